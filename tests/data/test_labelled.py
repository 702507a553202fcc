"""Labelled texts: every form they come in, their labels' numbers, faults by file and line, tokens and batches."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from llamita.data import meadow
from llamita.data.batches import IGNORE_INDEX, BatchIterator
from llamita.data.labelled import Fields, absolute, read_labelled, read_mapping, read_records, validation_of
from llamita.data.labelled_batches import LabelledRows, encode_texts, labelled_evaluation
from llamita.text.bpe import train_bpe_from_iterator

FORMS = {
    "a.txt": "1 ||| A good film .\n\n0|||Bad | film\n 1 |||\n",
    "a.csv": 'label,id,text\n1,7,A good film .\n0,8,Bad | film\n1,9,""\n',
    "a.tsv": "text\tlabel\nA good film .\t1\nBad | film\t0\n\t1\n",
    "a.jsonl": '{"text": "A good film .", "label": 1}\n{"text": "Bad | film", "label": "0"}\n\n'
    '{"text": "", "label": 1}\n',
}


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts_and_labels(tmp_path, name):
    source = write(tmp_path / name, FORMS[name])
    for names in ((), ("0", "1"), ("bad", "good")):
        found = read_labelled([source], "train", names)
        assert found.texts == ("A good film .", "Bad | film", "")
        assert found.labels.tolist() == [1, 0, 1]
        assert found.names == (names or ("0", "1"))
        assert found.counts().tolist() == [1, 2]


def test_a_name_comes_before_a_number_and_numbers_sort_as_numbers(tmp_path):
    source = write(tmp_path / "a.txt", "10 ||| a\n2 ||| b\n0 ||| c\n")
    found = read_labelled([source], "train")
    assert (found.names, found.labels.tolist()) == (("0", "2", "10"), [2, 1, 0])
    assert read_labelled([source], "train", ["2", "0", "10"]).labels.tolist() == [2, 0, 1]
    words = write(tmp_path / "b.txt", "sad ||| a\nhappy ||| b\n")
    assert read_labelled([words], "train").names == ("happy", "sad")
    assert read_labelled([words, words], "train", ["sad", "happy"]).labels.tolist() == [0, 1, 0, 1]


def test_a_number_is_no_index_where_numbers_are_names(tmp_path):
    one, other = (
        write(tmp_path / name, text) for name, text in (("a", "1 ||| a\n2 ||| b\n"), ("b", "0 ||| a\n1 ||| b\n"))
    )
    names = read_labelled([one], "train").names
    with pytest.raises(ValueError, match=r"b, line 1: the label '0' is none of 1, 2$"):
        read_labelled([other], "validation", names)


def test_what_a_source_is_called_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("meadow", "rows"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a.txt", "0 ||| a\n")
    given = ("meadow", "meadow:7", "a.txt", "hub:rows@test", "hub:rows:small@test", "hub:SetFit/sst5", "b.txt")
    here = str(tmp_path.resolve())
    assert [absolute(source) for source in given] == [
        *("meadow", "meadow:7", f"{here}/a.txt", f"hub:{here}/rows@test", f"hub:{here}/rows:small@test"),
        *("hub:SetFit/sst5", "b.txt"),
    ]


def test_quoted_lines_of_csv_and_other_names_of_fields(tmp_path):
    source = write(tmp_path / "a.csv", 'sentence,mood\n"one\ntwo, ""three""",x\nfour,y\n')
    found = read_labelled([source], "train", (), Fields("sentence", "mood"))
    assert found.texts == ('one\ntwo, "three"', "four")
    assert [record.where for record in read_records(source, "train", Fields("sentence", "mood"))] == [
        f"{source}, line 3",
        f"{source}, line 4",
    ]


def test_meadow_is_labelled_by_its_facts_and_split_by_story():
    train, held_out = (read_labelled(["meadow:60"], split) for split in ("train", "validation"))
    assert train.texts == tuple(meadow.corpus(0, 60, "train"))
    assert train.names == ("happy", "sad")
    for text, label in zip(train.texts, train.labels, strict=True):
        story = meadow.parse(text)
        assert story is not None
        assert train.names[label] == meadow.label(story)
    assert not set(train.texts) & set(held_out.texts)
    assert validation_of(["meadow:9"]) == ("meadow",)
    assert validation_of(["hub:glue:sst2"]) == ("hub:glue:sst2",)
    assert validation_of(["meadow", "file.txt"]) == validation_of(["hub:glue:sst2@train"]) == ()


def test_a_dataset_with_named_labels(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for split, rows in {"train": [("a", 1), ("b", 0)], "test": [("c", 0), ("d", 1)]}.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / "set").mkdir(exist_ok=True)
        write(tmp_path / "set" / f"{split}.jsonl", "\n".join(lines))
    source = f"hub:{tmp_path / 'set'}"
    assert read_labelled([source], "train").labels.tolist() == [1, 0]
    assert read_labelled([f"{source}@test"], "train").texts == ("c", "d")

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    named = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: named)
    assert [record.label for record in read_records("hub:x", "train")] == ["yes", "no", None]
    with pytest.raises(ValueError, match=r"x \(train\), row 2 has no label; .*predict"):
        read_labelled(["hub:x"], "train")


@pytest.mark.parametrize("name", ["a.CSV", "a.Tsv.GZ", "a.JSONL", "a.ndjson", "a.Json"])
def test_the_end_of_a_name_tells_the_form_in_letters_of_any_size(tmp_path, name):
    lines = [json.dumps({"text": text, "label": label}) for text, label in (("a", "x"), ("b", "y"))]
    if name[2].lower() in "ct":
        lines = [line.replace(",", "\t" if "T" in name else ",") for line in ("text,label", "a,x", "   ", "b,y")]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    found = [(record.text, record.label) for record in read_records(str(tmp_path / name), "train", labelled=False)]
    assert found == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", "1 ||| fine\nno\n", r"a\.txt, line 2 is not of the form 'label \|\|\| sentence': 'no'"),
    ("a.txt", "1 ||| fine\n ||| none\n", r"a\.txt, line 2 has no label"),
    ("a.txt", "1 ||| fine\n2 ||| high\n", r"line 2: the label '2' is none of bad, good, or a number from 0 to 1"),
    ("a.txt", "ok ||| fine\n", r"a\.txt, line 1: the label 'ok' is none of bad, good"),
    ("a.txt", "0 ||| one\n0 ||| two\n", r"all 2 texts have the label 'bad'; .*placeholders.*predict"),
    ("a.txt", "\n", r"there is no text"),
    ("a.csv", "text,label\none,1\ntwo\n", r"a\.csv, line 3 has not the 2 columns"),
    ("a.csv", 'text,label\n"one"x,1\n', r"a\.csv, line 2 is not CSV"),
    ("a.csv", "body,label\none,1\n", r"a\.csv, line 2 has no field 'text', only \['body', 'label'\]; pass"),
    ("a.csv", "text,label,label\none,1,2\n", r"a\.csv, line 1 names the column 'label' 2 times"),
    ("a.csv", "text;label\none;1\n", r"a\.csv, line 1 is one column, 'text;label'; columns seem to be parted by ';'"),
    ("a.CSV", "text\tlabel\none\t1\n", r"a\.CSV, line 1 is one column, .*seem to be parted by '\\t'"),
    ("a.jsonl", '{"text": "x", "label": "\\ud800"}\n', r"line 1: character 0 is half of a surrogate"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', r"a\.jsonl, line 2 is not JSON"),
    ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl, line 1 has no field 'label', .*--label-field"),
    ("a.jsonl", '{"text": "x", "label": 0.5}\n', r"line 1: field 'label' is float"),
    ("a.jsonl", '{"text": "x", "label": true}\n', r"line 1: field 'label' is bool"),
    ("a.jsonl", '{"text": 3, "label": 1}\n', r"line 1: field 'text' is int"),
    ("a.jsonl", '[1]\n', r"line 1 is list, not an object"),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', r"line 1: character 0 is half of a surrogate"),
])  # fmt: skip
def test_faults_name_the_file_and_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled([write(tmp_path / name, content)], "train", ["bad", "good"])
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file nothing\.txt; give a file, meadow, or hub:NAME"):
        read_labelled(["nothing.txt"], "train")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_labelled([str(tmp_path)], "train")
    with pytest.raises(ValueError, match="at least two labels, found"):
        read_labelled([write(tmp_path / "a.txt", "x ||| one\n")], "train")


def test_texts_to_label_need_no_label(tmp_path):
    source = write(tmp_path / "a.txt", "just a text\n0 ||| another\n")
    found = [(record.text, record.label) for record in read_records(source, "validation", labelled=False)]
    assert found == [("just a text", None), ("another", "0")]
    lines = write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    assert [record.label for record in read_records(lines, "validation", labelled=False)] == [None]


def test_mappings(tmp_path):
    path = tmp_path / "map.json"
    for content in (["bad", "good"], {"good": 1, "bad": 0}, {"1": "good", "0": "bad"}):
        write(path, json.dumps(content))
        assert read_mapping(path) == ("bad", "good")
    faults = {
        "[": "not valid JSON",
        "3": "must hold a list of labels",
        '["a"]': "at least two",
        '["a", "a"]': "at least two different",
        '{"a": 0, "b": 2}': "the numbers 0 to 1, each once",
        '{"0": "a", "x": "b"}': "the numbers 0 to 1",
        "[1, 2]": "must hold a list of labels",
    }
    for content, message in faults.items():
        with pytest.raises(ValueError, match=message):
            read_mapping(Path(write(path, content)))
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "none.json")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300)


def test_a_longer_text_keeps_bos_and_the_side_asked_for(tokenizer):
    texts = ["the fox", "the fox had a blue scarf and was happy", ""]
    whole = [tokenizer.encode(text, bos=True) for text in texts]
    assert len(whole[1]) > 9
    for keep, expected in (("end", [whole[1][0], *whole[1][-7:]]), ("start", whole[1][:8])):
        found = encode_texts(tokenizer, texts, 8, keep)
        assert [ids.tolist() for ids in found.tokens] == [whole[0], expected, [tokenizer.bos_id]]
        assert (found.truncated, found.longest, found.context) == (1, len(whole[1]), 8)


def test_an_empty_text_needs_a_bos(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "bos_id", None)
    with pytest.raises(ValueError, match=r"f\.txt: text 2 is empty, and this tokenizer has no BOS"):
        encode_texts(tokenizer, ["a", ""], 8, "end", "f.txt")


def test_the_label_stands_at_the_last_token_alone(tokenizer):
    texts = list(meadow.corpus(0, 12, "train"))
    labels = np.arange(12) % 3
    rows = LabelledRows(encode_texts(tokenizer, texts, 100, "end"), labels, 2)
    for batch in (*(BatchIterator(rows, 5, 0).batch(step) for step in range(3)), *labelled_evaluation(rows, 5)):
        assert batch.tokens_BT.shape[1] % 32 == 0 or batch.tokens_BT.shape[1] == 100
        assert batch.num_targets == len(batch.row_ids)
        for tokens, row_labels, i in zip(batch.tokens_BT, batch.labels_BT, batch.row_ids, strict=True):
            ids = rows.encoded.tokens[i]
            assert tokens[: len(ids)].tolist() == ids.tolist()
            assert set(tokens[len(ids) :].tolist()) <= {2}
            assert np.flatnonzero(row_labels != IGNORE_INDEX).tolist() == [len(ids) - 1]
            assert row_labels[len(ids) - 1] == labels[i]


def test_order_is_an_epochs_and_resumes(tokenizer):
    rows = LabelledRows(encode_texts(tokenizer, list("abcdefg"), 8, "end"), np.zeros(7, dtype=int), 0, whole=True)
    batches = BatchIterator(rows, 3, 5)
    ids = np.concatenate([batches.next().row_ids for _ in range(7)])
    assert [sorted(ids[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    again = BatchIterator(rows, 3, 5)
    again.load_state({**batches.state(), "step": 4})
    batch = again.next()
    assert batch.row_ids.tolist() == ids[12:15].tolist()
    assert batch.tokens_BT.shape == (3, 8)
    chosen = sorted(i for batch in labelled_evaluation(rows, 2, limit=4) for i in batch.row_ids)
    assert chosen == [0, 1, 3, 5]

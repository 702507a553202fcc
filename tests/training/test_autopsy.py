"""The report on an update: whose fault it is, what the page says, rows as text whatever they hold."""

import json
import math
import re

import numpy as np
import pytest

from llamita.backend.interface import Diagnosis, RowDiagnosis
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training.autopsy import (
    Finding,
    Healthy,
    RowText,
    autopsy,
    cause,
    in_words,
    layer_norms,
    read_autopsy,
    row_text,
    suspects,
)
from llamita.training.spikes import Threshold

STORIES = ["Mia saw a red ball.", "The ball was in the tree.", "``` and | and <b> and \x1b[31m and é"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_from_iterator(STORIES * 3, 270)


def rows(*losses, norms=None):
    norms = norms or [1.0] * len(losses)
    return tuple(
        RowDiagnosis(i, 0 if x is None else 9, x, n) for i, (x, n) in enumerate(zip(losses, norms, strict=True))
    )


def diagnosis(found, loss=2.0, norm=1.0):
    norms = {"model.layers.0.mlp.up_proj.weight": norm, "model.layers.0.mlp.down_proj.weight": 2 * norm}
    return Diagnosis(loss, norm, norms | {"model.norm.weight": 0.5}, {"embedding": 1.0, "norm": loss}, found)


@pytest.mark.parametrize(
    ("found", "before", "limit", "expected"),
    [
        (rows(2.0, 9.0, 2.5, 7.0), rows(2.0, 3.0), 4.0, [1, 3]),
        (rows(2.0, 9.0, 2.5, 7.0), rows(2.0, 8.0), 4.0, [1]),  # rows before were as bad as 8
        (rows(2.0, 9.0, 2.5, 7.0), rows(20.0, 30.0), 4.0, [1]),  # all were: the worst is named at least
        (rows(2.0, 9.0, math.nan, math.inf), rows(2.0), None, [2, 3]),
        (rows(2.0, 2.0, 2.0, norms=[1.0, math.nan, 1.0]), rows(2.0), None, [1]),
        (rows(2.0, None, 5.0, norms=[1.0, None, 1.0]), (), 4.0, [2]),
        (rows(2.0, 2.0), (), None, []),  # the gradient of all of them overflowed in the sum alone
    ],
)
def test_suspects(found, before, limit, expected):
    assert suspects(found, before, limit) == expected


def test_gradient_norms_by_layer_are_roots_of_sums_of_squares():
    norms = {
        "model.embed_tokens.weight": 2.0,
        "model.layers.0.self_attn.q_proj.weight": 3.0,
        "model.layers.0.mlp.up_proj.weight": 4.0,
        "model.layers.11.input_layernorm.weight": 1.0,
        "model.layers.2.mlp.up_proj.weight": None,
        "model.norm.weight": 7.0,
        "lm_head.weight": 6.0,
    }
    assert layer_norms(norms) == {
        "embed_tokens": 2.0, "layers.0": 5.0, "layers.11": 1.0, "layers.2": None, "norm": 7.0, "lm_head": 6.0,
    }  # fmt: skip


def batch_of(tokenizer, texts, width=20):
    ids = [tokenizer.encode(text)[: width + 1] for text in texts]
    block = np.zeros((len(ids), width + 1), dtype=np.int32)
    labels = np.full((len(ids), width), IGNORE_INDEX, dtype=np.int32)
    for i, row in enumerate(ids):
        block[i, : len(row)] = row
        labels[i, : len(row) - 1] = row[1:]
    return Batch(block[:, :-1], labels, None, np.array([7, 7, 9], dtype=np.int64)[: len(ids)])


def report_of(batch, words, at=None, before=True, kind="spike"):
    found = at or diagnosis(
        tuple(RowDiagnosis(int(i), 9, loss, 1.0) for i, loss in zip(batch.row_ids, (2, 9, 3), strict=False)), 5.0, 4.0
    )
    finding = Finding(
        124, kind, found.loss, found.grad_norm, 1e-3, Threshold(2.0, 0.1, 2.7) if kind == "spike" else None
    )
    earlier = Healthy(123, 2.1, diagnosis(rows(2.0, 2.4))) if before else None
    history = [{"step": i, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3} for i in range(1, 124)]
    return autopsy(
        finding, [batch.rows(slice(0, 2)), batch.rows(slice(2, 3))], found, earlier, history, words, "It went on."
    )


def test_a_report_is_json_and_a_page_that_no_text_can_leave(tokenizer, tmp_path):
    """Rows of one number, as in two epochs of a batch, are kept apart; a row's text cannot end its block."""
    batch = batch_of(tokenizer, STORIES, 60)
    report = report_of(batch, RowText(tokenizer, lambda row: f"document {row} | x"))
    (tmp_path / "report.json").write_text(json.dumps(report, allow_nan=False))
    assert read_autopsy(tmp_path / "report.json") == json.loads(json.dumps(report))
    assert [(row["row_id"], row["texts"]["text"], row["suspect"]) for row in report["rows"]] == [
        (7, STORIES[1], True), (9, STORIES[2], True), (7, STORIES[0], False),
    ]  # fmt: skip
    assert report["suspects"] == [7, 9]
    assert len(report["history"]) == 50
    page = in_words(report)
    assert page.startswith(
        "# Step 124: the loss 5 is a spike: above 2.7, those before it being about 2\n\nIt went on.\n"
    )
    assert "\x1b" not in page
    assert "````text\n``` and | and <b>" in page
    assert "| 7 | document 7 \\| x | 9 | 1 | 9 | **suspect** |" in page
    assert "| layers.0 | 8.944 | 2.236 | 4.00 |" in page  # sqrt(4^2 + 8^2) beside sqrt(1 + 4)
    assert re.search(r"\| norm \| 5 \| 2 \| 2.50 \|", page)
    (tmp_path / "report.json").write_text(json.dumps(report | {"format": 9}))
    with pytest.raises(ValueError, match="no report on an update"):
        read_autopsy(tmp_path / "report.json")


def test_whose_fault_it_is(tokenizer):
    report = report_of(batch_of(tokenizer, STORIES), RowText(tokenizer))
    assert cause(report).endswith(
        "has a loss of 2, as it had 2.1 at its own step: the batch is at fault, not the weights."
    )
    report["before"]["loss"] = 6.0
    assert cause(report).endswith("had 2.1 at its own step: the weights are at fault; look at that update.")
    assert cause(report_of(batch_of(tokenizer, STORIES), RowText(), before=False)).endswith("to compare with.")
    lost = diagnosis(rows(math.nan, 2.0, 2.0), math.nan, math.nan)
    report = report_of(batch_of(tokenizer, STORIES), RowText(), lost, kind="loss")
    assert report["loss"] is None
    assert report["at"]["grad_norms"]["model.layers.0.mlp.up_proj.weight"] is None
    assert cause(report).startswith("Suspect: row 0. ")
    assert "the batch is at fault" in cause(report)
    assert "| loss, nats per target | – | 2.1 |" in in_words(report)


def test_the_text_of_a_row_leaves_padding_out(tokenizer):
    ids = tokenizer.encode("Mia saw a ball.")
    padded = np.array([*ids, 0, 0, 0], dtype=np.int32)
    labels = np.array([*ids[1:], *[IGNORE_INDEX] * 4], dtype=np.int32)
    assert row_text(padded, labels, tokenizer) == "Mia saw a ball."
    whole = np.array(ids, dtype=np.int32)
    assert row_text(whole[:-1], whole[1:], tokenizer) == "Mia saw a ball."  # the last token is a label alone
    assert row_text(whole[:-1], whole[1:], None) == " ".join(map(str, ids))
    prompt = np.full_like(whole[1:], IGNORE_INDEX)
    prompt[0] = whole[1]
    assert row_text(whole[:-1], prompt, tokenizer) == tokenizer.decode(ids[:-1])  # read, though not scored


def test_labels_and_both_answers_of_a_pair_are_shown(tokenizer):
    ids = np.array([tokenizer.encode("Mia saw a ball.")], dtype=np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[0, -1] = 1
    text = Batch(ids, labels, None, np.array([3]))
    found = diagnosis((RowDiagnosis(3, 1, 9.0, 1.0),), 9.0)
    finding = Finding(5, "spike", 9.0, 1.0, 1e-3, Threshold(0.1, 0.02, 0.24))
    words = RowText(tokenizer, label_names=("bad", "good"))
    report = autopsy(finding, [text], found, None, [], words, "")
    assert (report["rows"][0]["label"], report["rows"][0]["texts"]) == ("good", {"text": "Mia saw a ball."})
    assert "### row 3 (label: good)" in in_words(report)
    other = np.array([tokenizer.encode("The tree was red.")], dtype=np.int32)
    extras = {"rejected_tokens_BT": other[:, :-1], "rejected_labels_BT": other[:, 1:], "reference_B2": np.zeros((1, 2))}
    pair = Batch(ids[:, :-1], ids[:, 1:], None, np.array([3]), extras, row_is_target=True)
    report = autopsy(finding, [pair], found, None, [], RowText(tokenizer), "")
    assert report["rows"][0]["texts"] == {"text": "Mia saw a ball.", "rejected": "The tree was red."}
    assert "### row 3, rejected" in in_words(report)

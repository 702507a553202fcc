"""Instruction tuning as a run: it learns to answer and to stop, resumes to the same bytes, and refuses in one line."""

import gzip
import json
from types import SimpleNamespace

import pytest

from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.cli.main import main
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.workflows.options import resolve
from llamita.workflows.sft import SftConfig, sft
from tests.training.helpers import Silence, cut_short, timeless, weights_of

WORDS = ["apple", "bread", "candle", "drum", "engine", "flower", "garden", "hat"]


def save_model(path, reserved_tokens=0, **changes):
    """An untrained model of a few thousand parameters, as a directory."""
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 50, "train"), 300, reserved_tokens)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig(
        **{"vocab_size": 300, **shape, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes}
    )
    with files.atomic_directory(path) as directory:
        model_directory.save_tensors(directory, to_host_arrays(build_model(config, seed=3)))
        model_directory.save_config(directory, config)
        tokenizer.save(directory)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model without reserved tokens, one with them, and a file of conversations."""
    directory = tmp_path_factory.mktemp("given")
    data = directory / "data.jsonl"
    lines = [json.dumps({"prompt": f"Say {i}", "response": word}) for i, word in enumerate(WORDS)]
    data.write_text("\n".join(lines) + "\n")
    return SimpleNamespace(
        bare=save_model(directory / "bare"), reserved=save_model(directory / "reserved", reserved_tokens=4), data=data
    )


def config(given, output, **changes):
    values = {
        "model": given.bare,
        "data": (str(given.data),),
        "validation_data": (str(given.data),),
        "output": output,
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "evaluate_every": 4,
        "keep_checkpoints": 9,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    }
    return resolve(SftConfig, **values | changes)


def tune(config):
    """(result, what was reported)."""
    reported = []
    return sft(config, BACKEND, report=reported.append, display=Silence()), reported


@pytest.mark.medium
@pytest.mark.parametrize(("model", "mode", "end"), [("bare", "pad", "</s>"), ("reserved", "pack", "<r2>")])
def test_a_model_learns_to_answer_and_to_stop(given, tmp_path, model, mode, end, monkeypatch, capsys):
    chosen = config(
        given, tmp_path / "run", model=getattr(given, model), mode=mode, steps=60, evaluate_every=60, answers=8,
        batch_size=8 if mode == "pad" else 1,
    )  # fmt: skip
    result, reported = tune(chosen)
    assert result.best.measures == {"exact": 1.0}
    assert reported[0].startswith("training: 8 of 8 conversations,")
    best = tmp_path / "run/best"
    tokenizer = Tokenizer.load(best)
    (end_id,), _ = Chat(tokenizer).end_of_turn
    assert end_id == tokenizer.codec.special_tokens[end]
    assert end_id in model_directory.load_config(best).eos_token_ids
    ends = json.loads((best / "generation_config.json").read_text())["eos_token_id"]
    assert ends == (2 if end == "</s>" else [end_id, 2])
    monkeypatch.setattr("sys.stdin", (tmp_path / "said").open("w+"))
    (tmp_path / "said").write_text("Say 3\n/reset\nSay 5\n")
    assert main(["chat", str(tmp_path / "run"), "--temperature", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in printed if line.strip() in WORDS] == ["drum", "flower"]


def test_what_a_run_leaves_and_its_record(given, tmp_path):
    result, reported = tune(config(given, tmp_path / "run", model=given.reserved, answers=4))
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    counts = manifest["identity"]["conversations"]["train"]
    assert {"read": 8, "kept": 8, "dropped": 0, "truncated": 0, "nothing_to_learn": 0}.items() <= counts.items()
    assert f"{counts['tokens']} tokens, {counts['targets']} scored, in 1 rows of 512 tokens" in reported[0]
    records = metrics.read_records(tmp_path / "run/metrics.jsonl")
    found = [record["measures"] for record in records if record["kind"] == "evaluation"]
    assert [list(each) for each in found] == [["exact"]] * 3
    assert all(each["exact"] * 4 == int(each["exact"] * 4) for each in found)
    samples = (tmp_path / "run/samples.txt").read_text()
    assert "Say 0\n-> " in samples
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(result.checkpoint)
    turns = [{"role": "user", "content": "Say 0"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tuple(ids) == Chat(Tokenizer.load(result.checkpoint)).encode(turns).tokens


@pytest.mark.medium
@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_a_run_cut_short_resumes_to_the_same_bytes(given, tmp_path, mode, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(config(given, whole, mode=mode, answers=8, dropout=0.1, sequence_length=80))
    cut_short(whole, cut, lost_steps=(8, 12))
    monkeypatch.chdir(tmp_path)
    result, _ = tune(resolve(SftConfig, output=cut, resume=True))
    assert result.step == 12
    assert weights_of(whole / "last") == weights_of(cut / "last")
    assert timeless(whole) == timeless(cut)
    assert (whole / "samples.txt").read_text() == (cut / "samples.txt").read_text()
    with pytest.raises(ValueError, match=r"rows\.\w+ was .* and is now"):
        tune(
            resolve(
                SftConfig, output=cut, resume=True, **({"mode": "pad"} if mode == "pack" else {"sequence_length": 90})
            )
        )


def test_epochs_are_steps_over_the_rows(given, tmp_path):
    result, _ = tune(config(given, tmp_path / "run", mode="pad", epochs=2.5, batch_size=4, evaluate_every=0))
    assert result.step == 5
    assert tune(resolve(SftConfig, output=tmp_path / "run", resume=True))[0].step == 5


def test_a_share_validates_where_no_file_does(given, tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Say {i}", "response": "yes"}) + "\n" for i in range(60)))
    changes = {"data": (str(many),), "validation_data": (), "validation_share": 0.2, "steps": 1}
    _, reported = tune(config(given, tmp_path / "run", **changes))
    read = [int(line.split()[3]) for line in reported]
    assert sum(read) == 60
    assert 4 < read[1] < 25
    result, reported = tune(config(given, tmp_path / "none", **changes | {"validation_share": 0.0}))
    assert result.evaluation is None
    assert reported[1].startswith("validation: 0 of 0")


def test_meadow_needs_no_file(given, tmp_path):
    changes = {"data": ("meadow",), "validation_data": (), "conversations": 30, "answers": 3, "steps": 2}
    result, reported = tune(config(given, tmp_path / "run", too_long="truncate", **changes))
    assert result.evaluation.measures["exact"] == 0.0
    assert reported[0].startswith("training: 30 of 30 conversations")
    assert reported[1].startswith("validation: 2 of 2 conversations")


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "home"}}}
BAD = [
    "{broken",
    {"text": "Hi"},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 7}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
]


def test_bad_records_end_a_run_before_it_begins_or_are_skipped_and_counted(given, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    lines = [given.data.read_text().strip(), *(each if isinstance(each, str) else json.dumps(each) for each in BAD)]
    mixed.write_text("\n".join(lines) + "\n")
    changes = {"data": (str(mixed),), "steps": 2, "evaluate_every": 0}
    with pytest.raises(ValueError, match=r"mixed\.jsonl, line 9 is not JSON"):
        tune(config(given, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    result, reported = tune(config(given, tmp_path / "run", skip_bad=True, **changes))
    assert result.step == 2
    assert reported[0].startswith("training: 8 of 13 conversations,")
    assert "5 skipped, which cannot be laid out" in reported[0]
    assert [line.partition("mixed.jsonl, ")[2][:7] for line in reported[2:]] == ["line 9 ", "line 10", "line 11", ""]
    assert reported[-1] == "skipped: 2 more"
    counts = json.loads((tmp_path / "run/run.json").read_text())["identity"]["conversations"]
    assert (counts["train"]["bad"], counts["train"]["kept"], counts["train"]["read"]) == (5, 8, 13)
    assert "bad" not in counts["validation"]
    again, _ = tune(resolve(SftConfig, output=tmp_path / "run", resume=True))  # it remembers what is skipped
    assert again.step == 2


@pytest.mark.medium
def test_calls_and_reasoning_are_learned_from_files_as_they_come(given, tmp_path):
    """A compressed array of conversations, under a template that lays calls out: the model learns to write the call."""
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}<r0>{{ m.role }}<r1>{% if m.thinking %}({{ m.thinking }}) {% endif %}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<r2>{% endfor %}"
        "{% if add_generation_prompt %}<r0>assistant<r1>{% endif %}"
    )
    talks = [
        {"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "So", "reasoning": "hm"}]},
    ]
    (tmp_path / "talks.jsonl").write_bytes(gzip.compress(json.dumps(talks, indent=1).encode()))
    data = (str(tmp_path / "talks.jsonl"),)
    chosen = config(
        given, tmp_path / "run", model=given.reserved, data=data, validation_data=data, template=str(template),
        answers=2, mode="pad", steps=80, evaluate_every=80, batch_size=2,
    )  # fmt: skip
    result, _ = tune(chosen)
    assert result.best.measures == {"exact": 1.0}
    samples = (tmp_path / "run/samples.txt").read_text()
    assert f"Go\n-> {json.dumps(CALL['function'])}" in samples
    assert "Say\n-> (hm) So" in samples


# --- what is refused -------------------------------------------------------------------------------------------------


def refusals(given, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "Hi", "response": "Yo"}\n{"prompt": "Hi"}\n')
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    template = tmp_path / "upper.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    classifier = save_model(tmp_path / "classifier", num_labels=2)
    data, model = ["--data", given.data], ["--model", given.bare]
    return [
        (model, "--data is missing"),
        (data, "--model is missing"),
        ([*data, "--model", tmp_path / "none"], "none"),
        ([*model, "--data", tmp_path / "none.jsonl"], "there is no file"),
        ([*model, "--data", tmp_path], "is a directory"),
        ([*model, "--data", broken], "broken.jsonl, line 2 has the fields ['prompt']"),
        ([*model, *data, "--validation-data", broken], "broken.jsonl, line 2"),
        ([*model, "--data", silent], "nothing to train on: 0 of 1 conversations"),
        ([*model, *data, "--sequence-length", "8"], "dropped for their length; a longer --sequence-length"),
        ([*model, *data, "--sequence-length", "513"], "sequence_length=513 is longer than the model's 512 positions"),
        ([*model, *data, "--template", "nonsense"], "there is no chat template 'nonsense'"),
        ([*model, *data, "--template", "plain"], "use plain-eos"),
        ([*model, *data, "--template", "r0"], "needs the token <r0>, which this tokenizer lacks"),
        ([*model, *data, "--template", template], "no control token after an answer"),
        (["--model", classifier, *data], "is a classifier"),
        ([*model, "--data", "meadow", given.data], "--data meadow stands alone"),
        ([*model, *data, "--dataset", "x/y"], "choose one"),
        ([*model, *data, "--validation-dataset-split", "test"], "give that too"),
        ([*model, *data, "--validation-share", "1"], "validation_share=1.0 must be"),
        ([*model, *data, "--conversations", "0"], "conversations=0 must be"),
        ([*model, *data, "--epochs", "-1"], "epochs=-1.0 must not be negative"),
        ([*model, *data, "--epochs", "inf"], "epochs=inf must be a number"),
        ([*model, "--data", "meadow", "--validation-data", given.data], "so that --validation-data would not be read"),
        ([*model, *data, "--validation-data", given.data, "--validation-dataset-split", "x"], "choose one"),
        ([*model, *data, "--resume"], "holds no training run"),
    ]


def test_mistakes_end_in_one_line_and_leave_nothing(given, tmp_path, capsys):
    for arguments, message in refusals(given, tmp_path):
        status = main(["sft", *map(str, arguments), "--output", str(tmp_path / "run"), "--device", "cpu"])
        error = capsys.readouterr().err
        assert status == 2, arguments
        assert message in error, arguments
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()

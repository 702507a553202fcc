"""Preference tuning as a run: it learns, keeps its reference, resumes to the same bytes, refuses in one line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from llamita.backend.torch.infer.runner import load_runner
from llamita.data import meadow_tasks
from llamita.storage import model_directory, safetensors
from llamita.text.chat_templates import BUILT_IN
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.workflows.dpo import DpoConfig, dpo
from llamita.workflows.options import resolve
from tests.training.helpers import QUICK, Altered, Silence, timeless, weights_of
from tests.workflows.test_sft import save_model

NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model without a chat template, and files of pairs: polite answers are preferred."""
    directory = tmp_path_factory.mktemp("given")
    lines = [json.dumps({"prompt": f"Hello {name}. ", "chosen": "Good day.", "rejected": "No."}) for name in NAMES]
    for name, part in (("train", lines[:8]), ("held-out", lines[8:])):
        (directory / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    return SimpleNamespace(
        model=save_model(directory / "model"), train=directory / "train.jsonl", held_out=directory / "held-out.jsonl"
    )


def config(given, output, **changes):
    values = {
        "model": given.model,
        "data": (str(given.train),),
        "validation_data": (str(given.held_out),),
        "output": output,
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    }
    return resolve(DpoConfig, **values | changes)


def tune(config, backend=QUICK):
    """(result, what was reported)."""
    reported = []
    return dpo(config, backend, report=reported.append, display=Silence()), reported


def test_bad_pairs_end_a_run_or_are_skipped_and_counted(given, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    bad = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": [call], "rejected": "b"}, 7]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(given.train.read_text() + "".join(json.dumps(record) + "\n" for record in bad))
    changes = {"data": (str(mixed),), "steps": 1, "evaluate_every": 0}
    with pytest.raises(ValueError, match=r"mixed\.jsonl, line 9 has the fields \['chosen', 'prompt'\]"):
        tune(config(given, tmp_path / "run", **changes))
    _, reported = tune(config(given, tmp_path / "run", skip_bad=True, **changes))
    assert reported[0].startswith("training: 8 of 11 pairs, 3 skipped, which cannot be laid out")
    told = [line for line in reported if line.startswith("skipped: ")]
    assert [line.partition("mixed.jsonl, ")[2].split(" ")[1].strip(",") for line in told] == ["9", "11", "10"]
    assert "line 10, chosen: message 0 of them has tool_calls" in told[2]
    counts = json.loads((tmp_path / "run/run.json").read_text())["identity"]["pairs"]["train"]
    assert (counts["read"], counts["kept"], counts["bad"]) == (11, 8, 3)


def stored(run):
    arrays = safetensors.read_safetensors(run / "reference.safetensors")
    return {name: array.to_numpy().copy() for name, array in arrays.items()}


@pytest.mark.parametrize("changes", [{}, {"form": "ipo", "beta": 0.2}, {"normalize_lengths": True, "beta": 2.0}])
def test_what_is_preferred_gains_on_what_is_not(given, tmp_path, changes):
    result, reported = tune(config(given, tmp_path / "run", steps=24, evaluate_every=24, **changes))
    assert reported[:2] == ["training: 8 of 8 pairs, in rows of 20 tokens", "validation: 4 of 4 pairs"]
    measures = result.best.measures
    assert measures["accuracy"] == 1.0
    assert measures["margin"] == pytest.approx(measures["chosen_reward"] - measures["rejected_reward"], rel=1e-4)
    records = metrics.read_records(tmp_path / "run/metrics.jsonl")
    assert records[0]["margin"] == pytest.approx(0, abs=1e-5)  # before the first update the model is the reference
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward"} <= records[0].keys()
    assert records[-1]["target"] == "pair"


def test_the_reference_is_what_the_starting_model_gives(given, tmp_path):
    tune(config(given, tmp_path / "run", steps=2, evaluate_every=0))
    runner, tokenizer = load_runner(given.model), Tokenizer.load(given.model)
    for split, file in (("train", given.train), ("validation", given.held_out)):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record, found in zip(records, stored(tmp_path / "run")[split], strict=True):
            for side, value in zip(("chosen", "rejected"), found, strict=True):
                before = tokenizer.encode(record["prompt"], bos=True)
                ids = [*before, *tokenizer.encode(record[side], eos=True)]
                logits_TV = runner.forward(np.array([ids[:-1]]))["logits"][0].astype(np.float64)
                log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
                expected = sum(log_probs_TV[t - 1, ids[t]] for t in range(len(before), len(ids)))
                assert value == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    tune(config(given, directory))
    return directory


def stopping(after):
    """A backend whose step fails after some updates, as a crash would; and a count of what it was asked to score."""
    scored = []

    def watch(step):
        update, log_probs = step.step, step.log_probs

        def fail(*arguments):
            if step.optimizer.t >= after:
                raise RuntimeError("the power went")
            return update(*arguments)

        step.step = fail
        step.log_probs = lambda batch: scored.append(batch) or log_probs(batch)

    return Altered(watch), scored


def test_a_run_cut_short_resumes_to_the_same_bytes_with_the_stored_reference(given, tmp_path, whole):
    with pytest.raises(RuntimeError, match="the power went"):
        tune(config(given, tmp_path / "cut"), stopping(5)[0])
    backend, scored = stopping(99)
    tune(resolve(DpoConfig, output=tmp_path / "cut", resume=True), backend)
    assert scored == []
    assert weights_of(tmp_path / "cut/last") == weights_of(whole / "last")
    assert timeless(tmp_path / "cut") == timeless(whole)


@pytest.mark.parametrize("damage", ["flipped", "record", "gone", "other"])
def test_a_damaged_reference_is_computed_anew(given, tmp_path, whole, damage):
    run = tmp_path / "cut"
    with pytest.raises(RuntimeError):
        tune(config(given, run), stopping(5)[0])
    before = (run / "reference.safetensors").read_bytes()
    if damage == "flipped":
        (run / "reference.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif damage == "record":
        (run / "reference.json").write_text("{")
    elif damage == "gone":
        (run / "reference.safetensors").unlink()
    else:
        record = json.loads((run / "reference.json").read_text())
        (run / "reference.json").write_text(json.dumps(record | {"of": "0" * 64}))
    _, reported = tune(resolve(DpoConfig, output=run, resume=True))
    word = "of another model or other data" if damage == "other" else "damaged"
    assert word in reported[2]
    assert "12 pairs scored with the model before tuning" in reported[3]
    assert (run / "reference.safetensors").read_bytes() == before
    assert weights_of(run / "last") == weights_of(whole / "last")


def test_micro_batches_change_nothing_but_rounding(given, tmp_path):
    for size in (4, 1):
        tune(config(given, tmp_path / str(size), micro_batch_size=size, checkpoint_every=8, evaluate_every=0))
    whole, parts = (model_directory.load_tensors(tmp_path / name / "last") for name in ("4", "1"))
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name].to_numpy(), array.to_numpy(), atol=1e-4, err_msg=name)
    losses = [[record["loss"] for record in timeless(tmp_path / name)] for name in ("4", "1")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_right_answers_of_meadow_with_a_named_template(given, tmp_path):
    result, reported = tune(
        config(
            given, tmp_path / "run", data=("meadow",), validation_data=(), pairs=24, template="plain-eos", steps=2,
            evaluate_every=2, answers=2, validation_share=0.25,
        )
    )  # fmt: skip
    assert reported[0].startswith("training: 24 of 24 pairs,")
    assert reported[1] == "validation: 6 of 6 pairs"
    assert set(result.best.measures) == {"accuracy", "margin", "chosen_reward", "rejected_reward", "exact"}
    assert Tokenizer.load(tmp_path / "run/best").chat_template is not None
    again, _ = tune(resolve(DpoConfig, output=tmp_path / "run", resume=True))  # by the template's source, not its name
    assert again.step == 2
    first = next(meadow_tasks.preferences(0, 1, "validation"))
    assert first["prompt"].splitlines()[-1] in (tmp_path / "run/samples.txt").read_text()


def test_a_template_of_a_file_is_kept_in_the_run(given, tmp_path):
    file = tmp_path / "template.jinja"
    source = "{# " + "long " * 100 + "#}" + BUILT_IN["plain-eos"]
    file.write_text(source)
    tune(config(given, tmp_path / "run", template=str(file), steps=1))
    file.unlink()
    assert tune(resolve(DpoConfig, output=tmp_path / "run", resume=True))[0].step == 1
    assert Tokenizer.load(tmp_path / "run/last").chat_template == source


def test_other_data_or_another_loss_is_refused_when_resuming(given, tmp_path):
    tune(config(given, tmp_path / "run", steps=2, schedule="constant"))
    for changes, message in (
        ({"data": (str(given.held_out),)}, r"data\.train was"),
        ({"beta": 0.2}, r"objective\.beta was 0\.1 and is now 0\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(resolve(DpoConfig, output=tmp_path / "run", resume=True, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "--data is missing: give files of pairs"),
        ({"data": ("meadow", "x.jsonl")}, "--data meadow stands alone"),
        ({"data": ("nowhere.jsonl",)}, "there is no file nowhere.jsonl"),
        ({"dataset": "x"}, "--data and --dataset are both given"),
        ({"model": None}, "--model is missing"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"form": "ipo", "label_smoothing": 0.1}, "for form=dpo alone"),
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"answers": 3}, "--answers needs a chat template"),
        ({"template": "nonsense"}, "there is no chat template 'nonsense'"),
        ({"sequence_length": 4}, "there is nothing to train on: 0 of 8 pairs, 8 dropped for their length"),
        ({"sequence_length": 513}, "longer than the model's 512 positions"),
        ({"validation_data": (), "validation_dataset_split": "test"}, "split of the dataset that --dataset names"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(given, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        tune(config(given, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()

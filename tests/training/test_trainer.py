"""The loop: resuming bit for bit, the record, best and last, interruptions, faults."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from llamita.backend.interface import LossSums
from llamita.data.batches import IGNORE_INDEX
from llamita.storage import model_directory
from llamita.training.evaluation import evaluate
from llamita.training.examples import Examples
from llamita.training.run_directory import open_run
from llamita.training.trainer import Trainer
from tests.training.helpers import (
    MODEL,
    Silence,
    config,
    examples,
    make_step,
    state_of,
    timeless,
    train,
    weights_of,
)


class StopError(Exception):
    """Ends a run from inside, as abruptly as an exception can."""


def stop_at(step, at):
    """A step that raises before update number `at`."""
    original = step.step

    def stepping(*arguments):
        if step.optimizer.t == at:
            raise StopError
        return original(*arguments)

    step.step = stepping
    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision):
    whole = config(tmp_path / "whole", precision=precision)
    result, _, _ = train(whole)
    broken = config(tmp_path / "broken", precision=precision)
    resumed = config(tmp_path / "broken", precision=precision, resume=True)
    with pytest.raises(StopError):
        train(broken, step=stop_at(make_step(broken), 3))  # before the first checkpoint
    for at in (11, 13, 29):
        with pytest.raises(StopError):
            train(resumed, step=stop_at(make_step(resumed), at))
    again, _, display = train(resumed)
    assert "resumed from step 28 of 30" in display.messages
    assert result.step == again.step == 30
    assert result.loss == again.loss
    assert weights_of(tmp_path / "whole/last") == weights_of(tmp_path / "broken/last")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")
    assert os.readlink(tmp_path / "whole/best") == os.readlink(tmp_path / "broken/best")


def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", Trainer._plot.__wrapped__)  # this run draws its own losses
    result, _, display = train(config(tmp_path / "run"), on_evaluation=lambda e: f"a sample of step {e.step}")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in updates] == list(range(1, 31))
    assert all(
        {"loss", "learning_rate", "grad_norm", "targets", "tokens_per_second"} <= line.keys() for line in updates
    )
    assert updates[2]["learning_rate"] == pytest.approx(1e-2)  # the warm-up takes a tenth of the steps
    assert updates[-1]["learning_rate"] == pytest.approx(1e-3)
    assert updates[0]["loss"] == pytest.approx(math.log(40), rel=0.15)
    assert updates[-1]["loss"] < 0.85 * updates[0]["loss"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    last = evaluations[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["bits_per_byte"] == pytest.approx(last["nats_per_character"] / 2 / math.log(2))
    assert result.evaluation.loss == last["loss"]
    assert "a sample of step 20" in display.messages
    assert (tmp_path / "run/samples.txt").read_text().count("=== step") == 3
    png = (tmp_path / "run/loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") >= 800
    assert 10_000 < len(png) < 300_000


def test_a_checkpoint_is_a_model_directory_and_a_state(tmp_path):
    result, step, _ = train(config(tmp_path / "run"))
    directory = model_directory.resolve_model_directory(tmp_path / "run")
    assert directory == tmp_path / "run/best"
    assert model_directory.load_config(directory) == MODEL
    arrays = model_directory.load_tensors(result.checkpoint)
    assert {name: array.to_numpy().tobytes() for name, array in arrays.items()} == {
        name: array.to_numpy().tobytes() for name, array in step.weights().items()
    }
    assert all(array.dtype == "F32" for array in arrays.values())
    optimizer = model_directory.load_tensors(result.checkpoint, "optimizer")
    assert optimizer.keys() == {"t"} | {f"{kind}.{name}" for kind in "mv" for name in arrays}
    state = state_of(result.checkpoint)
    assert state["step"] == 30
    assert state["data"]["step"] == 30
    assert state["files"].keys() == {
        "model.safetensors",
        "optimizer.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert state["conditions"]["torch"] == torch.__version__


def test_keeps_the_newest_and_the_best(tmp_path):
    step = make_step(config(tmp_path / "run"))
    losses = iter([3.0, 2.0, 4.0, 5.0, 6.0, 7.0])
    current = {}
    original_step = step.step

    def stepping(*arguments):
        current.clear()
        return original_step(*arguments)

    def fake(batch):
        if not current:
            current["loss"] = next(losses)
        return LossSums(current["loss"], 1, {"accuracy": 1 / current["loss"]})

    step.step, step.evaluate = stepping, fake
    settings = config(tmp_path / "run", evaluate_every=5, checkpoint_every=5, evaluation_rows=3)
    result, _, _ = train(settings, step=step)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000025", "step-00000030"]
    assert os.readlink(tmp_path / "run/best") == "checkpoints/step-00000010"
    assert os.readlink(tmp_path / "run/last") == "checkpoints/step-00000030"
    assert (result.best.step, result.best.loss) == (10, 2.0)


def test_micro_batches_do_not_change_the_losses(tmp_path):
    _, _, whole = train(config(tmp_path / "a", micro_batch_size=0, max_grad_norm=0.0), step=no_dropout())
    _, _, parts = train(config(tmp_path / "b", micro_batch_size=1, max_grad_norm=0.0), step=no_dropout())
    for a, b in zip(whole.records, parts.records, strict=True):
        assert a["targets"] == b["targets"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert parts.records[0]["loss"] == pytest.approx(whole.records[0]["loss"], rel=1e-6)


def no_dropout():
    settings = config("unused")
    return make_step(settings, type(MODEL)(**{**MODEL.__dict__, "dropout": 0.0}))


def test_an_interruption_finishes_the_update_and_saves(tmp_path):
    settings = config(tmp_path / "run", evaluate_every=10)
    whole, _, _ = train(config(tmp_path / "whole"))

    class Interrupting(Silence):
        def update(self, record):
            super().update(record)
            if record["step"] == 7:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result, _, _ = train(settings, display=Interrupting())
    assert result.interrupted
    assert result.step == 7
    assert signal.getsignal(signal.SIGINT) is before
    assert state_of(tmp_path / "run/last")["step"] == 7
    again, _, _ = train(config(tmp_path / "run", resume=True))
    assert not again.interrupted
    assert weights_of(again.checkpoint) == weights_of(whole.checkpoint)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_a_killed_run_of_muon_resumes_to_the_same_bytes(tmp_path):
    whole, _, _ = train(config(tmp_path / "whole", optimizer="muon"))
    settings = config(tmp_path / "run", optimizer="muon")
    with pytest.raises(StopError):
        train(settings, step=stop_at(make_step(settings), 17))
    with pytest.raises(ValueError, match=r"training\.optimizer was 'muon' and is now 'adamw'; start"):
        train(config(tmp_path / "run", resume=True))
    again, _, _ = train(config(tmp_path / "run", optimizer="muon", resume=True))
    assert weights_of(again.checkpoint) == weights_of(whole.checkpoint)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    optimizer = model_directory.load_tensors(again.checkpoint, "optimizer")
    assert {name.partition(".")[0] for name in optimizer} == {"t", "m", "v", "momentum"}


def test_an_interrupted_evaluation_is_made_up_for(tmp_path):
    whole, _, _ = train(config(tmp_path / "whole"))
    settings = config(tmp_path / "run")
    step = make_step(settings)
    original = step.evaluate

    def evaluating(batch):
        if step.optimizer.t == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return original(batch)

    step.evaluate = evaluating
    result, _, _ = train(settings, step=step)
    assert result.interrupted
    assert [r["step"] for r in timeless(tmp_path / "run") if r["kind"] == "evaluation"] == [10]
    train(config(tmp_path / "run", resume=True))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert os.readlink(tmp_path / "run/best") == os.readlink(tmp_path / "whole/best")
    assert weights_of(tmp_path / "run/last") == weights_of(whole.checkpoint)


def test_a_second_interruption_ends_at_once(tmp_path):
    class Impatient(Silence):
        def update(self, record):
            if record["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run"), display=Impatient())
    assert state_of(tmp_path / "run/last")["step"] == 4


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    settings = config(tmp_path / "run")
    step = make_step(settings)
    original = step.step

    def stepping(*arguments):
        if step.optimizer.t == 9:
            with torch.no_grad():
                step.model.model.norm.weight[3] = float("inf")
        return original(*arguments)

    step.step = stepping
    batches = examples(settings).batches
    rows = [int(row) for row in batches.row_ids(9)]
    with pytest.raises(ValueError, match=r"step 10: the loss is nan on rows \[") as error:
        train(settings, step=step)
    named = json.loads(str(error.value).partition("rows ")[2].partition("]")[0] + "]")
    assert set(named) <= set(rows)
    assert "\n" not in str(error.value)
    assert state_of(tmp_path / "run/last")["step"] == 8
    assert timeless(tmp_path / "run")[-1]["step"] == 9


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    settings = config(tmp_path / "run")
    step = make_step(settings)
    step.model.model.norm.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(ValueError, match="step 1: the gradient norm is nan"):
        train(settings, step=step)
    assert np.isfinite(step.weights()["model.norm.weight"].to_numpy()).all()


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path):
    whole, _, _ = train(config(tmp_path / "whole", evaluate_every=8))
    settings = config(tmp_path / "run", evaluate_every=8)
    with pytest.raises(StopError):
        train(settings, step=stop_at(make_step(settings), 17))
    newest = tmp_path / "run/checkpoints/step-00000016"
    assert os.readlink(tmp_path / "run/last") == "checkpoints/step-00000016"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 64
    (newest / "model.safetensors").write_bytes(content)
    again, _, display = train(config(tmp_path / "run", evaluate_every=8, resume=True))
    assert "step-00000016 is damaged" in display.messages[0]
    assert display.messages[1] == "resumed from step 12 of 30"
    assert weights_of(again.checkpoint) == weights_of(whole.checkpoint)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_changed_conditions_are_announced(tmp_path):
    settings = config(tmp_path / "run", steps=4, evaluate_every=0, checkpoint_every=2)
    with pytest.raises(StopError):
        train(settings, step=stop_at(make_step(settings), 3))
    file = tmp_path / "run/run.json"
    manifest = json.loads(file.read_text())
    manifest["conditions"] |= {"torch": "2.9.0", "threads": 64}
    file.write_text(json.dumps(manifest))
    settings = config(tmp_path / "run", steps=4, evaluate_every=0, checkpoint_every=2, resume=True)
    _, _, display = train(settings)
    text = "\n".join(display.messages)
    assert "torch was '2.9.0'" in text
    assert "threads was 64" in text
    assert "last bits" in text


def test_a_constant_schedule_can_be_extended_and_a_cosine_cannot(tmp_path):
    train(config(tmp_path / "a", schedule="constant", warmup_steps=3, steps=12))
    extended = config(tmp_path / "a", schedule="constant", warmup_steps=3, steps=20, resume=True)
    result, _, _ = train(extended)
    assert result.step == 20
    straight, _, _ = train(config(tmp_path / "b", schedule="constant", warmup_steps=3, steps=20))
    assert weights_of(result.checkpoint) == weights_of(straight.checkpoint)
    train(config(tmp_path / "c", steps=12))
    with pytest.raises(ValueError, match=r"training\.steps was 12 and is now 20.*only schedule=constant"):
        train(config(tmp_path / "c", steps=20, warmup_steps=1, resume=True))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(config(tmp_path / "run"))
    before = weights_of(tmp_path / "run/last"), timeless(tmp_path / "run")
    result, _, _ = train(config(tmp_path / "run", resume=True))
    assert result.step == 30
    assert (weights_of(tmp_path / "run/last"), timeless(tmp_path / "run")) == before


def test_evaluation_is_the_mean_over_all_targets():
    settings = config("unused")
    step, data = make_step(settings), examples(settings)
    totals = evaluate(step, data)
    nats = targets = characters = 0
    for batch in data.validation():
        tokens, labels = (torch.from_numpy(np.array(x)).long() for x in (batch.tokens_BT, batch.labels_BT))
        segments = None if batch.segments_BT is None else torch.from_numpy(np.array(batch.segments_BT))
        step.model.eval()
        with torch.no_grad():
            log_p = torch.log_softmax(step.model(tokens, segments_BT=segments).logits_BTV, -1)
        scored = labels != IGNORE_INDEX
        nats -= float(log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][scored].double().sum())
        targets += int(scored.sum())
        characters += int(labels[scored].sum())  # TokenText gives token i the length i
    assert totals.targets == targets
    assert totals.loss == pytest.approx(nats / targets, rel=1e-5)
    assert totals.nats_per_character == pytest.approx(nats / characters, rel=1e-5)


def test_without_validation_rows_the_last_checkpoint_is_all_there_is(tmp_path):
    settings = config(tmp_path / "run", steps=5)
    with open_run(settings.run.output, {}, {}, False) as run:
        data = Examples(examples(settings).batches)
        result = Trainer(settings.training, MODEL, make_step(settings), data, run, display=Silence()).run()
    assert result.evaluation is None
    assert not (tmp_path / "run/best").exists()
    assert state_of(tmp_path / "run/last")["step"] == 5

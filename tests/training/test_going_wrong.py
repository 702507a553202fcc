"""A run in which something goes wrong: planted rows that the loss jumps on or that are not finite, and what becomes of
them under each policy; checkpoints before evaluations that fail; those that are kept for good."""

import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from llamita.data.batches import BatchIterator
from llamita.training.run_directory import RunDirectory, open_run
from llamita.training.trainer import Trainer, split
from tests.training.helpers import MODEL, Silence, config, examples, make_step, state_of, timeless, weights_of

STEPS = 60
MODEL = dataclasses.replace(MODEL, dropout=0.0, tie_word_embeddings=False)
UNUSED = 39  # a token of no document, for which a batch is planted


class StopError(Exception):
    """Ends a run from inside, as abruptly as an exception can."""


class Planted(BatchIterator):
    """Batches, of which those of some steps, counted from 1, are changed by what is planted there."""

    def __init__(self, rows, batch_size, seed, plants):
        super().__init__(rows, batch_size, seed)
        self.plants = plants

    def batch(self, step):
        batch = super().batch(step)
        tokens, labels = (np.where(x == UNUSED, 0, x).astype(np.int32) for x in (batch.tokens_BT, batch.labels_BT))
        batch = dataclasses.replace(batch, tokens_BT=tokens, labels_BT=labels)
        if step + 1 in self.plants:
            self.plants[step + 1](batch)
        return batch


def garbage(batch):
    """In the last three rows, labels that the model has learned never to expect."""
    batch.labels_BT[-3:] = UNUSED


def unused(batch):
    """A token whose embedding is infinite."""
    batch.tokens_BT[-1, 4] = UNUSED


def settings(path, **changes):
    return config(
        path, **{"steps": STEPS, "learning_rate": 3e-2, "evaluate_every": 20, "checkpoint_every": 15} | changes
    )


def data_of(options, plants):
    given = examples(options, "pack")
    batches = Planted(given.batches.rows, options.training.batch_size, options.training.seed, plants)

    def validation():
        for batch in given.validation():
            tokens, labels = (np.where(x == UNUSED, 0, x) for x in (batch.tokens_BT, batch.labels_BT))
            yield dataclasses.replace(batch, tokens_BT=tokens, labels_BT=labels)

    return dataclasses.replace(given, batches=batches, validation=validation, origin=lambda row: f"document {row}")


def step_of(options, infinite=False):
    step = make_step(options, MODEL)
    if infinite:
        with torch.no_grad():
            step.model.model.embed_tokens.weight[UNUSED] = math.inf
    return step


def train(options, plants=None, step=None, identity=None, **more):
    """Returns the result of a run, and its display."""
    display = Silence()
    identity = identity or {"training": options.training.identity()}
    with open_run(options.run.output, identity, {}, options.run.resume) as run:
        data = data_of(options, plants or {})
        trainer = Trainer(options.training, MODEL, step or step_of(options), data, run, display=display, **more)
        return trainer.run(), display


def by_hand(options, plants, without, infinite=False):
    """The weights after a plain loop over the batches that makes no update from some of them."""
    step, data = step_of(options, infinite), data_of(options, plants)
    rates = options.training.resolved().learning_rates()
    for number in range(1, options.training.steps + 1):
        batch = data.batches.next()
        if number not in without:
            assert step.step(split(batch, 4), rates.at(number - 1)).is_update
    return {name: bytes(array.data) for name, array in step.weights().items()}


def weights(path):
    from llamita.storage import model_directory

    return {name: bytes(array.data) for name, array in model_directory.load_tensors(path / "last").items()}


def report_of(path, step):
    return json.loads((path / f"autopsies/step-{step:08d}/report.json").read_text())


def kinds(path, *wanted):
    return [record for record in timeless(path) if record["kind"] in wanted]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "run"
    result, _ = train(settings(path))
    assert not (path / "autopsies").exists()
    return path, result


def test_a_spike_is_reported_and_changes_nothing(tmp_path):
    for name, changes in (("on", {}), ("off", {"spike_deviations": 0.0})):
        _, display = train(settings(tmp_path / name, **changes), {47: garbage})
        if name == "on":
            told = [text for text in display.messages if "spike" in text]
    assert weights_of(tmp_path / "on/last") == weights_of(tmp_path / "off/last")
    assert not (tmp_path / "off/autopsies").exists()
    (spike,) = kinds(tmp_path / "on", "spike")
    assert [record for record in timeless(tmp_path / "on") if record != spike] == timeless(tmp_path / "off")
    rows = data_of(settings(tmp_path), {}).batches.row_ids(46)[-3:].tolist()
    report = report_of(tmp_path / "on", 47)
    assert sorted(report["suspects"]) == sorted(rows)
    assert spike["rows"] == data_of(settings(tmp_path), {}).batches.row_ids(46).tolist()
    assert (spike["step"], spike["loss"]) == (report["step"], report["loss"])
    assert len(told) == 1
    assert told[0].startswith(f"step 47: the loss {spike['loss']:.4g} is a spike: above {spike['limit']:.4g}")
    assert f"on rows {report['suspects']}; see {tmp_path / 'on/autopsies/step-00000047/report.md'}" in told[0]


def test_what_a_report_says(tmp_path):
    train(settings(tmp_path / "run"), {47: garbage})
    options = settings(tmp_path)
    report, data = report_of(tmp_path / "run", 47), data_of(options, {47: garbage})
    updates = {record["step"]: record for record in kinds(tmp_path / "run", "train")}
    assert (report["loss"], report["grad_norm"]) == (updates[47]["loss"], updates[47]["grad_norm"])
    assert report["learning_rate"] == updates[47]["learning_rate"]
    assert [record["step"] for record in report["history"]] == list(range(1, 47))
    assert report["history"][-1]["loss"] == updates[46]["loss"]
    assert report["at"]["loss"] == pytest.approx(report["loss"], rel=1e-5)
    assert report["at"]["grad_norm"] == pytest.approx(report["grad_norm"], rel=1e-4)
    assert (report["before"]["step"], report["before"]["loss_then"]) == (46, updates[46]["loss"])
    assert report["before"]["loss"] < report["threshold"]["limit"] < report["loss"]
    batch = data.batches.batch(46)
    assert sorted(row["row_id"] for row in report["rows"]) == sorted(batch.row_ids.tolist())
    assert [row["suspect"] for row in report["rows"]] == [True] * 3 + [False] * 3
    worst = report["rows"][0]
    place = batch.row_ids.tolist().index(worst["row_id"])
    assert worst["origin"] == f"document {worst['row_id']}"
    ids = [*batch.tokens_BT[place].tolist(), int(batch.labels_BT[place, -1])]
    assert worst["texts"] == {"text": " ".join(map(str, ids))}
    losses = [row["loss"] for row in report["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] > report["threshold"]["limit"] > losses[3]
    page = (tmp_path / "run/autopsies/step-00000047/report.md").read_text()
    assert f"Suspect: rows {', '.join(map(str, report['suspects']))}. " in page
    assert "the batch is at fault, not the weights" in page
    assert "layers.1" in page
    assert worst["texts"]["text"] in page


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_batch_is_passed_over_and_the_run_recovers(tmp_path, clean, policy):
    options = settings(tmp_path / "run", on_spike=policy)
    result, _ = train(options, {47: garbage})
    assert weights(tmp_path / "run") == by_hand(options, {47: garbage}, {47})
    assert result.evaluation.loss == pytest.approx(clean[1].evaluation.loss, rel=0.02)
    (skipped,) = kinds(tmp_path / "run", "skipped")
    assert skipped["step"] == 47
    assert [record["step"] for record in kinds(tmp_path / "run", "train")] == [n for n in range(1, 61) if n != 47]
    again = kinds(tmp_path / "run", "rewind")
    if policy == "rewind":
        (back,) = again
        assert (back["step"], back["from"], back["skipped"]) == (45, 47, [47])
        assert back["loss"] > back["limit"]
    else:
        assert again == []
    assert state_of(result.checkpoint)["skipped"] == [47]
    assert state_of(result.checkpoint)["passed_over"] == 1


def stop_before(step, at):
    """A step that raises before it makes update number `at` for the second time it is asked to."""
    original, asked = step.step, []

    def stepping(micro_batches, rate, *more):
        asked.append(rate)
        if asked.count(rate) == 2 and rate == at:
            raise StopError
        return original(micro_batches, rate, *more)

    step.step = stepping
    return step


def test_a_run_that_is_killed_after_it_went_back_passes_over_the_batch_too(tmp_path):
    whole = settings(tmp_path / "whole", on_spike="rewind", schedule="cosine")
    train(whole, {47: garbage})
    options = settings(tmp_path / "killed", on_spike="rewind")
    rates = options.training.resolved().learning_rates()
    with pytest.raises(StopError):
        train(options, {47: garbage}, step=stop_before(step_of(options), rates.at(45)))  # step 46, once more
    assert state_of(tmp_path / "killed/last")["skipped"] == [47]
    result, display = train(settings(tmp_path / "killed", on_spike="rewind", resume=True), {47: garbage})
    assert display.messages[0] == "resumed from step 45 of 60"
    assert result.step == 60
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert weights_of(tmp_path / "killed/last") == weights_of(tmp_path / "whole/last")


def test_stop_saves_names_the_rows_and_can_go_on(tmp_path):
    options = settings(tmp_path / "run", on_spike="stop")
    with pytest.raises(ValueError, match=r"step 47: the loss .* is a spike") as error:
        train(options, {47: garbage})
    assert f" on rows {report_of(tmp_path / 'run', 47)['suspects']}" in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run/autopsies/step-00000047/report.md") in str(error.value)
    assert state_of(tmp_path / "run/last")["step"] == 46
    session = json.loads((tmp_path / "run/run.json").read_text())["sessions"][-1]
    assert session["state"] == "failed"
    assert "is a spike" in session["reason"]
    train(settings(tmp_path / "run", on_spike="skip", resume=True), {47: garbage})
    assert weights(tmp_path / "run") == by_hand(options, {47: garbage}, {47})


def test_a_spike_right_behind_a_batch_that_was_passed_over_goes_further_back(tmp_path):
    """The batch before both is then passed over too, from a checkpoint before it; those after it are gone."""
    plants = {46: garbage, 47: garbage}
    options = settings(tmp_path / "run", on_spike="rewind", keep_checkpoints=9)
    result, _ = train(options, plants)
    assert weights(tmp_path / "run") == by_hand(options, plants, {45, 46, 47})
    back = kinds(tmp_path / "run", "rewind")
    assert [(record["step"], record["from"]) for record in back] == [(40, 47)]  # the best one
    assert back[0]["skipped"] == [45, 46, 47]
    assert [record["step"] for record in kinds(tmp_path / "run", "skipped")] == [45, 46, 47]
    assert state_of(result.checkpoint)["passed_over"] == 2


def test_after_so_many_batches_the_run_stops(tmp_path):
    plants = {45: garbage, 48: garbage, 51: garbage}
    options = settings(tmp_path / "run", on_spike="skip", spike_limit=2)
    with pytest.raises(ValueError, match=r"step 51: the loss .* is a spike.* --spike-limit above 2$"):
        train(options, plants)
    assert state_of(tmp_path / "run/last")["step"] == 50
    assert state_of(tmp_path / "run/last")["skipped"] == [45, 48]


def test_rows_that_are_not_finite_stop_the_run_with_an_autopsy_or_are_passed_over(tmp_path, clean):
    plants = {12: unused, 33: unused}
    options = settings(tmp_path / "run", schedule="constant")
    row = int(data_of(options, {}).batches.row_ids(11)[-1])
    with pytest.raises(ValueError, match=rf"step 12: the loss is nan on rows \[{row}\]; the update was not made"):
        train(options, plants, step_of(options, infinite=True))
    report = report_of(tmp_path / "run", 12)
    assert (report["kind"], report["loss"], report["suspects"]) == ("loss", None, [row])
    assert [row["loss"] is None for row in report["rows"]] == [True] + [False] * 5
    assert report["at"]["activations"]["embedding"] is None
    assert all(norm is None for norm in report["at"]["grad_norms"].values())
    assert all(norm is not None for norm in report["before"]["grad_norms"].values())
    page = (tmp_path / "run/autopsies/step-00000012/report.md").read_text()
    assert page.startswith("# Step 12: the loss is nan\n")
    options = settings(tmp_path / "on", on_spike="skip")
    result, _ = train(options, plants, step_of(options, infinite=True))
    assert weights(tmp_path / "on") == by_hand(options, plants, {12, 33}, infinite=True)
    assert result.evaluation.loss == pytest.approx(clean[1].evaluation.loss, rel=0.05)


# --- checkpoints and evaluations --------------------------------------------------------------------------------------


def test_an_evaluation_that_fails_costs_no_update(tmp_path, clean):
    options = settings(tmp_path / "run")
    step = step_of(options)
    original = step.evaluate

    def evaluate(batch):
        if step.optimizer.t == STEPS:
            raise MemoryError("out of memory")
        return original(batch)

    step.evaluate = evaluate
    with pytest.raises(MemoryError):
        train(options, step=step)
    assert state_of(tmp_path / "run/last")["step"] == STEPS
    assert weights_of(tmp_path / "run/last") == weights_of(clean[0] / "last")
    result, _ = train(settings(tmp_path / "run", resume=True))
    assert result.evaluation == clean[1].evaluation
    assert timeless(tmp_path / "run") == timeless(clean[0])
    assert os.readlink(tmp_path / "run/best") == os.readlink(clean[0] / "best")
    assert state_of(tmp_path / "run/last")["evaluated_step"] == STEPS
    evaluated = []
    step = step_of(options)
    step.evaluate = evaluated.append
    train(settings(tmp_path / "run", resume=True), step=step)
    assert evaluated == []  # it is not made again


@pytest.mark.parametrize("at", [20, 30, 60])
def test_an_evaluation_that_was_cut_off_before_it_was_noted_is_recorded_once(tmp_path, clean, monkeypatch, at):
    options = settings(tmp_path / "run", evaluate_every=10)
    whole = settings(tmp_path / "whole", evaluate_every=10)
    train(whole, on_evaluation=lambda e: f"sample {e.step}")

    def fail(run, step, changes):
        if step == at or (at == 20 and step == 30):  # at step 20 there is no checkpoint, but for a best one
            raise StopError
        return noted(run, step, changes)

    noted = RunDirectory.update_state
    monkeypatch.setattr(RunDirectory, "update_state", fail)
    with pytest.raises(StopError):
        train(options, on_evaluation=lambda e: f"sample {e.step}")
    monkeypatch.undo()
    train(settings(tmp_path / "run", evaluate_every=10, resume=True), on_evaluation=lambda e: f"sample {e.step}")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert (tmp_path / "run/samples.txt").read_text() == (tmp_path / "whole/samples.txt").read_text()
    assert weights_of(tmp_path / "run/last") == weights_of(tmp_path / "whole/last")


def test_some_checkpoints_are_kept_for_good(tmp_path):
    options = settings(tmp_path / "run", checkpoint_every=5, keep_checkpoints=1, keep_every=12, evaluate_every=0)
    train(options)
    assert RunDirectory(tmp_path / "run", {}).steps() == [12, 24, 36, 48, 60]
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000060")
    with open_run(tmp_path / "run", {"training": options.training.identity()}, {}, True) as run:
        assert run.newest(pytest.fail).step == 48


def test_a_run_that_was_begun_without_these_options_goes_on(tmp_path, clean):
    """As an older version left it: neither in what it is compared by, nor in its checkpoints."""
    options = settings(tmp_path / "run")
    identity = {"training": options.training.identity()}
    assert not identity["training"].keys() & {"on_spike", "spike_deviations", "spike_limit", "keep_every"}
    step = step_of(options)
    original = step.step

    def stepping(*arguments):
        if step.optimizer.t == 50:
            raise StopError
        return original(*arguments)

    step.step = stepping
    with pytest.raises(StopError):
        train(options, step=step)
    file = tmp_path / "run/last/train_state.json"
    state = json.loads(file.read_text())
    del state["skipped"], state["passed_over"]
    file.write_text(json.dumps(state))
    train(settings(tmp_path / "run", resume=True))
    assert weights_of(tmp_path / "run/last") == weights_of(clean[0] / "last")


def test_a_run_gets_so_many_reports_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("llamita.training.trainer.MOST_REPORTED", 1)
    train(settings(tmp_path / "run"), {45: garbage, 52: garbage})
    assert [record["step"] for record in kinds(tmp_path / "run", "spike")] == [45, 52]
    assert [path.name for path in (tmp_path / "run/autopsies").iterdir()] == ["step-00000045"]


def test_an_autopsy_that_cannot_be_made_costs_no_run(tmp_path, clean):
    options = settings(tmp_path / "run", on_spike="skip")
    step = step_of(options)

    def fail(micro_batches):
        raise RuntimeError("out of\nmemory")

    step.diagnose = fail
    result, display = train(options, {47: garbage}, step=step)
    assert weights(tmp_path / "run") == by_hand(options, {47: garbage}, {47})
    assert any("(no autopsy: out of memory)" in text for text in display.messages)
    assert not (tmp_path / "run/autopsies").exists()
    assert result.step == STEPS

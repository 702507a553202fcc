"""Runs listed, shown and compared: what is told of each state, of old and of damaged ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamita.cli.main import main
from llamita.evaluation import records
from llamita.model.sizes import count_parameters
from llamita.training import metrics
from llamita.training.run_directory import open_run
from llamita.workflows import runs
from tests.training.helpers import MODEL, config, make_step, train
from tests.training.test_trainer import StopError, stop_at

IDENTITY = {"kind": "pretraining", "model": {**MODEL.__dict__}, "data": {"train": "abc"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs: a finished one, one of another learning rate that failed, one of an older version."""
    root = tmp_path_factory.mktemp("runs")
    for name, changes in (("first", {}), ("group/second", {"learning_rate": 2e-2})):
        settings = config(root / name, steps=12, evaluate_every=4, **changes)
        identity = IDENTITY | {"training": settings.training.identity()}
        step = make_step(settings)
        if name == "first":
            train(settings, step=step, identity=identity, on_evaluation=lambda e: f"sample of {e.step}")
            continue
        with pytest.raises(StopError):
            train(settings, step=stop_at(step, 9), identity=identity)
    shutil.copytree(root / "first", root / "old", symlinks=True)
    manifest = json.loads((root / "old/run.json").read_text())
    del manifest["sessions"]
    (root / "old/run.json").write_text(json.dumps(manifest))
    return root


def test_a_run_is_summed_up(made):
    run = runs.open_run(made / "first")
    lines = [json.loads(line) for line in (made / "first/metrics.jsonl").read_text().splitlines()]
    checks = [line for line in lines if line["kind"] == "evaluation"]
    assert (run.state, run.kind, run.steps_done, run.steps) == ("finished", "pretraining", 12, 12)
    assert run.parameters == count_parameters(MODEL).total
    lowest = min(checks, key=lambda line: line["loss"])
    assert run.best == ("loss", lowest["loss"], lowest["step"])
    last = run.final_metrics()
    assert last["validation.perplexity"] == checks[-1]["perplexity"]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert last["train.loss (smoothed)"] == metrics.smoothed(losses)[-1]
    assert runs.open_run(made / "group/second").state == "failed"
    old = runs.open_run(made / "old")
    assert (old.state, old.started, old.parameters) == ("finished", None, run.parameters)


def test_a_measure_names_the_best(tmp_path):
    with open_run(tmp_path / "run", IDENTITY, {"steps": 4}, resume=False) as run:
        run.update_manifest({"best_measure": "accuracy"})
        file = metrics.MetricsFile(run.file("metrics.jsonl"))
        for step, loss, accuracy, best in ((2, 1.0, 0.9, True), (4, 0.5, 0.8, False)):
            file.append(
                {"kind": "evaluation", "step": step, "loss": loss, "best": best, "measures": {"accuracy": accuracy}}
            )
        file.close()
    assert runs.open_run(tmp_path / "run").best == ("accuracy", 0.9, 2)


def test_every_difference_is_named(made, tmp_path):
    shutil.copytree(made / "first", tmp_path / "twin", symlinks=True)
    a, b, twin = (runs.open_run(path) for path in (made / "first", made / "group/second", tmp_path / "twin"))
    assert runs.differences(a, twin) == []
    found = {key: (left, right) for key, left, right in runs.differences(a, b)}
    assert found["option.learning_rate"] == (1e-2, 2e-2)
    assert found["option.minimum_learning_rate"] == (1e-3, 2e-3)
    assert found["state"] == ("finished", "failed")
    assert found["train.steps"] == (12, 9)
    assert {key for key in found if key.startswith(("identity", "environment", "code", "condition"))} == set()
    manifest = json.loads((tmp_path / "twin/run.json").read_text())
    manifest["identity"]["data"]["train"] = "xyz"
    manifest["sessions"][-1]["environment"]["versions"]["numpy"] = "0.1"
    manifest["sessions"][-1]["code"]["commit"] = "feed"
    (tmp_path / "twin/run.json").write_text(json.dumps(manifest))
    records.write(tmp_path / "twin", "exam", {"accuracy": 0.5, "group": {"x": 2}}, "llamita evaluate")
    changed = {key: right for key, _, right in runs.differences(a, runs.open_run(tmp_path / "twin"))}
    assert changed == {
        "identity.data.train": "xyz",
        "environment.versions.numpy": "0.1",
        "code.commit": "feed",
        "evaluation.exam.accuracy": 0.5,
        "evaluation.exam.group.x": 2,
    }


def test_the_verbs(made, tmp_path, capsys):
    root = tmp_path / "runs"
    shutil.copytree(made, root, symlinks=True)
    (root / "broken").mkdir()
    (root / "broken/run.json").write_text("{")
    assert main(["runs", "list", str(root)]) == 0
    shown, _, note = capsys.readouterr().out.partition("note: ")
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert rows.keys() == {"run", "broken", "first", "group/second", "old"}
    assert "run.json is not valid JSON" in note
    assert "unreadable" in rows["broken"]
    assert "12/12" in rows["first"]
    assert rows["first"].rstrip().endswith("finished")
    assert "9/12" in rows["group/second"]
    assert rows["group/second"].rstrip().endswith("failed")
    records.write(root / "first", "exam \x1b[31m", {"accuracy": 0.5}, "llamita evaluate")
    assert main(["runs", "show", str(root / "first")]) == 0
    shown = capsys.readouterr().out
    for text in ("learning_rate", "0.01", "hidden_size", "versions.torch", "abc", "session 1", "accuracy"):
        assert text in shown
    assert "\x1b" not in shown
    assert main(["runs", "diff", str(root / "first"), str(root / "group/second")]) == 0
    assert "option.learning_rate" in capsys.readouterr().out
    assert main(["runs", "diff", str(root / "first"), str(root / "first")]) == 0
    assert "nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "there is no directory nowhere"),
        (["show", "nowhere"], "holds no training run"),
        (["diff", ".", "."], "holds no training run"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *arguments]) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors
    assert "\n" not in errors


CHILD = """
import sys, time
from tests.training.helpers import config, Silence, train
class Slow(Silence):
    def update(self, record):
        print(record["step"], flush=True)
        time.sleep(0.2)
train(config(sys.argv[1], steps=1000), display=Slow())
"""


@pytest.mark.medium
def test_a_run_that_goes_on_is_running_and_then_killed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    child.stdout.readline()
    run = runs.open_run(tmp_path / "run")
    assert run.state == "running"
    assert 1 <= run.steps_done < 1000
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert runs.open_run(tmp_path / "run").state == "killed"


def test_a_model_belongs_to_its_run(made, tmp_path):
    first = made / "first"
    for model in (first, first / "best", first / "checkpoints" / os.readlink(first / "best").split("/")[1]):
        assert records.run_of(model) == first
    assert records.run_of(tmp_path) is None
    (tmp_path / "link").symlink_to(first / "last")
    assert records.run_of(tmp_path / "link") == first.resolve()


def test_a_name_on_the_hub_belongs_to_no_run(made, monkeypatch):
    monkeypatch.chdir(made / "first")
    assert records.run_of(Path("someone/model")) is None
    assert records.run_of(Path("best")) == made / "first"


def test_records_of_evaluations(tmp_path):
    records.write(tmp_path, "a task/../x", {"accuracy": 0.5, "nan": float("nan"), "text": "no number"}, "cmd")
    [file] = (tmp_path / "evaluations").iterdir()
    assert file.name == "a-task-..-x.json"
    (tmp_path / "evaluations/bad.json").write_text('{"metrics": 3}')
    [record], faults = records.read(tmp_path)
    assert (record.name, record.metrics) == ("a task/../x", {"accuracy": 0.5, "nan": None})
    assert len(faults) == 1
    assert "bad.json" in faults[0]

"""The record and what shows it: lines, rewinding, smoothing, the plot, displays, TensorBoard, Weights & Biases."""

import io
import json
import math

import pytest

from llamita.training import display, loggers, metrics

RECORD = {
    "kind": "train",
    "step": 3,
    "loss": 2.5,
    "smoothed": 2.75,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "targets": 100,
    "tokens_per_second": 12345.6,
    "utilization": 0.43,
    "memory_bytes": 2_500_000_000,
    "seconds": 0.1,
}
EVALUATION = {
    "kind": "evaluation",
    "step": 3,
    "loss": 2.0,
    "perplexity": math.exp(2.0),
    "nats_per_character": 0.5,
    "bits_per_byte": 0.7,
    "targets": 10,
    "best": True,
    "target": "token",
    "measures": {},
}


def test_lines_and_rewinding(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    for step in range(1, 6):
        file.append({"kind": "train", "step": step, "loss": float("inf") if step == 2 else 1 / step})
        assert len(path.read_text().splitlines()) == step  # there at once
    file.sync()
    file.close()
    with path.open("a") as torn:
        torn.write('{"kind": "train", "step": 6, "lo')
    assert [r["step"] for r in metrics.read_records(path)] == [1, 2, 3, 4, 5]
    kept = metrics.rewind(path, 3)
    assert [r["step"] for r in kept] == [1, 2, 3]
    assert kept[1]["loss"] is None
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    assert metrics.rewind(tmp_path / "none.jsonl", 3) == []


def test_samples_are_rewound_too(tmp_path):
    path = tmp_path / "samples.txt"
    for step in (10, 20, 30):
        metrics.append_sample(path, step, f"text of {step}\n\nwith two paragraphs\n")
    whole = path.read_text()
    metrics.rewind_samples(path, 20)
    assert path.read_text() == whole[: whole.index("=== step 30")]
    metrics.rewind_samples(path, 0)
    assert path.read_text() == ""


def test_smoothing_is_unbiased_at_the_start_and_halves_in_twenty_steps():
    assert metrics.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    average = metrics.SmoothedLoss(half_life=20)
    assert math.isnan(average.value)
    for _ in range(400):
        average.update(1.0)
    for _ in range(20):
        average.update(0.0)
    assert average.value == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("floor", [None, 0.9])
def test_plot(tmp_path, floor):
    records = [{"kind": "train", "step": s, "loss": 1 + 6 / s} for s in range(1, 200)]
    records += [{"kind": "evaluation", "step": s, "loss": 1.05 + 6 / s} for s in range(50, 200, 50)]
    records[150]["loss"] = 400.0  # a spike must not press the curve flat
    metrics.plot_losses(records, tmp_path / "loss.png", floor)
    png = (tmp_path / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (960, 540)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    metrics.plot_losses([], tmp_path / "empty.png", floor)


def test_plain_display_prints_now_and_then(monkeypatch):
    stream, now = io.StringIO(), [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.PlainDisplay(steps=100, start=0, stream=stream, seconds=10)
    for step in range(1, 101):
        now[0] += 1
        shown.update(RECORD | {"step": step})
    shown.evaluation(EVALUATION)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/100", "11/100", "21/100"]
    assert lines[0] == (
        "step 1/100  loss 2.500  smoothed 2.750  rate 1.00e-03  gradient 0.50  tokens/s 12,346  of-peak 43%  "
        "memory 2.50 GB  left 1:39"
    )
    assert lines[-1] == (
        "step 3/100  validation loss 2.0000 nats/token, perplexity 7.39, 0.5000 nats/character, 0.7000 bits/byte "
        "(best so far)"
    )


def test_live_display_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    shown = display.make_display(100, 0, stream)
    assert isinstance(shown, display.LiveDisplay)
    shown.update(RECORD)
    shown.evaluation(EVALUATION)
    shown.message("a sample [with brackets]")
    shown.update(RECORD | {"step": 4, "chosen_reward": 0.25})
    shown.close()
    text = stream.getvalue()
    for part in (
        "chosen-reward",
        "0.250",
        "2.500",
        "4/100",
        "1.00e-03",
        "12,346",
        "2.50 GB",
        "43%",
        "a sample [with brackets]",
        "perplexity",
    ):
        assert part in text
    assert isinstance(display.make_display(100, 0, io.StringIO()), display.PlainDisplay)


def test_control_characters_do_not_reach_a_terminal():
    assert display.printable("a\x1b[2Jb\x07\nc\td é") == "a\ufffd[2Jb\ufffd\nc\td é"


def test_duration():
    assert [display.duration(s) for s in (0.4, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = loggers.make_loggers(["tensorboard"], tmp_path, {})
    for step in (1, 2):
        logger.log(RECORD | {"step": step, "loss": 3.0 - step, "time": 1000.0 + step})
    logger.log(EVALUATION | {"time": 1003.0})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    assert events.Scalars("evaluation/perplexity")[0].value == pytest.approx(math.exp(2.0))


@pytest.mark.medium
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (logger,) = loggers.make_loggers(["wandb"], tmp_path, {"seed": 1})
    logger.log(RECORD | {"time": 1000.0})
    logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_missing_package_is_found_before_a_run_begins(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="wandb") as error:
        loggers.require(["wandb"])
    assert error.value.name == "wandb"
    loggers.require([])


def test_unknown_logger(tmp_path):
    with pytest.raises(ValueError, match="log='mlflow'"):
        loggers.make_loggers(["mlflow"], tmp_path, {})

"""The record of a run: metrics.jsonl, the smoothed loss, and the plot of the losses.

A line of metrics.jsonl is one JSON object. `kind` "train" is one update: step (updates made so far), loss (nats per
target, before the update), learning_rate, grad_norm (before clipping), targets; `kind` "evaluation" is one pass over
the validation rows. `kind` "spike" is an update whose loss was above `limit`; "skipped" a step whose batch was passed
over, without an update; "rewind" a return to the checkpoint of `step` from the step `from`. The keys in TIMES depend on
the machine's mood; all others are the same in a run that was killed and resumed. Knows nothing of how either is shown.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llamita.storage import files

TIMES = ("seconds", "tokens_per_second", "utilization", "memory_bytes")
WIDE_RANGE = 4.0  # the ratio of the first losses to the last from which a plot takes logarithms


class MetricsFile:
    """Appends objects to a file, one a line; each line reaches the system at once. Without a path, nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = self._open()

    def _open(self) -> TextIO:
        return open(self.path or os.devnull, "a", encoding="utf-8")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of updates after `step`, and return the objects that stay."""
        self._file.close()
        kept = rewind(self.path, step) if self.path else []
        self._file = self._open()
        return kept

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite, which JSON lacks, become null."""
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has all lines."""
        if self.path:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """The same with None in the place of numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a line that a killed process left incomplete is passed over."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def rewind(path: Path, step: int, evaluated: bool = True) -> list[dict[str, Any]]:
    """Drop the lines of updates after `step`, and return the objects that stay.

    Where the checkpoint of `step` was not `evaluated`, so that it will be, an evaluation of it is dropped too.
    """
    kept = [
        record
        for record in read_records(path)
        if record.get("step", 0) <= step
        and (evaluated or record.get("kind") != "evaluation" or record.get("step", 0) < step)
    ]
    if path.is_file():
        files.atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


SAMPLE_HEADING = "=== step {step} ==="


def append_sample(path: Path, step: int, text: str) -> None:
    """Add what a model of this step wrote to samples.txt."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{SAMPLE_HEADING.format(step=step)}\n{text.rstrip()}\n\n")


def rewind_samples(path: Path, step: int) -> None:
    """Drop the samples of steps after `step`."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        heading = re.fullmatch(r"=== step (\d+) ===\n?", line)
        if heading and int(heading[1]) > step:
            break
        kept.append(line)
    files.atomic_write(path, "".join(kept))


class SmoothedLoss:
    """An exponential moving average, corrected for its start as Adam's are; `half_life` in updates."""

    def __init__(self, half_life: float = 20.0) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self._sum = 0.0
        self._weight = 0.0

    def update(self, value: float) -> float:
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


def smoothed(values: Iterable[float]) -> list[float]:
    average = SmoothedLoss()
    return [average.update(value) for value in values]


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, floor: float | None = None) -> None:
    """Draw train, smoothed and validation loss over the steps as a PNG; `floor` is nats per target, a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"]) for r in records if r.get("kind") == "train" and r.get("loss") is not None]
    validation = [
        (r["step"], r["loss"]) for r in records if r.get("kind") == "evaluation" and r.get("loss") is not None
    ]
    target = next((r["target"] for r in records if "target" in r), "token")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
        axes.plot(steps, smoothed(losses), color="#2171b5", linewidth=1.8, label="training, smoothed")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color="#d94801", marker="o", markersize=4, linewidth=1.5, label="validation")
    if floor is not None:
        axes.axhline(floor, color="#555555", linestyle="--", linewidth=1.2, label=f"floor {floor:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {target})")
    scale_losses(axes, [loss for _, loss in train + validation], floor)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def scale_losses(axes: Any, losses: Sequence[float], floor: float | None) -> None:
    """Leave a spike off the top, and take logarithms where the first losses would press the rest of the curve flat."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not losses:
        return
    ordered = sorted(losses)
    low = min(ordered[0], floor if floor is not None else math.inf)
    high = max(ordered[int(0.995 * (len(ordered) - 1))], losses[0])
    if low > 0 and high / low > WIDE_RANGE:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        crowded = high / low > 100 * WIDE_RANGE
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if crowded else (1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)

"""The display of a run for a person: a live table on a terminal, a plain line now and then elsewhere.

Shows the records of metrics.jsonl as they are made; knows nothing of models or files.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llamita.training import metrics

PLAIN_SECONDS = 10.0
"""Between two lines of the plain display."""


OWN = ("kind", "step", "loss", "smoothed", "learning_rate", "grad_norm", "targets")
"""Keys of every train record besides the times; its objective adds its metrics."""


class Display(Protocol):
    """`update` takes every train record, with `smoothed` added; `evaluation` every evaluation record."""

    def update(self, record: Mapping[str, Any]) -> None: ...

    def evaluation(self, record: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_display(steps: int, start: int, stream: TextIO | None = None) -> Display:
    """The display that fits `stream` (default: standard output) for updates `start` to `steps`."""
    stream = stream or sys.stdout
    return LiveDisplay(steps, start, stream) if stream.isatty() else PlainDisplay(steps, start, stream)


class SilentDisplay:
    """Shows nothing: of several processes, one is enough to read."""

    def update(self, record: Mapping[str, Any]) -> None: ...

    def evaluation(self, record: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """A line at the first update, at the last, and every ten seconds between them."""

    def __init__(self, steps: int, start: int, stream: TextIO, seconds: float = PLAIN_SECONDS) -> None:
        self._clock = _Clock(steps, start)
        self._stream = stream
        self._seconds = seconds
        self._shown = -float("inf")

    def update(self, record: Mapping[str, Any]) -> None:
        left = self._clock.left(record["step"])
        now = time.monotonic()
        if now - self._shown >= self._seconds or record["step"] == self._clock.steps:
            self._shown = now
            step = f"step {record['step']}/{self._clock.steps}"
            self.message("  ".join([step, *metric_texts(record), f"left {left}"]))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.message(f"step {record['step']}/{self._clock.steps}  {evaluation_text(record)}")

    def message(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A table that stays at the foot of the terminal; evaluations and samples scroll above it."""

    def __init__(self, steps: int, start: int, stream: TextIO) -> None:
        self._clock = _Clock(steps, start)
        self._console = Console(file=stream)
        self._evaluation = ""
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        pairs = [text.split(" ", 1) for text in metric_texts(record)]
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(name, style="dim") for name, _ in pairs))
        table.add_row(*(Text(value, style="bold") for _, value in pairs))
        bar = Table.grid(padding=(0, 1))
        progress = ProgressBar(total=self._clock.steps, completed=record["step"], width=40)
        left = self._clock.left(record["step"])
        bar.add_row(f"step {record['step']}/{self._clock.steps}", progress, f"{left} left")
        self._live.update(Group(bar, table, *([Text(self._evaluation, style="cyan")] if self._evaluation else [])))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._evaluation = f"step {record['step']}: {evaluation_text(record)}"
        self.message(self._evaluation)

    def message(self, text: str) -> None:
        self._live.console.print(Text(printable(text)))

    def close(self) -> None:
        self._live.stop()


class _Clock:
    """Estimates the time that is left, from the updates of this process."""

    def __init__(self, steps: int, start: int) -> None:
        self.steps = steps
        self._start = start
        self._begun = time.monotonic()

    def left(self, step: int) -> str:
        done = max(1, step - self._start)
        return duration((time.monotonic() - self._begun) / done * (self.steps - step))


def metric_texts(record: Mapping[str, Any]) -> list[str]:
    """The numbers of a train record, each `name value`, in the order shown."""
    texts = [
        f"loss {record['loss']:.3f}",
        f"smoothed {record['smoothed']:.3f}",
        f"rate {record['learning_rate']:.2e}",
        f"gradient {record['grad_norm']:.2f}",
        f"tokens/s {record['tokens_per_second']:,.0f}",
    ]
    measured = [name for name in record if name not in (*OWN, *metrics.TIMES)]
    texts += [f"{name.replace('_', '-')} {record[name]:.3f}" for name in measured]
    if record.get("utilization"):
        texts.append(f"of-peak {record['utilization']:.0%}")
    return [*texts, f"memory {record['memory_bytes'] / 1e9:.2f} GB"]


def evaluation_text(record: Mapping[str, Any]) -> str:
    """An evaluation record in words."""
    parts = [f"validation loss {record['loss']:.4f} nats/{record['target']}"]
    if record.get("perplexity") is not None:
        parts.append(f"perplexity {record['perplexity']:.2f}")
    if record.get("nats_per_character") is not None:
        parts += [f"{record['nats_per_character']:.4f} nats/character", f"{record['bits_per_byte']:.4f} bits/byte"]
    parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["measures"].items()]
    return ", ".join(parts) + (" (best so far)" if record.get("best") else "")


def printable(text: str) -> str:
    """Text without control characters, which an untrained model writes too and a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

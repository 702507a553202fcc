"""The one progress bar of the library: how far something is, how fast it goes, and what time is left.

It is drawn on standard error, and only where that is a terminal. Knows nothing of what is counted.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar that is there within `with` and gone afterwards: label, bar, count, rate, time left.

    `unit` is what the rate counts, `total` is None where nobody knows it. Whoever prints to another console while the
    bar is shown gives that `console`, and the lines go above the bar.
    """

    def __init__(self, label: str, total: float | None = None, unit: str = "", console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[count]", "fields[rate]")]
        columns = (texts[0], BarColumn(), *texts[1:], TimeRemainingColumn())
        # What a program prints is never redirected: it would end up on standard error.
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
        )
        self._unit = unit
        self._task = self._progress.add_task(label, count="", rate="")
        self.begin(label, total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, label: str, total: float | None = None) -> None:
        """Starts again from 0, with another part of the work."""
        self._total, self._begun = total, time.perf_counter()
        self._progress.reset(self._task, description=label, total=total, count="", rate="")

    def update(self, done: float, units: float | None = None, label: str | None = None) -> None:
        """Shows that so much is done; `units` are what the rate counts, where that is not `done` itself."""
        rate = (done if units is None else units) / max(time.perf_counter() - self._begun, 1e-9)
        count = f"{done:,.0f}" if self._total is None else f"{done:,.0f}/{self._total:,.0f}"
        speed = f"{rate:,.{0 if rate >= 100 else 1}f} {self._unit}/s" if self._unit else f"{rate:,.1f}/s"
        self._progress.update(self._task, completed=done, description=label, count=count, rate=speed)

"""Tells a loss that is far above those before it, a spike, from the ordinary ups and downs of training.

    limit = median of the last 20 losses + deviations x deviation
    deviation = max(1.4826 x median |difference| / sqrt 2, 0.02 nats)   of the last 100 losses, each less the one before

The spike score of OLMo 2 (2025, arXiv:2501.00656) calls a loss a spike that lies seven standard deviations from its
running average. Medians stand in for averages here, so that one spike does not hide the next. Differences of
neighbours, whose variance is twice that of a loss (von Neumann 1941), leave out the fall of the loss over the window;
1.4826 makes their median a standard deviation where they are normally distributed. The least deviation keeps a loss
that hardly moves, such as that of a finished model or of rewards without a signal, from making a spike of a rounding
error. Numbers alone; what becomes of a spike is the trainer's.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

SpikePolicy = Literal["report", "skip", "rewind", "stop"]

WINDOW, NEAR = 100, 20  # losses that are looked back on, and the last of them; with fewer, none is called a spike
NORMAL = 1.4826  # standard deviation / median absolute deviation of a normal distribution
LEAST_DEVIATION = 0.02  # nats per target


@dataclass(frozen=True)
class Threshold:
    """The loss above which an update is a spike, and what it follows from; nats per target."""

    median: float
    deviation: float
    limit: float


class SpikeDetector:
    """Follows the losses of the updates that were made; `deviations` 0 finds no spike, nor do the first `warmup`."""

    def __init__(self, deviations: float, warmup: int) -> None:
        self.deviations, self.warmup = deviations, warmup
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._count = 0
        self.goes_on = False
        """Whether the last loss was above its limit: the next one belongs to the same spike."""

    def threshold(self) -> Threshold | None:
        """Returns the limit of the next update; None where none is a spike yet."""
        if not self.deviations or self._count < self.warmup or len(self._losses) < NEAR:
            return None
        losses = list(self._losses)
        median = statistics.median(losses[-NEAR:])
        spread = statistics.median(abs(after - before) for before, after in pairwise(losses))
        deviation = max(NORMAL * spread / math.sqrt(2), LEAST_DEVIATION)
        return Threshold(median, deviation, median + self.deviations * deviation)

    def add(self, loss: float) -> None:
        """Note the loss of an update that was made."""
        threshold = self.threshold()
        self.goes_on = threshold is not None and loss > threshold.limit
        self._losses.append(loss)
        self._count += 1

    def replay(self, losses: Iterable[float]) -> None:
        """Begin anew, as if these losses had been added one by one."""
        known = [loss for loss in losses if math.isfinite(loss)]
        self._losses.clear()
        self._losses.extend(known[:-1])
        self._count, self.goes_on = max(0, len(known) - 1), False
        if known:
            self.add(known[-1])

"""Learning rates as functions of the step: constant, cosine, and warm-up-stable-decay. Knows nothing but arithmetic."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "constant", "warmup-stable-decay"]
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "constant", "warmup-stable-decay")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each of `steps` updates, counted from 0.

    All rise linearly over the first `warmup_steps` updates, the last of which runs at `peak`. Then: `constant` stays;
    `cosine` falls along half a cosine to `minimum`, which the last update uses (Loshchilov & Hutter 2017,
    arXiv:1608.03983); `warmup-stable-decay` stays, and falls linearly to `minimum` over the last `decay_steps` updates
    (Hu et al. 2024, arXiv:2404.06395).
    """

    name: ScheduleName
    peak: float
    minimum: float
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule={self.name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ValueError(f"learning_rate={self.peak!r} must be a finite number above 0")
        if not 0 <= self.minimum <= self.peak:
            raise ValueError(f"minimum_learning_rate={self.minimum!r} must lie between 0 and learning_rate={self.peak}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie between 0 and steps={self.steps}")
        if not 0 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} must lie between 0 and the {self.steps - self.warmup_steps} steps "
                "after the warm-up"
            )

    def at(self, step: int) -> float:
        """The learning rate of update number `step`, 0 <= step < steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        if self.name == "cosine":
            progress = (step + 1 - self.warmup_steps) / (self.steps - self.warmup_steps)
            return self.minimum + (self.peak - self.minimum) * (1 + math.cos(math.pi * progress)) / 2
        remaining = self.steps - 1 - step
        if remaining >= self.decay_steps:
            return self.peak
        return self.minimum + (self.peak - self.minimum) * remaining / self.decay_steps

"""What the updates of every backend share: AdamW's constants and the scale of clipping.

Numbers alone; knows nothing of frameworks, models or schedules.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdamWSettings:
    """The constants of AdamW. `weight_decay` is multiplied by the learning rate of the step."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    bias_correction: Literal["textbook", "efficient"] = "textbook"
    """textbook: m-hat / (sqrt(v-hat) + epsilon). efficient: the end of section 2 of Kingma & Ba (2015,
    arXiv:1412.6980), alpha_t m / (sqrt(v) + epsilon-hat), where `epsilon` is epsilon-hat."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in [0, 1)")
        if not self.epsilon > 0.0:
            raise ValueError(f"epsilon={self.epsilon!r} must be above 0; 1e-8 is usual")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be 0 or more")
        if self.bias_correction not in ("textbook", "efficient"):
            raise ValueError(f"bias_correction={self.bias_correction!r} must be 'textbook' or 'efficient'")


def clipping_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm must be multiplied by to have at most `max_norm` (0 stands for no limit)."""
    return max_norm / norm if 0.0 < max_norm < norm else 1.0

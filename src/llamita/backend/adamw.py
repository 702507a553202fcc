"""The part of an update that every backend shares: AdamW's constants, the scale of clipping, the saved state.

Numbers alone; knows nothing of frameworks, models or schedules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamita.backend.arrays import FusedParameter, missing_or_misshapen, part_shapes
from llamita.model.host_array import HostArray

MOMENTUM = "momentum."
"""Begins the names of Muon's momentum in a saved state; AdamW's moments are m. and v."""


@dataclass(frozen=True)
class AdamWSettings:
    """The constants of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """The term against division by zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate of the step; not on norms and biases."""
    bias_correction: Literal["textbook", "efficient"] = "textbook"
    """textbook: m-hat / (sqrt(v-hat) + epsilon). efficient: alpha_t m / (sqrt(v) + epsilon-hat), epsilon being
    epsilon-hat (end of section 2 of Kingma & Ba 2015, arXiv:1412.6980)."""

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
    """Returns the factor that brings gradients of this norm down to at most `max_norm`; 0 stands for no limit."""
    return max_norm / norm if 0.0 < max_norm < norm else 1.0


def saved_state(moments: Mapping[str, HostArray], updates: int) -> dict[str, HostArray]:
    """Returns m and v under canonical names (`m.model.norm.weight`), and `t`, the number of updates made."""
    return {**moments, "t": HostArray.from_numpy(np.array([updates], dtype=np.int64))}


def updates_made(state: Mapping[str, HostArray], parameters: Iterable[FusedParameter]) -> int:
    """Returns `t` of a saved state; ValueError, naming them, for arrays that it lacks or that have another shape."""
    if optimizer_of(state) != "adamw":
        raise ValueError("the saved state is of --optimizer muon and cannot be gone on with by adamw; resume with muon")
    shapes = part_shapes(parameters)
    check_arrays({"t": (1,)} | {f"{kind}.{name}": shape for kind in "mv" for name, shape in shapes.items()}, state)
    return int(state["t"].to_numpy()[0])


def check_arrays(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, HostArray]) -> None:
    """Raises ValueError, naming them, for arrays that a saved state lacks or that have another shape."""
    faults = missing_or_misshapen(expected, state)
    if faults:
        raise ValueError(f"the optimizer's state lacks {faults}, or has another shape there")


def optimizer_of(state: Mapping[str, HostArray]) -> Literal["adamw", "muon"]:
    """Returns the optimiser that a saved state is of."""
    return "muon" if any(name.startswith(MOMENTUM) for name in state) else "adamw"

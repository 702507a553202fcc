"""What a training step asks of an optimiser, and the choice of one."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import mlx.core as mx

from llamita.backend.adamw import AdamWSettings
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.train.adamw import AdamW
from llamita.backend.mlx.train.muon import Muon
from llamita.backend.muon import MuonSettings
from llamita.model.host_array import HostArray


class Optimizer(Protocol):
    """Updates parameters from gradients. What it keeps of them has canonical names."""

    parameters: list[FusedParameter]
    t: int
    """The number of steps taken."""

    def step(self, gradients: Sequence[mx.array], learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its gradient, in the same order, times `gradient_scale`."""

    def state(self) -> dict[str, HostArray]:
        """Returns all that the next step depends on besides parameters and gradients, and `t`."""

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError, in one line, for another optimiser's and for what is missing."""


def make_optimizer(
    parameters: Sequence[FusedParameter],
    adamw: AdamWSettings | None,
    muon: MuonSettings | None,
    precision: Literal["bf16", "fp32"],
    device: mx.DeviceType,
) -> Optimizer:
    """Returns AdamW, or with `muon` that for the matrices of the blocks and AdamW for the rest.

    Products of bfloat16 are left to a GPU: on a CPU they are no faster in MLX.
    """
    if muon is None:
        return AdamW(parameters, adamw)
    low = precision == "bf16" and device == mx.gpu
    return Muon(parameters, muon, adamw, mx.bfloat16 if low else mx.float32)

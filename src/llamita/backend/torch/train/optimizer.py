"""What a training step asks of an optimiser, and the choice of one."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from llamita.backend import processor
from llamita.backend.adamw import AdamWSettings
from llamita.backend.muon import MuonSettings
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.train.adamw import AdamW
from llamita.backend.torch.train.muon import Muon
from llamita.model.host_array import HostArray


class Optimizer(Protocol):
    """Updates parameters from their gradients. What it keeps of them has canonical names."""

    parameters: list[FusedParameter]
    t: int
    """The number of steps taken."""

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its `.grad`, which may be changed, times `gradient_scale`."""

    def state(self) -> dict[str, HostArray]:
        """Returns all that the next step depends on besides parameters and gradients, whole, and `t`."""

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError, in one line, for another optimiser's and for what is missing."""

    def moments(self) -> dict[str, Tensor]:
        """Returns the tensors of the state themselves, without `t`, sharded as the parameters are."""


def make_optimizer(
    parameters: Sequence[FusedParameter],
    adamw: AdamWSettings | None,
    muon: MuonSettings | None,
    precision: Literal["bf16", "fp32", "fp8"],
) -> Optimizer:
    """Returns AdamW, or with `muon` that for the matrices of the blocks and AdamW for the rest."""
    if muon is None:
        return AdamW(parameters, adamw)
    on_cpu = any(item.parameter.device.type == "cpu" for item in parameters)
    low = precision != "fp32" and (not on_cpu or processor.multiplies("bfloat16"))
    return Muon(parameters, muon, adamw, torch.bfloat16 if low else torch.float32)

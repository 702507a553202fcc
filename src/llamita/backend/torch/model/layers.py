"""The layers of a Llama outside attention: RMSNorm, rotary positions, SwiGLU, linear maps.

Each is written twice: a plain form from array operations, to be read beside its paper, and the fused form that runs by
default. Tests hold the two equal. Knows nothing of the model that is built from them.

Letters beyond the usual: E the pairs of a head that rotate.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.torch.model import attention, saving
from llamita.model.config import Activation

CPU = torch.device("cpu")


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divides each vector by its root mean square, then scales it (Zhang & Sennrich 2019, arXiv:1910.07467).

    x_D is (..., D), weight_D (D,). The mean square is taken in float32; the result has the type of x_D.
    """
    wide_D = x_D.float()
    mean_square = wide_D.pow(2).mean(dim=-1, keepdim=True)
    normed_D = wide_D * torch.rsqrt(mean_square + eps)
    return weight_D * normed_D.to(x_D.dtype)


def rms_norm_fused(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x_D.device.type == "cpu" and x_D.dtype == torch.float32 and saving.wanted(x_D):
        return saving.rms_norm(x_D, weight_D, eps)
    return F.rms_norm(x_D, (x_D.shape[-1],), weight_D, eps)


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Computes y = x W^T + b: (..., D) times (C, D) transposed gives (..., C)."""
    y_C = x_D @ weight_CD.mT
    return y_C if bias_C is None else y_C + bias_C


def silu(x: Tensor) -> Tensor:
    """Returns x times its logistic sigmoid (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x / (1 + torch.exp(-x))


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns the gate of SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up, from (..., 2 C) to (..., C)."""
    gate_C, up_C = gate_up.chunk(2, dim=-1)
    return silu(gate_C) * up_C


def gated_silu_fused(gate_up: Tensor) -> Tensor:
    if saving.wanted(gate_up):
        return saving.gated(gate_up, "silu")
    gate_C, up_C = gate_up.chunk(2, dim=-1)
    return F.silu(gate_C) * up_C


def rope_table(positions_BT: Tensor, frequencies_E: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotation angles, float32, each (B, T, E), times `scale`.

    Pair i of a head turns by position * frequency i (Su et al. 2021, arXiv:2104.09864). Angles are computed in float32,
    as transformers does; `rope.rotary_frequencies` gives frequencies and scale.
    """
    angles_BTE = positions_BT[..., None].float() * frequencies_E
    return angles_BTE.cos() * scale, angles_BTE.sin() * scale


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns x times the normal integral, approximated by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated_gelu(gate_up: Tensor) -> Tensor:
    """Returns the gate of GeGLU (Shazeer 2020, arXiv:2002.05202): gelu(gate) * up, from (..., 2 C) to (..., C)."""
    gate_C, up_C = gate_up.chunk(2, dim=-1)
    return gelu_tanh(gate_C) * up_C


def gated_gelu_fused(gate_up: Tensor) -> Tensor:
    if saving.wanted(gate_up):
        return saving.gated(gate_up, "gelu_pytorch_tanh")
    gate_C, up_C = gate_up.chunk(2, dim=-1)
    return F.gelu(gate_C, approximate="tanh") * up_C


class RopeTable:
    """`rope_table` of the positions 0, 1, ..., computed once and looked up.

    It grows by whole blocks of positions, so that an entry is the same bits however many others were asked for.
    """

    BLOCK = 1024

    def __init__(self, frequencies_E: Tensor, scale: float) -> None:
        self.frequencies_E, self.scale = frequencies_E, scale
        self._cos_SE = self._sin_SE = torch.empty(0, len(frequencies_E))

    def at(self, positions_BT: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines (B, T, E) of positions below `longest`."""
        cos_SE, sin_SE = self.up_to(longest, positions_BT.device)
        return cos_SE[positions_BT], sin_SE[positions_BT]

    def up_to(self, longest: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines (S, E) of all positions below `longest`, and of some more."""
        if self._cos_SE.device != device or len(self._cos_SE) < longest:
            blocks = [
                rope_table(torch.arange(start, start + self.BLOCK)[None], self.frequencies_E, self.scale)
                for start in range(0, longest, self.BLOCK)
            ]
            self._cos_SE, self._sin_SE = (
                torch.cat([block[which][0] for block in blocks]).to(device) for which in (0, 1)
            )
        return self._cos_SE, self._sin_SE


def apply_rope(x_BTNH: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotates the pairs (i, i + H/2): the layout of Hugging Face checkpoints, and of every model here.

    x_BTNH is (..., T, heads, H); the table is (..., T, E), shared by all heads. Keeps the type of x_BTNH.
    """
    first, second = x_BTNH.chunk(2, dim=-1)
    cos, sin = cos_BTE.unsqueeze(-2), sin_BTE.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)


def apply_rope_interleaved(x_BTNH: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotates the pairs (2 i, 2 i + 1): the layout of Meta's checkpoints and of the RoFormer paper."""
    first, second = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    cos, sin = cos_BTE.unsqueeze(-2), sin_BTE.unsqueeze(-2)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(-2).to(x_BTNH.dtype)


def halves_from_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a query or key projection (heads * H, ...) from interleaved pairs to rotated halves.

    With the reordered weight, `apply_rope` gives the attention scores that `apply_rope_interleaved` gave before.
    """
    per_head = weight.unflatten(0, (-1, head_dim // 2, 2))
    return per_head.transpose(1, 2).reshape(weight.shape)


def interleaved_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Inverts `halves_from_interleaved`."""
    per_head = weight.unflatten(0, (-1, 2, head_dim // 2))
    return per_head.transpose(1, 2).reshape(weight.shape)


class Adapters(Protocol):
    """The adapters of a forward pass: one for all of it (lora.py), or each for its rows (infer/adapters.py)."""

    def changed(self, matrix: str, x: Tensor, y: Tensor) -> Tensor:
        """Returns the output `y` that the linear map of this name has for `x`, changed as its adapters say."""


@dataclass(frozen=True)
class Operations:
    """The operations that a model is built from; `PLAIN` to read and to check against, `FUSED` to run."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    linear: Callable[..., Tensor]
    gates: Mapping[Activation, Callable[[Tensor], Tensor]]
    attention: Callable[..., Tensor]


PLAIN = Operations(rms_norm, linear, {"silu": gated_silu, "gelu_pytorch_tanh": gated_gelu}, attention.attention)
FUSED = Operations(
    rms_norm_fused,
    F.linear,
    {"silu": gated_silu_fused, "gelu_pytorch_tanh": gated_gelu_fused},
    attention.attention_fused,
)

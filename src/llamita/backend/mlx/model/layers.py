"""The layers of a Llama outside attention: RMSNorm, rotary positions, SwiGLU, linear maps.

Each is written twice: a plain form from array operations, to be read beside its paper, and the form that runs by
default, on MLX's fused kernels where it has one. Tests hold the two equal. Knows nothing of the model that is built
from them.

Letters beyond the usual: E half a head size, R tokens as rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from llamita.backend.mlx.model import attention
from llamita.model.config import Activation


def rms_norm(x_D: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    """Divides each vector by its root mean square, then scales it (Zhang & Sennrich 2019, arXiv:1910.07467).

    x_D is (..., D), weight_D (D,). The mean square is taken in float32; the result has the type of x_D.
    """
    wide_D = x_D.astype(mx.float32)
    mean_square = mx.mean(wide_D * wide_D, axis=-1, keepdims=True)
    normed_D = wide_D * mx.rsqrt(mean_square + eps)
    return weight_D * normed_D.astype(x_D.dtype)


def rms_norm_fused(x_D: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x_D, weight_D, eps)


def linear(x_D: mx.array, weight_CD: mx.array, bias_C: mx.array | None = None) -> mx.array:
    """Computes y = x W^T + b: (..., D) times (C, D) transposed gives (..., C).

    In the type of the weight: with bfloat16 weights beside a float32 residual stream, the product alone is bfloat16.
    """
    y_C = x_D.astype(weight_CD.dtype) @ weight_CD.T
    return y_C if bias_C is None else y_C + bias_C


def linear_fused(x_D: mx.array, weight_CD: mx.array, bias_C: mx.array | None = None) -> mx.array:
    x_D = x_D.astype(weight_CD.dtype)
    return x_D @ weight_CD.T if bias_C is None else mx.addmm(bias_C, x_D, weight_CD.T)


def silu(x: mx.array) -> mx.array:
    """Returns x times its logistic sigmoid (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x / (1 + mx.exp(-x))


def gated_silu(gate_up: mx.array) -> mx.array:
    """Returns the gate of SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up, from (..., 2 C) to (..., C)."""
    gate_C, up_C = mx.split(gate_up, 2, axis=-1)
    return silu(gate_C) * up_C


def gelu_tanh(x: mx.array) -> mx.array:
    """Returns x times the normal integral, approximated by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated_gelu(gate_up: mx.array) -> mx.array:
    """Returns the gate of GeGLU (Shazeer 2020, arXiv:2002.05202): gelu(gate) * up, from (..., 2 C) to (..., C)."""
    gate_C, up_C = mx.split(gate_up, 2, axis=-1)
    return gelu_tanh(gate_C) * up_C


gated_gelu_fused = mx.compile(gated_gelu)
"""`gated_gelu` as one kernel."""


@mx.compile
def _gate_kernel(gate_C: mx.array, up_C: mx.array) -> mx.array:
    return gate_C * mx.sigmoid(gate_C) * up_C


def gated_silu_fused(gate_up: mx.array) -> mx.array:
    """Computes `gated_silu` as one kernel, which `mx.compile` makes of its elementwise operations."""
    gate_C, up_C = mx.split(gate_up, 2, axis=-1)
    return _gate_kernel(gate_C, up_C)


def rope_table(positions_BT: mx.array, frequencies_E: mx.array, scale: float = 1.0) -> tuple[mx.array, mx.array]:
    """Returns cosines and sines of the rotation angles, float32, each (B, T, H/2), times `scale`.

    Pair i of a head turns by position * frequency i (Su et al. 2021, arXiv:2104.09864). Angles are computed in float32,
    as transformers does; `rope.rotary_frequencies` gives frequencies and scale.
    """
    angles_BTE = positions_BT[..., None].astype(mx.float32) * frequencies_E
    return mx.cos(angles_BTE) * scale, mx.sin(angles_BTE) * scale


def apply_rope(x_BTNH: mx.array, cos_BTE: mx.array, sin_BTE: mx.array) -> mx.array:
    """Rotates the pairs (i, i + H/2): the layout of Hugging Face checkpoints, and of every model here.

    x_BTNH is (..., T, heads, H); the table is (..., T, H/2), shared by all heads. Keeps the type of x_BTNH.
    """
    first, second = mx.split(x_BTNH, 2, axis=-1)
    cos, sin = cos_BTE[..., None, :], sin_BTE[..., None, :]
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def apply_rope_interleaved(x_BTNH: mx.array, cos_BTE: mx.array, sin_BTE: mx.array) -> mx.array:
    """Rotates the pairs (2 i, 2 i + 1): the layout of Meta's checkpoints and of the RoFormer paper."""
    first, second = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    cos, sin = cos_BTE[..., None, :], sin_BTE[..., None, :]
    rotated = mx.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.flatten(-2).astype(x_BTNH.dtype)


def rotate(x_BTNH: mx.array, positions_BT: mx.array | None, frequencies_E: mx.array, scale: float = 1.0) -> mx.array:
    """Rotates as `apply_rope` does, at these positions (B, T) or (1, T); None stands for 0, 1, ..., T - 1."""
    if positions_BT is None:
        positions_BT = mx.arange(x_BTNH.shape[1])[None]
    return apply_rope(x_BTNH, *rope_table(positions_BT, frequencies_E, scale))


def rotate_fused(
    x_BTNH: mx.array, positions_BT: mx.array | None, frequencies_E: mx.array, scale: float = 1.0
) -> mx.array:
    """Computes `rotate` by MLX's kernel, which computes angles as it goes and knows positions as an offset a row.

    So where positions are given, each token becomes a row of its own.
    """
    B, T, N, H = x_BTNH.shape
    radians: dict[str, Any] = {"traditional": False, "base": None, "scale": 1.0, "freqs": 1 / frequencies_E}
    if positions_BT is None:
        rotated_BTNH = mx.fast.rope(x_BTNH.swapaxes(1, 2), H, offset=0, **radians).swapaxes(1, 2)
    else:
        offsets_R = mx.broadcast_to(positions_BT, (B, T)).reshape(-1)
        rotated_RN1H = mx.fast.rope(x_BTNH.reshape(B * T, N, 1, H), H, offset=offsets_R, **radians)
        rotated_BTNH = rotated_RN1H.reshape(B, T, N, H)
    return rotated_BTNH if scale == 1.0 else rotated_BTNH * scale


def halves_from_interleaved(weight: mx.array, head_dim: int) -> mx.array:
    """Reorders the rows of a query or key projection (heads * H, ...) from interleaved pairs to rotated halves.

    With the reordered weight, `apply_rope` gives the attention scores that `apply_rope_interleaved` gave before.
    """
    per_head = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return per_head.swapaxes(1, 2).reshape(weight.shape)


def interleaved_from_halves(weight: mx.array, head_dim: int) -> mx.array:
    """Inverts `halves_from_interleaved`."""
    per_head = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return per_head.swapaxes(1, 2).reshape(weight.shape)


class Adapters(Protocol):
    """The adapters of a forward pass: one for all of it (lora.py), or each for its rows (infer/adapters.py)."""

    def changed(self, matrix: str, x: mx.array, y: mx.array) -> mx.array:
        """Returns the output `y` that the linear map of this name has for `x`, changed as its adapters say."""


@dataclass(frozen=True)
class Operations:
    """The operations that a model is built from; `PLAIN` to read and to check against, `FUSED` to run."""

    rms_norm: Callable[[mx.array, mx.array, float], mx.array]
    linear: Callable[..., mx.array]
    gates: Mapping[Activation, Callable[[mx.array], mx.array]]
    attention: Callable[..., mx.array]
    rotate: Callable[..., mx.array]


PLAIN = Operations(rms_norm, linear, {"silu": gated_silu, "gelu_pytorch_tanh": gated_gelu}, attention.attention, rotate)
FUSED = Operations(
    rms_norm_fused,
    linear_fused,
    {"silu": gated_silu_fused, "gelu_pytorch_tanh": gated_gelu_fused},
    attention.attention_fused,
    rotate_fused,
)

"""Products in 8-bit floating-point numbers (Micikevicius et al. 2022, arXiv:2209.05433) for the blocks' linear maps.

Each product's two matrices are divided by a scale of their own, which brings the largest magnitude to the largest
number of the format, and rounded: inputs and weights to e4m3 (4 bits of exponent, 3 of mantissa), gradients to e5m2,
whose range is wider. Weights stay float32 for the optimiser. Knows nothing of the model.

Letters beyond the usual: M rows of an input (all positions of all texts), I inputs and O outputs of a linear map.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.model.config import ModelConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""cuBLAS takes 8-bit matrices whose sides are multiples of this."""
LEAST = 1e-12
"""The least magnitude that a scale is made for: a matrix of zeros has none."""
FIRST_CAPABILITY = (8, 9)
"""The compute capability of the first GPUs that multiply 8-bit numbers (Ada; Hopper is 9.0)."""


class Scaled(NamedTuple):
    """A matrix as 8-bit numbers times a scale, a float32 scalar."""

    numbers: Tensor
    scale: Tensor


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """Rounds a matrix to an 8-bit format, its largest magnitude to the format's; NaN and infinity leave NaN."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=LEAST) / largest
    return Scaled((x.float() / scale).clamp(-largest, largest).to(dtype), scale)


def product(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Computes A B^T, summed in float32, for 8-bit A (M, I) and B (O, I); `fast` sums with fewer bits on Hopper."""
    rows_MI, columns_IO = a.numbers.contiguous(), b.numbers.contiguous().t()
    return torch._scaled_mm(rows_MI, columns_IO, scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast)


def transposed(x: Scaled) -> Scaled:
    return Scaled(x.numbers.t(), x.scale)


def linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Computes `layers.linear` with 8-bit products, forwards and backwards; the result is bfloat16."""
    x_MI = x_I.reshape(-1, x_I.shape[-1])
    missing = -len(x_MI) % MULTIPLE  # rows of zeros, which change no product
    padded_MI = F.pad(x_MI, (0, 0, 0, missing)) if missing else x_MI
    y_MO = _Product.apply(padded_MI, weight_OI)
    y_O = y_MO[: len(x_MI)].view(*x_I.shape[:-1], len(weight_OI))
    return y_O if bias_O is None else y_O + bias_O.to(y_O.dtype)


class _Product(torch.autograd.Function):
    """X W^T; of its inputs it keeps the 8-bit numbers alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        x, weight = scaled(x_MI, E4M3), scaled(weight_OI, E4M3)
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_MI.dtype, weight_OI.dtype
        return product(x, weight, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_numbers, x_scale, weight_numbers, weight_scale = (
            ctx.saved_tensors
        )  # asked for once: it may compute them again
        x, weight = Scaled(x_numbers, x_scale), Scaled(weight_numbers, weight_scale)
        x_dtype, weight_dtype = ctx.dtypes
        gradient_MO = scaled(grad_outputs[0], E5M2)
        of_x_MI = of_weight_OI = None
        if ctx.needs_input_grad[0]:
            of_x_MI = product(gradient_MO, transposed(weight), torch.bfloat16).to(x_dtype)
        if ctx.needs_input_grad[1]:
            of_weight_OI = product(transposed(gradient_MO), transposed(x), torch.float32).to(weight_dtype)
        return of_x_MI, of_weight_OI


def check(config: ModelConfig, device: torch.device) -> None:
    """ValueError, in one line, where a model or its device has no 8-bit products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} does not multiply 8-bit numbers (Ada, Hopper and later do); use --precision bf16")
    if config.quantization:
        raise ValueError(f"the model is quantised ({config.quantization}) and not for fp8; use --precision bf16")
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(f"{name}={size} must be a multiple of {MULTIPLE} for --precision fp8")

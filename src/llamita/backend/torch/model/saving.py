"""RMSNorm and the gates of the feed-forward layer with a backward pass that holds less: the same numbers, bit for bit.

PyTorch's own operations keep every factor of a product for the backward pass. Here a factor that one operation gives
from what is kept anyway is computed again there. Under `torch.compile` the compiler decides what to keep.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamita.model.config import Activation


def wanted(x: Tensor) -> bool:
    """Returns whether a backward pass will come that autograd, not a compiler, holds tensors for."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Computes `layers.rms_norm_fused` on a CPU, where PyTorch keeps the normed vectors beside the input."""
    root_1 = torch.rsqrt(x_D.pow(2).mean(dim=-1, keepdim=True).add_(eps))
    normed_D: Tensor = _Scaled.apply(x_D, root_1, weight_D)
    return normed_D


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """Computes activation(gate) * up, from (..., 2 C) to (..., C); keeps (..., 2 C) alone."""
    gated_C: Tensor = _Gated.apply(gate_up, activation)
    return gated_C


class _Scaled(torch.autograd.Function):
    """x * root * weight."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, root_1: Tensor, weight_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_D, root_1, weight_D)
        return (x_D * root_1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor) -> tuple[Tensor | None, ...]:
        x_D, root_1, weight_D = ctx.saved_tensors
        grad_weight_D = None
        if ctx.needs_input_grad[2]:
            grad_weight_D = (x_D * root_1).mul_(grad_D).sum_to_size(weight_D.shape)
        grad_normed_D = grad_D * weight_D
        grad_root_1 = (grad_normed_D * x_D).sum(dim=-1, keepdim=True)
        return grad_normed_D.mul_(root_1), grad_root_1, grad_weight_D


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate_C, up_C = gate_up.chunk(2, dim=-1)
        return _activated(gate_C, activation) * up_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate_C, up_C = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate_C, grad_up_C = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_C, _activated(gate_C, ctx.activation), out=grad_up_C)
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward(grad_C * up_C, gate_C, grad_input=grad_gate_C)
        else:
            torch.ops.aten.gelu_backward(grad_C * up_C, gate_C, approximate="tanh", grad_input=grad_gate_C)
        return grad_gate_up, None


def _activated(gate_C: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate_C) if activation == "silu" else F.gelu(gate_C, approximate="tanh")

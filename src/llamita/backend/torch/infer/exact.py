"""The operations of the exact mode that differ from the fast one, so that a row's result depends on that row alone.

PyTorch's kernels round a row differently by where it stands among the others: at an end of what a thread takes, at an
odd address, or in too narrow a result. Found by comparing bits over many sizes; knows nothing of caches or requests.
"""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.torch.infer.kv_cache import EXACT_ROWS
from llamita.backend.torch.infer.paged_attention import WIDTH
from llamita.backend.torch.model.llama import Embedding, FeedForward, Linear, Llama

SERIAL = 32768
"""Elements up to which PyTorch leaves an elementwise operation to one thread."""


def exact_model(model: Llama) -> Llama:
    """Returns a model over the same parameters whose rows do not depend on their neighbours.

    Rows must be a multiple of `EXACT_ROWS`. ValueError for reordered weights, whose products are another library's.
    """
    if model.reordered:
        raise ValueError("the exact mode reads plain weights; give load_runner exact=True")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in twin.modules():
        if isinstance(module, Linear | Embedding):
            module.product = linear
        elif isinstance(module, FeedForward):
            module.gate = GATES[module.activation]
    return twin


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Computes `layers.linear`, `EXACT_ROWS` rows at a time and over a multiple of 16 columns, zeros added.

    With more rows, a library may cut the sums in another way. Of other numbers of columns, the last few of the result
    have bits that depend on how the row is aligned in memory.
    """
    lacking = -weight_CD.shape[1] % WIDTH
    if lacking:
        x_D, weight_CD = F.pad(x_D, (0, lacking)), F.pad(weight_CD, (0, lacking))
    pieces = x_D.flatten(0, -2).split(EXACT_ROWS)
    return torch.cat([F.linear(piece, weight_CD, bias_C) for piece in pieces]).view(*x_D.shape[:-1], -1)


def gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """Computes a gate of `layers.py` so few rows at a time that no two threads share them: what a thread has left over
    after whole vectors goes through another exponential, and that may be in the middle of a row."""
    gate_C, up_C = gate_up.chunk(2, dim=-1)
    pieces = gate_C.flatten(0, -2).split(max(1, SERIAL // gate_C.shape[-1]))
    return torch.cat([activation(piece) for piece in pieces]).view(up_C.shape) * up_C


GATES = {
    "silu": functools.partial(gated, F.silu),
    "gelu_pytorch_tanh": functools.partial(gated, functools.partial(F.gelu, approximate="tanh")),
}

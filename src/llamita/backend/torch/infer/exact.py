"""The operations of the exact mode that differ from the fast one, so that a row's result depends on that row alone.

`exact_model` is a model of such operations, and `exact_states` runs whole texts through it, each alone.

PyTorch's kernels round a row differently by where it stands among the others: at an end of what a thread takes, at an
odd address, or in too narrow a result. Found by comparing bits over many sizes; knows nothing of caches or requests.
"""

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.backend.torch.infer.kv_cache import EXACT_ROWS, PagedKVCache, PagedStep
from llamita.backend.torch.infer.paged_attention import TILE, WIDTH
from llamita.backend.torch.model.layers import Adapters
from llamita.backend.torch.model.llama import Embedding, FeedForward, Linear, Llama, Trace

SERIAL = 32768
"""Elements up to which PyTorch leaves an elementwise operation to one thread."""
TEXT_PIECE = 512
"""Tokens of a whole text that are run at once, as many as an engine's step reads."""


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


def exact_states(
    model: Llama,
    tokens_T: Sequence[int],
    adapters: Adapters | None = None,
    trace: Trace | None = None,
    attention_of: Collection[int] = (),
) -> Tensor:
    """Returns the states (T, D) after the final norm of one text, the same bits as a step of the engine gives.

    `model` is an `exact_model`. The text is read in pieces of `TEXT_PIECE` tokens over a memory of its own. `trace` is
    shown, of each piece, what `Llama.hidden` shows of a row, the probabilities of attention (1, N, t, T) included.
    """
    config, length = model.config, len(tokens_T)
    blocks = -(-length // TILE)
    layout = CacheLayout(TILE, blocks, config.attention_windows)
    memory = PagedKVCache(config, layout)
    tables = tuple(np.arange(blocks, dtype=np.int32) for _ in layout.windows)
    pieces: list[Tensor] = []
    for start in range(0, length, TEXT_PIECE):
        tokens = tuple(tokens_T[start : start + TEXT_PIECE])
        step = memory.step([ScheduledChunk(0, tokens, start, tables)], exact=True)
        padded = torch.tensor([[*tokens, *[0] * (step.padded - step.tokens)]])
        show = None if trace is None else _shown(trace, step.tokens)
        watched = step if show is None or not attention_of else WatchedStep(step, show, attention_of, length)
        hidden_1TD = model.hidden(padded, cache=watched, adapters=adapters, trace=show)
        pieces.append(hidden_1TD[0, : step.tokens])
    return torch.cat(pieces)


def _shown(trace: Trace, tokens: int) -> Trace:
    """Returns a trace that leaves the padding out."""
    return lambda name, x: trace(name, x[:, :, :tokens] if name.endswith(".attention") else x[:, :tokens])


@dataclass
class WatchedStep:
    """A step of one sequence that also shows the attention probabilities of some layers, (1, N, t, `length`)."""

    step: PagedStep
    trace: Trace
    attention_of: Collection[int]
    length: int

    @property
    def positions_1T(self) -> Tensor:
        return self.step.positions_1T

    @property
    def longest(self) -> int:
        return self.step.longest

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        mixed_TNH = self.step.attend(layer, q_TNH, k_TKH, v_TKH)
        if layer in self.attention_of:
            weights_NTS = self.step.probabilities(layer, q_TNH)
            weights_NTT = F.pad(weights_NTS, (0, self.length - weights_NTS.shape[-1]))
            self.trace(f"layers.{layer}.attention", weights_NTT[None])
        return mixed_TNH


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

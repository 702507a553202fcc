"""Attention of one step's queries over keys and values that lie in blocks.

Two ways: a batch of single queries, and a chunk of one sequence. Each takes the queries (T, N, H) and a layer's whole
memory (K, slots, H), of which it reads blocks that lie one after the other where they are, and gathers others.

Letters beyond the usual: M blocks of a table, X positions of a block.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

from llamita.backend.mlx.model.attention import attention_fused
from llamita.backend.step_layout import BlockSpan, blocks_side_by_side
from llamita.model.config import AttentionSpec


class Span(BlockSpan):
    """A span that reads its blocks out of a memory."""

    @cached_property
    def blocks_M(self) -> mx.array:
        return mx.array(self.blocks)

    def read(self, memory: mx.array) -> mx.array:
        """Returns the contents of the blocks, (1, K, S, H), S being `keys`."""
        if self.begin is not None:
            return memory[None, :, self.begin : self.begin + self.keys]
        return gather(memory, self.blocks_M[None], self.block_size)[:, :, : self.keys]


class Part(Protocol):
    """The attention of some rows of a step, in every layer of a group."""

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array: ...


def gather(memory: mx.array, blocks_BM: mx.array, block_size: int) -> mx.array:
    """Returns the contents of blocks of a memory (K, slots, H), those of a row one after the other: (B, K, S, H)."""
    K, _, H = memory.shape
    x_KBMXH = memory.reshape(K, -1, block_size, H)[:, blocks_BM]
    return x_KBMXH.reshape(K, len(blocks_BM), -1, H).swapaxes(0, 1)


class DecodeAttention:
    """One query each of several sequences."""

    def __init__(self, spans: Sequence[Span], spec: AttentionSpec) -> None:
        self.spans, self.spec = spans, spec
        keys = spans[0].keys
        if len(spans) > 1:
            blocks_BM = blocks_side_by_side(spans)
            self.blocks_BM = mx.array(blocks_BM)
            keys = blocks_BM.shape[1] * spans[0].block_size
        self.mask: mx.array | None = None
        if len(spans) > 1 or spans[0].window:
            rows = [span.seen(np.array([span.start]), span.first + np.arange(keys)) for span in spans]
            self.mask = mx.array(np.stack(rows)[:, None])  # (B, 1, 1, S)

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        if len(self.spans) == 1:
            k_BKSH, v_BKSH = self.spans[0].read(keys), self.spans[0].read(values)
        else:
            k_BKSH, v_BKSH = (gather(memory, self.blocks_BM, self.spans[0].block_size) for memory in (keys, values))
        return attention_fused(q_TNH[:, :, None], k_BKSH, v_BKSH, self.mask, spec=self.spec)[:, :, 0]


class ChunkAttention:
    """Consecutive queries of one sequence."""

    def __init__(self, span: Span, spec: AttentionSpec) -> None:
        self.span, self.spec = span, spec
        self.mask: mx.array | None = None
        if span.window and span.stop > span.window:
            self.mask = mx.array(span.seen(np.arange(span.start, span.stop), np.arange(span.first, span.stop)))

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        q_1NTH = q_TNH.swapaxes(0, 1)[None]
        k_1KSH, v_1KSH = self.span.read(keys), self.span.read(values)
        mixed_1NTH = attention_fused(q_1NTH, k_1KSH, v_1KSH, self.mask, causal=self.mask is None, spec=self.spec)
        return mixed_1NTH[0].swapaxes(0, 1)

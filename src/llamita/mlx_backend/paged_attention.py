"""Attention of one step's queries over keys and values that lie in blocks.

Two ways: a batch of single queries, and a chunk of one sequence. Each takes the queries (T, N, H) and a layer's whole
memory (K, slots, H), of which it reads blocks that lie one after the other where they are, and gathers others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

from llamita.mlx_backend.attention import attention_fused
from llamita.plan import ScheduledChunk

LEAST_ALIKE = 0.75
"""Shortest context in a batch of single queries, as a share of its longest: what is computed in vain stays small."""


@dataclass(frozen=True)
class Span:
    """A chunk's queries and the blocks of all that they see: positions `first` .. stop - 1."""

    start: int
    stop: int
    blocks: np.ndarray
    first: int  # position at which blocks[0] begins
    block_size: int
    window: int

    @classmethod
    def of(cls, chunk: ScheduledChunk, table: np.ndarray, block_size: int, window: int) -> "Span":
        skipped = max(0, chunk.start - window + 1) // block_size if window else 0
        blocks = table[skipped : -(-chunk.end // block_size)]
        return cls(chunk.start, chunk.end, blocks, skipped * block_size, block_size, window)

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.stop - self.first

    @cached_property
    def begin(self) -> int | None:
        """The slot of the first position where the blocks lie one after the other and can be read where they are."""
        return int(self.blocks[0]) * self.block_size if (np.diff(self.blocks) == 1).all() else None

    @cached_property
    def blocks_M(self) -> mx.array:
        return mx.array(self.blocks)

    def seen(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Boolean (queries, keys), both given as positions: whether one sees the other."""
        back = queries[:, None] - keys
        return (back >= 0) & (back < self.window) if self.window else back >= 0

    def read(self, memory: mx.array) -> mx.array:
        """What the blocks hold, (1, K, S, H), S being `keys`."""
        if self.begin is not None:
            return memory[None, :, self.begin : self.begin + self.keys]
        return gather(memory, self.blocks_M[None], self.block_size)[:, :, : self.keys]


class Part(Protocol):
    """How some rows of a step attend, in every layer of a group."""

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array: ...


def gather(memory: mx.array, blocks_BM: mx.array, block_size: int) -> mx.array:
    """What blocks of a memory (K, slots, H) hold, those of a row one after the other: (B, K, S, H)."""
    K, _, H = memory.shape
    x_KBMXH = memory.reshape(K, -1, block_size, H)[:, blocks_BM]  # X: positions of a block
    return x_KBMXH.reshape(K, len(blocks_BM), -1, H).swapaxes(0, 1)


def alike(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Cut a run of single queries into batches of similar context, neighbours staying together."""
    begin = 0
    for end in range(1, len(spans) + 1):
        lengths = [len(span.blocks) for span in spans[begin : end + 1]]
        if end == len(spans) or min(lengths) < LEAST_ALIKE * max(lengths):
            yield spans[begin:end]
            begin = end


class DecodeAttention:
    """One query each of several sequences."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        keys = spans[0].keys
        if len(spans) > 1:
            longest = max(len(span.blocks) for span in spans)
            # filled up with a sequence's own last block: it reads nobody else's
            blocks_BM = np.stack([np.pad(span.blocks, (0, longest - len(span.blocks)), mode="edge") for span in spans])
            self.blocks_BM = mx.array(blocks_BM)
            keys = longest * spans[0].block_size
        self.mask: mx.array | None = None
        if len(spans) > 1 or spans[0].window:
            rows = [span.seen(np.array([span.start]), span.first + np.arange(keys)) for span in spans]
            self.mask = mx.array(np.stack(rows)[:, None])  # (B, 1, 1, S)

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        if len(self.spans) == 1:
            k_BKSH, v_BKSH = self.spans[0].read(keys), self.spans[0].read(values)
        else:
            k_BKSH, v_BKSH = (gather(memory, self.blocks_BM, self.spans[0].block_size) for memory in (keys, values))
        return attention_fused(q_TNH[:, :, None], k_BKSH, v_BKSH, self.mask)[:, :, 0]


class ChunkAttention:
    """Consecutive queries of one sequence."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.mask: mx.array | None = None
        if span.window and span.stop > span.window:
            self.mask = mx.array(span.seen(np.arange(span.start, span.stop), np.arange(span.first, span.stop)))

    def attend(self, q_TNH: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        q_1NTH = q_TNH.swapaxes(0, 1)[None]
        mixed_1NTH = attention_fused(
            q_1NTH, self.span.read(keys), self.span.read(values), self.mask, causal=self.mask is None
        )
        return mixed_1NTH[0].swapaxes(0, 1)

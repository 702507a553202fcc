"""Paged key/value memory: blocks of positions in one large array a layer, found through a sequence's table of blocks.

`PagedKVCache` is the memory; `PagedStep` is one step's use of it: where the new keys and values of all chunks go, and
what each chunk's queries attend to. Attention needs one verb of it, `attend`. Knows nothing of models or requests.

Letters beyond the usual: M blocks to be emptied.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llamita.backend.interface import BlockCopy, CacheLayout, ScheduledChunk
from llamita.backend.step_layout import alike
from llamita.backend.torch.infer.paged_attention import (
    ChunkAttention,
    DecodeAttention,
    ExactAttention,
    Part,
    Span,
    TableAttention,
    TableKernel,
)
from llamita.backend.torch.memory import own_memory
from llamita.model.config import AttentionSpec, ModelConfig

EXACT_ROWS = 16
"""In the exact mode every matrix product takes so many rows."""


class PagedKVCache:
    """Keys and values of every layer, (slots, K, H) each; slot `block * block_size + offset` holds one position.

    The layers of one attention window form a group (`CacheLayout.windows`), with tables of its own. With a
    `kernel` single queries are attended to by following these tables, and there is a block more, `spare_block`, that no
    sequence has.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernel: TableKernel | None = None,
    ) -> None:
        assert layout.windows == config.attention_windows
        self.layout, self.dtype, self.kernel = layout, dtype, kernel
        self.positions = config.max_position_embeddings
        self.group_of_layer = [layout.windows.index(config.window(i)) for i in range(config.num_hidden_layers)]
        self.specs = [config.attention(self.group_of_layer.index(group)) for group in range(len(layout.windows))]
        blocks = layout.blocks + (kernel is not None)
        shape = (blocks * layout.block_size, config.num_key_value_heads, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in self.group_of_layer]
        self.values = [_zeros(shape, dtype, device) for _ in self.group_of_layer]

    @property
    def spare_block(self) -> int:
        assert self.kernel is not None
        return self.layout.blocks

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copies whole blocks, in order."""
        size = self.layout.block_size
        for copy in copies:
            source, target = (slice(block * size, (block + 1) * size) for block in (copy.source, copy.target))
            for layer, group in enumerate(self.group_of_layer):
                if group == copy.group:
                    self.keys[layer][target] = self.keys[layer][source]
                    self.values[layer][target] = self.values[layer][source]

    @cached_property
    def addresses(self) -> np.ndarray:
        """Where the keys and the values of each layer lie, (L, 2)."""
        pairs = zip(self.keys, self.values, strict=True)
        return np.array([(keys.data_ptr(), values.data_ptr()) for keys, values in pairs], dtype=np.int64)

    def empty(self, layer: int, blocks_M: Tensor | None) -> None:
        """Puts zeros into blocks of a layer; None: into none."""
        if blocks_M is not None:
            for memory in (self.keys[layer], self.values[layer]):
                memory.unflatten(0, (-1, self.layout.block_size)).index_fill_(0, blocks_M, 0)

    def step(self, chunks: Sequence[ScheduledChunk], exact: bool = False) -> "PagedStep":
        """Returns the use of this memory by the chunks of one step, whose tokens follow one another in one row."""
        return PagedStep(self, chunks, exact)


class CacheStep(Protocol):
    """All that a model needs of a step: positions, and attention to all that came before."""

    @property
    def positions_1T(self) -> Tensor: ...

    @property
    def longest(self) -> int:
        """A number that no position reaches."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor: ...


class PagedStep:
    """Positions and attention of the chunks of one step, laid into one row of T tokens, single tokens first.

    In the exact mode the row is padded to a multiple of `EXACT_ROWS`.
    """

    def __init__(self, cache: PagedKVCache, chunks: Sequence[ScheduledChunk], exact: bool) -> None:
        self._cache = cache
        self._single = sum(len(chunk.tokens) == 1 for chunk in chunks)
        assert all(len(chunk.tokens) == 1 for chunk in chunks[: self._single]), "single tokens come first"
        device = cache.keys[0].device
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        self.tokens = len(positions)
        self.longest = int(positions.max()) + 1
        padding = -self.tokens % EXACT_ROWS if exact else 0
        self.padded = self.tokens + padding
        self.positions_1T = torch.from_numpy(np.pad(positions, (0, padding)))[None].to(device)
        size = cache.layout.block_size
        self._slots: list[Tensor] = []
        self._begun: list[Tensor | None] = []
        self._parts: list[list[tuple[slice, Part]]] = []
        for group, spec in enumerate(cache.specs):
            tables = [chunk.tables[group] for chunk in chunks]
            slots = [
                table[np.arange(chunk.start, chunk.end) // size] * size + np.arange(chunk.start, chunk.end) % size
                for table, chunk in zip(tables, chunks, strict=True)
            ]
            self._slots.append(torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device))
            self._begun.append(_begun(chunks, tables, size, device))
            spans = [Span.of(chunk, table, size, spec.window) for chunk, table in zip(chunks, tables, strict=True)]
            self._parts.append(list(self._divide(spans, spec, exact, device)))

    def _divide(
        self, spans: Sequence[Span], spec: AttentionSpec, exact: bool, device: torch.device
    ) -> Iterable[tuple[slice, Part]]:
        """Divides the rows as they are attended to: single tokens of similar context in one batch, each chunk alone."""
        row = 0
        if not exact:
            if self._cache.kernel is not None and self._single:
                yield slice(0, self._single), TableAttention.of(self._cache.kernel, spans[: self._single], spec, device)
                row = self._single
            for batch in alike(spans[row : self._single]):
                yield slice(row, row + len(batch)), DecodeAttention(batch, spec, device)
                row += len(batch)
            spans = spans[self._single :]
        for span in spans:
            rows = slice(row, row + span.queries)
            yield rows, ExactAttention(span, spec) if exact else ChunkAttention(span, spec, device)
            row = rows.stop

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Stores new keys and values, then returns the mix of values that each query sees: (T, N, H)."""
        group = self._cache.group_of_layer[layer]
        keys, values, slots_T = self._cache.keys[layer], self._cache.values[layer], self._slots[group]
        self._cache.empty(layer, self._begun[group])
        keys.index_copy_(0, slots_T, k_TKH[: self.tokens].to(keys.dtype))
        values.index_copy_(0, slots_T, v_TKH[: self.tokens].to(values.dtype))
        parts = self._parts[group]
        if len(parts) == 1 and self.padded == self.tokens:
            return parts[0][1].attend(q_TNH, keys, values)
        mixed_TNH = torch.zeros_like(q_TNH, memory_format=torch.contiguous_format)
        for rows, part in parts:
            mixed_TNH[rows] = part.attend(q_TNH[rows], keys, values)
        return mixed_TNH

    def probabilities(self, layer: int, q_TNH: Tensor) -> Tensor:
        """Returns the probabilities (N, T, S) with which the queries of the exact mode's only chunk have just looked at
        each key of their sequence."""
        ((rows, part),) = self._parts[self._cache.group_of_layer[layer]]
        assert isinstance(part, ExactAttention), "the fast kernels keep no probabilities"
        return part.probabilities(q_TNH[rows], self._cache.keys[layer])


def _begun(
    chunks: Sequence[ScheduledChunk], tables: Sequence[np.ndarray], size: int, device: torch.device
) -> Tensor | None:
    """Returns the blocks that the chunks begin and do not fill; None for none.

    They are emptied first: a batch reads the rest of them as well, to no effect unless an earlier sequence left NaN.
    """
    blocks = [
        table[chunk.end // size]
        for chunk, table in zip(chunks, tables, strict=True)
        if chunk.end % size and chunk.start <= chunk.end // size * size
    ]
    return torch.from_numpy(np.array(blocks, dtype=np.int64)).to(device) if blocks else None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Returns zeros whose memory, on a CPU, is taken from the system page by page as it is first written."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return own_memory(math.prod(shape), dtype).view(shape)

"""Paged key/value memory: blocks of positions in one large array a layer, found through a sequence's table of blocks.

`PagedKVCache` is the memory; `PagedStep` is one step's use of it: where the new keys and values of all chunks go, and
what each chunk's queries attend to. Attention needs one verb of it, `attend`. Arrays of MLX do not change, but one
that nobody else holds gives its memory to its successor: as long as a layer's array has no other name, an update
writes the new positions alone. Knows nothing of models or requests.

Letters beyond the usual: X slots to be emptied.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from llamita.backend.interface import BlockCopy, CacheLayout, ScheduledChunk
from llamita.backend.mlx.infer.paged_attention import ChunkAttention, DecodeAttention, Part, Span
from llamita.backend.step_layout import alike
from llamita.model.config import AttentionSpec, ModelConfig


class PagedKVCache:
    """Keys and values of every layer, (K, slots, H) each; slot `block * block_size + offset` holds one position.

    The layers of one attention window form a group (`CacheLayout.windows`), with tables of its own. Memory is taken
    when a block is first used, at least as much again as there is, up to the layout's.
    """

    def __init__(self, config: ModelConfig, layout: CacheLayout, dtype: mx.Dtype = mx.float32) -> None:
        assert layout.windows == config.attention_windows
        self.layout = layout
        self.group_of_layer = [layout.windows.index(config.window(i)) for i in range(config.num_hidden_layers)]
        self.specs = [config.attention(self.group_of_layer.index(group)) for group in range(len(layout.windows))]
        empty = mx.zeros((config.num_key_value_heads, 0, config.head_dim), dtype)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copies whole blocks, in order."""
        size = self.layout.block_size
        for copy in copies:
            self.reserve(copy.group, max(copy.source, copy.target) + 1)
            source, target = (slice(block * size, (block + 1) * size) for block in (copy.source, copy.target))
            for layer, group in enumerate(self.group_of_layer):
                if group == copy.group:
                    self.keys[layer][:, target] = self.keys[layer][:, source]
                    self.values[layer][:, target] = self.values[layer][:, source]

    def reserve(self, group: int, blocks: int) -> None:
        """Makes the memory of a group hold at least its first `blocks` blocks."""
        slots = blocks * self.layout.block_size
        for memory in (self.keys, self.values):
            for layer, layer_group in enumerate(self.group_of_layer):
                K, held, H = memory[layer].shape
                if layer_group == group and held < slots:
                    wanted = max(slots, min(2 * held, self.layout.blocks * self.layout.block_size))
                    more = mx.zeros((K, wanted - held, H), memory[layer].dtype)
                    memory[layer] = mx.concatenate([memory[layer], more], axis=1)

    def step(self, chunks: Sequence[ScheduledChunk]) -> "PagedStep":
        """Returns the use of this memory by the chunks of one step, whose tokens follow one another in one row."""
        return PagedStep(self, chunks)


class PagedStep:
    """Positions and attention of the chunks of one step, laid into one row of T tokens, single tokens first."""

    def __init__(self, cache: PagedKVCache, chunks: Sequence[ScheduledChunk]) -> None:
        self._cache = cache
        self._single = sum(len(chunk.tokens) == 1 for chunk in chunks)
        assert all(len(chunk.tokens) == 1 for chunk in chunks[: self._single]), "single tokens come first"
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        self.positions_1T = mx.array(positions[None].astype(np.int32))
        size = cache.layout.block_size
        self._slots: list[slice | mx.array] = []
        self._begun: list[mx.array | None] = []
        self._parts: list[list[tuple[slice, Part]]] = []
        for group, spec in enumerate(cache.specs):
            tables = [chunk.tables[group] for chunk in chunks]
            slots = np.concatenate(
                [
                    table[np.arange(chunk.start, chunk.end) // size] * size + np.arange(chunk.start, chunk.end) % size
                    for table, chunk in zip(tables, chunks, strict=True)
                ]
            )
            spans = [Span.of(chunk, table, size, spec.window) for chunk, table in zip(chunks, tables, strict=True)]
            cache.reserve(group, max(int(span.blocks.max()) for span in spans) + 1)
            begin, together = int(slots[0]), (np.diff(slots) == 1).all()
            self._slots.append(slice(begin, begin + len(slots)) if together else mx.array(slots.astype(np.int32)))
            self._begun.append(_begun(chunks, tables, size))
            self._parts.append(list(self._divide(spans, spec)))

    def _divide(self, spans: Sequence[Span], spec: AttentionSpec) -> Iterable[tuple[slice, Part]]:
        """Divides the rows as they are attended to: single tokens of similar context in one batch, each chunk alone."""
        row = 0
        for batch in alike(spans[: self._single]):
            yield slice(row, row + len(batch)), DecodeAttention(batch, spec)
            row += len(batch)
        for span in spans[self._single :]:
            yield slice(row, row + span.queries), ChunkAttention(span, spec)
            row += span.queries

    def attend(self, layer: int, q_TNH: mx.array, k_TKH: mx.array, v_TKH: mx.array) -> mx.array:
        """Stores new keys and values, then returns the mix of values that each query sees: (T, N, H)."""
        group, keys, values = self._cache.group_of_layer[layer], self._cache.keys, self._cache.values
        for memory, x_TKH in ((keys, k_TKH), (values, v_TKH)):
            if (begun_X := self._begun[group]) is not None:
                memory[layer][:, begun_X] = 0
            memory[layer][:, self._slots[group]] = x_TKH.swapaxes(0, 1)
        mixed = [part.attend(q_TNH[rows], keys[layer], values[layer]) for rows, part in self._parts[group]]
        return mixed[0] if len(mixed) == 1 else mx.concatenate(mixed)


def _begun(chunks: Sequence[ScheduledChunk], tables: Sequence[np.ndarray], size: int) -> mx.array | None:
    """Returns the slots of blocks that the chunks begin and do not fill; None for none.

    They are emptied first: a batch reads the rest of them as well, to no effect unless an earlier sequence left NaN.
    """
    blocks = [
        table[chunk.end // size]
        for chunk, table in zip(chunks, tables, strict=True)
        if chunk.end % size and chunk.start <= chunk.end // size * size
    ]
    if not blocks:
        return None
    return mx.array((np.array(blocks, dtype=np.int32)[:, None] * size + np.arange(size, dtype=np.int32)).ravel())

"""How the chunks of a step lie one after the other in a row of tokens, and which positions each of them sees.

What the backends share of that, in plain Python and numpy. Knows no tensor and no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

from llamita.backend.interface import SampleSpec, ScheduledChunk

LEAST_ALIKE = 0.75
"""Shortest context in a batch of single queries, as a share of its longest: what is computed in vain stays small."""


def packing_order(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """The places of the chunks in the order to pack them: single tokens first, those of similar context together."""
    return sorted(range(len(chunks)), key=lambda i: (len(chunks[i].tokens) > 1, chunks[i].end))


def begins(chunks: Sequence[ScheduledChunk]) -> Iterator[tuple[ScheduledChunk, int]]:
    """Each packed chunk with the row of its first token."""
    begin = 0
    for chunk in chunks:
        yield chunk, begin
        begin += len(chunk.tokens)


def rows_drawn(chunks: Sequence[ScheduledChunk]) -> tuple[list[int], list[SampleSpec], list[int]]:
    """The rows after which tokens are to be drawn, what is asked of each, and whose they are: ids of sequences."""
    rows: list[int] = []
    specs: list[SampleSpec] = []
    ids: list[int] = []
    for chunk, begin in begins(chunks):
        rows += [begin + sample.position - 1 - chunk.start for sample in chunk.samples]
        specs += chunk.samples
        ids += [chunk.sequence_id] * len(chunk.samples)
    return rows, specs, ids


def rows_wanted(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """The rows after which a token is drawn or scored, in order."""
    wanted = set(rows_drawn(chunks)[0])
    for chunk, begin in begins(chunks):
        wanted |= set(range(begin, begin + len(chunk.targets)))
    return sorted(wanted)


@dataclass(frozen=True)
class BlockSpan:
    """A chunk's queries and the blocks of all that they see: positions `first` .. stop - 1."""

    start: int
    stop: int
    blocks: np.ndarray
    first: int  # position at which blocks[0] begins
    block_size: int
    window: int

    @classmethod
    def of(cls, chunk: ScheduledChunk, table: np.ndarray, block_size: int, window: int) -> Self:
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

    def seen(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Boolean (queries, keys), both given as positions: whether one sees the other."""
        back = queries[:, None] - keys
        return (back >= 0) & (back < self.window) if self.window else back >= 0


AnySpan = TypeVar("AnySpan", bound=BlockSpan)


def alike(spans: Sequence[AnySpan]) -> Iterator[Sequence[AnySpan]]:
    """Cut a run of single queries into batches of similar context, neighbours staying together."""
    begin = 0
    for end in range(1, len(spans) + 1):
        lengths = [len(span.blocks) for span in spans[begin : end + 1]]
        if end == len(spans) or min(lengths) < LEAST_ALIKE * max(lengths):
            yield spans[begin:end]
            begin = end


def blocks_side_by_side(spans: Sequence[BlockSpan]) -> np.ndarray:
    """The blocks of several spans as one array (spans, M), shorter ones filled up with a sequence's own last block: it
    reads nobody else's."""
    longest = max(len(span.blocks) for span in spans)
    return np.stack([np.pad(span.blocks, (0, longest - len(span.blocks)), mode="edge") for span in spans])

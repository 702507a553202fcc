"""A mixture of sources: which source each row of a step comes from, and which row of it.

Both are a pure function of (seed, step), so a batch depends neither on the processes that share it nor on what was read
before, and resuming needs only the number of the step. The rows of all steps, laid end to end, are cut into blocks. A
block holds as many rows of each source as its weight says, to within one over any number of blocks, in an order drawn
for that block; each source gives its rows in epochs of its own, each row once an epoch, in an order drawn for that
epoch. This file knows nothing about what is in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from llamita.data.batches import Batch, BatchIterator, BatchSource, collate, random_words
from llamita.data.packing import Row

BLOCK = 1024
"""Rows in a block; changing it changes what every run reads."""


class RowSource(BatchSource, Protocol):
    """A source whose rows can be taken one by one: `packing.Rows`."""

    def row(self, index: int) -> Row: ...


class MixedRows:
    """The rows of several sources under one numbering: those of the first, then those of the second, and so on."""

    def __init__(self, sources: Mapping[str, RowSource]) -> None:
        """All of one RowsConfig."""
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.config = self.sources[0].config
        assert all(source.config == self.config for source in self.sources)
        for name, source in sources.items():
            if len(source) == 0:
                raise ValueError(
                    f"the source {name} has no rows; prepare it with at least one document, or leave it out"
                )
        self.firsts = np.concatenate([[0], np.cumsum([len(source) for source in self.sources])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def row(self, index: int) -> Row:
        """Row `index` of all."""
        _, source, row = self.place(index)
        return source.row(row)

    def place(self, index: int) -> tuple[str, RowSource, int]:
        """The source of row `index` of all by its name and itself, and the number that the row has there."""
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.names[number], self.sources[number], index - int(self.firsts[number])

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Returns some rows, of whichever sources, as a batch."""
        return collate([self.row(int(index)) for index in row_ids], row_ids)


class MixtureIterator(BatchIterator):
    """Batches of rows of several sources, in proportion to `weights`; shared and resumed as those of one source.

    A batch's metrics are the rows read of each source up to it, and its epochs: passes over the source, with the
    fraction; in random mode, counted by tokens read.
    """

    rows: MixedRows

    def __init__(self, rows: MixedRows, weights: Sequence[float], batch_size: int, seed: int) -> None:
        """`weights`, one a source, are positive; only their proportions count."""
        super().__init__(rows, batch_size, seed)
        self.weights = normalised(weights, len(rows.sources))
        # Exact: the same on every machine, however many rows were read.
        self._shares = [Fraction(weight) for weight in self.weights]
        self._heaviest = max(range(len(self.weights)), key=self.weights.__getitem__)
        self._block = max(BLOCK, len(self.weights) ** 2)
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        self._orders = [_SourceOrder(source, seed, number) for number, source in enumerate(rows.sources, start=1)]

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        counts = self.counts((step + 1) * self.batch_size)
        metrics: dict[str, float] = {f"rows/{name}": count for name, count in zip(self.rows.names, counts, strict=True)}
        for name, source, count in zip(self.rows.names, self.rows.sources, counts, strict=True):
            metrics[f"epochs/{name}"] = round(count / _rows_in_an_epoch(source), 4)
        return Batch(batch.tokens_BT, batch.labels_BT, batch.segments_BT, batch.row_ids, metrics=metrics)

    def row_ids(self, step: int) -> np.ndarray:
        start = step * self.batch_size
        sources = self.sources_of(start, self.batch_size)
        before = self.counts(start)
        row_ids = np.empty(self.batch_size, dtype=np.int64)
        for number, order in enumerate(self._orders):
            of_this = sources == number
            positions = np.arange(before[number], before[number] + int(of_this.sum()), dtype=np.int64)
            row_ids[of_this] = self.rows.firsts[number] + order.row_ids(positions)
        return row_ids

    def sources_of(self, start: int, count: int) -> np.ndarray:
        """The sources of `count` rows of the run from the `start`-th on: int64 [count], their numbers from 0."""
        first, last = start // self._block, (start + count - 1) // self._block
        found = np.concatenate([self._sources_in(block) for block in range(first, last + 1)])
        return found[start - first * self._block :][:count]

    def counts(self, end: int) -> list[int]:
        """The rows of each source among the first `end` of the run."""
        block, rest = divmod(end, self._block)
        counts = self._counts_before(block)
        if rest:
            inside = np.bincount(self._sources_in(block)[:rest], minlength=len(counts))
            counts = [before + int(more) for before, more in zip(counts, inside, strict=True)]
        return counts

    @property
    def epoch(self) -> float:
        """The passes over the source that has had most of them."""
        counts = self.counts(self.step * self.batch_size)
        return max(count / _rows_in_an_epoch(s) for count, s in zip(counts, self.rows.sources, strict=True))

    def _identity(self) -> dict[str, Any]:
        rows = [len(source) for source in self.rows.sources]
        return {**super()._identity(), "rows_of_sources": rows, "weights": list(self.weights)}

    def _counts_before(self, block: int) -> list[int]:
        """The rows of each source before a block: the nearest whole number; what is left is the heaviest source's."""
        total = block * self._block
        counts = [round(total * share) for share in self._shares]
        counts[self._heaviest] += total - sum(counts)
        return counts

    def _sources_in(self, block: int) -> np.ndarray:
        if block != self._drawn[0]:
            counts = np.subtract(self._counts_before(block + 1), self._counts_before(block))
            in_turn = np.repeat(np.arange(len(counts)), counts)
            order = np.argsort(random_words(self.seed, block, self._block), kind="stable")
            self._drawn = block, in_turn[order]
        return self._drawn[1]


def normalised(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Weights that sum to one; ValueError where they are not `count` positive numbers."""
    if len(weights) != count:
        raise ValueError(f"there are {len(weights)} weights for {count} sources; give one for each, in their order")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights={tuple(weights)} must be positive numbers; leave a source out to give it no weight")
    return tuple(weight / sum(weights) for weight in weights)


class _SourceOrder:
    """The order in which a source gives its rows: an own one for each epoch or, in random mode, draws without end."""

    def __init__(self, source: BatchSource, seed: int, stream: int) -> None:
        self._count, self._seed, self._stream = len(source), seed, stream
        self._random = source.config.mode == "random"
        self._period = BLOCK if self._random else self._count
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def row_ids(self, positions: np.ndarray) -> np.ndarray:
        """The rows at some consecutive positions of this order."""
        periods, places = np.divmod(positions, self._period)
        row_ids = np.empty_like(positions)
        for period in np.unique(periods).tolist():
            row_ids[periods == period] = self._order(period)[places[periods == period]]
        return row_ids

    def _order(self, period: int) -> np.ndarray:
        if period != self._drawn[0]:
            words = random_words(self._seed, period, self._period, self._stream)
            order = (
                (words % np.uint64(self._count)).astype(np.int64) if self._random else np.argsort(words, kind="stable")
            )
            self._drawn = period, order
        return self._drawn[1]


def _rows_in_an_epoch(source: BatchSource) -> int:
    return max(1, len(source) // source.config.sequence_length) if source.config.mode == "random" else len(source)

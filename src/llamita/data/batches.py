"""The order of rows: resumable training batches that any number of processes can share, and evaluation batches.

The rows of a step are a pure function of (seed, step), so a batch does not depend on how many processes share it, and
resuming needs only the number of the step. This file knows nothing about what is in a row, devices or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # packing.py makes batches of its rows
    from llamita.data.packing import Row, RowsConfig

IGNORE_INDEX = -100
"""The label of a position whose prediction is not scored (what PyTorch calls ignore_index)."""


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model, already shifted: labels_BT[b, t] is the token after tokens_BT[b, t].

    tokens_BT: int32. labels_BT: int32, IGNORE_INDEX where nothing is scored. segments_BT: int32 of the inputs, or None
    where every row is one causal sequence (padding, if any, behind it); 0 is padding. row_ids: int64 [B], the rows'
    numbers. extras: what an objective needs besides, arrays of B rows each (see backend/objectives.py). row_is_target:
    the loss is a mean over rows, not over scored positions. metrics: those of the whole batch for the record of an
    update.
    """

    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    segments_BT: np.ndarray | None
    row_ids: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    row_is_target: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        """The number of targets that the loss is a mean over: scored positions, or rows."""
        return len(self.row_ids) if self.row_is_target else int((self.labels_BT != IGNORE_INDEX).sum())

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        segments_BT = None if self.segments_BT is None else self.segments_BT[part]
        extras = {name: array[part] for name, array in self.extras.items()}
        return Batch(
            self.tokens_BT[part], self.labels_BT[part], segments_BT, self.row_ids[part], extras, self.row_is_target
        )


class Batches(Protocol):
    """An endless, resumable order of training batches, such as BatchIterator."""

    def next(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class BatchSource(Protocol):
    """Rows by number, and batches of them: `packing.Rows`, `examples.ConversationRows`, labelled texts, pairs."""

    @property
    def config(self) -> RowsConfig: ...
    def __len__(self) -> int: ...
    def batch(self, row_ids: np.ndarray) -> Batch:
        """Returns the rows of these numbers, int64 [B], as a batch."""


class BatchIterator:
    """Batches without end: epochs follow each other, and a batch may hold the end of one and the start of the next.

    pad and pack rows come in a permutation per epoch keyed by (seed, epoch), so each epoch visits each row exactly
    once; random rows come at offsets keyed by (seed, step). Several processes read the same batch and share it out
    themselves (`backend.group.share`), so a run may go on with another number of them.
    """

    def __init__(self, rows: BatchSource, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if len(rows) == 0:
            raise ValueError("there are no rows to iterate over; prepare a split with at least one document")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.step = 0
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __iter__(self) -> BatchIterator:
        return self

    def next(self) -> Batch:
        """The batch of the current step; then the step is one further."""
        batch = self.batch(self.step)
        self.step += 1
        return batch

    __next__ = next

    def batch(self, step: int) -> Batch:
        """The batch of any step; the iterator stays where it is."""
        return self.rows.batch(self.row_ids(step))

    def row_ids(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step: int64 [batch_size]."""
        count = len(self.rows)
        if self.rows.config.mode == "random" and self.shuffle:
            return (random_words(self.seed, step, self.batch_size) % np.uint64(count)).astype(np.int64)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(positions, count)
        if not self.shuffle:
            return places
        row_ids = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            row_ids[epochs == epoch] = self._epoch_order(epoch)[places[epochs == epoch]]
        return row_ids

    @property
    def epoch(self) -> float:
        """The passes over the rows so far, with the fraction; for random rows, counted by tokens read."""
        rows = len(self.rows)
        if self.rows.config.mode == "random":
            rows = max(1, rows // self.rows.config.sequence_length)
        return self.step * self.batch_size / rows

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` needs to go on exactly here; JSON-able."""
        return {"step": self.step, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken. ValueError where rows, seed or batch size are not those of that run."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the saved run read rows with {name}={state.get(name)!r}, this one has {value!r}")
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        config = self.rows.config
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "rows": len(self.rows),
            "mode": config.mode,
            "sequence_length": config.sequence_length,
            "within_documents": config.within_documents,
        }

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Sorting raw Philox words, unlike Generator.permutation, is the same in every version of numpy.
            words = random_words(self.seed, epoch, len(self.rows))
            self._order = np.argsort(words, kind="stable")
            self._epoch = epoch
        return self._order


def evaluation_batches(rows: BatchSource, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """At most `limit` rows (0: all), evenly spaced and in order, each once; the last batch may be smaller."""
    count = min(limit, len(rows)) or len(rows)
    row_ids = np.arange(count, dtype=np.int64) * len(rows) // max(count, 1)
    for start in range(0, count, batch_size):
        yield rows.batch(row_ids[start : start + batch_size])


def collate(rows: Sequence[Row], row_ids: np.ndarray) -> Batch:
    """Stack rows of one length and shift them.

    Segments are left out where each row is one document before its padding: causal attention alone then keeps what is
    scored from the padding. Where one row has several, those without become a single segment.
    """
    tokens = np.stack([row.tokens for row in rows])
    scored = np.stack([row.label_mask for row in rows])
    segments_BT = None
    if any(row.segments is not None and row.segments.max() > 1 for row in rows):
        ones = np.ones(tokens.shape[1], dtype=np.int32)
        segments_BT = np.stack([ones if row.segments is None else row.segments for row in rows])[:, :-1]
    labels_BT = np.where(scored[:, 1:], tokens[:, 1:], np.int32(IGNORE_INDEX))
    return Batch(tokens[:, :-1], labels_BT, segments_BT, np.asarray(row_ids, dtype=np.int64))


def random_words(seed: int, number: int, count: int, stream: int = 0) -> np.ndarray:
    """`count` uint64 words of the Philox counter-based generator keyed by (seed, number); each stream has its own."""
    key = np.array([seed % 2**64, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)).random_raw(count)

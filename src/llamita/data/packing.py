"""From token documents to rows of sequence_length + 1 tokens: padded, packed, fitted, or random windows.

A row is one block: T inputs and, one place to the right, T targets. This file decides which tokens share a row and
which targets are scored. It knows nothing about files, batches, order or epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np

from llamita.data.batches import Batch, collate
from llamita.data.best_fit import best_fit

RowMode = Literal["pad", "pack", "best-fit", "random"]


class TokenDocuments(Protocol):
    """Documents of token ids laid end to end: what Rows reads. TokenShards is one; InMemoryDocuments is another."""

    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def document_starts(self) -> np.ndarray:
        """int64 or uint64 [num_documents + 1]: where each document starts in the stream, then num_tokens."""
        ...

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length of the stream, across documents."""
        ...


@dataclass(frozen=True)
class RowsConfig:
    """The options by which documents become rows."""

    mode: RowMode = "pack"
    """pad: each document padded to whole rows; pack: documents back to back; best-fit: whole documents, as many as fit
    in a row; random: windows at random offsets."""
    sequence_length: int = 256
    """Tokens a model reads per row, T; a row stores T + 1."""
    within_documents: bool = False
    """Keep attention inside a document, and never score a document's first token from the previous document's last."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(RowMode):
            raise ValueError(f"mode={self.mode!r} is not a way to make rows; use pad, pack, best-fit or random")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 1")

    def for_evaluation(self) -> RowsConfig:
        """The same, but every target once (not at random), and whole documents where attention stays inside them, so
        that a loss is over each from its beginning."""
        if self.within_documents:
            return replace(self, mode="pad", within_documents=False)
        return replace(self, mode="pack") if self.mode == "random" else self


@dataclass(frozen=True)
class Row:
    """One block of T + 1 tokens.

    tokens: int32 [T+1]. label_mask: bool [T+1], True where the token is scored as a target; label_mask[0] is always
    False, since nothing in the row precedes it. segments: int32 [T+1] or None; documents count from 1, padding is 0,
    and attention stays inside equal numbers. None means that all tokens see each other (causally).
    """

    tokens: np.ndarray
    label_mask: np.ndarray
    segments: np.ndarray | None


class Rows:
    """The rows of one split, by number; a pure function of the documents and the configuration.

    pad: a document of n tokens takes ceil(n / (T+1)) rows, which do not overlap, so the first token of each row is not
    scored; the rest of its last row is padding (segment 0, never a target, never predicted from).
    pack: row i holds the stream from token i*T on, so neighbours share one token and every token but the first is a
    target exactly once. The last row is moved back to end with the stream, and scores only what is left. With
    within_documents the first token of a document is not scored.
    best-fit: rows begin with a document and hold whole ones, placed by `best_fit` so that little is left over; the rest
    of a row is padding. A document longer than a row is cut into rows of its own and what is left of it, whose first
    token is not scored. With within_documents no document's first token is scored.
    random: row i starts at token i, for any i < len(rows); the iterator draws the starts.

    Only a corpus shorter than one block gives a padded row in pack mode; random refuses it (ValueError).
    """

    def __init__(
        self,
        documents: TokenDocuments,
        config: RowsConfig,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        if documents.num_tokens < 2:
            raise ValueError(f"the split has {documents.num_tokens} tokens; at least 2 are needed to predict one")
        self.documents = documents
        self.config = config
        self.block = config.sequence_length + 1
        # Padding is masked everywhere, so any valid id will do where the tokenizer has none of its own.
        self.pad_id = next((i for i in (pad_id, eos_id, bos_id) if i is not None), 0)
        self._starts = documents.document_starts
        if config.mode == "pad":
            lengths = np.diff(self._starts).astype(np.int64)
            # rows_before[d] = rows of all documents before document d.
            self._rows_before = np.concatenate([[0], np.cumsum(-(-lengths // self.block))])
            self._length = int(self._rows_before[-1])
        elif config.mode == "best-fit":
            self._placement = best_fit(self._starts, self.block)
            self._length = len(self._placement)
        elif config.mode == "pack":
            self._length = -(-(documents.num_tokens - 1) // config.sequence_length)
        else:
            self._length = documents.num_tokens - config.sequence_length
            if self._length < 1:
                raise ValueError(
                    f"the split has {documents.num_tokens} tokens, fewer than one random window of {self.block}; "
                    f"use a sequence_length of at most {documents.num_tokens - 1} or mode=pad"
                )

    def __len__(self) -> int:
        return self._length

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Returns some rows as a batch."""
        return collate([self.row(int(i)) for i in row_ids], row_ids)

    def row(self, index: int) -> Row:
        """Row `index`, 0 <= index < len(rows)."""
        spans = self.spans(index)
        if self.config.mode == "best-fit":
            return self._fitted(spans)
        start, length = spans[0]
        tokens = self.documents.window(start, length)
        if self.config.mode == "pad":
            return self._padded(tokens, np.ones(length, dtype=np.int32))
        is_first = np.zeros(length, dtype=bool)
        segments = None
        if self.config.within_documents:
            low, high = np.searchsorted(self._starts, (start + 1, start + length), side="left")
            is_first[np.asarray(self._starts[low:high]).astype(np.int64) - start] = True
            segments = 1 + np.cumsum(is_first, dtype=np.int32)
        row = self._padded(tokens, segments)
        row.label_mask[:length] &= ~is_first
        if self.config.mode == "pack":  # a last row that was moved back begins with targets of the row before
            row.label_mask[: index * self.config.sequence_length + 1 - start] = False
        return row

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Returns the stretches of the stream that row `index` holds before padding: first token, number of tokens.

        There is one in every mode but best-fit, where there is one for each document or part of one.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        if self.config.mode == "best-fit":
            return self._placement.pieces(index)
        if self.config.mode == "pad":
            document = int(np.searchsorted(self._rows_before, index, side="right")) - 1
            start = int(self._starts[document]) + (index - int(self._rows_before[document])) * self.block
            return [(start, min(self.block, int(self._starts[document + 1]) - start))]
        start = index
        if self.config.mode == "pack":
            start = max(0, min(index * self.config.sequence_length, self.documents.num_tokens - self.block))
        return [(start, min(self.block, self.documents.num_tokens - start))]

    def _fitted(self, spans: list[tuple[int, int]]) -> Row:
        tokens = np.concatenate([self.documents.window(start, length) for start, length in spans])
        starts, lengths = np.array(spans, dtype=np.int64).T
        segments = None
        if self.config.within_documents:
            segments = np.repeat(np.arange(1, len(spans) + 1, dtype=np.int32), lengths)
        row = self._padded(tokens, segments)
        places = np.cumsum(lengths) - lengths
        begins = np.asarray(self._starts)[np.searchsorted(self._starts, starts)] == starts
        row.label_mask[places if self.config.within_documents else places[~begins]] = False
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self.row(i) for i in range(self._length))

    def _padded(self, tokens: np.ndarray, segments: np.ndarray | None) -> Row:
        """Pad to a whole block, with every real token but the first a target."""
        length = len(tokens)
        block_tokens = np.full(self.block, self.pad_id, dtype=np.int32)
        block_tokens[:length] = tokens
        label_mask = np.zeros(self.block, dtype=bool)
        label_mask[1:length] = True
        if length < self.block and segments is None:
            segments = np.ones(length, dtype=np.int32)
        block_segments = None
        if segments is not None:
            block_segments = np.zeros(self.block, dtype=np.int32)
            block_segments[:length] = segments
        return Row(block_tokens, label_mask, block_segments)


class InMemoryDocuments:
    """Token documents held in memory, for tests and small experiments."""

    def __init__(self, documents: Sequence[Sequence[int] | np.ndarray]) -> None:
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        self.tokens = np.concatenate([np.zeros(0, dtype=np.int32), *arrays])
        self.document_starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]

    def window(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def strided_windows(tokens: np.ndarray, sequence_length: int, stride: int) -> Iterator[Row]:
    """Windows over one sequence of tokens in which every token but the first is scored exactly once.

    The first window scores all its targets; each later one starts `stride` tokens further and scores only its last
    `stride` targets, so those are predicted from at least sequence_length - stride + 1 tokens of context (a sliding
    window, as in the perplexity guide of transformers). The last window is moved back to end with the sequence and
    scores what is left. A sequence shorter than a block is one shorter window; fewer than two tokens give none.

    Validation loss = sum of nats over the scored targets / their number; with stride = sequence_length the windows
    score the same targets as packed rows do.
    """
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"stride={stride} must be between 1 and sequence_length={sequence_length}")
    tokens = np.asarray(tokens, dtype=np.int32)
    next_target = 1
    while next_target < len(tokens):
        end = sequence_length + 1 if next_target == 1 else next_target + stride
        end = min(end, len(tokens))
        start = max(0, end - sequence_length - 1)
        label_mask = np.arange(start, end) >= next_target
        yield Row(tokens[start:end], label_mask, None)
        next_target = end

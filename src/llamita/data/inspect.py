"""A look at prepared data as a model sees it: counts over rows, documents in both splits, a row as marked text.

Knows nothing about terminals or colours: it says which stretches of a row are scored, read or padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from llamita.data.packing import Row, Rows
from llamita.data.shards import TokenShards
from llamita.text.tokenizer import Tokenizer

Mark = Literal["scored", "read", "padding"]


@dataclass(frozen=True)
class RowCounts:
    """Counts over `looked_at` rows, spread evenly over all `rows`."""

    rows: int
    looked_at: int
    targets: int
    """Tokens that are scored."""
    padding: int
    """Tokens that are padding."""
    truncated: int
    """Rows that end inside a document."""
    empty: int
    """Rows that hold nothing but padding."""
    fully_masked: int
    """Rows in which nothing is scored."""


def count_rows(rows: Rows, limit: int = 50_000) -> RowCounts:
    """Count over every row, or over `limit` of them where there are more."""
    starts = rows.documents.document_starts
    looked_at = min(limit, len(rows))
    targets = padding = truncated = empty = fully_masked = 0
    for i in range(looked_at):
        index = i * len(rows) // looked_at
        row = rows.row(index)
        spans = rows.spans(index)
        length = sum(length for _, length in spans)
        scored = int(row.label_mask.sum())
        targets += scored
        padding += rows.block - length
        ends = [start + length for start, length in spans]
        truncated += any(starts[np.searchsorted(starts, ends)] != ends)
        empty += length == 0
        fully_masked += scored == 0
    return RowCounts(len(rows), looked_at, targets, padding, truncated, empty, fully_masked)


def documents_of_row(rows: Rows, index: int) -> str:
    """Says in words which documents of the split row `index` has tokens of, by their numbers from 0."""
    starts = np.asarray(rows.documents.document_starts[:-1]).astype(np.int64)
    found: list[int] = []
    for start, length in rows.spans(index):
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = max(first, int(np.searchsorted(starts, start + length, side="left")) - 1)
        found += range(first, last + 1)
    numbers = sorted(found)
    if len(numbers) == 1:
        return f"document {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"documents {numbers[0]} to {numbers[-1]}"
    return f"documents {', '.join(map(str, numbers))}"


def documents_cut(rows: Rows) -> int:
    """Counts documents that no row holds whole; in random mode, those that no window could hold."""
    starts = np.asarray(rows.documents.document_starts).astype(np.int64)
    begins, ends = starts[:-1], starts[1:]
    if rows.config.mode != "pack":
        return int((ends - begins > rows.block).sum())
    step = rows.config.sequence_length
    in_its_row = ends <= begins // step * step + rows.block
    in_the_last = begins >= rows.documents.num_tokens - rows.block  # which is moved back to end with the stream
    return int((~(in_its_row | in_the_last)).sum())


def documents_in_both(train: TokenShards, validation: TokenShards) -> int:
    """Counts validation documents that are also training documents, token for token; memory grows with validation."""
    digests = [_digest(validation.document(i)) for i in range(validation.num_documents)]
    wanted = set(digests)
    found = {digest for i in range(train.num_documents) if (digest := _digest(train.document(i))) in wanted}
    return sum(digest in found for digest in digests)


def marked_text(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[Mark, str, int]]:
    """A row as stretches of (mark, text, number of tokens). Special tokens appear by name, padding has no text."""
    for mark, group in groupby(range(len(row.tokens)), key=lambda j: _mark(row, j)):
        ids = row.tokens[list(group)].tolist()
        # Not tokenizer.decode, which takes the space from the front of what it thinks is the start of a text.
        text = b"" if mark == "padding" else b"".join(_bytes(token_id, tokenizer) for token_id in ids)
        yield mark, text.decode(errors="replace"), len(ids)


def _bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    if token_id in tokenizer.special_ids:
        return tokenizer.decode([token_id], skip_special=False).encode()
    return tokenizer.token_bytes(token_id)


def _mark(row: Row, place: int) -> Mark:
    if row.segments is not None and row.segments[place] == 0:
        return "padding"
    return "scored" if row.label_mask[place] else "read"


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens).view(np.uint8).data, digest_size=16).digest()

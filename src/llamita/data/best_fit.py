"""Best-fit-decreasing packing: which stretches of a stream of documents share a row, so that few documents are cut.

Documents longer than a row are first cut into pieces of a row's length; what is left of them, and all other documents,
are placed from the longest to the shortest, each into the row with the least room that still holds it (Ding et al.
2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830). Knows nothing of tokens, files or targets.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """The pieces of every row.

    Row r holds the pieces row_starts[r] .. row_starts[r + 1], in this order. row_starts: int64 [rows + 1]. starts:
    int64 [pieces], where a piece begins in the stream. lengths: int32 [pieces].
    """

    row_starts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """Start and length of each piece of a row."""
        part = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return list(zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True))


def best_fit(document_starts: np.ndarray, block: int) -> Placement:
    """Places documents (starts int64 [documents + 1]) into rows of `block` tokens.

    In a row, beginnings of documents come before the rest of a long one, each in the order of the stream; so a row
    begins with a document unless it holds nothing but parts of long ones. Rows are in the order of their first pieces.
    Ten million documents take some seconds, and 60 bytes each.
    """
    begins, ends = np.asarray(document_starts[:-1]), np.asarray(document_starts[1:])
    lengths = (ends - begins).astype(np.int64)
    whole = (lengths // block).astype(np.int32)  # pieces that fill a row each
    rest = (lengths % block).astype(np.int32)
    del lengths
    row_of = _place(rest, block)
    rows = int(row_of.max(initial=-1)) + 1

    # The last pieces of documents, then the pieces that fill a row each.
    last = np.flatnonzero(rest)
    number_in_document = _count_up(whole)
    filled = np.arange(rows, rows + len(number_in_document), dtype=np.int32)
    starts = np.concatenate(
        [
            begins[last].astype(np.int64) + whole[last].astype(np.int64) * block,
            np.repeat(begins, whole).astype(np.int64) + number_in_document * block,
        ]
    )
    pieces = np.concatenate([rest[last], np.full(len(filled), block, dtype=np.int32)])
    row_of_piece = np.concatenate([row_of[last], filled])
    continues = np.concatenate([whole[last] > 0, number_in_document > 0])
    del whole, rest, row_of, last, number_in_document, filled

    order = np.lexsort((starts, continues, row_of_piece))
    del continues
    starts, pieces, row_of_piece = starts[order], pieces[order], row_of_piece[order]
    del order
    first = np.flatnonzero(np.diff(row_of_piece, prepend=np.int32(-1)))  # of each row, among the pieces
    del row_of_piece
    sizes = np.diff(first, append=len(starts))
    by_start = np.argsort(starts[first], kind="stable")
    sizes, first = sizes[by_start], first[by_start]
    order = np.repeat(first, sizes) + _count_up(sizes)
    return Placement(np.concatenate([[0], np.cumsum(sizes)]), starts[order], pieces[order])


def _place(lengths: np.ndarray, block: int) -> np.ndarray:
    """The row of each piece, int32; -1 for those of length 0, which need none.

    Pieces of one length are placed together. Among rows with equal room, the one that has had it longest comes first;
    pieces of equal length come in their order. So at a given room, the first row takes as many pieces as fit, then the
    next one does: what is left in it is less room than any other row has that could take one.
    """
    by_length = np.argsort(lengths, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(lengths, minlength=block + 1))
    rooms: dict[int, deque[np.ndarray]] = {}  # rows, in groups, by the room in them
    in_order: list[int] = []  # the keys of `rooms`
    row_of = np.full(len(lengths), -1, dtype=np.int32)
    opened = 0
    for length in range(block, 0, -1):
        pieces = by_length[ends[length - 1] : ends[length]]
        while len(pieces):
            place = bisect_left(in_order, length)
            room = in_order[place] if place < len(in_order) else block
            each = room // length
            wanted = -(-len(pieces) // each)
            if place == len(in_order):  # no row can take one: new rows
                rows = np.arange(opened, opened + wanted, dtype=np.int32)
                opened += wanted
            else:
                rows = rooms[room].popleft()
                if len(rows) > wanted:
                    rooms[room].appendleft(rows[wanted:])
                    rows = rows[:wanted]
                if not rooms[room]:
                    del rooms[room], in_order[place]
            placed = np.repeat(rows, each)[: len(pieces)]
            row_of[pieces[: len(placed)]] = placed
            pieces = pieces[len(placed) :]
            in_last = len(placed) - (len(rows) - 1) * each
            filled = rows if in_last == each else rows[:-1]
            last = rows[len(filled) :]
            for left, group in ((room - each * length, filled), (room - in_last * length, last)):
                if left and len(group):
                    if left not in rooms:
                        insort(in_order, left)
                        rooms[left] = deque()
                    rooms[left].append(group)
    return row_of


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 for each of the sizes, laid end to end."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - sizes, sizes)

"""Documents packed into rows, so that no place is wasted on padding, and each document is computed as if alone.

B: rows; T: positions of a row.
"""

from collections.abc import Sequence

import mlx.core as mx
from loss import IGNORE_INDEX


def packed(documents: Sequence[Sequence[int]], length: int, padding: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns (rows, numbers), two lists of rows of `length` + 1 integers each: tokens, and whose they are.

    The documents are laid end to end in one stream. Row i holds the tokens of the stream from place i * length on, so
    its last token is the first one of the row after it, and each token but the stream's first follows another one in
    exactly one row. There are as many rows as that takes; the last is filled up with `padding`. No document is
    empty, and the stream has two tokens or more.

    numbers: which document of its row each token is of. The first document in a row is 1 (also where it began in the
    row before), the next is 2, and so on; padding is 0.
    """
    # to do: the stream, and beside it the number of each token's document; cut both; count from 1 in each row.
    stream = [token for document in documents for token in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    rows, numbers = [], []
    for start in range(0, len(stream) - 1, length):
        row = stream[start : start + length + 1]
        here = owners[start : start + length + 1]
        order = {owner: place for place, owner in enumerate(dict.fromkeys(here), 1)}
        missing = length + 1 - len(row)
        rows.append(row + [padding] * missing)
        numbers.append([order[owner] for owner in here] + [0] * missing)
    return rows, numbers
    # done


def packed_labels(rows: mx.array, numbers: mx.array) -> mx.array:
    """Returns the labels (B, T) of packed rows.

    rows, numbers: (B, T + 1), as `packed` gives them. The label at t is the token at t + 1 where both are of the same
    document, else IGNORE_INDEX: the first token of a document is not to be guessed from the one before, and padding is
    not to be guessed at all.
    """
    # to do: the shifted tokens; compare the numbers.
    same = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != 0)
    return mx.where(same, rows[:, 1:], IGNORE_INDEX)
    # done


def document_mask(numbers: mx.array) -> mx.array:
    """Returns who sees whom: booleans (B, T, T), [b, q, k] being whether position q of row b sees position k.

    numbers: (B, T). A position sees itself and those before it that are of the same document. Padding, 0, counts as
    a document: a row of the mask without any True would make a softmax of nothing. No zeros and ones: those would be
    added to the attention's scores.
    """
    # to do: the same number, and not later.
    place = mx.arange(numbers.shape[1])
    return (numbers[:, :, None] == numbers[:, None, :]) & (place[:, None] >= place[None, :])
    # done


def positions_of(numbers: mx.array) -> mx.array:
    """Returns the position of each token in its document, integers (B, T).

    numbers: (B, T). Positions begin again at 0 with each document, also with one that began in the row before: counted
    is what the row has of it. Padding counts on from 0 too.
    """
    # to do: where a number differs from the one before it, a document begins; how far is it back to there?
    place = mx.broadcast_to(mx.arange(numbers.shape[1]), numbers.shape)
    begins = mx.ones(numbers.shape, dtype=mx.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return place - mx.where(begins, place, 0).cummax(axis=1)
    # done

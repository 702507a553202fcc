"""Best-fit packing: the placement against a slow one that looks at every row, and what rows hold and score."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data.batches import IGNORE_INDEX, BatchIterator
from llamita.data.best_fit import best_fit
from llamita.data.inspect import count_rows, documents_cut
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) >= 2)
BLOCKS = st.integers(2, 14)


def slow_best_fit(lengths: list[int], block: int) -> list[list[tuple[int, int]]]:
    """Rows of (start, length), one piece after the other, looking at every row for the tightest."""
    starts = np.cumsum([0, *lengths]).tolist()
    full, pieces = [], []
    for start, length in zip(starts, lengths, strict=False):
        while length >= block:
            full.append([(start, block)])
            start, length = start + block, length - block
        if length:
            pieces.append((start, length))
    rows: list[list[tuple[int, int]]] = []
    since: list[int] = []  # when each row came to the room that it has
    for time, (start, length) in enumerate(sorted(pieces, key=lambda piece: -piece[1])):
        rooms = [block - sum(size for _, size in row) for row in rows]
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            chosen = min(fitting, key=lambda number: (rooms[number], since[number]))
            rows[chosen].append((start, length))
            since[chosen] = time
        else:
            rows.append([(start, length)])
            since.append(time)
    begins = set(starts)
    ordered = [sorted(row, key=lambda piece: (piece[0] not in begins, piece[0])) for row in rows + full]
    return sorted(ordered)


def placed(lengths: list[int], block: int) -> list[list[tuple[int, int]]]:
    placement = best_fit(np.cumsum([0, *lengths]), block)
    return [placement.pieces(row) for row in range(len(placement))]


def distinct_documents(lengths: list[int]) -> InMemoryDocuments:
    ends = np.cumsum(lengths)
    return InMemoryDocuments([np.arange(end - n, end) + 1 for end, n in zip(ends, lengths, strict=True)])


def make_rows(lengths: list[int], sequence_length: int, within: bool = False) -> Rows:
    return Rows(distinct_documents(lengths), RowsConfig("best-fit", sequence_length, within), pad_id=0)


@given(LENGTHS, BLOCKS)
@settings(max_examples=400)
def test_every_piece_lies_where_looking_at_every_row_puts_it(lengths, block):
    assert placed(lengths, block) == slow_best_fit(lengths, block)


def test_many_documents_of_few_lengths():
    lengths = np.random.default_rng(5).integers(1, 40, 3000).tolist()
    assert placed(lengths, 64) == slow_best_fit(lengths, 64)


def test_by_hand():
    # 10 fills a row and leaves 2; 5 goes first, 2 and 2 beside 3, the longest of those that leave room.
    assert placed([3, 10, 2, 5], 8) == [[(0, 3), (15, 5)], [(3, 8)], [(13, 2), (11, 2)]]


@given(LENGTHS, BLOCKS)
def test_every_token_once_and_no_document_cut_that_fits(lengths, block):
    rows = placed(lengths, block)
    assert all(sum(length for _, length in row) <= block for row in rows)
    tokens = sorted(place for row in rows for start, length in row for place in range(start, start + length))
    assert tokens == list(range(sum(lengths)))
    starts = np.cumsum([0, *lengths]).tolist()
    pieces = {piece for row in rows for piece in row}
    assert all((start, n) in pieces for start, n in zip(starts, lengths, strict=False) if 0 < n <= block)


@given(LENGTHS, st.integers(1, 12), st.booleans())
def test_rows_begin_with_documents_and_score_only_what_follows(lengths, sequence_length, within):
    lengths = [length for length in lengths if length]
    rows = make_rows(lengths, sequence_length, within)
    first = set((np.cumsum([0, *lengths[:-1]]) + 1).tolist())
    owner = np.repeat(np.arange(len(lengths)), lengths)
    held = []
    for index, row in enumerate(rows):
        real = row.tokens[row.tokens > 0].tolist()
        held += real
        if first & set(real):
            assert real[0] in first
        expected = np.zeros(sequence_length + 1, dtype=bool)
        for place in range(1, len(real)):
            follows = real[place] == real[place - 1] + 1 and owner[real[place] - 1] == owner[real[place] - 2]
            expected[place] = follows or (real[place] in first and not within)
        assert row.label_mask.tolist() == expected.tolist()
        if within:
            sizes = [length for _, length in rows.spans(index)]
            padding = [0] * (sequence_length + 1 - sum(sizes))
            assert row.segments.tolist() == np.repeat(np.arange(len(sizes)) + 1, sizes).tolist() + padding
    assert sorted(held) == list(range(1, sum(lengths) + 1))


@given(LENGTHS, st.integers(1, 12), st.sampled_from(["pad", "pack", "best-fit"]))
def test_documents_that_are_cut_are_counted(lengths, sequence_length, mode):
    lengths = [length for length in lengths if length]
    documents = distinct_documents(lengths)
    rows = Rows(documents, RowsConfig(mode, sequence_length), pad_id=0)
    held = [set(row.tokens.tolist()) for row in rows]
    wholes = [set(documents.document(number).tolist()) for number in range(len(lengths))]
    assert documents_cut(rows) == sum(not any(whole <= row for row in held) for whole in wholes)


def test_batches_and_counts():
    rows = make_rows([5, 9, 2, 1, 4, 4, 7], 5, within=True)
    iterator = BatchIterator(rows, 3, seed=1)
    batches = [iterator.next() for _ in range(2)]
    assert sorted(np.concatenate([batch.row_ids for batch in batches])[: len(rows)].tolist()) == list(range(len(rows)))
    labels = np.concatenate([rows.batch(np.arange(len(rows))).labels_BT])
    assert (labels != IGNORE_INDEX).sum() == sum(int(row.label_mask.sum()) for row in rows)
    counts = count_rows(rows)
    assert counts.padding == sum(int((row.tokens == 0).sum()) for row in rows)
    assert documents_cut(rows) == 2


def test_evaluation_reads_the_same_rows_or_whole_documents():
    assert RowsConfig("best-fit", 3).for_evaluation() == RowsConfig("best-fit", 3)
    assert RowsConfig("best-fit", 3, within_documents=True).for_evaluation() == RowsConfig("pad", 3)

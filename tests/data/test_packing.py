"""Rows: what is in them and what is scored, against a slow reading of the same rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig

# Every token of a corpus is distinct, so a row's tokens say where in the stream they come from. 0 is the padding id.
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


def distinct_documents(lengths: list[int]) -> InMemoryDocuments:
    ends = np.cumsum(lengths)
    return InMemoryDocuments([np.arange(end - n, end) + 1 for end, n in zip(ends, lengths, strict=True)])


def make_rows(lengths: list[int], mode: str, sequence_length: int, within: bool = False) -> Rows:
    return Rows(distinct_documents(lengths), RowsConfig(mode, sequence_length, within), pad_id=0)


def scored(rows: Rows) -> list[int]:
    return [int(t) for row in rows for t in row.tokens[row.label_mask]]


def test_pad_by_hand():
    rows = make_rows([5, 2, 1], "pad", 2)
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3], [4, 5, 0], [6, 7, 0], [8, 0, 0]]
    assert [row.segments.tolist() for row in rows] == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert [row.label_mask.tolist() for row in rows] == [
        [False, True, True],
        [False, True, False],
        [False, True, False],
        [False, False, False],
    ]


def test_pack_by_hand():
    rows = make_rows([3, 2, 1], "pack", 2)
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3], [3, 4, 5], [4, 5, 6]]
    assert [row.label_mask.tolist() for row in rows] == [[False, True, True], [False, True, True], [False, False, True]]
    assert all(row.segments is None for row in rows)


def test_pack_within_documents_by_hand():
    rows = make_rows([3, 2, 1], "pack", 2, within=True)
    assert [row.segments.tolist() for row in rows] == [[1, 1, 1], [1, 2, 2], [1, 1, 2]]
    # 4 and 6 begin documents: never predicted from the document before.
    assert scored(rows) == [2, 3, 5]


def test_pack_shorter_than_a_block_is_padded():
    rows = make_rows([2, 1], "pack", 5)
    (row,) = rows
    assert row.tokens.tolist() == [1, 2, 3, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 0, 0, 0]
    assert scored(rows) == [2, 3]


def test_random_by_hand():
    rows = make_rows([3, 3], "random", 3)
    assert len(rows) == 3
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert all(row.label_mask.tolist() == [False, True, True, True] for row in rows)
    within = make_rows([3, 3], "random", 3, within=True)
    assert within.row(1).segments.tolist() == [1, 1, 2, 2]
    assert within.row(1).label_mask.tolist() == [False, True, False, True]


@given(LENGTHS, st.integers(1, 12))
def test_pad_holds_each_document_once(lengths, sequence_length):
    documents = distinct_documents(lengths)
    rows = Rows(documents, RowsConfig("pad", sequence_length), pad_id=0)
    block = sequence_length + 1
    assert [int(t) for row in rows for t in row.tokens[row.segments == 1]] == documents.tokens.tolist()
    starts = {int(document[k]) for i in range(len(lengths)) for document in [documents.document(i)]
              for k in range(0, len(document), block)}  # fmt: skip
    assert sorted(scored(rows)) == sorted(set(documents.tokens.tolist()) - starts)
    for row in rows:
        assert not row.label_mask[row.segments == 0].any()
        assert (row.tokens[row.segments == 0] == 0).all()


@given(LENGTHS, st.integers(1, 12))
def test_pack_scores_every_target_once_and_rebuilds_the_stream(lengths, sequence_length):
    rows = make_rows(lengths, "pack", sequence_length)
    stream = rows.documents.tokens.tolist()
    assert scored(rows) == stream[1:]
    assert [stream[0], *scored(rows)] == stream
    for row in rows:
        real = row.tokens[row.tokens > 0]
        assert (np.diff(real) == 1).all(), "a row is a stretch of the stream"
        assert not row.label_mask[row.tokens == 0].any()


@given(LENGTHS, st.integers(1, 12), st.sampled_from(["pack", "random"]))
def test_within_documents_never_scores_across(lengths, sequence_length, mode):
    if mode == "random" and sum(lengths) <= sequence_length:
        return
    rows = make_rows(lengths, mode, sequence_length, within=True)
    documents = rows.documents
    first = {int(t) for t in documents.tokens[documents.document_starts[:-1]]}
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows:
        assert not first & set(row.tokens[row.label_mask].tolist())
        real = row.tokens > 0
        owners = owner[row.tokens[real] - 1]
        assert row.segments[real].tolist() == (owners - owners[0] + 1).tolist()
        assert (row.segments[~real] == 0).all()
    if mode == "pack":
        assert scored(rows) == [t for t in documents.tokens.tolist() if t not in first]


@given(LENGTHS, st.integers(1, 12), st.sampled_from(["pad", "pack", "random"]), st.booleans())
@settings(max_examples=200)
def test_shapes_and_scored_tokens_hold_in_every_mode(lengths, sequence_length, mode, within):
    if mode == "random" and sum(lengths) <= sequence_length:
        return
    rows = make_rows(lengths, mode, sequence_length, within)
    for row in rows:
        assert row.tokens.shape == row.label_mask.shape == (sequence_length + 1,)
        assert row.tokens.dtype == np.int32
        assert row.label_mask.dtype == bool
        assert not row.label_mask[0]
        for j in np.flatnonzero(row.label_mask):
            assert row.tokens[j] == row.tokens[j - 1] + 1, "a target is the token after its input"
            if row.segments is not None:
                assert row.segments[j] == row.segments[j - 1] > 0


def test_rows_are_pure():
    rows = make_rows([4, 4], "pack", 3, within=True)
    rows.row(0).tokens[:] = 99
    assert rows.row(0).tokens.tolist() == [1, 2, 3, 4]


def test_for_evaluation():
    assert RowsConfig("random", 3).for_evaluation() == RowsConfig("pack", 3)
    assert RowsConfig("pack", 3, within_documents=True).for_evaluation() == RowsConfig("pad", 3)
    for unchanged in (RowsConfig("pad", 3), RowsConfig("pack", 3)):
        assert unchanged.for_evaluation() == unchanged


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="use pad, pack, best-fit or random"):
        RowsConfig("fold", 4)
    with pytest.raises(ValueError, match="sequence_length=0"):
        RowsConfig("pack", 0)
    with pytest.raises(ValueError, match="fewer than one random window of 6"):
        make_rows([5], "random", 5)
    with pytest.raises(ValueError, match="at least 2"):
        make_rows([1], "pack", 5)
    with pytest.raises(IndexError, match="row 2 of 2"):
        make_rows([5], "pack", 2).row(2)

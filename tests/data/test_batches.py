"""The order of rows: exact resuming, epochs, and evaluation windows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data.batches import IGNORE_INDEX, BatchIterator, collate, evaluation_batches
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig, strided_windows


def make_rows(tokens: int = 97, mode: str = "pack", sequence_length: int = 4, within: bool = False) -> Rows:
    documents = InMemoryDocuments([np.arange(1, 1 + tokens // 2), np.arange(1 + tokens // 2, 1 + tokens)])
    return Rows(documents, RowsConfig(mode, sequence_length, within), pad_id=0)


MODES = st.sampled_from(["pad", "pack", "best-fit", "random"])
SEEDS = st.integers(0, 2**64 - 1)


@given(MODES, SEEDS, st.integers(1, 60), st.integers(0, 12), st.booleans())
def test_resuming_is_exact(mode, seed, batch_size, steps, shuffle):
    rows = make_rows(mode=mode)
    before = BatchIterator(rows, batch_size, seed, shuffle)
    for _ in range(steps):
        before.next()
    state = json.loads(json.dumps(before.state()))
    after = BatchIterator(rows, batch_size, seed, shuffle)
    after.load_state(state)
    for _ in range(3):
        ours, theirs = before.next(), after.next()
        assert (ours.row_ids == theirs.row_ids).all()
        assert (ours.tokens_BT == theirs.tokens_BT).all()
        assert (ours.labels_BT == theirs.labels_BT).all()


@given(st.sampled_from(["pad", "pack"]), SEEDS, st.integers(1, 50))
def test_each_epoch_visits_each_row_once(mode, seed, batch_size):
    rows = make_rows(mode=mode)
    iterator = BatchIterator(rows, batch_size, seed)
    ids = np.concatenate([iterator.next().row_ids for _ in range(-(-3 * len(rows) // batch_size))])
    epochs = ids[: 3 * len(rows)].reshape(3, len(rows))
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(len(rows)))
    assert (epochs[0] != epochs[1]).any(), "another order every epoch"


def test_every_target_is_trained_once_in_an_epoch():
    rows = make_rows(tokens=98)
    iterator = BatchIterator(rows, 5, seed=3)
    assert len(rows) == 25
    labels = np.concatenate([iterator.next().labels_BT for _ in range(5)])
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == list(range(2, 99))


def test_seeds_and_steps_give_other_rows():
    rows = make_rows(mode="random")
    draws = {tuple(BatchIterator(rows, 8, seed).row_ids(step)) for seed in range(5) for step in range(5)}
    assert len(draws) == 25
    packed = make_rows()
    assert len({tuple(BatchIterator(packed, len(packed), seed).row_ids(0)) for seed in range(20)}) == 20


def test_the_order_is_fixed_for_good():
    """A saved run must resume to the same rows with a later version of the library or of numpy."""
    assert BatchIterator(make_rows(), 6, seed=7).row_ids(0).tolist() == [8, 16, 4, 23, 1, 6]
    assert BatchIterator(make_rows(mode="random"), 6, seed=7).row_ids(3).tolist() == [84, 31, 80, 35, 5, 49]


def test_random_offsets_are_uniform():
    rows = make_rows(tokens=14)
    rows = Rows(rows.documents, RowsConfig("random", 4))
    counts = np.bincount(BatchIterator(rows, 20_000, seed=1).row_ids(0), minlength=len(rows))
    assert len(counts) == 10
    # Standard deviation of a count is 42 around 2000.
    assert abs(counts - 2000).max() < 200


def test_no_shuffle_is_in_order_and_wraps():
    iterator = BatchIterator(make_rows(tokens=17), 3, seed=0, shuffle=False)
    assert [next(iterator).row_ids.tolist() for _ in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    assert iterator.epoch == 9 / 4


@given(MODES, st.booleans(), st.integers(0, 20))
def test_labels_are_the_next_token_and_never_padding(mode, within, step):
    batch = BatchIterator(make_rows(mode=mode, within=within), 7, seed=0).batch(step)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (7, 4)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == np.int32
    assert batch.row_ids.dtype == np.int64
    scored = batch.labels_BT != IGNORE_INDEX
    assert (batch.labels_BT[scored] == batch.tokens_BT[scored] + 1).all()
    assert (batch.labels_BT[scored] > 0).all()
    if batch.segments_BT is not None:
        assert batch.segments_BT.shape == (7, 4)
        assert (batch.segments_BT[scored] > 0).all()
    assert batch.num_targets == scored.sum()


def test_collate_gives_rows_without_segments_one():
    within, plain = make_rows(within=True), make_rows()
    assert collate([plain.row(0)], np.array([0])).segments_BT is None
    batch = collate([plain.row(0), within.row(11)], np.array([0, 11]))
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1], within.row(11).segments[:-1].tolist()]


def test_state_of_another_run_is_refused():
    state = BatchIterator(make_rows(), 4, seed=0).state()
    with pytest.raises(ValueError, match="with seed=0, this one has 1"):
        BatchIterator(make_rows(), 4, seed=1).load_state(state)
    with pytest.raises(ValueError, match="with batch_size=4, this one has 8"):
        BatchIterator(make_rows(), 8, seed=0).load_state(state)
    with pytest.raises(ValueError, match="with rows=24, this one has 12"):
        BatchIterator(make_rows(tokens=49), 4, seed=0).load_state(state)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        BatchIterator(make_rows(), 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        BatchIterator(make_rows(), 4, -1)


@pytest.mark.parametrize("mode", ["pad", "pack", "best-fit", "random"])
def test_evaluation_reads_every_row_once(mode):
    rows = make_rows(mode=mode)
    rows = Rows(rows.documents, rows.config.for_evaluation(), pad_id=0)
    ids = [i for batch in evaluation_batches(rows, 5) for i in batch.row_ids.tolist()]
    assert ids == list(range(len(rows)))
    targets = np.concatenate([batch.labels_BT for batch in evaluation_batches(rows, 5)])
    if mode in ("pack", "random"):
        assert targets[targets != IGNORE_INDEX].tolist() == list(range(2, 98))


def test_a_few_evaluation_rows_span_the_split():
    rows = make_rows(mode="pack")
    ids = [batch.row_ids.tolist() for batch in evaluation_batches(rows, 3, limit=4)]
    assert ids == [[0, 6, 12], [18]]
    assert len(rows) == 24


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_strided_windows_score_every_target_once(length, sequence_length, data):
    stride = data.draw(st.integers(1, sequence_length))
    tokens = np.arange(100, 100 + length)
    windows = list(strided_windows(tokens, sequence_length, stride))
    assert [t for w in windows for t in w.tokens[w.label_mask].tolist()] == tokens[1:].tolist()
    for window in windows:
        assert len(window.tokens) == min(sequence_length + 1, length)
        assert not window.label_mask[0]
        assert (np.diff(window.tokens) == 1).all()
    for window in windows[1:]:
        assert window.label_mask.sum() <= stride
        assert np.flatnonzero(window.label_mask)[0] >= sequence_length + 1 - stride


def test_strided_windows_by_hand():
    windows = list(strided_windows(np.arange(8), sequence_length=4, stride=2))
    assert [w.tokens.tolist() for w in windows] == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert [w.tokens[w.label_mask].tolist() for w in windows] == [[1, 2, 3, 4], [5, 6], [7]]
    with pytest.raises(ValueError, match="stride=5"):
        next(strided_windows(np.arange(8), 4, 5))

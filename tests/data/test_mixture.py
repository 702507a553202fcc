"""Mixtures: every row of a step against a plain reading of the rule, shares, epochs, processes, resuming."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data.batches import BatchIterator
from llamita.data.mixture import BLOCK, MixedRows, MixtureIterator
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig

MODES = st.sampled_from(["pad", "pack", "best-fit", "random"])
SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=2, max_size=4)


def make_rows(sizes: list[int], mode: str = "pack", within: bool = False) -> MixedRows:
    """Sources of so many tokens each; the tokens of source k are k * 1000 and on."""
    sources = {}
    for number, size in enumerate(sizes):
        tokens = number * 1000 + np.arange(1, size + 1)
        documents = InMemoryDocuments([tokens[start : start + 7] for start in range(0, size, 7)])
        sources[f"source {number}"] = Rows(documents, RowsConfig(mode, 4, within), pad_id=0)
    return MixedRows(sources)


def words(seed: int, number: int, count: int, stream: int) -> list[int]:
    key, counter = np.array([seed, number], dtype=np.uint64), np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count).tolist()


def shuffled(items: list, chances: list[int]) -> list:
    return [item for _, _, item in sorted((chance, place, item) for place, (chance, item) in
                                          enumerate(zip(chances, items, strict=True)))]  # fmt: skip


def plain_reading(counts: list[int], weights: list[float], seed: int, random: bool = False):
    """Every (source, row) of a run, one after the other, from the beginning."""
    whole = sum(weights)
    heaviest = weights.index(max(weights))

    def rows_of(source):
        for epoch in range(10**9):
            if random:
                yield from (word % counts[source] for word in words(seed, epoch, BLOCK, source + 1))
            else:
                yield from shuffled(list(range(counts[source])), words(seed, epoch, counts[source], source + 1))

    rows = [rows_of(source) for source in range(len(counts))]
    given = [0] * len(counts)
    for block in range(10**9):
        due = [round((block + 1) * BLOCK * weight / whole) for weight in weights]
        due[heaviest] = (block + 1) * BLOCK - sum(due[:heaviest] + due[heaviest + 1 :])
        block_of = [source for source in range(len(counts)) for _ in range(due[source] - given[source])]
        given = due
        for source in shuffled(block_of, words(seed, block, BLOCK, 0)):
            yield source, next(rows[source])


@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["pack", "best-fit", "random"]))
@settings(max_examples=10)
def test_every_row_of_a_run(seed, batch_size, mode):
    weights = [0.5, 0.375, 0.125]  # whose products are exact, so that no rounding is in doubt
    rows = make_rows([60, 900, 33], mode)
    iterator = MixtureIterator(rows, weights, batch_size, seed)
    steps = -(-3000 // batch_size)
    ours = np.concatenate([iterator.row_ids(step) for step in range(steps)])
    counts = [len(source) for source in rows.sources]
    firsts = np.cumsum([0, *counts])
    expected = list(islice(plain_reading(counts, weights, seed, mode == "random"), steps * batch_size))
    assert ours.tolist() == [firsts[source] + row for source, row in expected]


@given(WEIGHTS, SEEDS, st.integers(1, 50), st.integers(0, 200))
def test_counts_are_those_of_the_rows(weights, seed, batch_size, step):
    rows = make_rows([50] * len(weights))
    iterator = MixtureIterator(rows, weights, batch_size, seed)
    sources = iterator.sources_of(0, (step + 1) * batch_size)
    expected = np.bincount(sources, minlength=len(weights)).tolist()
    assert iterator.counts((step + 1) * batch_size) == expected
    metrics = iterator.batch(step).metrics
    assert [metrics[f"rows/{name}"] for name in rows.names] == expected
    sizes = [len(source) for source in rows.sources]
    epochs = [metrics[f"epochs/{name}"] for name in rows.names]
    assert epochs == pytest.approx([count / size for count, size in zip(expected, sizes, strict=True)], abs=1e-4)


@given(WEIGHTS, SEEDS, st.integers(1, 10**7))
def test_shares_are_the_weights_to_within_a_row_a_source(weights, seed, block):
    iterator = MixtureIterator(make_rows([50] * len(weights)), weights, 1, seed)
    counts = iterator.counts(block * BLOCK)
    assert sum(counts) == block * BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - block * BLOCK * weight / sum(weights)) <= len(weights)


def test_far_sources_have_positive_shares_however_many_there_are():
    weights = [1.0] * 40 + [1e-9]
    iterator = MixtureIterator(make_rows([20] * 41), weights, 1600, seed=3)
    for step in range(30):
        assert np.bincount(iterator.sources_of(step * 1600, 1600), minlength=41).sum() == 1600
    assert iterator.counts(10**12)[-1] == round(10**12 * 1e-9 / 40)


@given(MODES, SEEDS, st.integers(0, 300))
@settings(max_examples=20)
def test_resuming_needs_the_step_alone(mode, seed, steps):
    rows = make_rows([60, 200], mode)
    before = MixtureIterator(rows, [0.7, 0.3], 5, seed)
    before.step = steps
    after = MixtureIterator(rows, [7, 3], 5, seed)
    after.load_state(json.loads(json.dumps(before.state())))
    read = MixtureIterator(rows, [0.7, 0.3], 5, seed)
    for _ in range(steps):
        read.row_ids(read.step)
        read.step += 1
    for _ in range(3):
        batches = [iterator.next() for iterator in (before, after, read)]
        assert all((batch.tokens_BT == batches[0].tokens_BT).all() for batch in batches)


@pytest.mark.parametrize("mode", ["pad", "pack", "best-fit"])
def test_each_source_gives_each_row_once_an_epoch(mode):
    rows = make_rows([60, 200, 20], mode)
    iterator = MixtureIterator(rows, [0.2, 0.5, 0.3], 10, seed=4)
    ids = np.concatenate([iterator.next().row_ids for _ in range(300)])
    for first, source in zip(rows.firsts.tolist(), rows.sources, strict=False):
        own = ids[(ids >= first) & (ids < first + len(source))] - first
        epochs = own[: len(own) // len(source) * len(source)].reshape(-1, len(source))
        assert len(epochs) >= 10
        assert all(sorted(epoch) == list(range(len(source))) for epoch in epochs.tolist())
        assert (epochs[0] != epochs[1]).any()


@given(MODES, st.booleans())
def test_rows_are_those_of_their_sources(mode, within):
    rows = make_rows([60, 200], mode, within)
    batch = rows.batch(np.array([0, len(rows) - 1, len(rows.sources[0])]))
    expected = [rows.sources[0].row(0), rows.sources[1].row(len(rows.sources[1]) - 1), rows.sources[1].row(0)]
    assert batch.tokens_BT.tolist() == [row.tokens[:-1].tolist() for row in expected]
    assert (batch.labels_BT >= 0).tolist() == [row.label_mask[1:].tolist() for row in expected]
    assert len(rows) == sum(map(len, rows.sources))


def test_the_order_is_fixed_for_good():
    """A saved run must resume to the same rows with a later version of the library or of numpy."""
    iterator = MixtureIterator(make_rows([60, 200]), [0.7, 0.3], 8, seed=7)
    assert iterator.row_ids(0).tolist() == [22, 2, 50, 10, 5, 7, 63, 8]
    random = MixtureIterator(make_rows([60, 200], "random"), [0.7, 0.3], 8, seed=7)
    assert random.row_ids(200).tolist() == [19, 42, 40, 89, 62, 2, 158, 239]


def test_two_sources_do_not_share_an_order():
    rows = make_rows([60, 60])
    iterator = MixtureIterator(rows, [1, 1], 30, seed=0)
    ids = np.concatenate([iterator.next().row_ids for _ in range(2)])
    first, second = ids[ids < 15].tolist(), (ids[ids >= 15] - 15).tolist()
    assert first[:10] != second[:10]
    assert first[:10] != BatchIterator(rows.sources[0], 15, seed=0).row_ids(0).tolist()[:10]


@pytest.mark.parametrize(("weights", "message"), [
    ([0.5], "there are 1 weights for 2 sources"),
    ([0.5, 0.0], "must be positive"),
    ([0.5, float("nan")], "must be positive"),
])  # fmt: skip
def test_mistakes_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureIterator(make_rows([60, 60]), weights, 4, 0)


def test_state_of_other_weights_is_refused():
    state = MixtureIterator(make_rows([60, 60]), [0.5, 0.5], 4, 0).state()
    with pytest.raises(ValueError, match="weights"):
        MixtureIterator(make_rows([60, 60]), [0.4, 0.6], 4, 0).load_state(state)

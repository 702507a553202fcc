"""Attention over blocks in both backends against a float64 oracle: heads, blocks, chunks, windows, in order and not."""

import itertools

import numpy as np
import pytest

from llamita.backend.interface import ScheduledChunk
from llamita.backend.step_layout import alike
from llamita.model.config import AttentionSpec
from tests.backend.paged import HEADS, PLAIN, STARTS, check_attention, joined_queries, lay_out
from tests.backend.tolerances import ATTENTION

PRECISIONS = ["fp32", "bf16"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_chunk_attends_as_by_the_oracle(framework, heads, block_size, shuffled, precision):
    """Each chunk by every way that takes it."""
    for (start, length), window in itertools.product(STARTS, (0, 1, 5, 64, 100)):
        sequences, *memories = lay_out(framework, [(start, length)], heads, block_size, window, shuffled, precision)
        span = sequences[0].span
        assert (span.begin is not None) or shuffled
        keys, values = (framework.memory(memory, precision) for memory in memories)
        q_TNH = framework.array(joined_queries(sequences), precision)
        ways = [framework.chunk_attention(span, PLAIN)]
        ways += [framework.decode_attention([span], PLAIN)] if length == 1 else []
        for way in ways:
            found = way.attend(q_TNH, keys, values)
            assert found.dtype == framework.dtype(precision)
            check_attention(framework.numbers(found), sequences, ATTENTION[framework.name][precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_single_queries_of_several_sequences_attend_as_by_the_oracle(framework, heads, block_size, window, precision):
    chunks = [(start, 1) for start in (33, 0, 62, 40, 100, 15, 16)]
    sequences, *memories = lay_out(framework, chunks, heads, block_size, window, True, precision)
    together = framework.decode_attention([sequence.span for sequence in sequences], PLAIN)
    keys, values = (framework.memory(memory, precision) for memory in memories)
    found = together.attend(framework.array(joined_queries(sequences), precision), keys, values)
    check_attention(framework.numbers(found), sequences, ATTENTION[framework.name][precision])


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(soft_cap=0.7), AttentionSpec(0.3, 0.7)], ids=str)
def test_scores_are_scaled_and_capped_as_by_the_oracle(framework, spec, window):
    chunks = [(33, 1), (62, 1), (40, 9)]
    sequences, *memories = lay_out(framework, chunks, (6, 2, 12), 3, window, True)
    keys, values = (framework.memory(memory, "fp32") for memory in memories)
    single, long = sequences[:2], sequences[2:]
    for way, part in (
        (framework.decode_attention([sequence.span for sequence in single], spec), single),
        (framework.decode_attention([single[0].span], spec), single[:1]),
        (framework.chunk_attention(long[0].span, spec), long),
    ):
        found = way.attend(framework.array(joined_queries(part)), keys, values)
        check_attention(framework.numbers(found), part, ATTENTION[framework.name]["fp32"], spec=spec)


def test_a_span_begins_with_the_first_block_that_is_seen(framework):
    table = np.arange(10, dtype=np.int32)
    for start, length, window, first in ((0, 5, 0, 0), (20, 3, 0, 0), (20, 1, 8, 12), (20, 1, 9, 12), (20, 9, 10, 8)):
        span = framework.paged_attention.Span.of(ScheduledChunk(0, (0,) * length, start), table, 4, window)
        assert (span.first, span.keys) == (first, start + length - first)
        assert span.blocks[0] == first // 4
        assert span.blocks[-1] == (start + length - 1) // 4
        seen = span.seen(np.arange(start, start + length), np.arange(start + length))
        assert not seen[:, :first].any(), "nothing before it is seen"


def test_batches_of_single_queries_have_similar_context(framework):
    table = np.arange(100, dtype=np.int32)

    def span(blocks):
        return framework.paged_attention.Span.of(ScheduledChunk(0, (0,), 4 * blocks - 1), table, 4, 0)

    batches = [[len(one.blocks) for one in batch] for batch in alike([span(n) for n in (8, 6, 8, 7, 5, 4, 40, 31, 30)])]
    assert batches == [[8, 6, 8, 7], [5, 4], [40, 31, 30]]
    assert list(alike([])) == []

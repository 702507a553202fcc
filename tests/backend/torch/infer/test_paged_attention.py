"""Attention over blocks against a float64 oracle: sizes of heads, blocks, chunks and windows, in order and shuffled."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llamita.backend.interface import ScheduledChunk
from llamita.backend.step_layout import alike
from llamita.backend.torch.infer.paged_attention import TILE, ChunkAttention, DecodeAttention, ExactAttention, Span
from llamita.model.config import AttentionSpec
from tests import reference

PLAIN = AttentionSpec()
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of a difference, as a share of the largest value: bfloat16 has 8 bits, and rounds weights as well as results."""
HEADS = [(4, 4, 8), (6, 2, 12), (4, 1, 6), (8, 2, 32), (3, 3, 64)]  # query heads, key heads, head size
STARTS = [(0, 1), (0, 17), (1, 1), (63, 1), (64, 1), (60, 9), (130, 40), (7, 3)]  # start and length of a chunk
SPARE = 4


class Sequence_:
    """Random queries, keys and values of one sequence, and where they lie in a memory."""

    def __init__(self, span: Span, q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> None:
        self.span, self.q_TNH, self.k_SKH, self.v_SKH = span, q_TNH, k_SKH, v_SKH

    def expected(self) -> np.ndarray:
        """(T, N, H) by the oracle, head by head over all positions from 0 on."""
        N = self.q_TNH.shape[1]
        group = N // self.k_SKH.shape[1]
        queries, keys = np.arange(self.span.start, self.span.stop), np.arange(self.span.stop)
        allowed = keys <= queries[:, None]
        if self.span.window:
            allowed &= keys > queries[:, None] - self.span.window
        heads = [
            reference.attention(self.q_TNH[:, n], self.k_SKH[:, n // group], self.v_SKH[:, n // group], allowed)
            for n in range(N)
        ]
        return np.stack(heads, axis=1)


def lay_out(
    chunks: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    window: int,
    shuffled: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Sequence_], torch.Tensor, torch.Tensor]:
    """Sequences with their keys and values in one memory, large numbers everywhere else; -1 for unseen blocks."""
    N, K, H = heads
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        """Numbers that the type holds exactly, so that the oracle starts from the same."""
        return torch.from_numpy(random.standard_normal(shape)).to(dtype).double().numpy()

    counts = [-(-(start + length) // block_size) for start, length in chunks]
    blocks = sum(counts) + SPARE
    order = random.permutation(blocks) if shuffled else np.arange(blocks)
    memories = [100 * normal(blocks * block_size, K, H) for _ in "kv"]
    sequences, taken = [], 0
    for (start, length), count in zip(chunks, counts, strict=True):
        table = order[taken : taken + count].astype(np.int32)
        taken += count
        stop = start + length
        slots = (table[:, None] * block_size + np.arange(block_size)).ravel()[:stop]
        k_SKH, v_SKH = normal(stop, K, H), normal(stop, K, H)
        memories[0][slots], memories[1][slots] = k_SKH, v_SKH
        table[: max(0, start - window + 1) // block_size if window else 0] = -1
        span = Span.of(ScheduledChunk(0, (0,) * length, start), table, block_size, window)
        sequences.append(Sequence_(span, normal(length, N, H), k_SKH, v_SKH))
    keys, values = (torch.from_numpy(memory).to(dtype) for memory in memories)
    return sequences, keys, values


def check(mixed_TNH: torch.Tensor, expected_TNH: np.ndarray) -> None:
    difference = np.abs(mixed_TNH.double().numpy() - expected_TNH).max()
    assert difference < TOLERANCE[mixed_TNH.dtype] * np.abs(expected_TNH).max()


def queries(sequence: Sequence_, keys: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(sequence.q_TNH).to(keys.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_chunk_attends_as_by_the_oracle(heads, block_size, shuffled, dtype):
    """Each chunk by every way that takes it."""
    for (start, length), window in itertools.product(STARTS, (0, 1, 5, 64, 100)):
        (sequence,), keys, values = lay_out([(start, length)], heads, block_size, window, shuffled, dtype)
        assert (sequence.span.begin is not None) or shuffled
        ways = [ChunkAttention(sequence.span, PLAIN, CPU)]
        ways += [DecodeAttention([sequence.span], PLAIN, CPU)] if length == 1 else []
        ways += [ExactAttention(sequence.span, PLAIN)] if dtype == torch.float32 else []
        for way in ways:
            check(way.attend(queries(sequence, keys), keys, values), sequence.expected())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_single_queries_of_several_sequences_attend_as_by_the_oracle(heads, block_size, window, dtype):
    chunks = [(start, 1) for start in (33, 0, 62, 40, 100, 15, 16)]
    sequences, keys, values = lay_out(chunks, heads, block_size, window, True, dtype)
    together = DecodeAttention([sequence.span for sequence in sequences], PLAIN, CPU)
    mixed_TNH = together.attend(torch.cat([queries(sequence, keys) for sequence in sequences]), keys, values)
    for row, sequence in enumerate(sequences):
        check(mixed_TNH[row : row + 1], sequence.expected())


@pytest.mark.parametrize("window", [0, 20, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_an_exact_query_is_the_same_bits_however_its_chunk_is_cut(heads, window):
    """140 positions at once, against chunks of every kind, blocks of several sizes, and memory of others around."""
    results = []
    for block_size, cut in ((16, 140), (16, 1), (1, 13), (3, 64), (7, 65), (16, 97)):
        starts = range(0, 140, cut)
        parts = []
        (whole,), keys, values = lay_out([(0, 140)], heads, block_size, 0, True)
        for start in starts:
            length = min(cut, 140 - start)
            chunk = ScheduledChunk(0, (0,) * length, start)
            exact = ExactAttention(Span.of(chunk, whole.span.blocks, block_size, window), PLAIN)
            q_TNH = torch.from_numpy(_numbers(heads, 140)[start : start + length])
            k_SKH, v_SKH = (torch.from_numpy(_numbers(heads, 140, kind)) for kind in (1, 2))
            slots = (whole.span.blocks[:, None] * block_size + np.arange(block_size)).ravel()[:140]
            keys[slots], values[slots] = k_SKH, v_SKH
            parts.append(exact.attend(q_TNH, keys, values))
        results.append(torch.cat(parts))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def _numbers(heads: tuple[int, int, int], length: int, kind: int = 0) -> np.ndarray:
    N, K, H = heads
    random = np.random.default_rng(kind)
    return random.standard_normal((length, K if kind else N, H)).astype(np.float32)


def test_a_span_begins_with_the_first_block_that_is_seen():
    table = np.arange(10, dtype=np.int32)
    for start, length, window, first in ((0, 5, 0, 0), (20, 3, 0, 0), (20, 1, 8, 12), (20, 1, 9, 12), (20, 9, 10, 8)):
        span = Span.of(ScheduledChunk(0, (0,) * length, start), table, 4, window)
        assert (span.first, span.keys) == (first, start + length - first)
        assert span.blocks[0] == first // 4
        assert span.blocks[-1] == (start + length - 1) // 4
        seen = span.seen(np.arange(start, start + length), np.arange(start + length))
        assert not seen[:, :first].any(), "nothing before it is seen"
    assert TILE == 64


def test_batches_of_single_queries_have_similar_context():
    table = np.arange(100, dtype=np.int32)

    def span(blocks: int) -> Span:
        return Span.of(ScheduledChunk(0, (0,), 4 * blocks - 1), table, 4, 0)

    batches = [[len(one.blocks) for one in batch] for batch in alike([span(n) for n in (8, 6, 8, 7, 5, 4, 40, 31, 30)])]
    assert batches == [[8, 6, 8, 7], [5, 4], [40, 31, 30]]
    assert list(alike([])) == []

"""Attention over blocks in the exact mode: the oracle's values, and the same bits however a chunk is cut."""

import itertools

import numpy as np
import pytest
import torch

from llamita.backend.interface import ScheduledChunk
from llamita.backend.torch.infer.paged_attention import TILE, ExactAttention, Span
from tests.backend.frameworks import Torch
from tests.backend.paged import HEADS, PLAIN, STARTS, check_attention, lay_out
from tests.backend.tolerances import ATTENTION


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_chunk_attends_exactly_as_by_the_oracle(heads, block_size, shuffled):
    for (start, length), window in itertools.product(STARTS, (0, 1, 5, 64, 100)):
        sequences, *memories = lay_out(Torch(), [(start, length)], heads, block_size, window, shuffled)
        exact = ExactAttention(sequences[0].span, PLAIN)
        found = exact.attend(*map(torch.from_numpy, (sequences[0].q_TNH, *memories)))
        check_attention(found.numpy(), sequences, ATTENTION["torch"]["fp32"])
    assert TILE == 64


@pytest.mark.parametrize("window", [0, 20, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_an_exact_query_is_the_same_bits_however_its_chunk_is_cut(heads, window):
    """140 positions at once, against chunks of every kind, blocks of several sizes, and memory of others around."""
    results = []
    for block_size, cut in ((16, 140), (16, 1), (1, 13), (3, 64), (7, 65), (16, 97)):
        starts = range(0, 140, cut)
        parts = []
        (whole,), *memories = lay_out(Torch(), [(0, 140)], heads, block_size, 0, True)
        keys, values = map(torch.from_numpy, memories)
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

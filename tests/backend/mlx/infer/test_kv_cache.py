"""MLX's memory of keys and values grows as it is used, and a step writes into it without a copy."""

import dataclasses

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import CacheLayout, ScheduledChunk  # noqa: E402
from llamita.backend.mlx.infer.kv_cache import PagedKVCache  # noqa: E402
from tests.backend.models import small  # noqa: E402

CONFIG = small()


def test_memory_is_taken_as_blocks_are_used_and_what_it_held_stays() -> None:
    cache = PagedKVCache(CONFIG, CacheLayout(4, 100))
    assert cache.keys[0].shape == (2, 0, 8)
    cache.reserve(0, 3)
    cache.keys[1][:, 2] = 7
    cache.reserve(0, 4)
    assert [memory.shape[1] for memory in (*cache.keys, *cache.values)] == [24] * 4
    cache.reserve(0, 99)
    assert cache.keys[1].shape[1] == 396
    assert (np.array(cache.keys[1]) == 7).nonzero()[1].tolist() == [2] * 16
    cache.reserve(0, 100)
    assert cache.keys[1].shape[1] == 400


def test_a_step_writes_its_own_positions_and_does_not_copy_the_memory() -> None:
    """What a step allocates does not grow with the memory: 64 MB a layer, and a few kilobytes for a token."""
    slots = 2**20
    cache = PagedKVCache(dataclasses.replace(CONFIG, max_position_embeddings=slots), CacheLayout(16, slots // 16))
    cache.reserve(0, slots // 16)
    mx.eval(cache.keys, cache.values)
    new_1KH = mx.ones((1, 2, 8))
    for position in range(3):
        chunk = ScheduledChunk(0, (1,), position, (np.array([60_000], np.int32),))
        step = cache.step([chunk])
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mixed = [step.attend(layer, mx.ones((1, 4, 8)), new_1KH, new_1KH) for layer in range(2)]
        mx.eval(mixed, cache.keys, cache.values)
        assert cache.keys[0].nbytes == 2**26
        assert mx.get_peak_memory() - before < 2**20
    np.testing.assert_array_equal(np.array(cache.keys[1][:, 60_000 * 16 : 60_000 * 16 + 4, 0]), [[1, 1, 1, 0]] * 2)

"""Logits through the paged memory are those of the whole text, in any chunks, over blocks in any order."""

import dataclasses

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import BlockCopy, CacheLayout, ScheduledChunk  # noqa: E402
from llamita.backend.mlx.infer.kv_cache import PagedKVCache  # noqa: E402
from llamita.backend.mlx.model.llama import Llama  # noqa: E402
from llamita.backend.mlx.model.weights import build_model  # noqa: E402
from llamita.model.config import ModelConfig  # noqa: E402
from tests.backend.paged import even_cuts, shuffled_tables, without_unseen  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SHAPES = {
    "grouped": CONFIG,
    "one key head": dataclasses.replace(CONFIG, num_key_value_heads=1),
    "window": dataclasses.replace(CONFIG, sliding_window=7),
    "window of some layers": dataclasses.replace(
        CONFIG, query_key_value_bias=True, sliding_window=5, full_attention_layers=1
    ),
    "norm of heads": dataclasses.replace(CONFIG, query_key_norm=True, head_dim=10),
}


def paged_logits(model: Llama, rows: list[list[int]], cuts: list[list[int]], block_size: int) -> list[np.ndarray]:
    """Logits (T, V) of each row, row i being read in chunks of `cuts[i]` tokens; step j runs the j-th chunk of all.

    The memory begins full of large numbers, so that reading what was never written shows.
    """
    lengths = [len(row) for row in rows]
    assert [sum(cut) for cut in cuts] == lengths
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    layout = CacheLayout(block_size, blocks, model.config.attention_windows)
    cache = PagedKVCache(model.config, layout)
    for memory in (cache.keys, cache.values):
        shape = (memory[0].shape[0], blocks * block_size, memory[0].shape[2])
        memory[:] = [50 * mx.random.normal(shape, key=mx.random.key(3)) for _ in memory]
    tables, starts = shuffled_tables(layout, lengths), [0] * len(rows)
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for step in range(max(map(len, cuts))):
        now = [i for i, cut in enumerate(cuts) if step < len(cut)]
        now.sort(key=lambda i: cuts[i][step] > 1)  # single tokens first
        chunks = [
            ScheduledChunk(
                i,
                tuple(rows[i][starts[i] : starts[i] + cuts[i][step]]),
                starts[i],
                without_unseen(tables[i], layout, starts[i]),
            )
            for i in now
        ]
        tokens_1T = mx.array([[token for chunk in chunks for token in chunk.tokens]])
        logits_TV, begin = np.array(model(tokens_1T, cache=cache.step(chunks)).logits_BTV[0]), 0
        for i, chunk in zip(now, chunks, strict=True):
            found[i].append(logits_TV[begin : begin + len(chunk.tokens)])
            begin += len(chunk.tokens)
            starts[i] = chunk.end
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_chunks_of_several_sequences_give_the_logits_of_the_whole_texts(shape: str, block_size: int) -> None:
    model = build_model(SHAPES[shape], seed=1)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 60, length).tolist() for length in (23, 9, 21, 1, 24)]
    cuts = [even_cuts(23, 5), [1] * 9, [1, 20], [1], even_cuts(24, 20, 20)]
    for row, found_TV in zip(rows, paged_logits(model, rows, cuts, block_size), strict=True):
        np.testing.assert_allclose(found_TV, np.array(model(mx.array([row])).logits_BTV[0]), atol=2e-5)


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


def test_blocks_are_copied_in_order_within_their_group() -> None:
    config = SHAPES["window of some layers"]
    cache = PagedKVCache(config, CacheLayout(2, 6, config.attention_windows))
    cache.reserve(0, 6)
    cache.reserve(1, 6)
    for memory in (*cache.keys, *cache.values):
        memory[:] = mx.arange(12)[None, :, None].astype(mx.float32)
    cache.copy([BlockCopy(1, 0, 1), BlockCopy(1, 1, 4)])
    held = [np.array(memory)[0, :, 0].tolist() for memory in (cache.keys[0], cache.keys[1], cache.values[1])]
    assert held == [list(range(12)), *[[0, 1, 0, 1, 4, 5, 6, 7, 0, 1, 10, 11]] * 2]


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

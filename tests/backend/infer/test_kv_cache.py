"""Logits through the paged memory are those of the whole text, in any chunks, over blocks in any order."""

import dataclasses

import numpy as np
import pytest

from llamita.backend.interface import BlockCopy, CacheLayout
from tests import reference
from tests.backend.frameworks import to_numpy
from tests.backend.models import KINDS, SWITCHES, VARIANTS, perturbed, random_tokens, small
from tests.backend.paged import even_cuts, paged_logits
from tests.backend.tolerances import MODEL, relative_difference

TOLERANCE = MODEL["fp32"]
CAUSAL = {name: changes for name, changes in (VARIANTS | SWITCHES).items() if name != "classifier"}
LATER = {"query_key_value_bias": True, "sliding_window": 5, "full_attention_layers": 1}
SHAPES = {
    "grouped": {},
    "one key head": {"num_key_value_heads": 1},
    "window": {"sliding_window": 7},
    "window of some layers": LATER,
    "norm of heads": {"query_key_norm": True, "head_dim": 10},
}


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_full_recomputation(framework, kind, chunk, block_size):
    config = small(num_key_value_heads=KINDS[kind])
    model = framework.build_model(config, perturbed(config))
    tokens_BT = random_tokens(config, 2, 33)
    cached = paged_logits(framework, model, tokens_BT, [even_cuts(33, chunk)] * 2, block_size)
    assert relative_difference(np.stack(cached), framework.logits(model, tokens_BT)) < TOLERANCE


@pytest.mark.parametrize("variant", CAUSAL)
def test_cached_logits_of_every_variant_follow_the_oracle(framework, variant):
    config = small(**CAUSAL[variant])
    arrays = perturbed(config)
    model = framework.build_model(config, arrays)
    rows = [random_tokens(config, length) for length in (29, 12, 1, 40)]
    cuts = [[10, 1, 1, 17], [1, 3, 8], [1], even_cuts(40, 7, prompt=31)]
    for row, logits in zip(rows, paged_logits(framework, model, rows, cuts), strict=True):
        expected = reference.forward(config, to_numpy(arrays), row)["logits"]
        assert relative_difference(logits, expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_of_rows_of_different_length(framework, kind):
    """Prompts of different length go into the memory in one step, then each row goes on from its own end."""
    config = small(num_key_value_heads=KINDS[kind])
    model = framework.build_model(config, perturbed(config))
    lengths = [9, 1, 14]
    rows = [random_tokens(config, 3, 24)[i, : length + 10] for i, length in enumerate(lengths)]
    cached = paged_logits(framework, model, rows, [[length] + [1] * 10 for length in lengths])
    for row, logits in zip(rows, cached, strict=True):
        assert relative_difference(logits, framework.logits(model, row[None])[0]) < TOLERANCE


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_chunks_of_several_sequences_give_the_logits_of_the_whole_texts(framework, shape, block_size):
    config = small(vocab_size=60, **SHAPES[shape])
    model = framework.build_model(config, perturbed(config))
    random = np.random.default_rng(0)
    rows = [random.integers(0, 60, length) for length in (23, 9, 21, 1, 24)]
    cuts = [even_cuts(23, 5), [1] * 9, [1, 20], [1], even_cuts(24, 20, 20)]
    for row, found_TV in zip(rows, paged_logits(framework, model, rows, cuts, block_size), strict=True):
        np.testing.assert_allclose(found_TV, framework.logits(model, row[None])[0], atol=2e-5)


def test_blocks_are_copied_in_order_within_their_group(framework):
    config = dataclasses.replace(small(), **LATER)
    cache = framework.kv_cache.PagedKVCache(config, CacheLayout(2, 6, config.attention_windows))
    numbers_SKH = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (12, 2, 8))
    framework.fill(cache, numbers_SKH)
    cache.copy([BlockCopy(1, 0, 1), BlockCopy(1, 1, 4)])
    held = [framework.slots(memory)[:, 0, 0].tolist() for memory in (cache.keys[0], cache.keys[1], cache.values[1])]
    assert held == [list(range(12)), *[[0, 1, 0, 1, 4, 5, 6, 7, 0, 1, 10, 11]] * 2]

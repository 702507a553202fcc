"""Decoding steps over blocked weights, in a crowded engine, give the logits of the plain model under the same text."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.decode import Decoder
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model.reordered import build_reordered
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.inference.drafting import PromptLookup
from llamita.model.config import ModelConfig
from tests.backend.torch.infer.served import Served, requests

CONFIG = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "tied": {"tie_word_embeddings": True},
    "Qwen 2": {"query_key_value_bias": True, "num_attention_heads": 4},
    "Qwen 3": {"query_key_norm": True},
    "Mistral": {"sliding_window": 21},
    "windows in some layers": {"sliding_window": 21, "full_attention_layers": 1, "query_key_value_bias": True},
    "every head its own": {"num_key_value_heads": 6, "head_dim": 16},
}
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2, "float16": 3e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def largest_difference(config: ModelConfig, dtype: str, instructions: str, decodes: bool = True, drafter=None) -> float:
    """Between the logits of what an engine drew and those of the plain model in float32, as a share of the largest."""
    arrays = to_host_arrays(build_model(config, seed=1, dtype=torch.float32 if config.quantization else DTYPES[dtype]))
    model = build_reordered(config, arrays, dtype=DTYPES[dtype], instructions=instructions)
    runner, plain = TorchRunner(model), build_model(config, arrays)
    assert (runner._decoder is not None) == decodes
    each = requests(config.vocab_size, count=7, longest=100)
    served = Served(runner, [each[:4], each[4:]], drafter, blocks=60, max_sequences=4)
    assert drafter is None or any(statistics.accepted_tokens for statistics in served.statistics.values())
    differences, sizes = [], []
    for key, text in served.texts.items():
        with torch.inference_mode():
            reference_TV = plain(torch.tensor([text])).logits_BTV[0].numpy()
        for position, rows in served.logits_of(key).items():
            differences += [np.abs(row_V - reference_TV[position - 1]).max() for row_V in rows]
            sizes.append(np.abs(reference_TV[position - 1]).max())
    assert len(differences) > 100
    return max(differences) / max(sizes)


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, instructions) -> None:
    config = ModelConfig(**(CONFIG | FAMILIES[family]))
    assert largest_difference(config, "float32", instructions) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types(dtype) -> None:
    assert largest_difference(ModelConfig(**CONFIG), dtype, supported()[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
def test_quantised_weights(quantization, dtype) -> None:
    config = ModelConfig(**CONFIG, quantization=quantization)
    assert largest_difference(config, dtype, supported()[0]) < 2e-2


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_guesses_are_checked_in_one_step(family, instructions) -> None:
    config = ModelConfig(**(CONFIG | FAMILIES[family]))
    assert largest_difference(config, "float32", instructions, drafter=PromptLookup()) < TOLERANCE["float32"]


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"intermediate_size": 90}])
def test_sizes_that_fill_no_vectors_go_the_way_of_the_modules(changes) -> None:
    config = ModelConfig(**(CONFIG | changes))
    assert largest_difference(config, "float32", supported()[0], decodes=False) < TOLERANCE["float32"]


@pytest.mark.parametrize("family", ["Llama", "windows in some layers"])
@pytest.mark.parametrize("quantization", ["", "int8"])
def test_teams_of_any_size_give_the_same_bits(family, quantization) -> None:
    config = ModelConfig(**(CONFIG | FAMILIES[family]), quantization=quantization)
    arrays = to_host_arrays(build_model(config, seed=1))
    decoder = Decoder(build_reordered(config, arrays, dtype=torch.float32, instructions=supported()[0]))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            cache = PagedKVCache(config, CacheLayout(16, 8, config.attention_windows))
            mine, other = (tuple(np.array(blocks, np.int32) for _ in cache.specs) for blocks in ([5, 1, 3], [0, 7]))
            read = decoder.hidden(list(range(29)), [ScheduledChunk(0, tuple(range(29)), 0, mine)], cache)
            step = [ScheduledChunk(0, (8,), 29, mine), ScheduledChunk(1, tuple(range(19)), 0, other)]
            found.append(torch.cat([read, decoder.hidden([8, *range(19)], step, cache)]))
    finally:
        torch.set_num_threads(before)
    assert found[0].isfinite().all()
    assert found[0].abs().max() > 0.1
    for each in found[1:]:
        assert torch.equal(each, found[0])

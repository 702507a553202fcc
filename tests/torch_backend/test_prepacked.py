"""Prepacked weights give the products of plain ones, and are the same values when they are taken out again."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita import adapters, checkpoint, files
from llamita.adapters import LoraSettings
from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.torch_backend import lora, prepacked
from llamita.torch_backend.model import Linear
from llamita.torch_backend.runner import DTYPES, TorchRunner, load_runner
from llamita.torch_backend.weights import build_model, to_host_arrays

pytestmark = pytest.mark.skipif(not prepacked.can_prepack(torch.float32), reason="oneDNN has no such kernels here")

CONFIG = ModelConfig(
    vocab_size=1531,
    hidden_size=192,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    query_key_value_bias=True,
    tie_word_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 70))
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def save(directory: Path, config: ModelConfig = CONFIG, dtype: str = "float32") -> Path:
    with files.atomic_directory(directory) as temporary:
        checkpoint.save_tensors(temporary, to_host_arrays(build_model(config, seed=1, dtype=DTYPES[dtype])))
        checkpoint.save_config(temporary, config, {"float32": "F32", "bfloat16": "BF16"}[dtype])
    return directory


def is_prepacked(runner: TorchRunner, name: str) -> bool:
    return runner.model.get_submodule(name).weight.is_mkldnn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(0,), (1,), (1, 5), (2, 3, 40)])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 32), (101, 77), (1, 300)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_weight(dtype, rows, n_out, n_in, bias) -> None:
    if not prepacked.can_prepack(DTYPES[dtype]):
        pytest.skip("oneDNN multiplies no bfloat16 here")
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator).to(DTYPES[dtype]) for shape in ((*rows, n_in), (n_out, n_in), (n_out,))
    )
    with torch.inference_mode():
        weight_before, packed = weight.clone(), prepacked.prepack(weight)
        assert torch.equal(packed.to_dense(), weight)
        weight.fill_(math.nan)  # the packed one has memory of its own
        y = prepacked.linear(x, packed, offset if bias else None)
        strided = prepacked.linear(x.repeat_interleave(2, -1)[..., ::2], packed, offset if bias else None)
    weight = weight_before
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])
    assert torch.equal(strided, y)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_computes_as_the_plain_one_and_gives_the_same_weights_back(tied, dtype, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    plain = TorchRunner(build_model(config, seed=1, dtype=DTYPES[dtype]).eval())
    runner = load_runner(save(tmp_path / "model", config, dtype))
    if prepacked.can_prepack(DTYPES[dtype]):
        assert is_prepacked(runner, "model.layers.1.mlp.gate_up_proj")
        assert not is_prepacked(runner, "model.layers.1.self_attn.o_proj"), "small: faster as it is"
        assert tied or is_prepacked(runner, "lm_head")
    capture = ("embedding", "layers.1", "norm")
    ours, expected = runner.forward(TOKENS, capture), plain.forward(TOKENS, capture)
    for name, values in expected.items():
        scale = np.abs(values).max()
        assert np.abs(ours[name] - values).max() < TOLERANCE[dtype] * scale, name
    assert np.array_equal(ours["embedding"], expected["embedding"])
    assert runner.weight_bytes == plain.weight_bytes
    arrays, unchanged = runner.weights(), plain.weights()
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
        n: (a.dtype, a.shape) for n, a in unchanged.items()
    }
    for name, array in unchanged.items():
        assert bytes(arrays[name].data) == bytes(array.data), name


def test_a_tied_embedding_is_looked_up_in_the_file(tmp_path) -> None:
    """The output head is a prepacked copy of it; where the file has another type, both are in memory."""
    model = save(tmp_path / "model")
    runner = load_runner(model)
    table = runner.model.model.embed_tokens
    assert isinstance(table, prepacked.PrepackedEmbedding)
    assert table.array is not None
    for path in sorted(model.iterdir()):
        path.unlink()  # what is mapped stays
    expected = TorchRunner(build_model(CONFIG, seed=1).eval()).forward(TOKENS)["logits"]
    assert np.abs(runner.forward(TOKENS)["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
    other = load_runner(save(tmp_path / "other", dtype="bfloat16"), "float32")
    assert other.model.model.embed_tokens.array is None
    assert other.model.model.embed_tokens.weight.dtype == torch.float32


def test_an_adapter_over_prepacked_weights_gives_the_logits_of_the_merged_model() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    factors = LoraSettings(4, 8.0).factors(config)
    random = np.random.default_rng(0)
    arrays = {
        name: HostArray.from_numpy(random.normal(0, 0.1, shape).astype(np.float32))
        for name, shape in adapters.shapes(config, factors).items()
    }
    adapter = adapters.Adapter(config, factors, arrays)
    merged = build_model(config, seed=1).eval()
    over = prepacked.build_prepacked(config, to_host_arrays(merged), dtype=torch.float32).eval()
    lora.merge(merged, adapter)
    runner, expected = TorchRunner(over, adapters={"a": adapter}, default="a"), TorchRunner(merged)
    logits = expected.forward(TOKENS)["logits"]
    assert np.abs(runner.forward(TOKENS)["logits"] - logits).max() < 1e-5 * np.abs(logits).max()
    for name, array in expected.weights().items():
        np.testing.assert_allclose(runner.weights()[name].to_numpy(), array.to_numpy(), atol=1e-6, err_msg=name)


def test_the_exact_mode_reads_plain_weights(tmp_path) -> None:
    runner = load_runner(save(tmp_path / "model"), exact=True)
    assert not any(module.weight.is_mkldnn for module in runner.model.modules() if isinstance(module, Linear))
    assert not isinstance(runner.model.model.embed_tokens, prepacked.PrepackedEmbedding)
    with pytest.raises(ValueError, match="plain weights"):
        TorchRunner(load_runner(tmp_path / "model").model, exact=True)


def test_what_no_kernel_takes_stays_plain() -> None:
    assert not prepacked.can_prepack(torch.float16)
    assert not prepacked.can_prepack(torch.float64)

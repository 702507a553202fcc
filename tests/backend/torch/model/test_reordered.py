"""Reordered weights give the products of plain ones, and are the same values when they are taken out again."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.infer.runner import DTYPES, TorchRunner, load_runner
from llamita.backend.torch.model import lora, reordered
from llamita.backend.torch.model.llama import Linear
from llamita.backend.torch.model.weights import build_model, load_host_arrays, to_host_arrays
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter, LoraSettings, adapter_shapes
from llamita.storage import files, model_directory

pytestmark = pytest.mark.skipif(not reordered.can_reorder(torch.float32), reason="oneDNN has no such kernels here")

CONFIG = ModelConfig(
    vocab_size=1031,
    hidden_size=384,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=128,
    query_key_value_bias=True,
    tie_word_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 70))
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def without_kernels_of_our_own(monkeypatch) -> None:
    monkeypatch.setenv("LLAMITA_KERNELS", "off")


def save(directory: Path, config: ModelConfig = CONFIG, dtype: str = "float32") -> Path:
    with files.atomic_directory(directory) as temporary:
        model_directory.save_tensors(temporary, to_host_arrays(build_model(config, seed=1, dtype=DTYPES[dtype])))
        model_directory.save_config(temporary, config, {"float32": "F32", "bfloat16": "BF16"}[dtype])
    return directory


def is_reordered(runner: TorchRunner, name: str) -> bool:
    return runner.model.get_submodule(name).weight.is_mkldnn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(0,), (1,), (1, 5), (2, 3, 40)])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 32), (101, 77), (1, 300)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_weight(dtype, rows, n_out, n_in, bias) -> None:
    if not reordered.can_reorder(DTYPES[dtype]):
        pytest.skip("oneDNN multiplies no bfloat16 here")
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator).to(DTYPES[dtype]) for shape in ((*rows, n_in), (n_out, n_in), (n_out,))
    )
    with torch.inference_mode():
        weight_before, laid_out = weight.clone(), reordered.reorder(weight)
        assert torch.equal(laid_out.to_dense(), weight)
        weight.fill_(math.nan)  # the reordered one has memory of its own
        y = reordered.linear(x, laid_out, offset if bias else None)
        strided = reordered.linear(x.repeat_interleave(2, -1)[..., ::2], laid_out, offset if bias else None)
    weight = weight_before
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])
    assert torch.equal(strided, y)


@pytest.mark.parametrize("rows", [(0,), (), (1,), (1, 1), (2,), (2, 3)])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 32), (101, 77), (1, 300), (900, 288)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_with_columns_are_those_of_the_plain_weight(rows, n_out, n_in, bias) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((*rows, n_in), (n_out, n_in), (n_out,))
    )
    columns = weight.mT.contiguous().mT
    with torch.inference_mode():
        y = reordered.linear_of_columns(x, columns, offset if bias else None)
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE["bfloat16"], atol=20 * TOLERANCE["bfloat16"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_computes_as_the_plain_one_and_gives_the_same_weights_back(tied, dtype, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    plain = TorchRunner(build_model(config, seed=1, dtype=DTYPES[dtype]).eval())
    runner = load_runner(save(tmp_path / "model", config, dtype))
    if reordered.can_reorder(DTYPES[dtype]):
        assert is_reordered(runner, "model.layers.1.mlp.gate_up_proj")
        assert is_reordered(runner, "model.layers.1.self_attn.qkv_proj"), "with its bias"
        assert not is_reordered(runner, "model.layers.1.self_attn.o_proj"), "small: faster as it is"
        assert tied or is_reordered(runner, "lm_head")
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
    """The output head is a reordered copy of it, of another type too, and the one that is in memory."""
    model = save(tmp_path / "model")
    runner = load_runner(model)
    table = runner.model.model.embed_tokens
    assert isinstance(table, reordered.ReorderedEmbedding)
    assert table.weight.is_mkldnn
    assert table.rows.mapping is not None
    for path in sorted(model.iterdir()):
        path.unlink()  # what is mapped stays
    expected = TorchRunner(build_model(CONFIG, seed=1).eval()).forward(TOKENS)["logits"]
    assert np.abs(runner.forward(TOKENS)["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
    other = load_runner(save(tmp_path / "other", dtype="bfloat16"), "float32")
    assert other.model.model.embed_tokens.rows.dtype == "BF16"
    found = other.forward(TOKENS, ("embedding",))["embedding"]
    weight = build_model(CONFIG, seed=1, dtype=torch.bfloat16).model.embed_tokens.weight
    assert np.array_equal(found, weight[torch.from_numpy(TOKENS)].float().detach().numpy())


def test_a_tied_embedding_of_arrays_in_memory_is_a_copy() -> None:
    """They may be those of a model in training, which goes on."""
    arrays = to_host_arrays(build_model(CONFIG, seed=1))
    runner = TorchRunner(reordered.build_reordered(CONFIG, arrays, dtype=torch.float32))
    before = runner.forward(TOKENS, ("embedding",))
    for array in arrays.values():
        np.frombuffer(array.data, dtype=np.uint8)[:] = 0
    after = runner.forward(TOKENS, ("embedding",))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_adapter_over_reordered_weights_gives_the_logits_of_the_merged_model() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    factors = LoraSettings(4, 8.0).factors(config)
    random = np.random.default_rng(0)
    arrays = {
        name: HostArray.from_numpy(random.normal(0, 0.1, shape).astype(np.float32))
        for name, shape in adapter_shapes(config, factors).items()
    }
    adapter = Adapter(config, factors, arrays)
    merged = build_model(config, seed=1).eval()
    over = reordered.build_reordered(config, to_host_arrays(merged), dtype=torch.float32).eval()
    lora.merge(merged, adapter)
    runner, expected = TorchRunner(over, adapters={"a": adapter}, default="a"), TorchRunner(merged)
    logits = expected.forward(TOKENS)["logits"]
    assert np.abs(runner.forward(TOKENS)["logits"] - logits).max() < 1e-5 * np.abs(logits).max()
    for name, array in expected.weights().items():
        np.testing.assert_allclose(runner.weights()[name].to_numpy(), array.to_numpy(), atol=1e-6, err_msg=name)


def test_the_exact_mode_reads_plain_weights(tmp_path) -> None:
    runner = load_runner(save(tmp_path / "model"), exact=True)
    assert not any(module.weight.is_mkldnn for module in runner.model.modules() if isinstance(module, Linear))
    assert not isinstance(runner.model.model.embed_tokens, reordered.ReorderedEmbedding)
    with pytest.raises(ValueError, match="plain weights"):
        TorchRunner(load_runner(tmp_path / "model").model, exact=True)


@pytest.mark.parametrize("reason", ["type", "system"])
def test_what_no_kernel_takes_stays_plain(reason, monkeypatch) -> None:
    arrays = to_host_arrays(build_model(CONFIG, seed=1))
    if reason == "system":
        monkeypatch.setattr(reordered, "can_reorder", lambda dtype: False)
    dtype = torch.float16 if reason == "type" else torch.float32
    model = reordered.build_reordered(CONFIG, arrays, dtype=dtype)
    assert not model.reordered
    assert {(parameter.dtype, parameter.is_mkldnn) for parameter in model.parameters()} == {(dtype, False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_damaged_weights_are_refused(tied, name, tmp_path) -> None:
    model = build_model(dataclasses.replace(CONFIG, tie_word_embeddings=tied), seed=1)
    model.canonical_state()[name][-1, -1] = math.nan
    with files.atomic_directory(tmp_path / "model") as temporary:
        model_directory.save_tensors(temporary, to_host_arrays(model))
        model_directory.save_config(temporary, model.config, "F32")
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        load_runner(tmp_path / "model")


def test_what_would_change_reordered_weights_is_refused(tmp_path) -> None:
    """Where the tied table alone is large, too."""
    config = dataclasses.replace(CONFIG, vocab_size=4096, hidden_size=96, intermediate_size=96)
    model = load_runner(save(tmp_path / "model", config)).model
    assert [name for name, parameter in model.named_parameters() if parameter.is_mkldnn] == [
        "model.embed_tokens.weight"
    ]
    with pytest.raises(ValueError, match="plain weights"):
        TorchRunner(model, exact=True)
    with pytest.raises(AssertionError, match="kernel's order"):
        load_host_arrays(model, to_host_arrays(build_model(config)))


def test_pages_of_the_file_do_not_stay_in_memory(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=40_000, hidden_size=384)  # 61 MB
    runner = load_runner(save(tmp_path / "model", config))
    status = Path("/proc/self/smaps")
    if not status.exists():
        pytest.skip("needs Linux to read what of a file is in memory")
    for first in range(0, 40_000, 400):
        runner.model.model.embed_tokens(torch.arange(first, first + 400))
    (mapped,) = [part for part in status.read_text().split("VmFlags") if str(tmp_path) in part]
    resident = int(mapped.split("Rss:")[1].split()[0]) * 1024
    assert resident < 2 * 2**20

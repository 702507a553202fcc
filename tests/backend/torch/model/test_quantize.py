"""PyTorch's kernels of int8 and int4 weights, and decoding through them, beside dequantised weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.runner import TorchRunner, runner_over
from llamita.backend.torch.model import quantize, weights
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import parameter_table

KERNEL_TOLERANCE = 0.01  # of the largest result: rounding to bfloat16, 0.4%, in products of up to a few hundred terms
MODEL_TOLERANCE = 0.03  # of the largest logit, two layers in bfloat16 in different orders of summation
CONFIG = ModelConfig(320, 64, 160, 2, 4, 2, 64, query_key_value_bias=True)
UNEVEN = ModelConfig(97, 18, 27, 2, 3, 3, 64)  # no kernel takes these shapes, and int4 groups and bytes are cut short
HAS_INT4 = bool(quantize._rows_of_block())


@pytest.mark.parametrize(("C", "D"), [(64, 64), (48, 32), (160, 96), (336, 1024)])
@pytest.mark.parametrize("M", [1, 3, 16])
def test_kernels_give_the_dequantised_product(M, C, D) -> None:
    generator = torch.Generator().manual_seed(C)
    x_MD, weight_CD = torch.randn(M, D, generator=generator).bfloat16(), torch.randn(C, D, generator=generator)
    for bits in (8, 4):
        values, scale = quantize.quantize(weight_CD, bits)
        if not quantize.kernel_fits(values, C, D, torch.bfloat16):
            assert (bits, HAS_INT4) == (4, False)
            continue
        expected_MC = x_MD.double() @ quantize.dequantize(values, scale, D, torch.float64).T
        if bits == 8:
            y_MC = quantize.int8_product(x_MD, values, scale)
        else:
            y_MC = quantize.int4_product(x_MD, quantize.to_blocks(values), quantize.scales_and_zeros(scale))
        assert (y_MC.double() - expected_MC).abs().max() <= KERNEL_TOLERANCE * expected_MC.abs().max()


@pytest.mark.skipif(not HAS_INT4, reason="this CPU has no int4 kernel whose order is known")
@pytest.mark.parametrize("C", [16, 48, 64, 80, 112, 128, 336])
def test_the_order_of_the_kernel_has_its_inverse(C) -> None:
    values = torch.randint(0, 256, (C, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(C))
    scale = torch.randn(C, 3).bfloat16()
    blocked = quantize.to_blocks(values)
    assert not torch.equal(blocked, values)
    assert torch.equal(quantize.from_blocks(blocked), values)
    plain_CD = quantize.dequantize(values, scale, 96, torch.float32)
    assert torch.equal(quantize.dequantize_blocks(blocked, scale, torch.float32), plain_CD)


def test_kernels_are_left_alone_where_they_are_slow_or_wrong() -> None:
    values = torch.zeros(64, 64, dtype=torch.int8)
    assert quantize.kernel_fits(values, 64, 64, torch.bfloat16)
    assert not quantize.kernel_fits(values, 64, 64, torch.float32)
    assert not quantize.kernel_fits(values, 64, 40, torch.bfloat16)  # would read past the weights
    assert not quantize.kernel_fits(values.to("meta"), 64, 64, torch.bfloat16)
    assert not quantize.kernel_fits(values.view(torch.uint8), 63, 64, torch.bfloat16)


def both(config: ModelConfig, scheme: str) -> tuple[ModelConfig, dict[str, HostArray], dict[str, HostArray]]:
    """A quantised model's config and arrays, and those of the model with its weights dequantised."""
    quantized = replace(config, quantization=scheme)
    arrays = weights.to_host_arrays(weights.build_model(quantized, seed=2, dtype=torch.bfloat16))
    plain = {}
    for row in parameter_table(config):
        values, scale = (
            weights.tensor_from_host(a) if a else None for a in map(arrays.get, (row.name, row.name + "_scale"))
        )
        if scale is not None:
            values = quantize.dequantize(values, scale, row.shape[1], torch.float32)
        plain[row.name] = weights.host_from_tensor(values)
    return quantized, arrays, plain


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_decoding_goes_through_the_kernels_and_gives_the_dequantised_logits(scheme, monkeypatch) -> None:
    quantized, arrays, plain = both(CONFIG, scheme)
    runner, exact = runner_over(quantized, arrays, "bfloat16"), runner_over(CONFIG, plain)
    product, calls = quantize.int8_product, []
    monkeypatch.setattr(quantize, "int8_product", lambda *given: calls.append(1) or product(*given))
    tokens = np.array([[5]])
    logits, expected = runner.forward(tokens)["logits"], exact.forward(tokens)["logits"]
    assert len(calls) == (9 if scheme == "int8" or not HAS_INT4 else 1)  # four maps a layer and the head, or it alone
    assert np.abs(logits - expected).max() <= MODEL_TOLERANCE * np.abs(expected).max()


def test_arranging_again_for_another_type_loses_nothing() -> None:
    quantized, arrays, _ = both(CONFIG, "int4")
    model = weights.build_model(quantized, arrays, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    before, weight = layer.plain_weight().clone(), layer.dequantized(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        layer.arrange(dtype)
        assert torch.equal(layer.plain_weight(), before)
        assert torch.equal(layer.dequantized(torch.float32), weight)


def test_a_step_of_decoding_reads_the_bytes_that_are_stored() -> None:
    """And a zero beside each scale of int4; the embedding alone is not read where it is not the output head."""
    for config in (CONFIG, replace(CONFIG, tie_word_embeddings=True)):
        quantized, arrays, _ = both(config, "int4")
        bytes_ = {name: len(array.data) for name, array in arrays.items()}
        unread = 0 if config.tie_word_embeddings else sum(n for name, n in bytes_.items() if "embed_tokens" in name)
        halves = [name for name, array in arrays.items() if array.dtype == "U8"]
        zeros = sum(bytes_[name + "_scale"] for name in halves)
        assert TorchRunner(weights.build_model(quantized, arrays)).weight_bytes > 0
        assert runner_over(quantized, arrays, "bfloat16").weight_bytes == sum(bytes_.values()) - unread + zeros

"""Rounding to int8 and int4 beside a numpy oracle; PyTorch's kernels and the model beside dequantised weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.runner import TorchRunner, runner_over
from llamita.backend.torch.model import quantize, weights
from llamita.backend.torch.model.layers import PLAIN
from llamita.backend.torch.train.step import TorchTrainStep
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import parameter_table, stored_arrays

KERNEL_TOLERANCE = 0.01  # of the largest result: rounding to bfloat16, 0.4%, in products of up to a few hundred terms
MODEL_TOLERANCE = 0.03  # of the largest logit, two layers in bfloat16 in different orders of summation
CONFIG = ModelConfig(320, 64, 160, 2, 4, 2, 64, query_key_value_bias=True)
UNEVEN = ModelConfig(97, 18, 27, 2, 3, 3, 64)  # no kernel takes these shapes, and int4 groups and bytes are cut short
HAS_INT4 = bool(quantize._rows_of_block())


def bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x, dtype=np.float32)).bfloat16().double().numpy()


def oracle(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, one group of one row after another, in float64."""
    rows, width = weight.shape
    group = width if bits == 8 else 32
    values, scales = np.zeros(weight.shape), np.zeros((rows, -(-width // group)))
    for row in range(rows):
        for number in range(scales.shape[1]):
            part = slice(number * group, min(width, (number + 1) * group))
            numbers = weight[row, part].astype(np.float64)
            largest = numbers[np.abs(numbers).argmax()]
            scale = float(bfloat16(abs(largest) / 127 if bits == 8 else largest / -8))
            low, high = (-127, 127) if bits == 8 else (-8, 7)
            scales[row, number] = scale
            values[row, part] = np.clip(np.rint(numbers / scale), low, high) if scale else 0
    return values, scales


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(48, 96), (5, 64), (3, 45), (1, 7)])
def test_values_and_scales_are_those_of_the_oracle(shape, bits) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    weight[0, :32] = 0
    values, scale = quantize.quantize(torch.from_numpy(weight), bits)
    expected, scales = oracle(weight, bits)
    assert np.array_equal(scale.double().numpy().reshape(scales.shape), scales)
    stored = values.numpy().astype(np.int64)
    if bits == 4:
        stored = np.stack((stored & 15, stored >> 4), -1).reshape(len(stored), -1)[:, : shape[1]] - 8
    assert np.mean(stored == expected) >= 0.999  # float32's quotient may fall on the other side of a half
    assert np.abs(stored - expected).max() <= 1
    again = quantize.dequantize(values, scale, shape[1], torch.float32).double().numpy()
    wide = np.repeat(scales, shape[1] if bits == 8 else 32, axis=1)[:, : shape[1]]
    np.testing.assert_allclose(again, stored * wide, rtol=1e-6)
    assert np.abs(again - weight).max() <= 1.02 * np.abs(wide).max()  # a step, at the end that -8..7 lacks


def test_int4_with_minus_eight_errs_less_than_without() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = quantize.dequantize(*quantize.quantize(weight, 4), 256, torch.float32) - weight
    groups = weight.view(64, 8, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    symmetric = ((groups / scale).round() * scale - groups).flatten()
    assert error.norm() < 0.92 * symmetric.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_damaged_weights_are_refused(bits, value) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize.quantize(weight, bits)


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
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, tie_word_embeddings=True), UNEVEN, replace(CONFIG, num_labels=3)],
    ids=["untied", "tied", "uneven", "classifier"],
)
def test_logits_are_those_of_the_dequantised_model(config, scheme) -> None:
    """In float32 to the last digits; in bfloat16, where one row goes through the kernels, within a tolerance."""
    quantized, arrays, plain = both(config, scheme)
    exact = weights.build_model(config, plain).eval()
    precise = weights.build_model(quantized, arrays, operations=PLAIN).eval()
    fast = weights.build_model(quantized, arrays, dtype=torch.bfloat16).eval()
    for B, T in ((1, 1), (1, 7), (3, 20)):
        tokens_BT = torch.from_numpy(np.random.default_rng(T).integers(config.vocab_size, size=(B, T)))
        with torch.inference_mode():
            expected, *found = (model(tokens_BT).logits_BTV.float() for model in (exact, precise, fast))
        for logits, tolerance in zip(found, (1e-5, MODEL_TOLERANCE), strict=True):
            assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


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


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_arrays_come_back_as_they_went_in(scheme) -> None:
    quantized, arrays, _ = both(CONFIG, scheme)
    for dtype in ("bfloat16", "float32"):
        again = runner_over(quantized, arrays, dtype).weights()
        assert list(again) == [array.name for array in stored_arrays(quantized)]
        for name, array in arrays.items():
            if array.dtype in ("I8", "U8") or name.endswith("_scale") or dtype == "bfloat16":
                assert (again[name].dtype, bytes(again[name].data)) == (array.dtype, bytes(array.data))


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


def test_training_is_refused() -> None:
    quantized, arrays, _ = both(CONFIG, "int8")
    with pytest.raises(ValueError, match=r"quantised \(int8\) and cannot be trained; train an adapter over it"):
        TorchTrainStep(weights.build_model(quantized, arrays))

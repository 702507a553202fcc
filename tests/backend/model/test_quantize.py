"""Rounding to int8 and int4 in both backends beside a numpy oracle; models beside dequantised weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamita.model.config import ModelConfig
from llamita.model.parameters import parameter_table, stored_arrays
from tests import reference
from tests.backend.frameworks import NAMES, make, normal
from tests.backend.models import dequantized, perturbed
from tests.backend.tolerances import QUANTIZED, relative_difference

CONFIG = ModelConfig(320, 64, 160, 2, 4, 2, 64, query_key_value_bias=True)
UNEVEN = ModelConfig(97, 18, 27, 2, 3, 3, 64)  # no kernel takes these shapes, and int4 groups and bytes are cut short
CONFIGS = {
    "untied": CONFIG,
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "uneven": UNEVEN,
    "classifier": replace(CONFIG, num_labels=3),
}

PLAIN = replace(CONFIG, query_key_value_bias=False)
FAMILIES = {
    "smollm 3": replace(PLAIN, tie_word_embeddings=True, layers_without_rope=(1,)),
    "olmo 2": replace(PLAIN, query_key_norm=True, norm_all_heads=True, norm_placement="after"),
    "granite 3": replace(
        PLAIN,
        embedding_multiplier=12.0,
        attention_multiplier=0.1,
        residual_multiplier=0.22,
        logits_scaling=8.0,
    ),
    "gemma 2": replace(
        PLAIN,
        tie_word_embeddings=True,
        norm_placement="both",
        unit_offset_norm=True,
        embedding_multiplier=8.0,
        sliding_window=8,
        full_attention_at=(1,),
        hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma 3": replace(
        PLAIN,
        query_key_norm=True,
        tie_word_embeddings=True,
        norm_placement="both",
        unit_offset_norm=True,
        embedding_multiplier=8.0,
        sliding_window=8,
        full_attention_at=(1,),
        rope_local_base_freq=1000.0,
        hidden_act="gelu_pytorch_tanh",
    ),
}


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
def test_values_and_scales_are_those_of_the_oracle(framework, shape, bits):
    weight = normal(*shape, seed=1)
    weight[0, :32] = 0
    values, scale = framework.quantize.quantize(framework.array(weight), bits)
    expected, scales = oracle(weight, bits)
    assert np.array_equal(framework.numbers(scale).reshape(scales.shape), scales)
    stored = framework.numbers(values).astype(np.int64)
    if bits == 4:
        stored = np.stack((stored & 15, stored >> 4), -1).reshape(len(stored), -1)[:, : shape[1]] - 8
    assert np.mean(stored == expected) >= 0.999  # float32's quotient may fall on the other side of a half
    assert np.abs(stored - expected).max() <= 1
    again = framework.numbers(framework.quantize.dequantize(values, scale, shape[1], framework.dtype("fp32")))
    wide = np.repeat(scales, shape[1] if bits == 8 else 32, axis=1)[:, : shape[1]]
    np.testing.assert_allclose(again, stored * wide, rtol=1e-6)
    assert np.abs(again - weight).max() <= 1.02 * np.abs(wide).max()  # a step, at the end that -8..7 lacks


def test_int4_with_minus_eight_errs_less_than_without(framework):
    weight = normal(64, 256)
    values, scale = framework.quantize.quantize(framework.array(weight), 4)
    error = framework.numbers(framework.quantize.dequantize(values, scale, 256, framework.dtype("fp32"))) - weight
    groups = weight.reshape(64, 8, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    symmetric = np.rint(groups / scale) * scale - groups
    assert np.linalg.norm(error) < 0.92 * np.linalg.norm(symmetric)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_damaged_weights_are_refused(framework, bits, value):
    weight = np.ones((4, 64), np.float32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        framework.quantize.quantize(framework.array(weight), bits)


def stored_by(framework, config, scheme):
    """A quantised model's config and arrays."""
    quantized = replace(config, quantization=scheme)
    return quantized, dict(framework.backend.quantize_arrays(quantized, perturbed(config, seed=2).items()))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_dequantised_model(framework, kind, scheme):
    """In float32 to the last digits; in bfloat16, where one row goes through the kernels, within a tolerance."""
    config = CONFIGS[kind]
    quantized, arrays = stored_by(framework, config, scheme)
    plain = {row.name: dequantized(arrays)[row.name][..., : row.shape[-1]] for row in parameter_table(config)}
    models = [framework.build_model(quantized, arrays, "fp32", operations=form) for form in ("PLAIN", "FUSED")]
    models.append(framework.build_model(quantized, arrays, "bf16"))
    for B, T in ((1, 1), (1, 7), (3, 20)):
        tokens_BT = np.random.default_rng(T).integers(config.vocab_size, size=(B, T))
        expected = [reference.forward(config, plain, tokens)["logits"] for tokens in tokens_BT]
        for model, precision in zip(models, ("fp32", "fp32", "bf16"), strict=True):
            found = framework.logits(model, tokens_BT)
            assert relative_difference(found, np.stack(expected)) <= QUANTIZED[precision]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_family_are_those_of_its_dequantised_weights(framework, family, scheme):
    """The same model over numbers that were never stored in so few bits, which other tests hold to transformers'."""
    config = FAMILIES[family]
    quantized, arrays = stored_by(framework, config, scheme)
    plain = framework.build_model(config, dequantized(arrays), "fp32")
    tokens_BT = np.random.default_rng(4).integers(config.vocab_size, size=(2, 20))
    expected = framework.logits(plain, tokens_BT)
    for precision in ("fp32", "bf16"):
        found = framework.logits(framework.build_model(quantized, arrays, precision), tokens_BT)
        assert relative_difference(found, expected) <= QUANTIZED[precision]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_arrays_come_back_as_they_went_in(framework, kind, scheme):
    quantized, arrays = stored_by(framework, CONFIGS[kind], scheme)
    for precision in ("bf16", "fp32"):
        again = framework.runner_over(quantized, arrays, precision).weights()
        assert list(again) == [array.name for array in stored_arrays(quantized)]
        for name, array in arrays.items():
            if array.dtype in ("I8", "U8") or name.endswith("_scale") or precision == "bf16":
                assert (again[name].dtype, bytes(again[name].data)) == (array.dtype, bytes(array.data))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_backends_store_the_same_bytes(kind, scheme):
    ours, theirs = (stored_by(make(name), CONFIGS[kind], scheme)[1] for name in NAMES)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert bytes(ours[name].data) == bytes(array.data), name


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_training_is_refused(framework, scheme):
    model = framework.build_model(*stored_by(framework, CONFIG, scheme))
    with pytest.raises(ValueError, match=rf"quantised \({scheme}\) and cannot be trained; train an adapter over it"):
        framework.step_over(model)

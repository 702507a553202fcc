"""What a forward pass shows of itself: attention, states as logits, logits of some positions; held to the oracle, to
transformers, and to the same pass without."""

import dataclasses

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.kernels.choice import supported
from tests import reference
from tests.backend.adapters import CONFIG as ADAPTED
from tests.backend.adapters import EVERYTHING, summed
from tests.backend.adapters import fresh as fresh_base
from tests.backend.frameworks import to_numpy
from tests.backend.models import SWITCHES, VARIANTS, dequantized, perturbed, save, small
from tests.backend.sessions import CONFIG, PROMPT
from tests.backend.tolerances import MODEL, QUANTIZED, relative_difference
from tests.backend.torch.model.test_families import made_by_transformers, tokens
from tests.inference.test_adapters import adapter_of

EVERY = VARIANTS | SWITCHES
ROWS = [PROMPT, PROMPT[::-1]]
FAMILIES = ("llama 3", "qwen 3", "gemma 2", "gemma 3", "olmo 2", "granite 3", "smollm 3")


def attention_of(config) -> list[str]:
    return [f"layers.{layer}.attention" for layer in range(config.num_hidden_layers)]


def streams_of(config) -> list[str]:
    return ["embedding", *(f"layers.{layer}" for layer in range(config.num_hidden_layers)), "norm"]


def assert_attention(weights_NTT: np.ndarray, window: int = 0) -> None:
    """Rows sum to one, and nothing is seen above the diagonal or outside the window."""
    T = weights_NTT.shape[-1]
    assert weights_NTT.dtype == np.float32
    np.testing.assert_allclose(weights_NTT.sum(-1, dtype=np.float64), 1, atol=1e-6)
    seen = np.tri(T, dtype=bool) & ~(np.tri(T, k=-window, dtype=bool) if window else np.zeros((T, T), bool))
    assert (weights_NTT[..., ~seen] == 0).all()


@pytest.mark.parametrize("variant", EVERY)
def test_attention_is_that_of_the_oracle(framework, variant) -> None:
    config = small(**EVERY[variant])
    arrays = perturbed(config)
    found = framework.runner_over(config, arrays).forward(ROWS, attention_of(config))
    for row, text in enumerate(ROWS):
        expected = reference.forward(config, to_numpy(arrays), text, attention=True)
        for layer, name in enumerate(attention_of(config)):
            assert_attention(found[name][row], config.window(layer))
            np.testing.assert_allclose(found[name][row], expected[name], atol=MODEL["fp32"])


@pytest.mark.parametrize("variant", ["plain", "sliding window", "gemma 2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_captured_changes_no_number(framework, variant, precision) -> None:
    config = small(**EVERY[variant])
    runner = framework.runner_over(config, perturbed(config), precision)
    plain, seen = runner.forward(ROWS), runner.forward(ROWS, [*attention_of(config), *streams_of(config)])
    assert plain.keys() == {"logits"}
    assert seen.keys() == {*attention_of(config), *streams_of(config), "logits"}
    np.testing.assert_array_equal(plain["logits"], seen["logits"])
    assert runner.forward(ROWS, ["layers.1.attention"]).keys() == {"layers.1.attention", "logits"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_of_narrow_types_sums_to_one(framework, precision) -> None:
    config = small(sliding_window=6)
    found = framework.runner_over(config, perturbed(config), precision).forward(ROWS, attention_of(config))
    for name in attention_of(config):
        assert_attention(found[name], 6)
        expected = reference.forward(config, to_numpy(perturbed(config)), PROMPT, attention=True)[name]
        np.testing.assert_allclose(found[name][0], expected, atol=0.02)


@pytest.mark.parametrize("variant", ["plain", "tied", "gemma 2", "granite 3", "olmo 2", "classifier"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_logit_lens_of_the_last_layer_is_the_model_itself(framework, variant, precision) -> None:
    config = small(**EVERY[variant])
    runner = framework.runner_over(config, perturbed(config), precision)
    for rows in (ROWS, ROWS[:1], [[7]]):
        found = runner.forward(rows, ["layers.1"])
        np.testing.assert_array_equal(runner.logit_lens(found["layers.1"]), found["logits"])


@pytest.mark.parametrize("variant", ["plain", "tied", "gemma 2", "granite 3"])
def test_the_logit_lens_of_every_place_is_that_of_the_oracle(framework, variant) -> None:
    config = small(**EVERY[variant])
    arrays = perturbed(config)
    runner, places = framework.runner_over(config, arrays), ["embedding", "layers.0", "layers.1"]
    found = runner.forward(ROWS, places)
    for row, text in enumerate(ROWS):
        expected = reference.forward(config, to_numpy(arrays), text)
        for name in places:
            logits = reference.output_logits(config, to_numpy(arrays), expected[name])
            assert relative_difference(runner.logit_lens(found[name])[row], logits) < MODEL["fp32"]


def test_logits_are_given_where_they_are_wanted(framework) -> None:
    runner = framework.runner_over(CONFIG, perturbed(CONFIG))
    every, last = runner.forward(ROWS, ["norm"]), runner.forward(ROWS, ["norm"], logits="last")
    none = runner.forward(ROWS, ["norm", "layers.0.attention"], logits="none")
    assert last["logits"].shape == (2, 1, CONFIG.vocab_size)
    assert relative_difference(last["logits"], every["logits"][:, -1:]) < 1e-6
    assert none.keys() == {"norm", "layers.0.attention"}
    np.testing.assert_array_equal(none["norm"], every["norm"])
    with pytest.raises(ValueError, match="logits='first' must be all, last or none"):
        runner.forward(ROWS, logits="first")


@pytest.mark.parametrize("name", ["layers.9", "layers.9.attention", "layers.-1", "norm.attention", "logits", ""])
def test_an_unknown_place_is_refused_before_anything_runs(framework, monkeypatch, name) -> None:
    runner = framework.runner_over(CONFIG, perturbed(CONFIG))
    monkeypatch.setattr(runner, "model", None)
    with pytest.raises(ValueError, match=r"is unknown; there are embedding, layers\.0 to layers\.2, norm, and layers"):
        runner.forward(ROWS, [name])


# --- adapters ---


def test_an_adapter_shows_in_attention_and_lens(framework) -> None:
    arrays, adapter = fresh_base(ADAPTED), adapter_of(ADAPTED, EVERYTHING, 3)
    runner = framework.runner_of(framework.build_model(ADAPTED, arrays), adapters={"a": adapter})
    values = summed({name: array.to_numpy() for name, array in arrays.items()}, adapter)
    text = np.arange(12)
    expected = reference.forward(ADAPTED, values, text, attention=True)
    found = runner.forward([text], ["layers.1", *attention_of(ADAPTED)], adapter="a")
    without = runner.forward([text], attention_of(ADAPTED))
    for name in attention_of(ADAPTED):
        np.testing.assert_allclose(found[name][0], expected[name], atol=MODEL["fp32"])
        assert np.abs(found[name] - without[name]).max() > 1e-3
    assert relative_difference(found["logits"][0], expected["logits"]) < MODEL["fp32"]
    np.testing.assert_array_equal(runner.logit_lens(found["layers.1"], "a"), found["logits"])
    assert np.abs(runner.logit_lens(found["layers.1"]) - found["logits"]).max() > 1e-3
    for call in (lambda: runner.forward([text], adapter="b"), lambda: runner.logit_lens(found["layers.1"], "b")):
        with pytest.raises(ValueError, match="there is no adapter 'b'; loaded are: a"):
            call()


# --- other forms of weights ---


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_show_the_attention_of_the_numbers_they_stand_for(framework, scheme) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96)
    quantized = dataclasses.replace(config, quantization=scheme)
    stored = dict(framework.backend.quantize_arrays(quantized, perturbed(config).items()))
    expected = reference.forward(config, dequantized(stored), PROMPT, attention=True)
    runner = framework.runner_over(quantized, stored)
    found = runner.forward([PROMPT], ["layers.2", *attention_of(config)])
    for name in attention_of(config):
        assert_attention(found[name])
        np.testing.assert_allclose(found[name][0], expected[name], atol=QUANTIZED["fp32"])
    np.testing.assert_array_equal(runner.logit_lens(found["layers.2"]), found["logits"])


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_opened_model_shows_the_same(framework, kernels, exact, tmp_path, monkeypatch) -> None:
    """With kernels of our own, the weights lie in their blocks."""
    if kernels == "on":
        pytest.importorskip("numba", reason="the kernels need Numba")
    if framework.name == "mlx" and (exact or kernels == "on"):
        pytest.skip("MLX has no exact mode and no kernels of our own")
    monkeypatch.setenv("LLAMITA_KERNELS", "off" if kernels == "off" else supported()[0])
    arrays = perturbed(CONFIG)
    runner = framework.backend.load_runner(save(CONFIG, arrays, tmp_path / "model"), device="cpu", exact=exact)
    expected = reference.forward(CONFIG, to_numpy(arrays), PROMPT, attention=True)
    found = runner.forward([PROMPT], ["layers.2", *attention_of(CONFIG)])
    for name in attention_of(CONFIG):
        assert_attention(found[name])
        np.testing.assert_allclose(found[name][0], expected[name], atol=MODEL["fp32"])
    np.testing.assert_array_equal(runner.logit_lens(found["layers.2"]), found["logits"])


# --- transformers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_transformers(framework, family, tmp_path) -> None:
    """Past the windows of 32 positions that some layers have."""
    theirs, _ = made_by_transformers(family, tmp_path)
    theirs.set_attn_implementation("eager")
    runner = framework.backend.load_runner(tmp_path / "theirs", device="cpu")
    rows = tokens(2, 70)
    with torch.no_grad():
        expected = theirs(rows, output_attentions=True)
    found = runner.forward(rows.numpy(), attention_of(runner.config))
    assert len(expected.attentions) == runner.config.num_hidden_layers
    for layer, (name, weights) in enumerate(zip(attention_of(runner.config), expected.attentions, strict=True)):
        np.testing.assert_allclose(found[name], weights.numpy(), atol=1e-4)
        assert_attention(found[name], runner.config.window(layer))
    assert relative_difference(found["logits"], expected.logits.numpy()) < 1e-4

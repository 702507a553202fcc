"""The model of both backends against the float64 oracle, PyTorch's autograd and transformers, in both directions."""

import warnings

import numpy as np
import pytest
import torch

from llamita.data.batches import Batch
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters, parameter_table
from llamita.model.presets import PRESETS, preset
from llamita.storage import model_directory
from tests import reference
from tests.backend.frameworks import to_numpy
from tests.backend.models import (
    KINDS,
    SWITCHES,
    VARIANTS,
    gradients_by_pytorch,
    perturbed,
    random_labels,
    random_tokens,
    save,
    shrunk,
    small,
)
from tests.backend.tolerances import MODEL, relative_difference

TOLERANCE = MODEL["fp32"]
EVERY = VARIANTS | SWITCHES


def check_every_layer(framework, config, arrays, model, tokens_BT):
    seen = framework.forward(model, tokens_BT)
    for row, tokens in enumerate(tokens_BT):
        expected = reference.forward(config, to_numpy(arrays), tokens)
        assert expected.keys() == seen.keys()
        for name, values in expected.items():
            assert relative_difference(seen[name][row], values) < TOLERANCE, name
    return seen


def check_gradients(framework, config, arrays, model, *batch):
    """Those of a whole update, whose loss is computed in chunks, held to autograd's."""
    tokens_BT, labels_BT, *segments = batch
    data = Batch(tokens_BT, labels_BT, *(segments or [None]), np.arange(len(tokens_BT)))
    metrics, gradients = framework.update_gradients(framework.step_over(model), [data])
    loss, expected = gradients_by_pytorch(config, arrays, data)
    assert metrics.loss == pytest.approx(loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys() == arrays.keys()
    for name, gradient in expected.items():
        assert relative_difference(gradients[name], gradient) < TOLERANCE, name
    return metrics.loss * data.num_targets


@pytest.mark.parametrize("operations", ["PLAIN", "FUSED"])
@pytest.mark.parametrize("variant", EVERY)
def test_every_layer_follows_the_oracle_and_every_gradient_autograd(framework, variant, operations):
    config = small(**EVERY[variant])
    arrays, tokens_BT, labels_BT = perturbed(config), random_tokens(config, 2, 17), random_labels(config, 2, 17)
    model = framework.build_model(config, arrays, operations=operations)
    seen = check_every_layer(framework, config, arrays, model, tokens_BT)
    nats = check_gradients(framework, config, arrays, model, tokens_BT, labels_BT)
    assert nats == pytest.approx(reference.cross_entropy(seen["logits"], labels_BT), rel=TOLERANCE)


@pytest.mark.parametrize("name", PRESETS)
def test_every_layer_and_gradient_of_presets(framework, name):
    config = shrunk(name)
    arrays, tokens_BT, labels_BT = perturbed(config), random_tokens(config, 2, 12), random_labels(config, 2, 12)
    model = framework.build_model(config, arrays)
    check_every_layer(framework, config, arrays, model, tokens_BT)
    check_gradients(framework, config, arrays, model, tokens_BT, labels_BT)


SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0]], dtype=np.int32)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}], ids=["whole", "window"])
def test_segments_keep_documents_apart_and_padding_out(framework, changes):
    config = small(**changes)
    arrays, tokens_BT = perturbed(config), random_tokens(config, 1, 20)
    model = framework.build_model(config, arrays)
    logits = framework.logits(model, tokens_BT, segments_BT=SEGMENTS)[0]
    assert np.isfinite(logits).all()
    expected = reference.forward(config, to_numpy(arrays), tokens_BT[0], SEGMENTS[0])["logits"]
    real = SEGMENTS[0] > 0
    assert relative_difference(logits[real], expected[real]) < TOLERANCE
    alone = reference.forward(config, to_numpy(arrays), tokens_BT[0, 7:14])["logits"]
    assert relative_difference(logits[7:14], alone) < TOLERANCE
    check_gradients(framework, config, arrays, model, tokens_BT, random_labels(config, 1, 20), SEGMENTS)


def test_a_padded_batch_on_the_left_equals_each_row_alone(framework):
    config = small()
    model, tokens_BT = framework.build_model(config, perturbed(config)), random_tokens(config, 2, 12)
    padding = [0, 5]
    segments = np.array([[0] * n + [1] * (12 - n) for n in padding])
    positions = np.array([[0] * n + list(range(12 - n)) for n in padding])
    batch = framework.logits(model, tokens_BT, segments_BT=segments, positions_BT=positions)
    for row, n in enumerate(padding):
        alone = framework.logits(model, tokens_BT[row : row + 1, n:])[0]
        assert relative_difference(batch[row, n:], alone) < TOLERANCE


@pytest.mark.parametrize("operations", ["PLAIN", "FUSED"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_through_a_cache_give_the_logits_of_the_whole(framework, kind, operations):
    """The contract of a cache in a few lines: all that one sequence's layers were shown so far."""
    config = small(num_key_value_heads=KINDS[kind])
    model = framework.build_model(config, perturbed(config), operations=operations)
    tokens_BT, logits, seen = random_tokens(config, 1, 21), [], {}

    class Memory:
        def __init__(self, start, end):
            self.positions_1T, self.longest = framework.array(np.arange(start, end)[None]), end

        def attend(self, layer, q_TNH, *new):
            new = [framework.numbers(x).astype(np.float32) for x in new]
            seen[layer] = (
                [np.concatenate(pair) for pair in zip(seen[layer], new, strict=True)] if layer in seen else new
            )
            k, v = (framework.array(x.swapaxes(0, 1)) for x in seen[layer])
            return framework.layers.FUSED.attention(q_TNH.swapaxes(0, 1), k, v, causal=True).swapaxes(0, 1)

    start = 0
    for size in (9, 1, 1, 7, 3):
        chunk = tokens_BT[:, start : start + size]
        logits.append(framework.cached_logits(model, chunk, Memory(start, start + size)))
        start += size
    assert relative_difference(np.concatenate(logits), framework.logits(model, tokens_BT)[0]) < TOLERANCE


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_logits_of_transformers_both_ways(framework, name, tmp_path):
    check_against_transformers(framework, shrunk(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_at_full_width_give_the_logits_of_transformers(framework, name, tmp_path):
    check_against_transformers(framework, shrunk(name, full=True), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_logits_of_transformers_both_ways(framework, variant, tmp_path):
    check_against_transformers(framework, small(**VARIANTS[variant]), tmp_path)


def check_against_transformers(framework, config, tmp_path):
    """Our directory opened by transformers, and theirs opened here, give the logits of the same model."""
    transformers = pytest.importorskip("transformers")
    arrays = perturbed(config)
    model = framework.build_model(config, arrays)
    save(config, framework.weights.to_host_arrays(model), tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM
    if config.num_labels:
        auto = transformers.AutoModelForSequenceClassification
    theirs, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_BT = random_tokens(config, 2, 40)
    logits, rows = framework.logits(model, tokens_BT), torch.from_numpy(tokens_BT).long()
    with torch.inference_mode():
        if config.num_labels:
            theirs.config.pad_token_id = theirs.config.eos_token_id = None
            expected = torch.stack([theirs(row[None]).logits[0] for row in rows])
            logits = logits[:, -1]
        else:
            expected = theirs(rows).logits
    assert relative_difference(logits, expected) < 1e-4
    if config.vocab_size * config.hidden_size <= 1024 * 512:
        full = reference.forward(config, to_numpy(arrays), tokens_BT[0])["logits"]
        full = full[-1] if config.num_labels else full
        assert relative_difference(logits[0], full) < TOLERANCE
        assert relative_difference(expected[0], full) < TOLERANCE

    theirs.save_pretrained(tmp_path / "theirs")
    config_read = model_directory.load_config(tmp_path / "theirs")
    assert config_read.num_labels == config.num_labels
    again = framework.build_model(config_read, model_directory.load_tensors(tmp_path / "theirs"))
    logits_again = framework.logits(again, tokens_BT)
    assert np.array_equal(logits_again[:, -1] if config.num_labels else logits_again, logits)


# --- values ---


@pytest.mark.parametrize("variant", ["plain", "tied", "biases", "classifier", "qwen3"])
@pytest.mark.parametrize("initialization", ["fan-in", "gpt-2"])
def test_a_seed_gives_the_same_bytes_in_every_backend(framework, variant, initialization):
    config = small(**VARIANTS[variant])
    expected = dict(initialize_parameters(config, 5, initialization))
    found = framework.weights.to_host_arrays(
        framework.weights.build_model(config, seed=5, initialization=initialization)
    )
    assert list(found) == list(expected) == [row.name for row in parameter_table(config)]
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == ("F32", values.shape)
        assert bytes(found[name].data) == values.tobytes(), name


@pytest.mark.parametrize("initialization", ["fan-in", "gpt-2"])
def test_initial_values_follow_the_table(framework, initialization):
    config = small(hidden_size=128, intermediate_size=256, vocab_size=500)
    model = framework.weights.build_model(config, initialization=initialization)
    arrays = to_numpy(framework.weights.to_host_arrays(model))
    for row in parameter_table(config, initialization):
        values, expected = arrays[row.name], row.initialization
        assert values.shape == row.shape
        if expected.kind == "normal":
            assert abs(values.std() / expected.std - 1) < 0.03, row.name
            assert abs(values.mean()) < 0.02 * expected.std * 3, row.name
        else:
            assert (values == (1.0 if expected.kind == "ones" else 0.0)).all()


def test_fresh_logits_have_unit_scale(framework):
    """Fan-in initialisation keeps activations of size one, so the first loss is that of a fresh guess."""
    model = framework.weights.build_model(preset("tiny", num_hidden_layers=2))
    assert 0.5 < framework.logits(model, random_tokens(model.config, 2, 32)).std() < 2.0


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_weights_of_every_type_are_read_from_a_mapped_file(framework, dtype, tmp_path):
    """What is kept in bfloat16 comes out with the same bytes; wider types are rounded once, as by PyTorch."""
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    config = small()
    values = {name: torch.from_numpy(x.to_numpy().copy()).to(types[dtype]) for name, x in perturbed(config).items()}

    def stored(tensor, name):
        return HostArray(name, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().data)

    save(config, {name: stored(tensor, dtype) for name, tensor in values.items()}, tmp_path / "m", dtype)
    mapped = model_directory.load_tensors(tmp_path / "m")
    for precision, name_read in (("fp32", "F32"), ("bf16", "BF16")):
        found = framework.weights.to_host_arrays(framework.build_model(config, mapped, precision))
        for name, tensor in values.items():
            assert found[name].dtype == name_read
            assert bytes(found[name].data) == bytes(stored(tensor.to(types[name_read]), name_read).data), name


def test_a_bfloat16_model_stays_in_bfloat16_and_near_float32(framework):
    config = small(query_key_norm=True)
    arrays, tokens_BT = perturbed(config), random_tokens(config, 2, 17)
    full = framework.logits(framework.build_model(config, arrays), tokens_BT)
    low = framework.build_model(config, arrays, "bf16")
    output = low(framework.array(tokens_BT))
    assert output.logits_BTV.dtype == output.hidden_BTD.dtype == framework.dtype("bf16")
    assert relative_difference(framework.numbers(output.logits_BTV), full) < MODEL["bf16"]


def test_wrong_weights_are_all_listed_and_damaged_ones_named(framework):
    config = small()
    arrays = perturbed(config)
    arrays["model.layers.7.bogus"] = arrays.pop("model.norm.weight")
    arrays["lm_head.weight"] = arrays["model.layers.0.self_attn.k_proj.weight"]
    weights = framework.weights
    model = weights.build_model(config)
    for load in (lambda: weights.build_model(config, arrays), lambda: weights.load_host_arrays(model, arrays)):
        with pytest.raises(ValueError, match="do not fit") as error:
            load()
        for words in ("model.norm.weight is missing", "bogus is not part", "lm_head.weight has shape [16, 32]"):
            assert words in str(error.value)
    damaged, name = perturbed(config), "model.layers.1.self_attn.k_proj.weight"
    values = damaged[name].to_numpy().copy()
    values[3, 4] = np.nan
    damaged[name] = HostArray.from_numpy(values)
    with pytest.raises(ValueError, match=r"k_proj\.weight holds NaN or infinite values"):
        weights.build_model(config, damaged)


def test_loaded_weights_are_those_that_are_saved(framework):
    config = small(attention_bias=True)
    arrays, model = perturbed(config, seed=4), framework.weights.build_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framework.weights.load_host_arrays(model, arrays)
    saved = framework.weights.to_host_arrays(model)
    assert saved.keys() == arrays.keys()
    assert all(bytes(saved[name].data) == bytes(array.data) for name, array in arrays.items())


def test_dropout_acts_only_where_it_is_drawn(framework):
    config = small(dropout=0.2)
    model, tokens_BT = framework.build_model(config, perturbed(config)), random_tokens(config, 1, 8)
    plain = framework.hidden(model, tokens_BT)
    assert np.array_equal(plain, framework.hidden(model, tokens_BT))
    first, again, other = (framework.hidden(model, tokens_BT, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain)

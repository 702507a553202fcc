"""The model against the float64 oracle and against transformers, in both directions, cached and not."""

import dataclasses

import numpy as np
import pytest
import torch

from llamita.backend.torch.model import layers, weights
from llamita.model.config import ModelConfig
from llamita.model.parameters import parameter_table
from llamita.model.presets import PRESETS, preset
from llamita.model.rope import RopeScaling
from llamita.storage import files, model_directory
from tests import reference
from tests.backend.paged import even_cuts, paged_logits

KINDS = {"multi-head": 4, "grouped-query": 2, "multi-query": 1}


def small(**changes) -> ModelConfig:
    values = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def shrunk(name: str, full: bool = False) -> ModelConfig:
    """A preset with its head counts and ratios, two layers, width at most 512, vocabulary at most 1024."""
    config = preset(name)
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = config.head_dim
    if width > 512 and not full:
        head_dim = max(2, 512 // heads // 2 * 2)
        width = heads * head_dim
    return dataclasses.replace(
        config,
        hidden_size=width,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size * width // config.hidden_size,
        num_hidden_layers=2,
        vocab_size=config.vocab_size if full else min(1024, config.vocab_size),
        bos_token_id=None,
        eos_token_id=None,
    )


def numpy_weights(model) -> dict[str, np.ndarray]:
    return {name: array.to_numpy() for name, array in weights.to_host_arrays(model).items()}


def perturb(model) -> None:
    """Move norms and biases off their initial ones and zeros, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def random_tokens(config, *shape) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def save(model, directory) -> None:
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, model.config)
        model_directory.save_tensors(temporary, weights.to_host_arrays(model))


def relative_difference(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head size of its own": {"head_dim": 6},
    "classifier": {"num_labels": 3},
    "theta": {"rope_theta": 500.0, "rms_norm_eps": 1e-3},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 3.0)},
    "llama3 scaling": {"rope_scaling": RopeScaling("llama3", 8.0, 64), "rope_theta": 500.0},
    "yarn scaling": {"rope_scaling": RopeScaling("yarn", 4.0, 64, beta_fast=8.0), "rope_theta": 500.0},
    "sliding window": {"sliding_window": 6},
    "sliding window in later layers": {"sliding_window": 6, "full_attention_layers": 1, "query_key_value_bias": True},
    "qwen2": {"query_key_value_bias": True, "tie_word_embeddings": True},
    "qwen3": {"query_key_norm": True, "head_dim": 12},
    "qwen3 with biases and a window": {"query_key_norm": True, "attention_bias": True, "sliding_window": 6},
} | {kind: {"num_key_value_heads": K} for kind, K in KINDS.items()}


@pytest.mark.parametrize("operations", ["PLAIN", "FUSED"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_follows_the_oracle(variant, operations):
    config = small(**VARIANTS[variant])
    model = weights.build_model(config, operations=getattr(layers, operations)).eval()
    perturb(model)
    tokens_BT = random_tokens(config, 2, 17)
    seen = {}
    with torch.inference_mode():
        output = model(tokens_BT, trace=lambda name, x: seen.update({name: x.clone()}))
    seen |= {"logits": output.logits_BTV}
    assert torch.equal(seen["norm"], output.hidden_BTD)
    for row, tokens in enumerate(tokens_BT):
        expected = reference.forward(config, numpy_weights(model), tokens)
        assert expected.keys() == seen.keys()
        for name, values in expected.items():
            assert relative_difference(seen[name][row], values) < 1e-5, name


def test_segments_keep_documents_apart_and_padding_out():
    config = small()
    model = weights.build_model(config).eval()
    tokens_BT = random_tokens(config, 1, 20)
    segments = [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0]
    with torch.inference_mode():
        logits = model(tokens_BT, segments_BT=torch.tensor([segments])).logits_BTV[0]
    assert torch.isfinite(logits).all()
    expected = reference.forward(config, numpy_weights(model), tokens_BT[0], segments)["logits"]
    real = np.array(segments) > 0
    assert relative_difference(logits[real], expected[real]) < 1e-5
    alone = reference.forward(config, numpy_weights(model), tokens_BT[0, 7:14])["logits"]
    assert relative_difference(logits[7:14], alone) < 1e-5


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_full_recomputation(kind, chunk, block_size):
    config = small(num_key_value_heads=KINDS[kind])
    model = weights.build_model(config).eval()
    tokens_BT = random_tokens(config, 2, 33)
    with torch.inference_mode():
        full = model(tokens_BT).logits_BTV
    cached = paged_logits(model, tokens_BT, [even_cuts(33, chunk)] * 2, block_size)
    assert relative_difference(torch.stack(cached), full) < 1e-5


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "classifier"])
def test_cached_logits_of_every_variant_follow_the_oracle(variant, exact):
    config = small(**VARIANTS[variant])
    model = weights.build_model(config).eval()
    perturb(model)
    rows = [random_tokens(config, length) for length in (29, 12, 1, 40)]
    cuts = [[10, 1, 1, 17], [1, 3, 8], [1], even_cuts(40, 7, prompt=31)]
    for row, logits in zip(rows, paged_logits(model, rows, cuts, exact=exact), strict=True):
        expected = reference.forward(config, numpy_weights(model), row)["logits"]
        assert relative_difference(logits, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_of_rows_of_different_length(kind):
    """Prompts of different length go into the memory in one step, then each row goes on from its own end."""
    config = small(num_key_value_heads=KINDS[kind])
    model = weights.build_model(config).eval()
    lengths = [9, 1, 14]
    rows = [random_tokens(config, 3, 24)[i, : length + 10] for i, length in enumerate(lengths)]
    cached = paged_logits(model, rows, [[length] + [1] * 10 for length in lengths])
    for row, logits in zip(rows, cached, strict=True):
        with torch.inference_mode():
            assert relative_difference(logits, model(row[None]).logits_BTV[0]) < 1e-5


def test_a_padded_batch_on_the_left_equals_each_row_alone():
    config = small()
    model = weights.build_model(config).eval()
    tokens_BT = random_tokens(config, 2, 12)
    padding = [0, 5]
    segments = torch.tensor([[0] * n + [1] * (12 - n) for n in padding])
    positions = torch.tensor([[0] * n + list(range(12 - n)) for n in padding])
    with torch.inference_mode():
        batch = model(tokens_BT, segments_BT=segments, positions_BT=positions).logits_BTV
        for row, n in enumerate(padding):
            alone = model(tokens_BT[row : row + 1, n:]).logits_BTV[0]
            assert relative_difference(batch[row, n:], alone) < 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_logits_of_transformers_both_ways(name, tmp_path):
    check_against_transformers(shrunk(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_at_full_width_give_the_logits_of_transformers(name, tmp_path):
    check_against_transformers(shrunk(name, full=True), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_logits_of_transformers_both_ways(variant, tmp_path):
    check_against_transformers(small(**VARIANTS[variant]), tmp_path)


def check_against_transformers(config: ModelConfig, tmp_path) -> None:
    """Our directory opened by transformers, and theirs opened here, give the logits of the same model."""
    transformers = pytest.importorskip("transformers")
    model = weights.build_model(config).eval()
    perturb(model)
    save(model, tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM
    if config.num_labels:
        auto = transformers.AutoModelForSequenceClassification
    theirs, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_BT = random_tokens(config, 2, 40)
    with torch.inference_mode():
        logits = model(tokens_BT).logits_BTV
        if config.num_labels:
            theirs.config.pad_token_id = theirs.config.eos_token_id = None
            expected = torch.stack([theirs(row[None]).logits[0] for row in tokens_BT])
            logits = logits[:, -1]
        else:
            expected = theirs(tokens_BT).logits
    assert relative_difference(logits, expected) < 1e-4
    if config.vocab_size * config.hidden_size <= 1024 * 512:
        full = reference.forward(config, numpy_weights(model), tokens_BT[0])["logits"]
        full = full[-1] if config.num_labels else full
        assert relative_difference(logits[0], full) < 1e-5
        assert relative_difference(expected[0], full) < 1e-5

    theirs.save_pretrained(tmp_path / "theirs")
    config_read = model_directory.load_config(tmp_path / "theirs")
    assert config_read.num_labels == config.num_labels
    again = weights.build_model(config_read, model_directory.load_tensors(tmp_path / "theirs")).eval()
    with torch.inference_mode():
        logits_again = again(tokens_BT).logits_BTV
    logits_again = logits_again[:, -1] if config.num_labels else logits_again
    assert torch.equal(logits_again, logits)


def test_initial_values_follow_the_table():
    config = small(hidden_size=128, intermediate_size=256, vocab_size=500)
    for name in ("fan-in", "gpt-2"):
        state = weights.build_model(config, initialization=name).canonical_state()
        for row in parameter_table(config, name):
            values, expected = state[row.name], row.initialization
            assert tuple(values.shape) == row.shape
            if expected.kind == "normal":
                assert abs(values.std() / expected.std - 1) < 0.03, row.name
                assert abs(values.mean()) < 0.02 * expected.std * 3, row.name
            else:
                assert (values == (1.0 if expected.kind == "ones" else 0.0)).all()


def test_fresh_logits_have_unit_scale():
    """Fan-in initialisation keeps activations of size one, so the first loss is that of a fresh guess."""
    model = weights.build_model(preset("tiny")).eval()
    with torch.inference_mode():
        logits = model(random_tokens(model.config, 4, 64)).logits_BTV
    assert 0.5 < logits.std() < 2.0


def test_wrong_weights_are_all_listed():
    config = small()
    arrays = weights.to_host_arrays(weights.build_model(config))
    arrays["model.layers.7.bogus"] = arrays.pop("model.norm.weight")
    arrays["lm_head.weight"] = arrays["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match="do not fit") as error:
        weights.build_model(config, arrays)
    for words in ("model.norm.weight is missing", "bogus is not part", "lm_head.weight has shape [16, 32]"):
        assert words in str(error.value)


def test_dropout_acts_only_while_training():
    model = weights.build_model(small(dropout=0.2))
    tokens_BT = random_tokens(model.config, 1, 8)
    first, again = (model(tokens_BT, training=True).logits_BTV for _ in range(2))
    assert not torch.equal(first, again)
    assert torch.equal(model(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)

"""Shapes that can be built, configs in and out, and the refusals in words."""

import dataclasses
import json
import math

import pytest

from llamita.model.config import ModelConfig, unknown_keys
from llamita.model.presets import feed_forward_width, preset
from llamita.model.rope import RopeScaling

SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def test_the_papers_feed_forward_widths():
    assert feed_forward_width(4096, 256) == 11008  # Llama 2 7B
    assert feed_forward_width(5120, 256) == 13824  # Llama 2 13B
    assert feed_forward_width(288, 32) == 768  # stories15M
    assert feed_forward_width(64, 4) == 172  # stories260K


def test_config_json_round_trip():
    config = ModelConfig(**SMALL, head_dim=10, eos_token_id=(2, 5), attention_bias=True, dropout=0.1, rope_theta=5e5)
    assert ModelConfig.from_dict(config.to_dict()) == config
    classifier = dataclasses.replace(config, num_labels=5)
    assert ModelConfig.from_dict(classifier.to_dict()) == classifier
    named = dataclasses.replace(config, num_labels=2, label_names=("bad", "good"))
    assert ModelConfig.from_dict(named.to_dict()) == named
    assert named.to_dict()["label2id"] == {"bad": 0, "good": 1}
    assert (named.labels, classifier.labels[4], config.labels) == (("bad", "good"), "LABEL_4", ())
    for id2label in ({"0": "a", "2": "b"}, {"0": "a", "1": "a"}, {"0": "a", "1": 3}):
        read = ModelConfig.from_dict(named.to_dict() | {"id2label": id2label})
        assert (read.num_labels, read.label_names) == (2, ())
    with pytest.raises(ValueError, match="must be num_labels=2 different names"):
        dataclasses.replace(named, label_names=("bad",))


SWITCHES = {
    "llama": [
        {},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 64, low_freq_factor=1.5, high_freq_factor=3.0)},
        {"rope_scaling": RopeScaling("yarn", 4.0, 32, beta_fast=16.0, truncate=False, mscale=1.0, mscale_all_dim=0.8)},
    ],
    "mistral": [{"sliding_window": 8}, {"sliding_window": 8, "head_dim": 10}],
    "qwen2": [{"query_key_value_bias": True}, {"query_key_value_bias": True, "sliding_window": 8}],
    "qwen3": [
        {"query_key_norm": True, "attention_bias": True},
        {"query_key_norm": True, "sliding_window": 8, "full_attention_layers": 1},
    ],
}


@pytest.mark.parametrize(("family", "changes"), [(family, c) for family, list_ in SWITCHES.items() for c in list_])
def test_switches_make_the_family_and_come_back(family, changes):
    config = ModelConfig(**(SMALL | changes))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["model_type"] == family
    assert values["architectures"] == [f"{family.capitalize()}ForCausalLM"]
    assert ModelConfig.from_dict(values) == config
    assert unknown_keys(values) == ()
    assert unknown_keys(values | {"a_new_key": 1}) == ("a_new_key",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3; try 2"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size=64 must be a multiple of .*=5; try 4"),
        ({"vocab_size": 0}, "vocab_size=0 must be a positive whole number"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers=10000000000 must be"),
        ({"hidden_size": True}, "hidden_size=True must be"),
        ({"head_dim": 7}, "head_dim=7 must be positive and even"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a finite number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"sliding_window": -1}, "sliding_window=-1 must be a positive whole number"),
        ({"full_attention_layers": 1}, "full_attention_layers=1 needs a sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": 3}, "at most num_hidden_layers=2"),
        ({"sliding_window": 4, "mlp_bias": True}, "mlp_bias=True does not go with a sliding_window"),
        ({"query_key_norm": True, "query_key_value_bias": True}, "does not go with query_key_norm"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**(SMALL | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "of type 'dynamic' is not supported"),
        ({"rope_parameters": {"type": "longrope", "factor": 8.0}}, "of type 'longrope' is not supported"),
        ({"model_type": "gemma3_text", "rope_parameters": 5}, "rope_parameters=5 in config.json must be an object"),
        ({"rope_parameters": {"rope_type": "defaul"}}, "of type 'defaul' is not supported"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be a finite number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn' in config.json lacks its factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs from layer to layer"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.inf}}, "factor=inf must be a finite number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization={'group_size': 64, 'bits': 4} in config.json"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"bits": 8}}}},
            "quantization_config={'quant_method': 'compressed-tensors'} in config.json is not supported",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": None}, "query_pre_attn_scalar=None must be a finite number"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -4}, "query_pre_attn_scalar=-4 must be a finite number"),
        ({"model_type": "granite", "attention_multiplier": 0}, "attention_multiplier=0 must be a finite number above"),
        (
            {
                "model_type": "mistral",
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types in config.json mixes kinds of attention",
        ),
        ({"sliding_window": 32}, "sliding_window=32"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types",
        ),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_foreign_mathematics_is_refused_by_key(changes, words):
    values = ModelConfig(**SMALL).to_dict() | changes
    if changes.get("hidden_size", 0) is None:
        del values["hidden_size"]
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict(values)


def test_configs_of_older_writers():
    values = ModelConfig(**SMALL, num_labels=2).to_dict()
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "id2label"):
        del values[key]
    config = ModelConfig.from_dict(values | {"rope_theta": 123.0})
    assert (config.rope_theta, config.num_key_value_heads, config.head_dim, config.num_labels) == (123.0, 4, 16, 2)


def test_presets_keep_their_shapes():
    config = preset("lillm-39m")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 32)
    assert preset("scratch", hidden_size=256).head_dim == 64
    with pytest.raises(ValueError, match="no preset named 'large'; choose one of tiny, "):
        preset("large")


def test_older_names_of_scaling_and_windows_that_are_off():
    values = ModelConfig(**SMALL).to_dict() | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    del values["rope_parameters"]
    assert ModelConfig.from_dict(values).rope_scaling == RopeScaling("yarn", 4.0, SMALL["max_position_embeddings"])
    qwen = {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}
    assert ModelConfig.from_dict(values | qwen).sliding_window == 0
    full = {"use_sliding_window": True, "layer_types": ["full_attention", "full_attention"]}
    assert ModelConfig.from_dict(values | qwen | full).sliding_window == 0
    half = ModelConfig.from_dict(values | qwen | {"use_sliding_window": True})
    assert (half.window(0), half.window(1)) == (0, 8)
    assert ModelConfig.from_dict(values | {"model_type": "mistral", "sliding_window": None}).family == "llama"

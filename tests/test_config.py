"""Shapes that can be built, configs in and out, and the refusals in words."""

import dataclasses

import pytest

from llamita.config import PRESETS, ModelConfig, feed_forward_width, preset, unbuilt_switches

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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn'"),
        ({"sliding_window": 32}, "sliding_window=32"),
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


def test_presets_whose_switches_are_missing_name_the_key():
    refused = {name: unbuilt_switches(name) for name in PRESETS if unbuilt_switches(name)}
    assert refused == {
        "llama-3.2-1b": ("rope_scaling",), "qwen2-0.5b": ("query_key_value_bias",), "qwen3-0.6b": ("query_key_norm",),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"preset 'qwen3-0\.6b' needs query_key_norm=True"):
        preset("qwen3-0.6b")

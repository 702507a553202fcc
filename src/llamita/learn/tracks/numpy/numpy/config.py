"""The sizes of a model, from the config.json of its directory."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LlamaConfig:
    """What one must know of a Llama besides its weights; the names are those of config.json."""

    vocab_size: int
    hidden_size: int
    """The width of the vectors between layers."""
    intermediate_size: int
    """The width of the feed-forward network."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """The size of a head, H; num_attention_heads * head_dim need not be hidden_size."""
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    """Whether the output's matrix is that of the embeddings; then the file has no lm_head.weight."""


def read_config(directory: Path) -> LlamaConfig:
    """Returns the config of a model directory; ValueError for a model that is no plain Llama."""
    content = json.loads((directory / "config.json").read_text("utf-8"))
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or {}
    kinds = {settings.get("rope_type", settings.get("type", "default")) for settings in (rope, scaling)}
    biased = content.get("attention_bias", False) or content.get("mlp_bias", False)
    if content["model_type"] != "llama" or kinds != {"default"} or biased:
        raise ValueError(
            f"{directory}: expected a Llama without biases and without scaled rotary positions, got "
            f"{content['model_type']} with rope types {sorted(kinds)} and biases {bool(biased)}"
        )
    heads = content["num_attention_heads"]
    return LlamaConfig(
        vocab_size=content["vocab_size"],
        hidden_size=content["hidden_size"],
        intermediate_size=content["intermediate_size"],
        num_hidden_layers=content["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or content["hidden_size"] // heads,
        rms_norm_eps=content["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", content.get("rope_theta", 10000.0)),
        tie_word_embeddings=content.get("tie_word_embeddings", False),
    )

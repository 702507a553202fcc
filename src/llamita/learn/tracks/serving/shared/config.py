"""The sizes of a model, read from the `config.json` of a Hugging Face model directory."""

import json
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Llama, a Qwen2 or a Qwen3, under the names that `config.json` has."""

    vocab_size: int
    hidden_size: int
    """Width of the hidden states."""
    intermediate_size: int
    """Width of the feed-forward network."""
    num_hidden_layers: int
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; a divisor of the query heads."""
    head_dim: int
    """Size of a head."""
    rms_norm_eps: float
    rope_theta: float
    """The base of the rotary positions."""
    max_position_embeddings: int
    """The most positions that the model is made for."""
    tie_word_embeddings: bool
    """Whether the logits come from the embeddings' own matrix."""


def read_config(directory: str | Path) -> ModelConfig:
    """Returns the sizes of the model in a directory; ValueError for one that this course's model cannot be."""
    path = Path(directory) / "config.json"
    values = json.loads(path.read_text("utf-8"))
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if values.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}; choose one of {', '.join(FAMILIES)}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rotary positions are stretched ({rope}); choose a model in which they are not")
    if values.get("use_sliding_window") or values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: expected hidden_act silu and no sliding window; choose another model")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        max_position_embeddings=values["max_position_embeddings"],
        tie_word_embeddings=values.get("tie_word_embeddings", False),
    )

"""Named shapes of models: Llamita's own, and those of well-known ones."""

from dataclasses import replace
from typing import Any

from llamita.model.config import ModelConfig
from llamita.model.rope import RopeScaling


def feed_forward_width(hidden_size: int, multiple_of: int) -> int:
    """Width C of SwiGLU: 8/3 D, as many parameters as a two-matrix layer of 4 D, rounded up (Touvron et al. 2023)."""
    return -(-(8 * hidden_size // 3) // multiple_of) * multiple_of


def _preset(
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    *,
    hidden: int = 0,
    multiple_of: int = 32,
    **more: Any,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": hidden or feed_forward_width(width, multiple_of),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
    } | more


# The fields of a ModelConfig.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _preset(1024, 128, 3, 4, 256, hidden=512),
    "scratch": _preset(4000, 128, 4, 4, 256, hidden=512),
    "mini-llama": _preset(32000, 256, 6, 8, 512, multiple_of=256),
    "lillm-39m": _preset(8192, 512, 12, 16, 512, num_key_value_heads=8, tie_word_embeddings=True),
    "lillm-300m": _preset(8192, 1024, 24, 16, 512, num_key_value_heads=8, tie_word_embeddings=True),
    "stories-260k": _preset(512, 64, 5, 8, 512, multiple_of=4, num_key_value_heads=4, tie_word_embeddings=True),
    "stories-15m": _preset(32000, 288, 6, 6, 256, tie_word_embeddings=True),
    "stories-42m": _preset(32000, 512, 8, 8, 1024, tie_word_embeddings=True),
    "stories-110m": _preset(32000, 768, 12, 12, 1024, tie_word_embeddings=True),
    "llama-2-7b": _preset(32000, 4096, 32, 32, 4096, multiple_of=256),
    "llama-3.2-1b": _preset(
        128256, 2048, 16, 32, 131072, hidden=8192, num_key_value_heads=8, rope_theta=500000.0,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
        rope_scaling=RopeScaling("llama3", 32.0, 8192),
    ),
    "qwen2-0.5b": _preset(
        151936, 896, 24, 14, 131072, hidden=4864, num_key_value_heads=2, rope_theta=1000000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=151643, query_key_value_bias=True,
    ),
    "qwen3-0.6b": _preset(
        151936, 1024, 28, 16, 40960, hidden=3072, num_key_value_heads=8, head_dim=128, rope_theta=1000000.0,
        rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=None, eos_token_id=151645, query_key_norm=True,
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> ModelConfig:
    """The named shape with some fields changed; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"no preset named {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(ModelConfig(**PRESETS[name]), **_recomputed(name, changes))


def _recomputed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A changed width or head count changes the head size too, unless that is given."""
    if "head_dim" not in changes and "head_dim" not in PRESETS[name]:
        changes = changes | {"head_dim": 0}
    return changes

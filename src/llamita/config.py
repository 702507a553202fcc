"""The shape of a model: `ModelConfig`, its `config.json` in and out, and the presets.

Field names are the keys of a Hugging Face `config.json`. Knows nothing of tensors, frameworks or files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

TOO_LARGE = 2**31  # no count in a real model reaches it; a config that does is broken


@dataclass(frozen=True)
class ModelConfig:
    """One Llama-family model: pre-norm blocks of RoPE attention and SwiGLU (Touvron et al. 2023, arXiv:2307.09288).

    Raises ValueError, naming the field, for shapes that cannot be built.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int = 0
    """0 stands for hidden_size / num_attention_heads."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = False
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer, while training."""
    num_labels: int = 0
    """0 is a language model; otherwise a linear classification head over the hidden states."""
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < TOO_LARGE:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; try {_nearest_divisor(self.hidden_size, self.num_attention_heads)}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; "
                f"try {_nearest_divisor(self.num_attention_heads, self.num_key_value_heads)}"
            )
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be positive and even: RoPE rotates pairs of numbers")
        for name, low in (("rms_norm_eps", 0.0), ("rope_theta", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= low:
                raise ValueError(f"{name}={value!r} must be a finite number above {low:g}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if self.num_labels < 0:
            raise ValueError(f"num_labels={self.num_labels!r} must be 0 (a language model) or more")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; Hugging Face configs give none, one or a list."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a Hugging Face Llama with these shapes; `dtype` is that of the weights beside it."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        result: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        result |= {
            "architectures": ["LlamaForSequenceClassification" if self.num_labels else "LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_dropout": self.dropout,
            "eos_token_id": eos,
            # transformers 5 reads `rope_parameters` and `dtype`; older ones and other readers the older names.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        labels = result.pop("num_labels")
        if labels:
            result["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            result["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json`; refuses, by key, mathematics that Llamita does not have."""
        _refuse_unbuilt(values)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; it must describe a Llama-family model")
        known = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        known.setdefault("num_key_value_heads", values["num_attention_heads"])
        known.setdefault("dropout", values.get("attention_dropout") or 0.0)
        rope = values.get("rope_parameters") or {}
        known["rope_theta"] = values.get("rope_theta") or rope.get("rope_theta") or 10000.0
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            known[name] = values.get(name)
        if isinstance(known["eos_token_id"], list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        known["num_labels"] = 0
        if any("SequenceClassification" in name for name in values.get("architectures") or ()):
            known["num_labels"] = len(values.get("id2label") or ()) or 2  # transformers writes no id2label for two
        return cls(**known)


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_REQUIRED = tuple(name for name in _COUNTS if name != "num_key_value_heads")  # absent in Llama 1 configs


def _refuse_unbuilt(values: Mapping[str, Any]) -> None:
    """Raise for keys of a `config.json` that ask for mathematics beyond this architecture."""
    expected = {"model_type": ("llama",), "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, 1.0)}
    for key, allowed in expected.items():
        if values.get(key) is not None and values[key] not in allowed:
            raise ValueError(f"{key}={values[key]!r} in config.json is not supported; Llamita has {allowed[0]!r}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{key} of type {kind!r} in config.json is not supported; Llamita has plain RoPE")
    for key in ("sliding_window", "quantization_config", "query_key_norm"):
        if values.get(key):
            raise ValueError(f"{key}={values[key]!r} in config.json is not supported by Llamita")


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - near), d))


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


# The fields of a ModelConfig. Keys that are not fields are switches still to be built: `preset` refuses them by name.
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
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001, rope_scaling="llama3",
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


def unbuilt_switches(name: str) -> tuple[str, ...]:
    """The keys that a preset needs and the model does not have yet; empty for a preset that can be built."""
    known = {field.name for field in fields(ModelConfig)}
    return tuple(key for key in PRESETS[name] if key not in known)


def preset(name: str, **changes: Any) -> ModelConfig:
    """The named shape with some fields changed; ValueError for an unknown name or a switch that is not built."""
    if name not in PRESETS:
        raise ValueError(f"no preset named {name!r}; choose one of {', '.join(PRESETS)}")
    missing = unbuilt_switches(name)
    if missing:
        key = missing[0]
        raise ValueError(f"preset {name!r} needs {key}={PRESETS[name][key]!r}, which Llamita does not have yet")
    return replace(ModelConfig(**PRESETS[name]), **_recomputed(name, changes))


def _recomputed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A changed width or head count changes the head size too, unless that is given."""
    if "head_dim" not in changes and "head_dim" not in PRESETS[name]:
        changes = changes | {"head_dim": 0}
    return changes

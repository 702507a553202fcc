"""The shape of a model: `ModelConfig`, and its `config.json` in and out.

Field names are the keys of a Hugging Face `config.json`. Knows nothing of tensors, frameworks or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from llamita.model.config_values import HARMLESS_KEYS, nearest_divisor, token_ids
from llamita.model.labels import default_labels, read_id2label
from llamita.model.quantization import QUANTIZATION_CONFIGS, Quantization
from llamita.model.rope import RopeScaling, check_count, check_number

TOO_MANY_LAYERS = 10_000

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


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
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    query_key_value_bias: bool = False
    """Biases on those but the output's (Qwen 2)."""
    query_key_norm: bool = False
    """RMSNorm over each head of queries and keys before their rotation (Qwen 3)."""
    sliding_window: int = 0
    """Positions that a query sees, its own included (Mistral); 0: all before it."""
    full_attention_layers: int = 0
    """So many first layers see everything in spite of the sliding window (Qwen's max_window_layers)."""
    mlp_bias: bool = False
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer, while training."""
    num_labels: int = 0
    """0 is a language model; otherwise a linear classification head over the hidden states."""
    label_names: tuple[str, ...] = ()
    """What the labels are called, in the order of the head's rows; empty: LABEL_0, LABEL_1, ...."""
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    quantization: Quantization = ""
    """How the matrices are stored: int8 with a scale a row, int4 with one for 32 inputs; empty: as they are."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        if self.num_hidden_layers > TOO_MANY_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is more than any model's {TOO_MANY_LAYERS}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.head_dim:
            check_count("head_dim", self.head_dim)
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; try {nearest_divisor(self.hidden_size, self.num_attention_heads)}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; "
                f"try {nearest_divisor(self.num_attention_heads, self.num_key_value_heads)}"
            )
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be positive and even: RoPE rotates pairs of numbers")
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(name, getattr(self, name), 0.0)
        if self.sliding_window:
            check_count("sliding_window", self.sliding_window)
        if not 0 <= self.full_attention_layers <= (self.num_hidden_layers if self.sliding_window else 0):
            raise ValueError(
                f"full_attention_layers={self.full_attention_layers!r} needs a sliding_window, and at most "
                f"num_hidden_layers={self.num_hidden_layers} layers"
            )
        unknown = [name for name in _FOREIGN_TO[self.family] if getattr(self, name)]
        if unknown:
            raise ValueError(
                f"{unknown[0]}={getattr(self, unknown[0])!r} does not go with {_MARKS[self.family]}: no family of "
                "models has both, so nothing else could open the model"
            )
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if self.num_labels < 0:
            raise ValueError(f"num_labels={self.num_labels!r} must be 0 (a language model) or more")
        if self.label_names and not len(self.label_names) == len(set(self.label_names)) == self.num_labels:
            raise ValueError(f"label_names={self.label_names!r} must be num_labels={self.num_labels} different names")
        if self.quantization not in get_args(Quantization):
            raise ValueError(f"quantization={self.quantization!r} must be int8, int4, or empty for none")

    @property
    def family(self) -> Family:
        """The `model_type` of the family that has these switches."""
        if self.query_key_norm:
            return "qwen3"
        if self.query_key_value_bias:
            return "qwen2"
        return "mistral" if self.sliding_window else "llama"

    def window(self, layer: int) -> int:
        """Positions that a query of this layer sees; 0: all before it."""
        return 0 if layer < self.full_attention_layers else self.sliding_window

    @property
    def attention_windows(self) -> tuple[int, ...]:
        """The different windows of the layers, that of full attention (0) first."""
        return tuple(sorted({self.window(layer) for layer in range(self.num_hidden_layers)}))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; Hugging Face configs give none, one or a list."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, those of Hugging Face where they were given none."""
        return self.label_names or default_labels(self.num_labels)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a Hugging Face model of this family; `dtype` is that of the weights beside it."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_dict()
        result: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("query_key_value_bias", "query_key_norm", "full_attention_layers", "num_labels", "sliding_window"):
            del result[name]
        del result["quantization"], result["label_names"]
        if self.quantization:
            result["quantization_config"] = dict(QUANTIZATION_CONFIGS[self.quantization])
        head = "SequenceClassification" if self.num_labels else "CausalLM"
        result |= {
            "architectures": [f"{self.family.capitalize()}For{head}"],
            "model_type": self.family,
            "hidden_act": "silu",
            "attention_dropout": self.dropout,
            "eos_token_id": eos,
            # transformers 5 reads `rope_parameters` and `dtype`; older ones and other readers the older names.
            "rope_parameters": scaling | {"rope_theta": self.rope_theta},
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        if self.sliding_window:
            result["sliding_window"] = self.sliding_window
        if self.family in ("qwen2", "qwen3"):
            result["use_sliding_window"] = bool(self.sliding_window)
            result["max_window_layers"] = self.full_attention_layers if self.sliding_window else self.num_hidden_layers
        if self.num_labels:
            result["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            result["label2id"] = {name: i for i, name in enumerate(self.labels)}
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json`; refuses, by key, mathematics that Llamita does not have."""
        _refuse_foreign(values)
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; it must describe a Llama-family model")
        for name in _REQUIRED:
            check_count(name, values[name])
        taken = [field.name for field in fields(cls) if field.name not in _DERIVED]
        known = {name: values[name] for name in taken if values.get(name) is not None}
        known.setdefault("num_key_value_heads", values["num_attention_heads"])
        known.setdefault("dropout", values.get("attention_dropout") or 0.0)
        rope = values.get("rope_parameters") or {}
        known["rope_theta"] = values.get("rope_theta") or rope.get("rope_theta") or 10000.0
        scaling = {**(values.get("rope_scaling") or {}), **rope}
        known["rope_scaling"] = RopeScaling.from_dict(scaling, values["max_position_embeddings"])
        known["query_key_value_bias"] = values.get("model_type") == "qwen2"
        known["query_key_norm"] = values.get("model_type") == "qwen3"
        known |= _window(values)
        scheme = values.get("quantization_config")
        known["quantization"] = next((name for name, its in QUANTIZATION_CONFIGS.items() if its == scheme), "")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            known[name] = token_ids(name, values.get(name), values["vocab_size"])
        known["num_labels"] = 0
        if "SequenceClassification" in str(values.get("architectures")):
            known["num_labels"] = len(values.get("id2label") or ()) or 2  # transformers writes no id2label for two
            known["label_names"] = read_id2label(values.get("id2label") or {})
        return cls(**known)


_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_SWITCHES = ("tie_word_embeddings", "attention_bias", "query_key_value_bias", "query_key_norm", "mlp_bias")
_REQUIRED = tuple(name for name in _COUNTS if name != "num_key_value_heads")  # absent in Llama 1 configs
# Fields that are not read under their own name.
_DERIVED = (
    *("rope_scaling", "query_key_value_bias", "query_key_norm", "sliding_window", "full_attention_layers"),
    *("quantization", "label_names"),
)
# Switches that a family lacks, and what marks the family.
_FOREIGN_TO: Mapping[Family, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("attention_bias", "mlp_bias", "full_attention_layers"),
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("query_key_value_bias", "mlp_bias"),
}
_MARKS = {"mistral": "a sliding_window", "qwen2": "query_key_value_bias", "qwen3": "query_key_norm", "llama": ""}


def unknown_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a `config.json` that are neither read nor known to change nothing."""
    known = {field.name for field in fields(ModelConfig)} | HARMLESS_KEYS
    return tuple(sorted(key for key in values if key not in known))


def _refuse_foreign(values: Mapping[str, Any]) -> None:
    """Raise for keys of a `config.json` that ask for mathematics beyond this architecture."""
    expected = {
        "model_type": get_args(Family),
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1,),
        "quantization_config": tuple(QUANTIZATION_CONFIGS.values()),
        "is_encoder_decoder": (False,),
        "use_mrope": (False,),
    }
    for key in ("rope_parameters", "rope_scaling", "id2label"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise ValueError(f"{key}={values[key]!r} in config.json must be an object")
    rope = values.get("rope_parameters") or {}
    for key, allowed in expected.items():
        value = values.get(key, rope.get(key)) if key == "partial_rotary_factor" else values.get(key)
        if value is not None and value not in allowed:
            has = f"; Llamita has {', '.join(map(str, allowed))}" if allowed else ""
            raise ValueError(f"{key}={value!r} in config.json is not supported{has}")
    for key in ("rope_parameters", "rope_scaling"):
        if any(isinstance(value, Mapping) for value in (values.get(key) or {}).values()):
            raise ValueError(f"{key} in config.json differs from layer to layer, which is not supported")


def _window(values: Mapping[str, Any]) -> dict[str, int]:
    """The sliding window of a `config.json` and the first layers without it."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window") or 0
    if values.get("model_type") not in ("mistral", "qwen2", "qwen3"):
        if window:
            raise ValueError(f"sliding_window={window!r} in config.json is not supported for a Llama; mistral has it")
        return {}
    if values["model_type"] != "mistral" and not values.get("use_sliding_window"):
        window = 0
    full = values.get("max_window_layers") or 0 if values["model_type"] != "mistral" else 0
    types = values.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        raise ValueError("layer_types in config.json must be a list of names")
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
        full = len(slides) - sum(slides)
        if set(types) - {"sliding_attention", "full_attention"} or slides != sorted(slides) or len(types) != layers:
            raise ValueError("layer_types in config.json mixes kinds of attention in an order that is not supported")
    if not window or full >= layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}

"""The shape of a model: `ModelConfig`, and its `config.json` in and out.

Field names are the keys of a Hugging Face `config.json`. Knows nothing of tensors, frameworks or files.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from llamita.model.families import SWITCHES, Family, family_named, family_of
from llamita.model.quantization import QUANTIZATION_CONFIGS, Quantization
from llamita.model.rope import RopeScaling, check_count, check_number, rotary_frequencies

TOO_MANY_LAYERS = 10_000

Activation = Literal["silu", "gelu_pytorch_tanh"]
NormPlacement = Literal["before", "after", "both"]
ProblemType = Literal["", "single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class AttentionSpec:
    """How attention turns products of queries and keys into scores, and how far it sees.

    Every form of attention reads it: plain, fused, by tiles, over blocks. `scale` multiplies the products, None:
    1 / sqrt(head size). `soft_cap` bends scores to cap * tanh(score / cap), 0: not. `window` is the number of positions
    that a query sees, its own included, 0: all before it.
    """

    scale: float | None = None
    soft_cap: float = 0.0
    window: int = 0


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
    problem_type: ProblemType = ""
    """What a classification head's numbers mean, where the model says so; see `scores_labels`."""
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    quantization: Quantization = ""
    """How the matrices are stored: int8 with a scale a row, int4 with one for 32 inputs; empty: as they are."""
    norm_all_heads: bool = False
    """The norm of queries, and that of keys, is over all heads at once (OLMo 2)."""
    full_attention_at: tuple[int, ...] = ()
    """Further layers that see everything in spite of the sliding window (Gemma)."""
    layers_without_rope: tuple[int, ...] = ()
    """Layers whose queries and keys are not rotated (SmolLM 3)."""
    rope_local_base_freq: float = 0.0
    """`rope_theta` of the layers with a sliding window, whose positions are not scaled (Gemma 3); 0: as all layers."""
    hidden_act: Activation = "silu"
    """The gate of the feed-forward network: SiLU, or GELU in its approximation by tanh (Gemma)."""
    norm_placement: NormPlacement = "before"
    """RMSNorm before each sublayer, after it on what is added to the residual stream (OLMo 2), or both (Gemma)."""
    unit_offset_norm: bool = False
    """Norms multiply by 1 + their weight (Gemma)."""
    embedding_multiplier: float = 1.0
    """Embeddings are multiplied by it (Granite; Gemma: the root of hidden_size)."""
    attention_multiplier: float = 0.0
    """Products of queries and keys are multiplied by it (Granite, Gemma); 0 stands for 1 / sqrt(head_dim)."""
    residual_multiplier: float = 1.0
    """What a sublayer adds to the residual stream is multiplied by it (Granite)."""
    logits_scaling: float = 1.0
    """Logits are divided by it (Granite)."""
    attn_logit_softcapping: float = 0.0
    """Scores of attention are capped softly, cap * tanh(score / cap) (Gemma 2); 0: not."""
    final_logit_softcapping: float = 0.0
    """Logits are capped in the same way (Gemma 2); 0: not."""

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
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(name, getattr(self, name), 0.0)
        if self.sliding_window:
            check_count("sliding_window", self.sliding_window)
        for name in ("full_attention_at", "layers_without_rope"):
            if any(not isinstance(i, int) or not 0 <= i < self.num_hidden_layers for i in getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be layers from 0 to {self.num_hidden_layers - 1}"
                )
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            check_number(name, getattr(self, name), 0.0)
        for name in (
            "attention_multiplier",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "rope_local_base_freq",
        ):
            if getattr(self, name):
                check_number(name, getattr(self, name), 0.0)
        literals = {"hidden_act": Activation, "norm_placement": NormPlacement, "problem_type": ProblemType}
        for name, choices in literals.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(choice for choice in get_args(choices) if choice)
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {known}")
        if not 0 <= self.full_attention_layers <= (self.num_hidden_layers if self.sliding_window else 0):
            raise ValueError(
                f"full_attention_layers={self.full_attention_layers!r} needs a sliding_window, and at most "
                f"num_hidden_layers={self.num_hidden_layers} layers"
            )
        family_of(self).check(self)
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if self.num_labels < 0:
            raise ValueError(f"num_labels={self.num_labels!r} must be 0 (a language model) or more")
        if self.label_names and not len(self.label_names) == len(set(self.label_names)) == self.num_labels:
            raise ValueError(f"label_names={self.label_names!r} must be num_labels={self.num_labels} different names")
        if self.problem_type and not self.num_labels:
            raise ValueError(f"problem_type={self.problem_type!r} needs a classification head, num_labels of 1 or more")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type='single_label_classification' needs num_labels of 2 or more; one number is a regression"
            )
        if self.quantization not in get_args(Quantization):
            raise ValueError(f"quantization={self.quantization!r} must be int8, int4, or empty for none")

    @property
    def family(self) -> str:
        """The `model_type` of the family that has these switches."""
        return family_of(self).model_type

    def window(self, layer: int) -> int:
        """Positions that a query of this layer sees; 0: all before it."""
        return 0 if layer < self.full_attention_layers or layer in self.full_attention_at else self.sliding_window

    def attention(self, layer: int) -> AttentionSpec:
        """How attention of this layer turns products of queries and keys into scores, and what it sees."""
        return AttentionSpec(self.attention_multiplier or None, self.attn_logit_softcapping, self.window(layer))

    def rotation(self, layer: int) -> int | None:
        """Which of `rotations` turns this layer's queries and keys; None: they are not turned."""
        if layer in self.layers_without_rope:
            return None
        return 1 if self.rope_local_base_freq and self.window(layer) else 0

    @property
    def rotations(self) -> tuple[tuple[np.ndarray, float], ...]:
        """The frequencies of rotary positions [H/2], and the factor on what is turned, by the number of `rotation`."""
        turns = rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
        if not self.rope_local_base_freq:
            return (turns,)
        return turns, rotary_frequencies(self.head_dim, self.rope_local_base_freq, None)

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

    @property
    def scores_labels(self) -> bool:
        """Whether the softmax over a classification head's numbers is the probability of each label.

        It is not where the head gives one number or `problem_type` says that the numbers are those of a regression or
        labels that do not exclude each other.
        """
        return self.num_labels > 1 and self.problem_type in ("", "single_label_classification")

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a Hugging Face model of this family; `dtype` is that of the weights beside it."""
        family = family_of(self)
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_dict()
        # Every model says whether it has these biases, as transformers' Llama does.
        keys = {"attention_bias", "mlp_bias", *family.keys}
        names = (field.name for field in fields(self) if field.name not in _NOT_KEYS)
        result: dict[str, Any] = {name: getattr(self, name) for name in names if name not in SWITCHES or name in keys}
        if self.quantization:
            result["quantization_config"] = dict(QUANTIZATION_CONFIGS[self.quantization])
        head = "SequenceClassification" if self.num_labels else "CausalLM"
        prefix = family.classifier if self.num_labels and family.classifier else family.classes
        result |= {
            "architectures": [f"{prefix}For{head}"],
            "model_type": family.model_type,
            "hidden_act": self.hidden_act,
            "attention_dropout": self.dropout,
            "eos_token_id": eos,
            # transformers 5 reads `rope_parameters` and `dtype`; older ones and other readers the older names.
            "rope_parameters": scaling | {"rope_theta": self.rope_theta},
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        result |= family.write(self)
        if self.num_labels:
            result["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            result["label2id"] = {name: i for i, name in enumerate(self.labels)}
            if self.problem_type:
                result["problem_type"] = self.problem_type
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face `config.json`; refuses, by key, mathematics that Llamita does not have."""
        family = family_named(values.get("model_type", "llama"))
        values = {**_defaults(family, values), "model_type": family.model_type} | dict(values)
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; it must describe a Llama-family model")
        for name in _REQUIRED:
            check_count(name, values[name])
        rope = family.rope(values)
        switches = family.implied(values) | family.read(values)
        _refuse_foreign(values, rope, switches)
        taken = [field.name for field in fields(cls) if field.name not in (*_NOT_KEYS, "rope_scaling", *SWITCHES)]
        known = {name: values[name] for name in {*taken, *family.keys} if values.get(name) is not None}
        known.setdefault("num_key_value_heads", values["num_attention_heads"])
        known.setdefault("dropout", values.get("attention_dropout") or 0.0)
        known["rope_theta"] = rope["rope_theta"]
        known["rope_scaling"] = RopeScaling.from_dict(rope, values["max_position_embeddings"])
        known |= switches
        scheme = values.get("quantization_config")
        known["quantization"] = next((name for name, its in QUANTIZATION_CONFIGS.items() if its == scheme), "")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            known[name] = _token_ids(name, values.get(name), values["vocab_size"])
        return cls(**(known | _read_head(values)))


_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_SWITCHES = (
    *("tie_word_embeddings", "attention_bias", "query_key_value_bias", "query_key_norm", "mlp_bias"),
    *("norm_all_heads", "unit_offset_norm"),
)
_REQUIRED = tuple(name for name in _COUNTS if name != "num_key_value_heads")  # absent in Llama 1 configs
_NOT_KEYS = ("num_labels", "label_names", "problem_type", "quantization")  # fields that are read or written apart
_HARMLESS_KEYS = frozenset(
    (
        *("add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "auto_map"),
        *("base_model_name_or_path", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size"),
        *("decoder_start_token_id", "dtype", "experts_implementation", "finetuning_task", "hidden_act", "id2label"),
        *("initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id", "layer_types"),
        *("max_sequence_length", "max_window_layers", "model_name", "model_name_or_path", "model_type"),
        *("name_or_path", "num_labels", "original_max_position_embeddings", "output_attentions"),
        *("output_hidden_states", "pad_token_type_id", "partial_rotary_factor", "per_layer_config", "prefix"),
        *("pretraining_tp", "problem_type", "pruned_heads", "quantization_config", "return_dict"),
        *("rope_interleaved", "rope_parameters", "sep_token_id", "task_specific_params", "tf_legacy_loss"),
        *("tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "torch_dtype", "torchscript"),
        *("transformers.js_config", "transformers_version", "use_bfloat16", "use_cache", "use_mrope"),
        *("use_sliding_window",),
        # How to generate: transformers has these in generation_config.json and leaves them out of a config.
        *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
        *("cache_implementation", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff"),
        *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
        *("length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "min_p"),
        *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups"),
        *("num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
        *("return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p"),
        *("typical_p",),
    )
)
"""Keys of a `config.json` that change no logit here, besides those that are read or that begin with _ or unsloth_."""
_OTHER_HEAD = re.compile(r"For(?!CausalLM$|SequenceClassification$)[A-Z]")
"""Finds, in the name of a class of transformers, a head that is neither a language model's nor a classifier's."""


def unknown_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys of a `config.json` that are neither read nor known to change nothing."""
    family = family_named(values.get("model_type", "llama"))
    named = {field.name for field in fields(ModelConfig)} - set(SWITCHES)
    read = {"sliding_window", *family.keys, *family.other_keys}
    off = {key for key in ("attention_bias", "mlp_bias") if not values.get(key)}
    known = named | read | off | _HARMLESS_KEYS
    return tuple(sorted(key for key in values if key not in known and not key.startswith(("_", "unsloth_"))))


def dtype_of(values: Mapping[str, Any]) -> str | None:
    """Returns the type of numbers that a `config.json` asks for; `dtype` counts before the older `torch_dtype`."""
    found = values.get("dtype") if values.get("dtype") is not None else values.get("torch_dtype")
    return found if isinstance(found, str) else None


def _defaults(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes for missing keys, without special tokens that a small vocabulary does not have."""
    size = values.get("vocab_size")
    return {
        key: value
        for key, value in family.defaults.items()
        if not key.endswith("_token_id") or not isinstance(size, int) or value < size
    }


def _read_head(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that tell what the head gives: a classifier's where the first of `architectures` is one."""
    named = values.get("architectures")
    name = str((named[0] if isinstance(named, list) else named) if named else "")
    if _OTHER_HEAD.search(name):
        raise ValueError(
            f"architectures={named!r} in config.json is not supported: its head is neither a language model's nor a "
            "classifier of texts"
        )
    if not name.endswith("SequenceClassification"):
        return {"num_labels": 0}
    names = values.get("id2label")
    count = values.get("num_labels")
    if count is not None:
        check_count("num_labels", count)
    if not isinstance(names or {}, Mapping):
        raise ValueError(f"id2label={names!r} in config.json must be an object")
    if count is None or count == len(names or ()):
        count = len(names or ()) or 2  # transformers writes no id2label for two
    elif names:
        names = {}  # num_labels counts in transformers, and takes the names away
    problem_type = values.get("problem_type") or ""
    return {"num_labels": count, "label_names": _read_id2label(names or {}), "problem_type": problem_type}


def _refuse_foreign(values: Mapping[str, Any], rope: Mapping[str, Any], switches: Mapping[str, Any]) -> None:
    """Raises for keys of a `config.json` that ask for mathematics beyond this architecture."""
    expected: dict[str, tuple[Any, ...]] = {
        "partial_rotary_factor": (1,),
        "quantization_config": tuple(QUANTIZATION_CONFIGS.values()),
        "is_encoder_decoder": (False,),
        "use_mrope": (False,),
        "pruned_heads": ({},),
        "per_layer_config": ({},),
        "quantization": ({},),  # mlx-lm's
    }
    if "hidden_act" not in switches:
        expected["hidden_act"] = ("silu", "swish")
    for key, allowed in expected.items():
        value = rope.get(key, values.get(key)) if key == "partial_rotary_factor" else values.get(key)
        if value is not None and value not in allowed:
            if isinstance(value, Mapping):  # its method and the like: the rest can be long
                value = {name: item for name, item in value.items() if isinstance(item, str | int | float)}
            has = f"; Llamita has {', '.join(map(str, allowed))}" if allowed else ""
            raise ValueError(f"{key}={value!r} in config.json is not supported{has}")


def default_labels(count: int) -> tuple[str, ...]:
    """Returns the names that Hugging Face gives labels without any."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _read_id2label(id2label: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in an `id2label`; none where they say nothing, or are not a name each for 0, 1, ...."""
    names = tuple(id2label.get(str(i)) for i in range(len(id2label)))
    given = tuple(name for name in names if isinstance(name, str))
    if given != names or len(set(names)) < len(names) or names == default_labels(len(names)):
        return ()
    return given


def _token_ids(name: str, value: Any, vocab_size: int) -> Any:
    """The id, or ids, of a special token; old configs say -1 for none."""
    if value is None or value == -1:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
        raise ValueError(f"{name}={value!r} in config.json must be an id from 0 to {vocab_size - 1}")
    return tuple(value) if isinstance(value, list) else value


def _nearest_divisor(number: int, near: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]  # a broken config's number is large
    return min((*small, *(number // d for d in small)), key=lambda d: (abs(d - near), d))

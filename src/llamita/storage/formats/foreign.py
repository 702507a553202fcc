"""The common form that every format is read into and written from: config, host arrays, perhaps a tokenizer.

Holds the names that Meta's code gave its parameters, and what other people's code made of them. Knows no file format.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llamita.model.config import ModelConfig
from llamita.model.families import SWITCHES
from llamita.model.host_array import HostArray
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD, check_arrays, parameter_table, shortened
from llamita.storage.rotation import ROTATED, to_halves, to_pairs
from llamita.text.tokenizer import Tokenizer

# Within a layer: Meta's name -> the canonical one. The guided course renames the projections of attention.
META_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
COURSE_LAYER = {
    {
        "attention.wq": "attention.compute_query",
        "attention.wk": "attention.compute_key",
        "attention.wv": "attention.compute_value",
        "attention.wo": "attention.compute_output",
    }.get(name, name): canonical
    for name, canonical in META_LAYER.items()
}
ROTARY_TABLE = re.compile(r"(^|\.)rope\.freqs$|^freqs_(cos|sin|cis)$")
"""Finds the rotary tables among the names of a checkpoint: they follow from the config."""
META_OUTSIDE = {"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": OUTPUT_HEAD}


@dataclass(frozen=True)
class ForeignModel:
    """A model read from, or to be written to, other people's files; `arrays` under canonical names, halves rotated."""

    config: ModelConfig
    arrays: Mapping[str, HostArray]
    tokenizer: Tokenizer | None = None

    @classmethod
    def in_order(
        cls, config: ModelConfig, arrays: Mapping[str, HostArray], tokenizer: Tokenizer | None = None
    ) -> "ForeignModel":
        """The model with its arrays in the order of the table; ValueError lists those that do not fit the config."""
        check_arrays(config, arrays)
        return cls(config, {row.name: arrays[row.name] for row in parameter_table(config)}, tokenizer)


def from_meta_names(state: Mapping[str, HostArray], head_dim: int, source: Any) -> dict[str, HostArray]:
    """Arrays under Meta's names (or the course's), pairs rotated, as canonical ones, halves rotated.

    ValueError lists the names that are neither. Rotary tables are left out: they follow from the config.
    """
    result, unknown = {}, []
    for name, array in state.items():
        if ROTARY_TABLE.search(name):
            continue
        canonical = canonical_name(name)
        if canonical is None:
            unknown.append(name)
            continue
        result[canonical] = to_halves(array, head_dim) if ROTATED.fullmatch(canonical) else array
    if unknown:
        raise ValueError(f"{source} holds {shortened(sorted(unknown))}, which no Llama of Meta's code has")
    return result


def canonical_name(name: str) -> str | None:
    """The canonical name of a parameter that Meta's code, or the course's, calls `name`; None for any other."""
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if inside and inside[2] in META_LAYER | COURSE_LAYER:
        return f"model.layers.{int(inside[1])}.{(META_LAYER | COURSE_LAYER)[inside[2]]}.weight"
    return META_OUTSIDE.get(name)


def to_meta_names(model: ForeignModel, layer_names: Mapping[str, str] = META_LAYER) -> dict[str, HostArray]:
    """The inverse of `from_meta_names`, an output head included where it is the embedding."""
    outside = {canonical: name for name, canonical in META_OUTSIDE.items()}
    inside = {canonical: name for name, canonical in layer_names.items()}
    result = {}
    for canonical, array in model.arrays.items():
        if canonical in outside:
            result[outside[canonical]] = array
            continue
        _, _, layer, name = canonical.removesuffix(".weight").split(".", 3)
        rotated = to_pairs(array, model.config.head_dim) if ROTATED.fullmatch(canonical) else array
        result[f"layers.{layer}.{inside[name]}.weight"] = rotated
    result.setdefault("output.weight", model.arrays[EMBEDDING])
    return result


def refuse_switches(
    config: ModelConfig, form: str, fixed: Mapping[str, Any] | None = None, held: Collection[str] = ()
) -> None:
    """Raise ValueError where a model has what a form of plain Llamas cannot hold.

    `fixed` names more that it fixes, `held` what it can hold all the same.
    """
    usual = {field.name: field.default for field in fields(config)}
    plain = {name: usual[name] for name in (*SWITCHES, "rope_scaling", "num_labels")}
    plain["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, value in {**plain, **(fixed or {})}.items():
        if name not in held and getattr(config, name) != value:
            raise ValueError(f"{form} cannot hold a model with {name}={getattr(config, name)!r}; there it is {value!r}")


def untied_where_different(config: ModelConfig, arrays: Mapping[str, HostArray]) -> ModelConfig:
    """The config, tied or not as the arrays are: a head that repeats the embedding is one with it."""
    head = arrays.get(OUTPUT_HEAD)
    tied = head is None or (head.shape == arrays[EMBEDDING].shape and bytes(head.data) == bytes(arrays[EMBEDDING].data))
    return replace(config, tie_word_embeddings=tied)

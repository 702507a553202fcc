"""Training checkpoints of other code, as dictionaries of arrays: llama2.c's and the guided course's `.pt`, Meta's
shards, and mini-llama's MLX arrays.

Pickled files are opened by whoever calls, with a reader that executes nothing; here their contents are understood.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD, shortened
from llamita.model.rope import RopeScaling, check_count
from llamita.storage.formats.foreign import (
    COURSE_LAYER,
    META_LAYER,
    ROTARY_TABLE,
    ForeignModel,
    from_meta_names,
    refuse_switches,
    to_meta_names,
    untied_where_different,
)
from llamita.storage.model_directory import unwrapped

MINI_LLAMA_LAYER = {
    "pre_norm": "input_layernorm",
    "attn.out_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
MINI_LLAMA_OUTSIDE = {
    "embd_toks.weight": EMBEDDING,
    "out_norm.weight": "model.norm.weight",
    "lm_head.weight": OUTPUT_HEAD,
}
META_POSITIONS: Mapping[float, int] = {500000.0: 8192, 1000000.0: 16384}
"""By `rope_theta`: Llama 3's and Code Llama's."""
LLAMA_1_WIDTH = 6656
"""Of LLaMA 30B, which no later model has."""
LLAMA_32_WIDTHS = (2048, 3072)
"""Of Llama 3.2's 1B and 3B, narrower than all other models of Meta's with scaled positions."""
META_KEYS = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "max_seq_len", "sliding_window"),
        *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_scale_factor", "scale_factor"),
        *("rope_low_freq_factor", "low_freq_factor", "rope_high_freq_factor", "high_freq_factor"),
        # Said by the weights, or of no consequence for them.
        *("vocab_size", "hidden_dim", "multiple_of", "ffn_dim_multiplier", "dropout", "max_batch_size"),
    )
)
"""Keys of a `params.json` that are read or change nothing."""
META_OTHER = re.compile(r"vision|moe|expert|quant|lora|yarn|rope|qk_norm|nope|chunk|bias", re.IGNORECASE)
"""Finds, in the names of other keys, mathematics beyond this architecture."""
PREFIXES = ("module.", "llama.")  # of data parallelism, of the course's classifier


def from_training_checkpoint(source: Path, content: Any) -> ForeignModel:
    """A model from `{"model_args": {...}, "model": {name: array}}`, under llama2.c's names or the guided course's."""
    arguments = content.get("model_args") if isinstance(content, Mapping) else None
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(state, Mapping):
        raise ValueError(
            f"{source} holds no model_args and model; llama2.c's training and the guided course write both"
        )
    arrays = {_bare(str(name)): array for name, array in state.items() if isinstance(array, HostArray)}
    first = arrays.get("layers.0.feed_forward.w1.weight")
    embedding = arrays.get("tok_embeddings.weight")
    if first is None or embedding is None or len(first.shape) != 2 or len(embedding.shape) != 2:
        raise ValueError(
            f"{source} lacks tok_embeddings.weight or layers.0.feed_forward.w1.weight; it is no such model"
        )
    heads = _number(source, arguments, "n_heads")
    config = ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=_number(source, arguments, "dim"),
        intermediate_size=first.shape[0],
        num_hidden_layers=_number(source, arguments, "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=arguments.get("n_kv_heads") or heads,
        max_position_embeddings=_number(source, arguments, "max_seq_len"),
        rms_norm_eps=arguments.get("norm_eps") or arguments.get("layer_norm_eps") or 1e-5,
        rope_theta=arguments.get("rope_theta") or 10000.0,
        dropout=arguments.get("dropout") or 0.0,
    )
    named = from_meta_names(arrays, config.head_dim, source)
    return _fitted(untied_where_different(config, named), named, source)


def to_training_checkpoint(model: ForeignModel, names: str) -> dict[str, Any]:
    """The inverse: names "meta" as llama2.c trains with, or "course"."""
    refuse_switches(model.config, "this form of checkpoint", {"rope_theta": 10000.0})
    arguments = training_arguments(model.config, names)
    return {"model_args": arguments, "model": to_meta_names(model, COURSE_LAYER if names == "course" else META_LAYER)}


def training_arguments(config: ModelConfig, names: str) -> dict[str, Any]:
    """The `model_args` of such a checkpoint: the sizes of a model."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "hidden_dim": config.intermediate_size,
        "multiple_of": 32,
        "max_seq_len": config.max_position_embeddings,
        "dropout": config.dropout,
        "layer_norm_eps" if names == "course" else "norm_eps": config.rms_norm_eps,
    }


def from_meta_shards(source: Path, parameters: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> ForeignModel:
    """A model from Meta's `params.json` and `consolidated.*.pth`, one shard for each model-parallel process."""
    parameters = parameters.get("model", parameters)
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{source}: params.json must hold an object of the model's sizes, dim, n_layers and n_heads")
    _check_meta_keys(source, parameters)
    width = _number(source, parameters, "dim")
    joined: dict[str, HostArray] = {}
    for name in shards[0]:
        if ROTARY_TABLE.search(name):
            continue
        parts = [shard.get(name) for shard in shards]
        if not all(isinstance(part, HostArray) for part in parts):
            other = next((f" ({part})" for part in parts if isinstance(part, str)), "")
            raise ValueError(
                f"{source}: {name} is no array in every shard{other}; some are missing or of another model"
            )
        joined[name] = _join(name, parts, width)  # type: ignore[arg-type]
    if "tok_embeddings.weight" not in joined or "layers.0.feed_forward.w1.weight" not in joined:
        raise ValueError(f"{source} lacks tok_embeddings.weight or layers.0.feed_forward.w1.weight; it is no Llama")
    rows, inner = (joined[name].shape[0] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
    config = meta_config(source, parameters, rows, inner)
    named = from_meta_names(joined, config.head_dim, source)
    return _fitted(untied_where_different(config, named), named, source)


def meta_config(source: Path, parameters: Mapping[str, Any], vocab_size: int, intermediate_size: int) -> ModelConfig:
    """The config that Meta's `params.json` stands for; the sizes that it does not give come from the weights."""
    heads = _number(source, parameters, "n_heads")
    theta = parameters.get("rope_theta") or 10000.0
    scaling = _meta_scaling(parameters)
    positions = 131072 if scaling else META_POSITIONS.get(theta, 2048 if _is_llama_1(parameters) else 4096)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=_number(source, parameters, "dim"),
        intermediate_size=intermediate_size,
        num_hidden_layers=_number(source, parameters, "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=parameters.get("n_kv_heads") or heads,
        max_position_embeddings=parameters.get("max_seq_len") or positions,
        head_dim=parameters.get("head_dim") or 0,
        rms_norm_eps=parameters.get("norm_eps") or 1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=parameters.get("sliding_window") or 0,
    )


def _check_meta_keys(source: Path, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError for a key of `params.json` that asks for other mathematics; warns of those not known."""
    others = {key: value for key, value in parameters.items() if key not in META_KEYS and value}
    for key, value in others.items():
        if META_OTHER.search(key):
            raise ValueError(f"{source}: {key}={value!r} in params.json is not supported")
    if others:
        names = ", ".join(sorted(others))
        warnings.warn(f"{source}: params.json has keys that Llamita does not know, and ignores: {names}", stacklevel=1)


def _is_llama_1(parameters: Mapping[str, Any]) -> bool:
    """Whether a model is of Llama 1, which had half of Llama 2's positions: by its epsilon, and its two largest by
    their shape (Llama 2's 70B shares its keys and values)."""
    width = parameters["dim"]
    largest = width == LLAMA_1_WIDTH or (width == 8192 and not parameters.get("n_kv_heads"))
    return not parameters.get("rope_theta") and (parameters.get("norm_eps") == 1e-6 or largest)


def _meta_scaling(parameters: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of Llama 3.1 to 3.3, which Meta's code has and params.json mostly only switches on.

    Llama 3.2's 1B and 3B, told by their width, stretch positions by 32, all others by 8 (as their published
    config.json say).
    """
    if not parameters.get("use_scaled_rope"):
        return None
    usual = 32.0 if parameters["dim"] in LLAMA_32_WIDTHS else 8.0

    def given(*names: str) -> Any:
        return next((parameters[name] for name in names if parameters.get(name)), None)

    return RopeScaling(
        "llama3",
        given("rope_scaling_factor", "rope_scale_factor", "scale_factor") or usual,
        8192,
        low_freq_factor=given("rope_low_freq_factor", "low_freq_factor") or 1.0,
        high_freq_factor=given("rope_high_freq_factor", "high_freq_factor") or 4.0,
    )


def is_mini_llama(names: Sequence[str]) -> bool:
    """Whether these are the parameters of mini-llama's MLX model."""
    return "embd_toks.weight" in names and any(name.endswith(".attn.attn_proj.weight") for name in names)


def from_mini_llama(
    source: Path, arrays: Mapping[str, HostArray], num_attention_heads: int, positions: int
) -> ForeignModel:
    """A model from mini-llama's arrays (MLX), whose query, key and value projections are one matrix.

    The file does not say how many heads there are, nor for how many positions it was trained.
    """
    named: dict[str, HostArray] = {}
    unknown = []
    for name, array in arrays.items():
        inside = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if name in MINI_LLAMA_OUTSIDE:
            named[MINI_LLAMA_OUTSIDE[name]] = array
        elif inside and inside[2] == "attn.attn_proj" and array.shape[0] % 3 == 0:
            for part, rows in zip("qkv", np.split(array.raw(), 3), strict=True):
                named[f"model.layers.{inside[1]}.self_attn.{part}_proj.weight"] = array.with_numbers(rows)
        elif inside and inside[2] in MINI_LLAMA_LAYER:
            named[f"model.layers.{inside[1]}.{MINI_LLAMA_LAYER[inside[2]]}.weight"] = array
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{source} holds {shortened(sorted(unknown))}, which no mini-llama has")
    if not num_attention_heads:
        raise ValueError(f"{source} does not say how many attention heads it has; give --heads")
    gate = named.get("model.layers.0.mlp.gate_proj.weight")
    if gate is None or len(gate.shape) != 2:
        raise ValueError(f"{source} lacks layers.0.ffn.gate_proj.weight; it is no mini-llama")
    layers = {name.split(".")[2] for name in named if name.startswith("model.layers.")}
    config = ModelConfig(
        vocab_size=named[EMBEDDING].shape[0],
        hidden_size=gate.shape[1],
        intermediate_size=gate.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        max_position_embeddings=positions or 512,
    )
    return _fitted(config, named, source)


def _fitted(config: ModelConfig, arrays: Mapping[str, HostArray], source: Path) -> ForeignModel:
    """`ForeignModel.in_order`, the source named where it refuses."""
    try:
        return ForeignModel.in_order(config, arrays)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _bare(name: str) -> str:
    name = unwrapped(name)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _number(source: Path, values: Mapping[str, Any], key: str) -> int:
    """A count among a checkpoint's arguments; ValueError names the file where it is none."""
    try:
        check_count(key, values.get(key))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return values[key]


def _join(name: str, parts: Sequence[HostArray], width: int) -> HostArray:
    """Put the parts of a parameter together along the axis that model parallelism had cut."""
    if len(parts) == 1 or len(parts[0].shape) == 1:
        return parts[0]
    row_parallel = name.endswith((".attention.wo.weight", ".feed_forward.w2.weight"))
    cut_embedding = name.startswith("tok_embeddings.") and parts[0].shape[1] != width  # Llama 3 cuts the vocabulary
    axis = 1 if row_parallel or cut_embedding else 0
    return parts[0].with_numbers(np.concatenate([part.raw() for part in parts], axis))

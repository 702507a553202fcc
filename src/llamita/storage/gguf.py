"""GGUF, llama.cpp's files: a model's shape and weights, as llama.cpp reads them.

Every number type that the `gguf` library dequantises is read; what is no float becomes float32 when it is read, one
tensor at a time. A Llama's queries and keys rotate pairs (2 i, 2 i + 1) there, Qwen's halves. A setting that would
change the mathematics is followed or refused by its name, none is dropped.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llamita.model import families
from llamita.model.config import ModelConfig
from llamita.model.families import Family, Gguf
from llamita.model.host_array import ComputedArray, HostArray, PackedRows, forget_mapped
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD, check_arrays, parameter_table
from llamita.model.rope import TOO_LARGE, RopeScaling, rotary_frequencies
from llamita.storage.gguf_header import Header, TensorInfo, read_header
from llamita.storage.rotation import ROTATED, halves

OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT_HEAD}
ROPE_FACTORS = "rope_freqs.weight"
FLOATS = {Kind.F32: "F32", Kind.F16: "F16", Kind.BF16: "BF16"}
DEQUANTIZED_AT_ONCE = 1 << 16
"""Numbers, so that what is computed on the way stays in a processor's cache and in memory that was had before."""
END_TOKENS = frozenset(
    {
        *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<|eom_id|>"),
    }
)
"""Tokens that end a text to llama.cpp whatever a file says: many files name one alone, and not what ends a turn."""
HARMLESS = frozenset(
    {
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.dimension_count"),
        *("rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor"),
        *("rope.scaling.yarn_attn_factor", "tensor_data_layout", "use_parallel_residual", "pooling_type"),
    }
)
"""Settings of an architecture that are read here, or change nothing."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
"""Values of settings that a family lacks with which they change nothing; 0, false and an empty list always do."""


def load_config(path: Path) -> ModelConfig:
    """Returns the shape of the model in a file; ValueError, naming the file, where it is broken or not of a family."""
    return _config_of(path, read_header(path))


def load_tensors(path: Path) -> dict[str, HostArray]:
    """Returns the weights of a file under canonical names, halves rotated. Floats that stay as they are lie in the
    mapped file; all others are computed when they are read."""
    header = read_header(path)
    config = _config_of(path, header)
    try:
        arrays = _arrays(header, config)
        check_arrays(config, arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {row.name: arrays[row.name] for row in parameter_table(config)}


def _config_of(path: Path, header: Header) -> ModelConfig:
    try:
        if (kind := header.metadata.get("general.type", "model")) != "model":
            raise ValueError(f"its general.type is {kind!r}, and it is no model")
        family = families.family_in_gguf(header.metadata.get("general.architecture"))
        assert family.gguf is not None
        return _config(header, family, family.gguf)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:  # of a setting of another type too
        raise ValueError(f"{path}: {error}") from None


def _arrays(header: Header, config: ModelConfig) -> dict[str, HostArray]:
    layout = families.family_in_gguf(header.metadata["general.architecture"]).gguf
    assert layout is not None
    arrays: dict[str, HostArray] = {}
    for name in header.tensors:
        if name == ROPE_FACTORS:
            continue
        canonical = _canonical(name, layout)
        rotated = layout.rotates_pairs and ROTATED.fullmatch(canonical.replace(".bias", ".weight")) is not None
        one_less = config.unit_offset_norm and canonical.endswith("norm.weight")  # llama.cpp adds the 1 to the file
        arrays[canonical] = _array(header, name, config.head_dim if rotated else 0, one_less)
    return arrays


def _array(header: Header, name: str, head_dim: int = 0, one_less: bool = False) -> HostArray:
    """Returns a tensor of the file; with `head_dim` its rows are brought from pairs to halves."""
    info = header.tensors[name]
    dtype = FLOATS.get(info.kind)
    data = memoryview(info.mapping)[info.start : info.stop]
    plain = HostArray(dtype, info.shape, data, info.mapping, info.start) if dtype else None
    if plain is not None and not head_dim and not one_less:
        return plain
    if plain is None and not _dequantises(info.kind):
        raise ValueError(f"{name} has numbers of type {info.kind.name}, which the gguf library cannot dequantise")

    def in_file(wanted: slice | np.ndarray) -> slice | np.ndarray:
        return halves(np.arange(info.shape[0]), head_dim)[wanted] if head_dim else wanted

    def compute(wanted: slice | np.ndarray) -> np.ndarray:
        stored = in_file(wanted)
        rows = plain.rows(stored) if plain is not None else _dequantized_rows(data, info, stored)
        forget_mapped(info.mapping, info.start, info.stop)
        return rows.to_numpy().astype(np.float32) - np.float32(1) if one_less else rows.raw()

    def read_blocks() -> np.ndarray:
        rows = _rows(data, info)[in_file(slice(None))].copy()
        forget_mapped(info.mapping, info.start, info.stop)
        return rows

    packed = PackedRows(info.kind.name, read_blocks) if dtype is None and len(info.shape) == 2 else None
    return ComputedArray("F32" if dtype is None or one_less else dtype, info.shape, compute, packed)


def _dequantized_rows(data: memoryview, info: TensorInfo, wanted: slice | np.ndarray) -> HostArray:
    stored = np.frombuffer(data, dtype=np.uint8)
    if len(info.shape) == 1:  # a block holds several rows
        return HostArray.from_numpy(_dequantized(stored, info.kind)[wanted])
    rows = _rows(data, info)[wanted]
    return HostArray.from_numpy(_dequantized(rows.reshape(-1), info.kind).reshape(len(rows), *info.shape[1:]))


def _rows(data: memoryview, info: TensorInfo) -> np.ndarray:
    """Returns the bytes of a matrix, a row of it in each row."""
    stored = np.frombuffer(data, dtype=np.uint8)
    return stored.reshape(info.shape[0], len(stored) // max(info.shape[0], 1))


def _dequantized(stored: np.ndarray, kind: Kind) -> np.ndarray:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, block_bytes)
    numbers = np.empty((len(blocks), block), dtype=np.float32)
    step = max(1, DEQUANTIZED_AT_ONCE // block)
    for start in range(0, len(blocks), step):  # the library takes a row of any length, and few rows at a time
        part = blocks[start : start + step]
        numbers[start : start + step] = gguf.quants.dequantize(part.reshape(1, -1), kind).reshape(-1, block)
    return numbers.reshape(-1)


def _dequantises(kind: Kind) -> bool:
    """Returns whether the library dequantises a number type; tried on one block of zeros."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        return True
    except NotImplementedError:
        return False


# --- the shape -------------------------------------------------------------------------------------------------------


def _config(header: Header, family: Family, layout: Gguf) -> ModelConfig:
    prefix, tensors = f"{layout.architecture}.", header.tensors
    if not tensors:
        raise ValueError("it has no weights, a tokenizer at most")
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    settings = {
        key.removeprefix(prefix): _alike(key, value) for key, value in header.metadata.items() if key.startswith(prefix)
    }
    _refuse_unread(settings, layout)

    def value(key: str, default: Any = None) -> Any:
        found = settings.get(key, default)
        if found is None:
            raise ValueError(f"{prefix}{key} is missing")
        return found

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", 0) or (width // heads if isinstance(heads, int) and heads > 0 else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if value(key, head_dim) != head_dim:
            raise ValueError(f"{prefix}{key}={value(key)} is not the head size {head_dim}")
    bias = "blk.0.attn_q.bias" in tensors
    shape = {
        "hidden_size": width,
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }
    switches = family.implied(shape) | layout.read(shape)
    for key, name in layout.numbers.items():
        if (number := settings.get(key)) is not None:
            switches[name] = _short_float(number) if isinstance(number, float) else number
    if family.model_type == "qwen3" or (bias and "blk.0.attn_output.bias" in tensors):
        switches["attention_bias"] = bias
    if "blk.0.ffn_gate.bias" in tensors:
        switches["mlp_bias"] = True
    embedding = tensors["token_embd.weight"].shape
    config = ModelConfig(
        vocab_size=embedding[0] if len(embedding) == 2 else 0,
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        max_position_embeddings=value("context_length"),
        head_dim=head_dim,
        rms_norm_eps=_short_float(value("attention.layer_norm_rms_epsilon")),
        rope_theta=_short_float(value("rope.freq_base", 10000.0)),
        tie_word_embeddings="output.weight" not in tensors,
        rope_scaling=_scaling(settings, prefix),
        bos_token_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_end_tokens(header.metadata),
        pad_token_id=header.metadata.get("tokenizer.ggml.padding_token_id"),
        **switches,
    )
    return _with_llama3_scaling(config, header) if ROPE_FACTORS in tensors else config


def _alike(key: str, value: Any) -> Any:
    """Returns a setting, or the value of all layers where it is a list of equal ones."""
    if isinstance(value, list) and value:
        if any(item != value[0] for item in value):
            raise ValueError(f"{key} differs between layers, and every layer here is alike")
        return value[0]
    return value


def _refuse_unread(settings: Mapping[str, Any], layout: Gguf) -> None:
    """Raises ValueError for a setting that is neither read nor known to change nothing."""
    for key, value in settings.items():
        if key in HARMLESS or key in layout.numbers or (value in NEUTRAL[key] if key in NEUTRAL else not value):
            continue
        if key == "attention.sliding_window" and value >= settings.get("context_length", 0):
            continue  # wider than any text
        raise ValueError(f"{layout.architecture}.{key}={value!r} is not supported")


def _end_tokens(metadata: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """Returns the tokens that end a text: the EOS token, what ends a turn or a message where those are named, and
    those that llama.cpp knows by their names."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    known = [token_id for token_id, text in enumerate(tokens) if text in END_TOKENS]
    ids = tuple(dict.fromkeys([*(metadata[key] for key in keys if metadata.get(key) is not None), *known]))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _scaling(settings: Mapping[str, Any], prefix: str) -> RopeScaling | None:
    """Returns the scaling of rotary positions, as llama.cpp reads its old and its new settings.

    Without a type it is linear, by the factor of either name; yarn multiplies its own attention factor by those given.
    """
    kind = settings.get("rope.scaling.type", "linear")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{prefix}rope.scaling.type={kind!r} is not supported; Llamita reads linear and yarn")
    given = 1.0
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        given *= settings.get(key, 1.0)
        if given != 1.0 and kind != "yarn":
            raise ValueError(f"{prefix}{key}={settings[key]!r} is not supported but with yarn")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return RopeScaling("linear", _short_float(factor))
    if settings.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        key = "rope.scaling.yarn_ext_factor"
        raise ValueError(f"{prefix}{key}={settings[key]!r} is not supported, only 1")
    beta_fast = settings.get("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = settings.get("rope.scaling.yarn_beta_slow", 1.0)
    length = settings.get("rope.scaling.original_context_length", settings.get("context_length", 0))
    return RopeScaling(
        "yarn",
        _short_float(factor),
        length,
        beta_fast=_short_float(beta_fast),
        beta_slow=_short_float(beta_slow),
        attention_factor=None if given == 1.0 else given * (0.1 * math.log(factor) + 1.0),
    )


def _with_llama3_scaling(config: ModelConfig, header: Header) -> ModelConfig:
    """Returns the config whose frequencies, divided by the plain ones, are those of the file."""
    factors = _array(header, ROPE_FACTORS).to_numpy().astype(np.float64)
    plain = rotary_frequencies(config.head_dim, config.rope_theta, None)[0].astype(np.float64)
    if factors.shape == plain.shape and np.isfinite(factors).all() and factors.min() > 0.5 and factors.max() > 1.0:
        for scaling in _llama3_scalings(factors, plain):
            frequencies = rotary_frequencies(config.head_dim, config.rope_theta, scaling)[0]
            if config.rope_scaling is None and np.allclose(plain / frequencies, factors, rtol=1e-5):
                return replace(config, rope_scaling=scaling)
    if factors.shape == plain.shape and (factors == 1.0).all():
        return config
    raise ValueError(f"{ROPE_FACTORS} holds a scaling of rotary positions other than Llama 3's")


def _llama3_scalings(factors: np.ndarray, plain: np.ndarray) -> Iterator[RopeScaling]:
    """What may have divided plain frequencies by these factors; whoever calls compares.

    Long waves are divided by the whole factor, short ones by 1; between, the share that is kept grows in a line with
    the frequency. The line tells the two others of high_freq_factor, low_freq_factor and the first length when one of
    them is known: low_freq_factor is 1 in every model there is.
    """
    factor = round(float(factors.max()), 4)
    yield RopeScaling("llama3", factor, 8192)  # Llama 3.1's and 3.2's; a short head may show no line
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-3) & (kept < 1 - 1e-3)
    if between.sum() < 2:
        return
    slope, start = np.polyfit(plain[between], kept[between], 1)
    if slope <= 0 or start >= 0:
        return
    high = round(1 - 1 / start, 3)
    length = slope * 2 * np.pi * (high - 1)
    for whole in (1024 * round(length / 1024), round(length)):
        if 0 < whole < TOO_LARGE and high > 1:
            yield RopeScaling("llama3", factor, whole, high_freq_factor=high)


def _short_float(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _canonical(name: str, layout: Gguf) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts, names = name.split("."), {**families.GGUF_LAYER, **layout.tensors}
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in names and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
    raise ValueError(f"{name} is not part of a model that Llamita has")


def foreign_name(canonical: str, layout: Gguf) -> str:
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    if canonical in outside:
        return outside[canonical]
    inside = {ours: theirs for theirs, ours in {**families.GGUF_LAYER, **layout.tensors}.items()}
    _, _, layer, rest = canonical.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{inside[module]}.{kind}"

"""GGUF, llama.cpp's files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), in and out through `gguf`.

Quantised tensors are dequantised to float32; a tokenizer goes along both ways (gguf_tokenizer.py). A Llama's queries
and keys rotate pairs (2 i, 2 i + 1) there, Qwen's halves. Every length in a file is checked before the library reads
it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llamita.model import families
from llamita.model.config import ModelConfig
from llamita.model.families import Family, Gguf
from llamita.model.host_array import HostArray
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD
from llamita.model.rope import TOO_LARGE, RopeScaling, rotary_frequencies
from llamita.storage.formats import gguf_header, gguf_tokenizer
from llamita.storage.formats.foreign import ROTATED, ForeignModel, raw, to_halves, to_pairs

NumberType = Literal["f32", "f16", "bf16", "q8_0"]
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama_ftype
READ_KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K)
OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT_HEAD}
ROPE_FACTORS = "rope_freqs.weight"


def is_gguf(head: bytes) -> bool:
    return head[:4] == b"GGUF"


def read_model(path: Path) -> ForeignModel:
    """Read a model with its tokenizer; ValueError, naming the file, where it is broken or of another architecture."""
    gguf_header.check_lengths(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read: {error}") from None
    try:
        family = families.family_in_gguf(metadata.get("general.architecture"))
        assert family.gguf is not None
        layout, arrays = family.gguf, {}
        config = _config(metadata, {tensor.name: tensor for tensor in reader.tensors}, family, layout)
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            name = _canonical(tensor.name, layout)
            array = _array(tensor)
            if layout.rotates_pairs and ROTATED.fullmatch(name.replace(".bias", ".weight")):
                array = to_halves(array, config.head_dim)
            if config.unit_offset_norm and name.endswith("norm.weight"):
                array = HostArray.from_numpy(
                    array.to_numpy().astype(np.float32) - 1
                )  # llama.cpp adds the 1 to the file
            arrays[name] = array
        return ForeignModel.in_order(config, arrays, gguf_tokenizer.read(metadata))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_model(path: Path, model: ForeignModel, numbers: NumberType = "f32", name: str = "") -> None:
    """Write a model with its tokenizer. Matrices have the type asked for, norms and biases float32."""
    config = model.config
    layout = families.family_of(config).gguf
    if config.num_labels or layout is None or (config.sliding_window and not layout.numbers):
        key = "num_labels" if config.num_labels else "sliding_window"
        raise ValueError(f"llama.cpp runs no model of this architecture with {key}={getattr(config, key)}")
    for name, implied in layout.read(dataclasses.asdict(config)).items():
        if name not in layout.numbers.values() and getattr(config, name) != implied:
            raise ValueError(
                f"a GGUF file of the architecture {layout.architecture} cannot hold a model with "
                f"{name}={getattr(config, name)!r}; llama.cpp's code has {implied!r} there"
            )
    scaling = config.rope_scaling
    if scaling is not None and (scaling.attention_factor, scaling.mscale, scaling.truncate) != (None, None, True):
        raise ValueError("a GGUF file holds YaRN scaling only with its own attention factor and whole borders")
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_name(name or path.stem)
    writer.add_file_type(FILE_TYPES[numbers])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    for key, name in layout.numbers.items():
        number = getattr(config, name)
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"{layout.architecture}.{key}", number)
    if scaling is not None and scaling.rope_type != "llama3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    if model.tokenizer is not None:
        gguf_tokenizer.write(writer, model.tokenizer, config)
    if scaling is not None and scaling.rope_type == "llama3":
        plain = rotary_frequencies(config.head_dim, config.rope_theta, None)[0]
        writer.add_tensor(
            ROPE_FACTORS, plain / rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)[0]
        )
    for canonical, array in model.arrays.items():
        if layout.rotates_pairs and ROTATED.fullmatch(canonical.replace(".bias", ".weight")):
            array = to_pairs(array, config.head_dim)
        if config.unit_offset_norm and canonical.endswith("norm.weight"):
            array = HostArray.from_numpy(array.to_numpy().astype(np.float32) + 1)
        _write_tensor(writer, _foreign(canonical, layout), array, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tensor(writer: gguf.GGUFWriter, name: str, array: HostArray, numbers: NumberType) -> None:
    kind = KINDS[numbers] if len(array.shape) > 1 else Kind.F32
    if kind == Kind.Q8_0 and array.shape[-1] % 32:
        kind = Kind.F16  # groups have 32 numbers
    if kind == Kind.BF16 and array.dtype == "BF16":
        stored = raw(array).view(np.uint8)  # as it is
    else:
        stored = gguf.quants.quantize(array.to_numpy().astype(np.float32), kind)
    writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], family: Family, layout: Gguf) -> ModelConfig:
    kind = layout.architecture
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{kind}.{key}", default)
        if found is None:
            raise ValueError(f"{kind}.{key} is missing")
        return found

    if metadata.get(f"{kind}.expert_count"):
        raise ValueError(f"{kind}.expert_count={metadata[f'{kind}.expert_count']}: experts are not supported")
    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", 0) or (width // heads if isinstance(heads, int) and heads > 0 else 0)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{kind}.rope.dimension_count={value('rope.dimension_count')} is not the head size {head_dim}")
    scaling_type = value("rope.scaling.type", "none")
    scaling = None
    if scaling_type != "none":
        scaling = RopeScaling.from_dict(
            {
                "rope_type": scaling_type,
                "factor": value("rope.scaling.factor"),
                "original_max_position_embeddings": metadata.get(f"{kind}.rope.scaling.original_context_length"),
                "beta_fast": metadata.get(f"{kind}.rope.scaling.yarn_beta_fast"),
                "beta_slow": metadata.get(f"{kind}.rope.scaling.yarn_beta_slow"),
            },
            value("context_length"),
        )
    bias = "blk.0.attn_q.bias" in tensors
    shape = {
        "hidden_size": width,
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }
    switches = family.implied(shape) | layout.read(shape)
    for key, name in layout.numbers.items():
        if (number := metadata.get(f"{kind}.{key}")) is not None:
            switches[name] = _short_float(number) if isinstance(number, float) else number
    if family.model_type == "qwen3" or (bias and "blk.0.attn_output.bias" in tensors):
        switches["attention_bias"] = bias
    if "blk.0.ffn_gate.bias" in tensors:
        switches["mlp_bias"] = True
    config = ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]) if len(tensors["token_embd.weight"].shape) == 2 else 0,
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
        rope_scaling=scaling,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        **switches,
    )
    return config if ROPE_FACTORS not in tensors else _with_llama3_scaling(config, tensors[ROPE_FACTORS])


def _with_llama3_scaling(config: ModelConfig, tensor: Any) -> ModelConfig:
    """The config whose frequencies, divided by the plain ones, are those of the file."""
    factors = _array(tensor).to_numpy().astype(np.float64)
    plain = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)[0].astype(np.float64)
    if factors.shape == plain.shape and np.isfinite(factors).all() and factors.min() > 0.5 and factors.max() > 1.0:
        for scaling in _llama3_scalings(factors, plain):
            frequencies = rotary_frequencies(config.head_dim, config.rope_theta, scaling)[0]
            if np.allclose(plain / frequencies, factors, rtol=1e-5):
                return replace(config, rope_scaling=scaling)
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


def _foreign(canonical: str, layout: Gguf) -> str:
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    if canonical in outside:
        return outside[canonical]
    inside = {ours: theirs for theirs, ours in {**families.GGUF_LAYER, **layout.tensors}.items()}
    _, _, layer, rest = canonical.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{inside[module]}.{kind}"


def _array(tensor: Any) -> HostArray:
    """A tensor of the reader as a host array: as it is in F32, F16 and BF16, else dequantised to float32."""
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    if tensor.tensor_type not in READ_KINDS:
        known = ", ".join(kind.name for kind in READ_KINDS)
        raise ValueError(f"{tensor.name} has numbers of type {tensor.tensor_type.name}; Llamita reads {known}")
    if tensor.tensor_type in (Kind.F32, Kind.F16, Kind.BF16):
        stored = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
        return HostArray(tensor.tensor_type.name, shape, stored.data)
    return HostArray.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape))

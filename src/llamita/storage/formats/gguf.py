"""GGUF, llama.cpp's files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), in and out as models with their
tokenizers. How shape and weights are read lies in storage/gguf.py, how a tokenizer is in text/gguf_tokenizer.py."""

import dataclasses
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llamita.model import families
from llamita.model.host_array import HostArray
from llamita.model.rope import rotary_frequencies
from llamita.storage import gguf as gguf_file
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.gguf import ROPE_FACTORS, foreign_name
from llamita.storage.rotation import ROTATED, to_pairs
from llamita.text import gguf_tokenizer
from llamita.text.tokenizer import Tokenizer

NumberType = Literal["f32", "f16", "bf16", "q8_0"]
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama_ftype


def read_model(path: Path, with_tokenizer: bool = True) -> ForeignModel:
    """Read a model, with its tokenizer where that is asked for; ValueError, naming the file, where either is broken or
    of a kind that Llamita does not have."""
    config, arrays = gguf_file.load_config(path), gguf_file.load_tensors(path)
    tokenizer = Tokenizer.load(path) if with_tokenizer and Tokenizer.is_in(path) else None
    return ForeignModel(config, arrays, tokenizer)


def write_model(path: Path, model: ForeignModel, numbers: NumberType = "f32", name: str = "") -> None:
    """Write a model with its tokenizer. Matrices have the type asked for, norms and biases float32."""
    config = model.config
    layout = families.family_of(config).gguf
    if config.num_labels or layout is None or (config.sliding_window and not layout.numbers):
        key = "num_labels" if config.num_labels else "sliding_window"
        raise ValueError(f"llama.cpp runs no model of this architecture with {key}={getattr(config, key)}")
    for switch, implied in layout.read(dataclasses.asdict(config)).items():
        if switch not in layout.numbers.values() and getattr(config, switch) != implied:
            raise ValueError(
                f"a GGUF file of the architecture {layout.architecture} cannot hold a model with "
                f"{switch}={getattr(config, switch)!r}; llama.cpp's code has {implied!r} there"
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
    for key, switch in layout.numbers.items():
        number = getattr(config, switch)
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
        _write_tensor(writer, foreign_name(canonical, layout), array, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tensor(writer: gguf.GGUFWriter, name: str, array: HostArray, numbers: NumberType) -> None:
    kind = KINDS[numbers] if len(array.shape) > 1 else Kind.F32
    if kind == Kind.Q8_0 and array.shape[-1] % 32:
        kind = Kind.F16  # groups have 32 numbers
    if kind == Kind.BF16 and array.dtype == "BF16":
        stored = array.raw().view(np.uint8)  # as it is
    else:
        stored = gguf.quants.quantize(array.to_numpy().astype(np.float32), kind)
    writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)

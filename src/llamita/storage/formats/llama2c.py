"""llama2.c's files (https://github.com/karpathy/llama2.c): `.bin` models of versions 0, 1 and 2, and `tokenizer.bin`.

Version 0 is a header of seven numbers and float32 arrays; 1 has a longer header and another order; 2 holds int8 numbers
with a float32 scale for each group of them. All rotate pairs (2 i, 2 i + 1), normalise with epsilon 1e-5, and have
rotary theta 10000. Knows nothing of training checkpoints (checkpoints.py).
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD, parameter_table
from llamita.storage.formats.foreign import ForeignModel, refuse_switches
from llamita.storage.rotation import to_halves, to_pairs

MAGIC = 0x616B3432
HEADER = struct.Struct("<7i")
LONG_HEADER_BYTES = 256
GROUP_SIZE = 64
FIXED: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}
MAX_LAYERS = 10_000
ROTARY_TABLES = {"cosines": np.cos, "sines": np.sin}  # version 0 had them once; readers skip them by their length
QUANTISED_LAYER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
)


def is_model(path: Path) -> bool:
    """Whether a file begins like one of these models."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        return False
    if struct.unpack("<I", head[:4])[0] == MAGIC:
        return True
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = HEADER.unpack(head)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocabulary), positions)
    return all(0 < size < 2**24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0


def read_model(path: Path) -> ForeignModel:
    """Read a model of any version; the bytes are mapped where nothing has to be reordered.

    ValueError where the file is no such model or has not the length that its header asks for.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        version = 0
        if len(first) == 8 and struct.unpack("<I", first[:4])[0] == MAGIC:
            version = struct.unpack("<i", first[4:])[0]
        file.seek(8 if version else 0)
        head = file.read(HEADER.size)
        flags = file.read(5)
    if len(head) < HEADER.size or len(flags) < 5:
        raise ValueError(f"{path} is no llama2.c model: it ends inside its header")
    if version not in (0, 1, 2):
        raise ValueError(f"{path} is a llama2.c model of version {version}; Llamita reads 0, 1 and 2")
    config = _config(path, head, flags[0] if version else None)
    if config.num_hidden_layers * config.hidden_size > size:  # the norms alone; before a list of layers is made
        raise ValueError(f"{path} has {size} bytes, too few for its {config.num_hidden_layers} layers")
    order = list(_order(config, version))
    sizes = [math.prod(shape) for _, shape in order]
    group = struct.unpack("<i", flags[1:])[0] if version == 2 else 0
    if version == 2 and (
        group < 1 or any(n % group for (_, shape), n in zip(order, sizes, strict=True) if len(shape) > 1)
    ):
        raise ValueError(f"{path} has groups of {group} numbers, which do not divide its matrices")
    lengths = [_stored_bytes(shape, n, group) for (_, shape), n in zip(order, sizes, strict=True)]
    start = LONG_HEADER_BYTES if version else HEADER.size
    if size != start + sum(lengths):
        raise ValueError(
            f"{path} has {size} bytes and its header asks for {start + sum(lengths)}; it is truncated, or no llama2.c "
            "model"
        )
    data = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = {}
    for (name, shape), length in zip(order, lengths, strict=True):
        stored, start = data[start : start + length], start + length
        if name in ROTARY_TABLES:
            continue
        array = HostArray("F32", shape, stored.data)
        if group and len(shape) > 1:
            array = HostArray.from_numpy(_dequantise(stored, group).reshape(shape))
        if "q_proj" in name or "k_proj" in name:
            array = to_halves(array, config.head_dim)
        arrays[name] = array
    return ForeignModel.in_order(config, arrays)


def write_model(path: Path, model: ForeignModel, version: int = 0) -> None:
    """Write version 0 (float32) or 2 (int8 in groups, as many numbers in a group as divide the width, at most 64)."""
    if version not in (0, 2):
        raise ValueError(f"version={version} of llama2.c's format is not written; choose 0 or 2")
    config = model.config
    refuse_switches(config, "llama2.c's format", FIXED)
    sizes = (
        *(config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads),
        *(config.num_key_value_heads, config.vocab_size, config.max_position_embeddings),
    )
    group = next(size for size in (64, 32, 16, 8, 4, 2, 1) if config.hidden_size % size == 0)
    if version == 2 and config.intermediate_size % group:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} must be a multiple of {group}, the largest group that "
            f"divides hidden_size={config.hidden_size}: llama2.c quantises both in such groups"
        )
    with open(path, "wb") as file:
        if version == 0:
            signed = [size if i != 5 or config.tie_word_embeddings else -size for i, size in enumerate(sizes)]
            file.write(HEADER.pack(*signed))
        else:
            head = struct.pack("<Ii", MAGIC, version) + HEADER.pack(*sizes)
            head += struct.pack("<Bi", config.tie_word_embeddings, group)
            file.write(head.ljust(LONG_HEADER_BYTES, b"\0"))
        for name, shape in _order(config, version):
            if name in ROTARY_TABLES:
                frequencies = config.rope_theta ** (-2 * np.arange(shape[1]) / config.head_dim)
                angles = np.arange(shape[0])[:, None] * frequencies
                file.write(ROTARY_TABLES[name](angles).astype("<f4").data)
                continue
            array = model.arrays[name]
            if "q_proj" in name or "k_proj" in name:
                array = to_pairs(array, config.head_dim)
            numbers = array.to_numpy().astype(np.float32)
            if version == 2 and len(shape) > 1:
                for part in _quantise(numbers, group):
                    file.write(part.data)
            else:
                file.write(np.ascontiguousarray(numbers).data)


def _config(path: Path, head: bytes, shared_flag: int | None) -> ModelConfig:
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = HEADER.unpack(head)
    shared = vocabulary > 0 if shared_flag is None else bool(shared_flag)
    if layers > MAX_LAYERS:
        raise ValueError(f"{path} says that it has {layers} layers; it is no llama2.c model")
    try:
        return ModelConfig(
            vocab_size=abs(vocabulary),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=shared,
            **FIXED,
        )
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c model: {error}") from None


def _order(config: ModelConfig, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file."""
    shapes = {row.name: row.shape for row in parameter_table(config)}

    def layers(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for layer in range(config.num_hidden_layers):
            full = f"model.layers.{layer}.{name}.weight"
            yield full, shapes[full]

    norms, final = ("input_layernorm", "post_attention_layernorm"), "model.norm.weight"
    if version == 0:
        yield EMBEDDING, shapes[EMBEDDING]
        for name in (norms[0], *QUANTISED_LAYER[:4], norms[1], *QUANTISED_LAYER[4:]):
            yield from layers(name)
        yield final, shapes[final]
        for name in ROTARY_TABLES:
            yield name, (config.max_position_embeddings, config.head_dim // 2)
    else:
        yield from layers(norms[0])
        yield from layers(norms[1])
        yield final, shapes[final]
        yield EMBEDDING, shapes[EMBEDDING]
        for name in QUANTISED_LAYER:
            yield from layers(name)
    if not config.tie_word_embeddings:
        yield OUTPUT_HEAD, shapes[OUTPUT_HEAD]


def _stored_bytes(shape: tuple[int, ...], size: int, group: int) -> int:
    return size + size // group * 4 if group and len(shape) > 1 else 4 * size


def _quantise(numbers: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers and float32 scales: each group is scaled so that its largest magnitude is 127."""
    rows = numbers.reshape(-1, group)
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)
    return np.rint(rows / divisors[:, None]).astype(np.int8), scales.astype(np.float32)


def _dequantise(stored: np.ndarray, group: int) -> np.ndarray:
    count = len(stored) * group // (group + 4)
    numbers = stored[:count].view(np.int8).reshape(-1, group)
    scales = np.frombuffer(stored[count:].tobytes(), dtype="<f4")
    return numbers.astype(np.float32) * scales[:, None]

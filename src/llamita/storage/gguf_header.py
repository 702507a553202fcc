"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): its settings, and where its
tensors lie.

Read in one pass over the mapped file, in which no count or length is believed: each must lie within the file. The
library's reader would loop or allocate without end, and take seconds over a large vocabulary.
"""

import functools
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

MAX_COUNT = 10_000_000
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNT, LENGTH = struct.Struct("<I"), struct.Struct("<Q")
ALIGNMENT = 32
PART = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)")
"""How the parts of a file are named that was split."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its shape as in numpy, the last dimension fastest, its number type, and its bytes in a mapped file."""

    shape: tuple[int, ...]
    kind: Kind
    start: int
    stop: int
    mapping: mmap.mmap


@dataclass(frozen=True)
class Header:
    """The settings of a file by their keys, and its tensors by their names; those of all parts where it is in parts."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: Path) -> Header:
    """Reads a file's header, that of the first part with the tensors of all where a file was split.

    ValueError, naming the file, where it is broken, truncated or of another version; FileNotFoundError for a part that
    is missing.
    """
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


def part_files(path: Path) -> list[Path]:
    """Returns the files that a model lies in: the one, or all parts where it was split."""
    parts = read_header(path).metadata.get("split.count", 1)
    return [path] if parts in (0, 1) else _named_parts(path, parts)


@functools.lru_cache(maxsize=1)  # whoever opens a model asks for its shape, its weights and its tokenizer in turn
def _read(path: Path, modified: int, size: int) -> Header:
    first = _read_part(path)
    parts = first.metadata.get("split.count", 1)
    if parts in (0, 1):
        return first
    files = _named_parts(path, parts)
    if first.metadata.get("split.no") != 0:
        raise ValueError(f"{path}: it is a part of a model; give the first part, {files[0].name}")
    tensors = dict(first.tensors)
    for place, part in enumerate(files[1:], 1):
        if not part.is_file():
            raise FileNotFoundError(f"{part} does not exist, and {path.name} is one of {parts} parts")
        found = _read_part(part)
        if found.metadata.get("split.no") != place or not tensors.keys().isdisjoint(found.tensors):
            raise ValueError(f"{part}: it is no part {place + 1} of {path.name}")
        tensors |= found.tensors
    return Header(first.metadata, tensors)


def _named_parts(path: Path, parts: Any) -> list[Path]:
    """Returns all files of a model in so many parts, by the name of one; ValueError where that is no such name."""
    name = PART.fullmatch(path.name)
    if type(parts) is not int or name is None or int(name[3][4:9]) != parts:
        raise ValueError(f"{path}: it is one of {parts} parts, and is not named as such: NAME-00001-of-{parts:05}.gguf")
    return [path.with_name(f"{name[1]}{place:05}{name[3]}") for place in range(1, parts + 1)]


def _read_part(path: Path) -> Header:
    with open(path, "rb") as file:
        if len(head := file.read(24)) < 24 or head[:4] != b"GGUF":
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Reader(mapping).header()
    except struct.error:
        raise ValueError(f"{path} is truncated: it ends inside its header") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path}: {error}") from None


class _Reader:
    """A position in the file, which moves forward."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping, self.at = mapping, 4

    def header(self) -> Header:
        version = self.take(COUNT)
        if version in (2 << 24, 3 << 24):
            raise ValueError(
                "its numbers are those of a big-endian machine; llama.cpp's gguf_convert_endian.py turns them"
            )
        if version not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensors, pairs = self.take(LENGTH), self.take(LENGTH)
        if tensors > MAX_COUNT or pairs > MAX_COUNT:
            raise ValueError(f"it is damaged: {tensors} tensors and {pairs} settings (version {version})")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.name()
            if key in metadata:
                raise ValueError(f"it is damaged: {key} is there twice")
            metadata[key] = self.value(self.take(COUNT), key)
        infos = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"general.alignment={alignment!r} must be a number of bytes")
        begin = -(-self.at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            if name in found:
                raise ValueError(f"it is damaged: the tensor {name} is there twice")
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            start = begin + offset
            stop = start + math.prod(shape) // block * block_bytes
            if stop > len(self.mapping):
                raise ValueError(
                    f"it is truncated: {name} needs bytes up to {stop}, and the file has {len(self.mapping)}"
                )
            if math.prod(shape) and shape[-1] % block:
                raise ValueError(f"it is damaged: {name} has rows of {shape[-1]} numbers in blocks of {block}")
            found[name] = TensorInfo(shape, kind, start, stop, self.mapping)
        return Header(metadata, found)

    def take(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.mapping, self.at)
        self.at += form.size
        return value

    def string(self) -> str:
        return self.pass_over(self.take(LENGTH)).decode()

    def name(self) -> str:
        """Returns the name of a setting or a tensor, which messages can show as it is."""
        text = self.string()
        if not text.isprintable():
            raise ValueError(f"it is damaged: {text[:80]!r} is no name of a setting or a tensor")
        return text

    def pass_over(self, count: int) -> bytes:
        """Returns the next bytes."""
        if count > len(self.mapping) - self.at:
            raise ValueError(f"it is truncated or damaged: {count} bytes from byte {self.at} on are missing")
        self.at += count
        return self.mapping[self.at - count : self.at]

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.take(struct.Struct("<" + SCALARS[kind]))
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"it is damaged: {key} has a value of unknown type {kind}")
        inner, count = self.take(COUNT), self.take(LENGTH)
        if count > MAX_COUNT:
            raise ValueError(f"it is damaged: {key} is a list of {count} values")
        if inner in SCALARS:
            dtype = np.dtype("<" + SCALARS[inner])
            return np.frombuffer(self.pass_over(dtype.itemsize * count), dtype=dtype).tolist()
        if inner != STRING:
            raise ValueError(f"it is damaged: {key} is a list of values of type {inner}")
        texts, mapping, at, end = [], self.mapping, self.at, len(self.mapping)
        unpack = LENGTH.unpack_from
        for _ in range(count):  # half a million of them in a large vocabulary
            (length,) = unpack(mapping, at)
            start = at + 8
            at = start + length
            if at > end:
                raise ValueError(f"it is truncated or damaged: {length} bytes from byte {start} on are missing")
            texts.append(mapping[start:at].decode())
        self.at = at
        return texts

    def tensor(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name, dimensions = self.name(), self.take(COUNT)
        if dimensions > 4:
            raise ValueError(f"it is damaged: {name} is a tensor of {dimensions} dimensions")
        shape = tuple(self.take(LENGTH) for _ in range(dimensions))[::-1]
        kind, offset = self.take(COUNT), self.take(LENGTH)
        if kind not in list(Kind):
            raise ValueError(f"it is damaged, or newer than Llamita: {name} has numbers of type {kind}")
        return name, shape, Kind(kind), offset

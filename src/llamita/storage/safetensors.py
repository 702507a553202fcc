"""One safetensors file (https://github.com/huggingface/safetensors), read and written.

Done here rather than through the format's library because that maps files only into a framework's tensors. Never
pickle.
"""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamita.model.host_array import ITEM_BYTES, HostArray
from llamita.storage.files import MAX_JSON_BYTES, parse_json

Layout = dict[str, tuple[str, tuple[int, ...]]]  # the dtype and shape of each array of a file


def write_safetensors(path: Path, tensors: Mapping[str, HostArray]) -> None:
    """Write one file."""
    write_file(path, layout_of(tensors), iter(tensors.items()))


def layout_of(tensors: Mapping[str, HostArray]) -> Layout:
    return {key: (array.dtype, array.shape) for key, array in tensors.items()}


def write_file(path: Path, layout: Layout, tensors: Iterator[tuple[str, HostArray]]) -> None:
    """Write one file: its header from `layout`, then as many arrays as that has."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in layout.items():
        end = offset + size_of(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin aligned to eight bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for key, (dtype, shape) in layout.items():
            given, array = next(tensors)
            assert (given, array.dtype, array.shape) == (key, dtype, shape), f"{given} came, {key} was announced"
            file.write(array.data)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def read_safetensors(path: Path) -> dict[str, HostArray]:
    """Map one safetensors file; every header entry is checked against the file before it is used."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}")
        header = parse_json(file.read(length), f"{path} has a broken header")
        if not isinstance(header, dict):
            raise ValueError(f"{path} has a broken header: expected an object of tensors")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    data = memoryview(mapping)[8 + length :]
    result, expected_start = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: _span(path, *item)):
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{path}: {key} has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}")
        if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{path}: {key} of shape {list(shape)} and {dtype} cannot fill {end - start} bytes")
        if start != expected_start:
            raise ValueError(
                f"{path}: {key} begins at byte {start}, expected {expected_start}; tensors overlap or gape"
            )
        if end > len(data):
            raise ValueError(f"{path} is truncated: {key} ends at byte {end}, the file holds {len(data)}")
        result[key] = HostArray(dtype, shape, data[start:end], mapping, 8 + length + start)
        expected_start = end
    if expected_start != len(data):
        raise ValueError(f"{path}: its tensors end at byte {expected_start}, the file holds {len(data)}")
    return result


def _span(path: Path, key: str, entry: Any) -> tuple[int, int]:
    """The data offsets of a header entry, for sorting; ValueError where it is not of the format's form."""
    try:
        start, end = entry["data_offsets"]
        numbers = [start, end, *entry["shape"]]
        if not isinstance(entry["dtype"], str) or not all(type(n) is int and n >= 0 for n in numbers) or start > end:
            raise ValueError
        return start, end
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: the header entry of {key!r} is broken") from None

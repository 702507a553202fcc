"""Model directories, on disk or on the Hugging Face hub: safetensors files and `config.json`.

Knows nothing of frameworks: an array is a dtype name, a shape and bytes, since numpy has no bfloat16. The safetensors
format (https://github.com/huggingface/safetensors) is read and written here rather than through its library because
that maps files only into a framework's tensors.
"""

import json
import math
import mmap
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from llamita.model.config import ModelConfig, unknown_keys
from llamita.model.parameters import shortened
from llamita.storage.files import MAX_JSON_BYTES, parse_json, read_json

MAX_SHARD_BYTES = 5_000_000_000
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
ADAPTER_CONFIG = "adapter_config.json"  # a directory that has it holds an adapter over another model
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
}
Layout = dict[str, tuple[str, tuple[int, ...]]]  # the dtype and shape of each array of a file
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class HostArray:
    """An array in host memory or in a mapped file: little-endian, row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    mapping: mmap.mmap | None = field(default=None, repr=False)
    """The file that the bytes are mapped from, and where in it they begin."""
    offset: int = 0

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> "HostArray":
        names = {np.dtype(code): name for name, code in NUMPY_TYPES.items()}
        return cls(names[array.dtype], array.shape, _bytes_of(array))

    @classmethod
    def from_bf16_bits(cls, bits: np.ndarray) -> "HostArray":
        """An array of bfloat16 given as uint16 bit patterns."""
        return cls("BF16", bits.shape, _bytes_of(bits))

    def to_numpy(self) -> np.ndarray:
        """A numpy array: a view of the bytes, but for bfloat16, which is widened to float32."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=NUMPY_TYPES[self.dtype]).reshape(self.shape)

    def forget(self, start: int, stop: int) -> None:
        """Give the memory of bytes that were read back to the system, where a file can give them again."""
        if self.mapping is None:
            return
        page = mmap.PAGESIZE
        first, last = -(-(self.offset + start) // page) * page, (self.offset + stop) // page * page
        if first < last:
            self.mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _bytes_of(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


# --- tensors ---------------------------------------------------------------------------------------------------------


def save_tensors(directory: Path | str, tensors: Mapping[str, HostArray], name: str = "model") -> None:
    """Write `<name>.safetensors`, or shards of at most 5 GB and an index. The directory should be an atomic one."""
    stream_tensors(directory, _layout(tensors), tensors.items(), name)


def stream_tensors(
    directory: Path | str, layout: Layout, tensors: Iterable[tuple[str, HostArray]], name: str = "model"
) -> None:
    """`save_tensors` of arrays that come one by one, in the order of `layout`, which has the type and shape of each."""
    directory, arrays = Path(directory), iter(tensors)
    shards: list[Layout] = [{}]
    used = total = 0
    for key, (dtype, shape) in layout.items():
        size = _size(dtype, shape)
        if used and used + size > MAX_SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][key] = (dtype, shape)
        used, total = used + size, total + size
    if len(shards) == 1:
        return _write_file(directory / f"{name}.safetensors", shards[0], arrays)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file_name, shard, arrays)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_safetensors(path: Path, tensors: Mapping[str, HostArray]) -> None:
    """Write one file."""
    _write_file(path, _layout(tensors), iter(tensors.items()))


def _layout(tensors: Mapping[str, HostArray]) -> Layout:
    return {key: (array.dtype, array.shape) for key, array in tensors.items()}


def _write_file(path: Path, layout: Layout, tensors: Iterator[tuple[str, HostArray]]) -> None:
    """Write one file: its header from `layout`, then as many arrays as that has."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in layout.items():
        end = offset + _size(dtype, shape)
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


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def load_tensors(directory: Path | str, name: str = "model") -> dict[str, HostArray]:
    """Map `<name>.safetensors`, or the shards that its index lists; nothing is copied.

    Raises FileNotFoundError where neither exists, ValueError (naming the file) for a broken one.
    """
    directory = Path(directory)
    single, index_file = directory / f"{name}.safetensors", directory / f"{name}.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index_file.is_file():
        if name == "model" and (directory / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{directory} holds an adapter, and a whole model is needed; make one with: llamita merge {directory} "
                "--output DIR"
            )
        pickled = sorted(file.name for file in directory.glob("*.bin")) or sorted(
            file.name for file in directory.glob("*.pt*")
        )
        hint = f"; {pickled[0]} may be a pickled file, which only `llamita convert` reads" if pickled else ""
        raise FileNotFoundError(f"no {single.name} in {directory}; expected a Hugging Face model directory{hint}")
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index_file} has no weight_map; the download is incomplete or the file is broken")
    result: dict[str, HostArray] = {}
    faults = []
    for file_name in sorted(set(weight_map.values())):
        shard = read_safetensors(_shard(directory, file_name, index_file))
        faults += [f"{file_name} repeats {key} of another shard" for key in sorted(result.keys() & shard.keys())]
        result |= shard
    faults += [f"no shard holds {key}" for key in sorted(weight_map.keys() - result.keys())]
    if faults:
        raise ValueError(f"{index_file} and its shards disagree: {shortened(faults)}")
    return result


def _shard(directory: Path, name: str, index_file: Path) -> Path:
    """The file of a shard, which lies in the directory; in the hub's cache it is a link to the model's blobs."""
    root = directory.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    file = directory / name
    if Path(name).name != name or file.resolve().parent not in roots:
        raise ValueError(f"{index_file} names {name!r}; a shard must lie in the same directory")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, but {index_file.name} names it; the download is incomplete")
    return file


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


# --- model directories -----------------------------------------------------------------------------------------------


def save_config(directory: Path | str, config: ModelConfig, dtype: str = "F32") -> None:
    """Write `config.json` and `generation_config.json`; `dtype` is the safetensors name of the weights' type.

    What is not quantised in a quantised model is bfloat16, whatever the type of its first array.
    """
    directory = Path(directory)
    values = config.to_dict("bfloat16" if config.quantization else DTYPE_NAMES[dtype])
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    tokens = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values[k] is not None}
    (directory / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")


def load_config(directory: Path | str) -> ModelConfig:
    """Read `config.json`; keys that Llamita does not know are named in a warning."""
    file = Path(directory) / "config.json"
    values = read_json(file)
    try:
        config = ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    unknown = unknown_keys(values)
    if unknown:
        warnings.warn(f"{file} has keys that Llamita does not know, and ignores: {', '.join(unknown)}", stacklevel=2)
    return config


def resolve_model_directory(path: Path | str) -> Path:
    """The model directory that a user means: a path, the best (else last) checkpoint of a training run, or a model's
    name on the Hugging Face hub (`owner/name` or `owner/name@revision`), which is fetched into the hub's cache.

    The hub's client decides where the cache is and whether to go online (HF_HOME, HF_HUB_OFFLINE).
    """
    on_hub = HUB_NAME.fullmatch(str(path))
    path = Path(path)
    for candidate in (path, path / "best", path / "last"):
        if any((candidate / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return candidate
    if path.exists():
        raise FileNotFoundError(
            f"{path} holds no config.json and no best or last checkpoint; expected a model or a run"
        )
    if on_hub is None or path.parent.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a model directory or a training run")
    try:
        found = huggingface_hub.snapshot_download(
            on_hub["name"], revision=on_hub["revision"], allow_patterns=list(HUB_FILES)
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"there is no directory {path}, and the hub gives no such model: {reason}") from None
    return Path(found)

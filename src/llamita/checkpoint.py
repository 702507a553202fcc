"""Model directories on disk: host arrays in safetensors files, `config.json`, and atomic writes.

A file or directory written here exists whole or not at all. Knows nothing of frameworks: an array is a dtype name, a
shape and bytes, since numpy has no bfloat16. The safetensors format (https://github.com/huggingface/safetensors) is
read and written here rather than through its library because that maps files only into a framework's tensors.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.config import ModelConfig

MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
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
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class HostArray:
    """An array in host memory or in a mapped file: little-endian, row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

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


def _bytes_of(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


# --- atomic writes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends, and vanishes when it raises.

    An existing `path` raises FileExistsError before anything is written, unless `overwrite`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or overwrite it explicitly")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.rename(path, old / path.name)
            os.rename(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replace a file by new content in one step: a reader sees the old content or the new, never a part."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# --- tensors ---------------------------------------------------------------------------------------------------------


def save_tensors(directory: Path | str, tensors: Mapping[str, HostArray], name: str = "model") -> None:
    """Write `<name>.safetensors`, or shards of at most 5 GB and an index. The directory should be an atomic one."""
    directory = Path(directory)
    shards: list[dict[str, HostArray]] = [{}]
    used = 0
    for key, array in tensors.items():
        if used and used + len(array.data) > MAX_SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][key] = array
        used += len(array.data)
    if len(shards) == 1:
        write_safetensors(directory / f"{name}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(len(array.data) for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_safetensors(path: Path, tensors: Mapping[str, HostArray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, array in tensors.items():
        end = offset + len(array.data)
        header[key] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin aligned to eight bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for array in tensors.values():
            file.write(array.data)


def load_tensors(directory: Path | str, name: str = "model") -> dict[str, HostArray]:
    """Map `<name>.safetensors`, or the shards that its index lists; nothing is copied.

    Raises FileNotFoundError where neither exists, ValueError (naming the file) for a broken one.
    """
    directory = Path(directory)
    single, index_file = directory / f"{name}.safetensors", directory / f"{name}.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index_file.is_file():
        raise FileNotFoundError(f"no {single.name} in {directory}; expected a Hugging Face model directory")
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index_file} has no weight_map; the download is incomplete or the file is broken")
    result: dict[str, HostArray] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise ValueError(f"{index_file} names {file_name!r}; a shard must lie in the same directory")
        shard = read_safetensors(directory / file_name)
        duplicates = sorted(result.keys() & shard.keys())
        if duplicates:
            raise ValueError(f"{directory / file_name} repeats {', '.join(duplicates[:5])} of another shard")
        result |= shard
    missing = sorted(weight_map.keys() - result.keys())
    if missing:
        raise ValueError(f"{index_file} lists {', '.join(missing[:5])}, which no shard holds")
    return result


def read_safetensors(path: Path) -> dict[str, HostArray]:
    """Map one safetensors file; every header entry is checked against the file before it is used."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has a broken header ({error}); fetch or write the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a broken header: expected an object of tensors")
    header.pop("__metadata__", None)
    data = np.memmap(path, dtype=np.uint8, mode="r").data[8 + length :]
    result, expected_start = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: _start(path, *item)):
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{path}: {key} has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}")
        if any(not isinstance(n, int) or n < 0 for n in shape) or end - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{path}: {key} of shape {list(shape)} and {dtype} cannot fill {end - start} bytes")
        if start != expected_start:
            raise ValueError(
                f"{path}: {key} begins at byte {start}, expected {expected_start}; tensors overlap or gape"
            )
        if end > len(data):
            raise ValueError(f"{path} is truncated: {key} ends at byte {end}, the file holds {len(data)}")
        result[key] = HostArray(dtype, shape, data[start:end])
        expected_start = end
    return result


def _start(path: Path, key: str, entry: Any) -> tuple[int, int]:
    """The data offsets of a header entry, for sorting; ValueError where it is not of the format's form."""
    try:
        start, end = entry["data_offsets"]
        if not (isinstance(entry["dtype"], str) and isinstance(entry["shape"], list)) or not 0 <= start <= end:
            raise ValueError
        return int(start), int(end)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: the header entry of {key!r} is broken") from None


# --- model directories -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def save_config(directory: Path | str, config: ModelConfig, dtype: str = "F32") -> None:
    """Write `config.json` and `generation_config.json`; `dtype` is the safetensors name of the weights' type."""
    directory = Path(directory)
    values = config.to_dict(DTYPE_NAMES[dtype])
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    tokens = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values[k] is not None}
    (directory / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")


def load_config(directory: Path | str) -> ModelConfig:
    return ModelConfig.from_dict(read_json(Path(directory) / "config.json"))


def resolve_model_directory(path: Path | str) -> Path:
    """The model directory that a user's path means: itself, or the best (else last) checkpoint of a training run."""
    path = Path(path)
    for candidate in (path, path / "best", path / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a model directory or a training run")
    raise FileNotFoundError(f"{path} holds no config.json and no best or last checkpoint; expected a model or a run")

"""A model's weights from its safetensors files (https://github.com/huggingface/safetensors), as float32 arrays."""

import json
from pathlib import Path

import numpy as np


def float32_of(data: bytes, dtype: str) -> np.ndarray:
    """Returns the numbers of raw bytes as a float32 array of one axis; the bytes of a number are little-endian.

    dtype is "F32", "F16" (numpy's float16) or "BF16". numpy has no bfloat16: it is the upper 16 of the 32 bits of a
    float32, so a bfloat16 number followed by 16 bits of zeros is a float32. Any other dtype is a ValueError.
    """
    # to do: `np.frombuffer` reads bytes as any dtype that numpy has; `array.view(dtype)` takes an array's bits as
    #        another dtype, where `array.astype(dtype)` converts its numbers.
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4")
    if dtype == "F16":
        return np.frombuffer(data, dtype="<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"expected F32, F16 or BF16, got {dtype}")
    # done


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of one file by name, as float32, each in its shape.

    The file begins with 8 bytes, a little-endian integer: the length of the header, which follows, a JSON object in
    UTF-8. Behind the header are the arrays' numbers. The header has for each name

        {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}

    where the offsets count bytes from the end of the header; the last axis runs fastest, as in numpy. A name
    "__metadata__" may be there too and is no array.
    """
    # to do: read the length, the header and the rest; then `float32_of` and `reshape` for each name.
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = content[start + begin : start + end]
            arrays[name] = float32_of(data, entry["dtype"]).reshape(entry["shape"])
    return arrays
    # done


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Returns all weights of a model directory by name, from one file or from several."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {name: array for file in files for name, array in read_safetensors(directory / file).items()}

"""The order of what rotary positions turn: pairs (2 i, 2 i + 1) in other people's files, halves (i, i + H/2) here."""

import re

import numpy as np

from llamita.model.host_array import NUMPY_TYPES, HostArray

ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.weight")
"""The canonical names of what is reordered."""


def raw(array: HostArray) -> np.ndarray:
    """Returns the numbers of an array in numpy; bfloat16 as the bit patterns that numpy has no type for."""
    code = "<u2" if array.dtype == "BF16" else NUMPY_TYPES[array.dtype]
    return np.frombuffer(array.data, dtype=code).reshape(array.shape)


def with_numbers(array: HostArray, numbers: np.ndarray) -> HostArray:
    """Returns an array of the same type with other numbers, as `raw` gives them."""
    flat = np.ascontiguousarray(numbers)
    return HostArray(array.dtype, numbers.shape, flat.reshape(-1).view(np.uint8).data)


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns rows that rotate pairs (2 i, 2 i + 1), reordered to rotate (i, i + H/2)."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(array: HostArray, head_dim: int) -> HostArray:
    """Returns a query or key projection whose rows were in pairs."""
    return with_numbers(array, halves(raw(array), head_dim))


def to_pairs(array: HostArray, head_dim: int) -> HostArray:
    """Inverts `to_halves`."""
    rows = raw(array)
    return with_numbers(array, rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))

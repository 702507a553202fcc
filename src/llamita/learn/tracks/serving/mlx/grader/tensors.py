"""MLX's side of the checks: numpy to arrays and back."""

from typing import Any

import mlx.core as mx
import numpy as np


def tensor(values: Any, dtype: str = "float32") -> mx.array:
    """Returns numbers as an array: float32, float16 or bfloat16."""
    return mx.array(np.asarray(values, np.float32)).astype(getattr(mx, dtype))


def integers(values: Any, dtype: str = "int32") -> mx.array:
    return mx.array(np.asarray(values)).astype(getattr(mx, dtype))


def dtype(name: str) -> mx.Dtype:
    found = getattr(mx, name)
    assert isinstance(found, mx.Dtype)
    return found


def array(x: Any) -> np.ndarray:
    """Returns an array of the reader's as numpy's float64; TypeError where it is none."""
    if not isinstance(x, mx.array):
        raise TypeError(f"expected an array, got {'None' if x is None else type(x).__name__}")
    return np.array(x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x).astype(np.float64)


def dtype_of(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns what tells the dtype: the bits of a number, and those of its mantissa."""
    if not isinstance(x, mx.array):
        raise TypeError(f"expected an array, got {'None' if x is None else type(x).__name__}")
    info = mx.finfo(x.dtype)
    return np.array(8 * x.dtype.size), np.array(round(-np.log2(info.eps)))

"""numpy's arrays as MLX's, and back."""

from typing import Any

import mlx.core as mx
import numpy as np


def tensor(values: Any) -> mx.array:
    """Returns an array: float32, int32 or bool, whichever kind the values are of."""
    values = np.asarray(values)
    kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return mx.array(np.array(values, dtype=kinds[values.dtype.kind]))


def half(values: Any) -> mx.array:
    """Returns a bfloat16 array."""
    return tensor(values).astype(mx.bfloat16)


def array(result: Any) -> np.ndarray:
    """Returns an array's values in float64; TypeError for what is no array of MLX."""
    if not isinstance(result, mx.array):
        raise TypeError(f"expected an mx.array, got {'None' if result is None else type(result).__name__}")
    kind = mx.int32 if result.dtype in (mx.bool_, mx.int32, mx.int64, mx.uint32) else mx.float32
    return np.array(result.astype(kind)).astype(np.float64)


def boolean(result: Any) -> bool:
    """Returns whether an array holds booleans."""
    return bool(result.dtype == mx.bool_)

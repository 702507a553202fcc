"""What the programs of this folder need of the framework: arrays from numpy and back, random numbers, gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

NAME = "mlx"


def value_and_gradients(
    function: Callable[[dict[str, mx.array]], mx.array], parameters: dict[str, mx.array]
) -> tuple[mx.array, dict[str, mx.array]]:
    """Returns the value of function(parameters), a scalar, and its gradient for each parameter, by name."""
    return mx.value_and_grad(function)(parameters)


def integers(values: Any) -> mx.array:
    """Returns an array of integers."""
    return mx.array(np.asarray(values, dtype=np.int32))


def floats(values: Any) -> mx.array:
    """Returns an array of float32."""
    return mx.array(np.asarray(values, dtype=np.float32))


def to_numpy(array: mx.array) -> np.ndarray:
    """Returns the values of an array."""
    return np.array(array)


def without_gradients(function: Callable[[], mx.array]) -> np.ndarray:
    """Returns the values of function(), computed without a record for gradients."""
    return np.array(function())


def computed(*arrays: Any) -> None:
    """Has arrays computed now; PyTorch has done so already, MLX waits until it is asked."""
    mx.eval(*arrays)

"""What the programs of this folder need of the framework: arrays from numpy and back, random numbers, gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAME = "torch"


def value_and_gradients(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the value of function(parameters), a scalar, and its gradient for each parameter, by name."""
    tracked = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    value = function(tracked)
    found = torch.autograd.grad(value, list(tracked.values()))
    return value.detach(), dict(zip(tracked, found, strict=True))


def integers(values: Any) -> Tensor:
    """Returns an array of integers."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


def floats(values: Any) -> Tensor:
    """Returns an array of float32."""
    return torch.from_numpy(np.array(values, dtype=np.float32))


def to_numpy(array: Tensor) -> np.ndarray:
    """Returns the values of an array."""
    return array.detach().numpy()


def without_gradients(function: Callable[[], Tensor]) -> np.ndarray:
    """Returns the values of function(), computed without a record for gradients."""
    with torch.no_grad():
        return function().numpy()


def computed(*arrays: Any) -> None:
    """Has arrays computed now; PyTorch has done so already, MLX waits until it is asked."""

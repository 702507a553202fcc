"""numpy's arrays as PyTorch's tensors, and back."""

from typing import Any

import numpy as np
import torch


def tensor(values: Any) -> torch.Tensor:
    """Returns a tensor: float32, int64 or bool, whichever kind the values are of."""
    values = np.asarray(values)
    kinds = {"f": np.float32, "i": np.int64, "b": np.bool_}
    return torch.from_numpy(np.array(values, dtype=kinds[values.dtype.kind]))


def half(values: Any) -> torch.Tensor:
    """Returns a bfloat16 tensor."""
    return tensor(values).bfloat16()


def array(result: Any) -> np.ndarray:
    """Returns a tensor's values in float64; TypeError for what is no tensor."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"expected a tensor, got {'None' if result is None else type(result).__name__}")
    return result.detach().double().numpy()


def boolean(result: Any) -> bool:
    """Returns whether an array holds booleans."""
    return bool(result.dtype == torch.bool)

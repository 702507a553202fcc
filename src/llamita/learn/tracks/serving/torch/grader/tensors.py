"""PyTorch's side of the checks: numpy to tensors and back."""

from typing import Any

import numpy as np
import torch


def tensor(values: Any, dtype: str = "float32") -> torch.Tensor:
    """Returns numbers as a tensor: float32, float16 or bfloat16."""
    return torch.tensor(np.asarray(values, np.float32)).to(getattr(torch, dtype))


def integers(values: Any, dtype: str = "int64") -> torch.Tensor:
    return torch.tensor(np.asarray(values)).to(getattr(torch, dtype))


def dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def array(x: Any) -> np.ndarray:
    """Returns a tensor of the reader's as numpy's float64; TypeError where it is none."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor, got {'None' if x is None else type(x).__name__}")
    return x.detach().double().numpy()


def dtype_of(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns what tells the dtype: the bits of a number, and those of its mantissa."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor, got {'None' if x is None else type(x).__name__}")
    info = torch.finfo(x.dtype)
    return np.array(info.bits), np.array(round(-np.log2(info.eps)))

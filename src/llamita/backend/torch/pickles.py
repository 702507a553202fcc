"""PyTorch's pickled files as plain values and host arrays, and back.

Nothing in a file is executed: the reader is PyTorch's restricted one, which knows tensors and plain containers only.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llamita.backend.torch.model.weights import TORCH_DTYPES, host_from_tensor, tensor_from_host
from llamita.model.host_array import HostArray


def read_pickle(path: Path) -> Any:
    """Reads a `.pt`, `.pth` or `.bin` file, tensors as host arrays; ValueError where it holds more than data.

    A tensor of a type that no weights have here (complex numbers, 8-bit floats) becomes a text that says so.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {named[1]}, and" if named else "it is damaged, or"
        raise ValueError(
            f"{path} is not opened: {what} a file that holds more than arrays and plain values could execute anything"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a file of PyTorch's, or is damaged: {reason}") from None
    return _to_host(content)


def write_pickle(path: Path, content: Any) -> None:
    """Writes a file that `read_pickle` reads back; host arrays become tensors."""
    torch.save(_to_tensors(content), path)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        readable = value.dtype in TORCH_DTYPES.values()
        return host_from_tensor(value) if readable else str(value.dtype).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: _to_host(item) for key, item in value.items()}
    return [_to_host(item) for item in value] if isinstance(value, list | tuple) else value


def _to_tensors(value: Any) -> Any:
    if isinstance(value, HostArray):
        return tensor_from_host(value).clone()
    return {key: _to_tensors(item) for key, item in value.items()} if isinstance(value, Mapping) else value

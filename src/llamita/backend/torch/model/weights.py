"""Values of a model: built from host arrays or freshly initialised, and given back as host arrays.

Copies arrays in and out by the names that `fused_parameters` and `canonical_state` translate; knows nothing of files.

Letters beyond the usual: X numbers laid end to end.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from llamita.backend.arrays import missing_or_misshapen, quantized_arrays
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.model import quantize
from llamita.backend.torch.model.layers import FUSED, Operations
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.model.quantized import QuantizedLinear
from llamita.model import host_array
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import InitializationName, check_arrays, initialize_parameters, stored_arrays

COPIED_AT_ONCE = 2**18
"""Numbers: few, since what is computed of them on the way leaves gaps of its size in the allocator's memory."""


def build_model(
    config: ModelConfig,
    arrays: Mapping[str, HostArray] | None = None,
    *,
    seed: int = 0,
    initialization: InitializationName = "fan-in",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    operations: Operations = FUSED,
    instructions: Instructions | None = None,
) -> Llama:
    """Returns a model with the values of `arrays` (canonical names), or freshly initialised from `seed` without them.

    Memory is allocated once the arrays are known to fit; mapped ones are read a few megabytes at a time. Quantised
    weights are put into the order of the kernels for `instructions`, where there are any.
    """
    if arrays is not None:
        check_arrays(config, arrays)
    model = model_without_values(config, dtype, operations).to_empty(device=device)
    if arrays is None:
        fresh = initialize_parameters(config, seed, initialization)
        host = ((name, HostArray.from_numpy(array)) for name, array in fresh)
        copy_values(model.canonical_state(), quantize_arrays(config, host) if config.quantization else host)
    else:
        state = model.canonical_state()
        copy_values(state, ((name, arrays[name]) for name in state))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.arrange(dtype, instructions)
    model.instructions = instructions if config.quantization else None
    return model


def model_without_values(config: ModelConfig, dtype: torch.dtype, operations: Operations = FUSED) -> Llama:
    """Returns a model whose parameters have shapes and types, but no memory."""
    with torch.device("meta"):
        model = Llama(config, operations)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:  # the scales of quantised weights keep their type
            parameter.data = parameter.data.to(dtype)
    return model


def quantize_arrays(config: ModelConfig, arrays: Iterable[tuple[str, HostArray]]) -> Iterator[tuple[str, HostArray]]:
    """Yields the arrays of `arrays.quantized_arrays`, rounded here."""

    def quantized(array: HostArray, bits: int) -> tuple[HostArray, HostArray]:
        values, scale = quantize.quantize(tensor_from_host(array), bits)
        return host_from_tensor(values), host_from_tensor(scale)

    def to_bfloat16(array: HostArray) -> HostArray:
        return host_from_tensor(tensor_from_host(array).bfloat16())

    return quantized_arrays(config, arrays, quantized, to_bfloat16)


def load_host_arrays(model: Llama, arrays: Mapping[str, HostArray]) -> None:
    """Gives the parameters the values of `arrays`; ValueError lists all that is missing, extra or misshapen."""
    rearranged = model.config.quantization or model.reordered
    assert not rearranged, "the weights may lie in a kernel's order; build the model anew"
    check_arrays(model.config, arrays)
    state = model.canonical_state()
    copy_values(state, ((name, arrays[name]) for name in state))


def copy_host_arrays(state: Mapping[str, Tensor], arrays: Mapping[str, HostArray]) -> None:
    """Gives some parameters the values of `arrays`; ValueError, naming them, for those missing or misshapen."""
    faults = missing_or_misshapen({name: tensor.shape for name, tensor in state.items()}, arrays)
    if faults:
        raise ValueError(f"the weights lack {faults}, or have another shape there")
    copy_values(state, ((name, arrays[name]) for name in state))


def copy_values(state: Mapping[str, Tensor], arrays: Iterable[tuple[str, HostArray]]) -> None:
    """Gives each tensor the values of the array of its name; ValueError for NaN or infinity."""
    with torch.no_grad():
        for name, array in arrays:
            target_X = state[name].reshape(-1)
            for start, piece_X in finite_pieces(name, array):
                target_X[start : start + len(piece_X)].copy_(piece_X)


def finite_pieces(name: str, array: HostArray) -> Iterator[tuple[int, Tensor]]:
    """Yields the values piece by piece, each with its start, so that of a mapped file little is in memory at a time.

    ValueError, naming the array, for NaN or infinity.
    """
    row = math.prod(array.shape[1:])
    item, at_once = host_array.ITEM_BYTES[array.dtype], max(1, COPIED_AT_ONCE // max(1, row))
    for first in range(0, array.shape[0], at_once):
        piece_X = tensor_from_host(array.rows(slice(first, first + at_once))).reshape(-1)
        if piece_X.is_floating_point() and not torch.isfinite(piece_X.sum(dtype=torch.float32)):
            raise ValueError(f"{name} holds NaN or infinite values; the weights are damaged")
        start = first * row
        yield start, piece_X
        array.forget(start * item, (start + len(piece_X)) * item)


TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def tensor_from_host(array: HostArray) -> Tensor:
    """Returns a tensor over the array's own bytes; read only where those are a mapped file."""
    if 0 in array.shape:
        return torch.empty(array.shape, dtype=TORCH_DTYPES[array.dtype])
    if not array.data.readonly:
        return torch.frombuffer(array.data, dtype=TORCH_DTYPES[array.dtype]).reshape(array.shape)
    with warnings.catch_warnings():  # a mapped file cannot be written to, of which torch warns
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(array.data, dtype=TORCH_DTYPES[array.dtype]).reshape(array.shape)


def host_from_tensor(tensor: Tensor) -> HostArray:
    """Returns the values of a tensor in host memory: its own bytes where it lies there contiguously, else a copy."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return HostArray(names[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def to_host_arrays(model: Llama) -> dict[str, HostArray]:
    """Returns the parameters under canonical names, in the table's order, for `model_directory.save_tensors`."""
    state = model.canonical_state()
    return {array.name: host_from_tensor(state[array.name]) for array in stored_arrays(model.config)}

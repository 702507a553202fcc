"""Values of a model: built from host arrays or freshly initialised, and given back as host arrays.

The only place where canonical names and packed parameters meet; knows nothing of files.
"""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llamita import architecture
from llamita.architecture import InitializationName
from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.torch_backend.layers import FUSED, Operations
from llamita.torch_backend.model import Llama


def build_model(
    config: ModelConfig,
    arrays: Mapping[str, HostArray] | None = None,
    *,
    seed: int = 0,
    initialization: InitializationName = "fan-in",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    operations: Operations = FUSED,
) -> Llama:
    """A model with the values of `arrays` (canonical names), or freshly initialised from `seed` without them."""
    with torch.device("meta"):
        model = Llama(config, operations)
    model = model.to(dtype).to_empty(device=device)
    if arrays is None:
        fresh = architecture.initialize(config, seed, initialization)
        _copy_values(model, ((name, HostArray.from_numpy(array)) for name, array in fresh))
    else:
        load_host_arrays(model, arrays)
    return model


def load_host_arrays(model: Llama, arrays: Mapping[str, HostArray]) -> None:
    """Give the parameters the values of `arrays`; ValueError lists all that is missing, extra or misshapen."""
    expected = {name: tuple(view.shape) for name, view in model.canonical_state().items()}
    faults = [f"{name} is missing" for name in expected if name not in arrays]
    for name, array in arrays.items():
        if name == architecture.OUTPUT_HEAD and model.config.tie_word_embeddings:
            continue  # some files repeat the tied embedding under the head's name
        if name not in expected:
            faults.append(f"{name} is not part of this model")
        elif array.shape != expected[name]:
            faults.append(f"{name} has shape {list(array.shape)}, expected {list(expected[name])}")
    if faults:
        raise ValueError(f"the weights do not fit config.json: {'; '.join(faults)}")
    _copy_values(model, ((name, arrays[name]) for name in expected))


def _copy_values(model: Llama, arrays: Iterable[tuple[str, HostArray]]) -> None:
    state = model.canonical_state()
    with torch.no_grad():
        for name, array in arrays:
            state[name].copy_(tensor_from_host(array))


TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def tensor_from_host(array: HostArray) -> Tensor:
    """A tensor over the array's own bytes; read only where those are a mapped file."""
    if 0 in array.shape:
        return torch.empty(array.shape, dtype=TORCH_DTYPES[array.dtype])
    with warnings.catch_warnings():  # a mapped file cannot be written to, of which torch warns
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(array.data, dtype=TORCH_DTYPES[array.dtype]).reshape(array.shape)


def host_from_tensor(tensor: Tensor) -> HostArray:
    """The values of a tensor in host memory: its own bytes where it lies there contiguously, else a copy."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return HostArray(names[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def to_host_arrays(model: Llama) -> dict[str, HostArray]:
    """The parameters under canonical names, in the order of the table, ready for `checkpoint.save_tensors`."""
    state = model.canonical_state()
    return {row.name: host_from_tensor(state[row.name]) for row in architecture.parameters(model.config)}

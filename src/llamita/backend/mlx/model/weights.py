"""Values of a model: built from host arrays or freshly initialised, and given back as host arrays.

Copies arrays in and out by the names that `fused_parameters` and `canonical_state` translate; knows nothing of files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from llamita.backend.arrays import missing_or_misshapen, part_shapes, quantized_arrays
from llamita.backend.mlx.model import quantize
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.layers import FUSED, Operations
from llamita.backend.mlx.model.llama import Llama
from llamita.backend.mlx.model.quantized import QuantizedLinear
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import InitializationName, check_arrays, initialize_parameters, stored_arrays


def build_model(
    config: ModelConfig,
    arrays: Mapping[str, HostArray] | None = None,
    *,
    seed: int = 0,
    initialization: InitializationName = "fan-in",
    dtype: mx.Dtype = mx.float32,
    operations: Operations = FUSED,
) -> Llama:
    """Returns a model with the values of `arrays` (canonical names), or freshly initialised from `seed` without them.

    Memory is allocated once the arrays are known to fit; of mapped ones one fused parameter is read at a time. The
    numbers that `seed` gives are those of every backend.
    """
    if arrays is not None:
        check_arrays(config, arrays)
    model = Llama(config, operations)
    if arrays is None:
        fresh = initialize_parameters(config, seed, initialization)
        host = ((name, HostArray.from_numpy(array)) for name, array in fresh)
        values = dict(quantize_arrays(config, host) if config.quantization else host)
        _copy_values(model.fused_parameters(), values.pop, dtype)
    else:
        _copy_values(model.fused_parameters(), arrays.__getitem__, dtype)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.arrange(dtype)
    return model


def quantize_arrays(config: ModelConfig, arrays: Iterable[tuple[str, HostArray]]) -> Iterator[tuple[str, HostArray]]:
    """Yields the arrays of `arrays.quantized_arrays`, rounded here."""

    def quantized(array: HostArray, bits: int) -> tuple[HostArray, HostArray]:
        values, scale = quantize.quantize(array_from_host(array), bits)
        return host_from_array(values), host_from_array(scale)

    def to_bfloat16(array: HostArray) -> HostArray:
        return host_from_array(array_from_host(array).astype(mx.bfloat16))

    return quantized_arrays(config, arrays, quantized, to_bfloat16)


def load_host_arrays(model: Llama, arrays: Mapping[str, HostArray]) -> None:
    """Gives the parameters the values of `arrays`; ValueError lists all that is missing, extra or misshapen."""
    assert not model.config.quantization, "quantised weights may lie in a kernel's order; build the model anew"
    check_arrays(model.config, arrays)
    _copy_values(model.fused_parameters(), arrays.__getitem__, model.model.norm.weight.dtype)


def copy_host_arrays(parameters: Iterable[FusedParameter], arrays: Mapping[str, HostArray]) -> None:
    """Gives some parameters the values of `arrays`; ValueError, naming them, for those missing or misshapen."""
    parameters = list(parameters)
    faults = missing_or_misshapen(part_shapes(parameters), arrays)
    if faults:
        raise ValueError(f"the weights lack {faults}, or have another shape there")
    _copy_values(parameters, arrays.__getitem__, mx.float32)


def _copy_values(parameters: Iterable[FusedParameter], array_of: Callable[[str], HostArray], dtype: mx.Dtype) -> None:
    """Puts values in place one fused parameter after the other; ValueError for NaN or infinity."""
    for fused in parameters:
        pieces = []
        for name in fused.parts:
            array = array_of(name)
            piece = array_from_host(array)
            if mx.issubdtype(piece.dtype, mx.floating):
                if not mx.all(mx.isfinite(piece)).item():
                    raise ValueError(f"{name} holds NaN or infinite values; the weights are damaged")
                if not name.endswith("weight_scale"):  # the scales of quantised weights keep their type
                    piece = piece.astype(dtype)
            pieces.append(piece)
            array.forget(0, array.data.nbytes)
        values = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        mx.eval(values)
        fused.replace(values)


MLX_DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "I64": mx.int64, "I32": mx.int32, "I16": mx.int16, "I8": mx.int8, "U8": mx.uint8,
}  # fmt: skip


def array_from_host(array: HostArray) -> mx.array:
    """Returns an array of MLX with these values, copied. Float64, which no GPU of MLX has, becomes float32."""
    if array.dtype == "BF16":
        bits = np.frombuffer(array.data, dtype="<u2").reshape(array.shape)
        return mx.array(bits).view(mx.bfloat16)
    values = array.to_numpy()
    return mx.array(values.astype(np.float32) if array.dtype == "F64" else values)


def host_from_array(array: mx.array) -> HostArray:
    """Returns the values of an array in host memory."""
    names = {dtype: name for name, dtype in MLX_DTYPES.items()}
    if array.dtype == mx.bfloat16:
        return HostArray.from_bf16_bits(np.array(array.view(mx.uint16)))
    return HostArray(names[array.dtype], tuple(array.shape), HostArray.from_numpy(np.array(array)).data)


def to_host_arrays(model: Llama) -> dict[str, HostArray]:
    """Returns the parameters under canonical names, in the table's order, for `model_directory.save_tensors`."""
    state = model.canonical_state()
    return {array.name: host_from_array(state[array.name]) for array in stored_arrays(model.config)}

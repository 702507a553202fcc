"""A model's host arrays one by one in the table's order, quantised or with an adapter merged in; and their checks.

What is done to a single array is the backend's, and is given; which array it is done to, and in which order, is written
here once. Knows no framework.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter
from llamita.model.parameters import parameter_table, weight_bits
from llamita.model.quantization import SCALE

Quantize = Callable[[HostArray, int], tuple[HostArray, HostArray]]
"""(a matrix, bits) -> its values and scales as they are stored; ValueError, without a name, for NaN or infinity."""
Merge = Callable[[HostArray, HostArray | None, int, str], HostArray]
"""(a matrix as it is stored, its scales where it is quantised, its number of inputs, its name without `.weight`) -> the
matrix in floating-point numbers, an adapter's change added where it has one there."""


class FusedParameter(Protocol):
    """A parameter of a backend's module and the canonical parameters whose rows it stacks, `sizes` rows each."""

    @property
    def parameter(self) -> Any: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...


def part_shapes(parameters: Iterable[FusedParameter]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the canonical parameters that some fused ones are made of."""
    return {
        name: (size, *fused.parameter.shape[1:])
        for fused in parameters
        for name, size in zip(fused.parts, fused.sizes, strict=True)
    }


def quantized_arrays(
    config: ModelConfig,
    arrays: Iterable[tuple[str, HostArray]],
    quantize: Quantize,
    to_bfloat16: Callable[[HostArray], HostArray],
) -> Iterator[tuple[str, HostArray]]:
    """Quantises the arrays of a plain model, one by one, into those that a model of the quantised `config` stores.

    What is not quantised becomes bfloat16, the type that activations have beside such weights. ValueError, naming the
    array, for NaN or infinity.
    """
    table = {row.name: row for row in parameter_table(config)}
    for name, array in arrays:
        bits = weight_bits(config, table[name])
        if not bits:
            yield name, to_bfloat16(array)
            continue
        try:
            values, scale = quantize(array, bits)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        yield name, values
        yield name + SCALE, scale


def merged_arrays(arrays: Mapping[str, HostArray], adapter: Adapter, merge: Merge) -> Iterator[tuple[str, HostArray]]:
    """Yields the base's arrays with the adapter merged in, in the table's order, in the base's type; quantised ones in
    bfloat16, so that the result is an ordinary model."""
    base = adapter.over(arrays)
    for row in parameter_table(adapter.config):
        module, array = row.name.removesuffix(".weight"), base[row.name]
        quantised = row.name not in adapter.replaced and weight_bits(adapter.config, row) > 0
        if module in adapter.factors or quantised:
            yield row.name, merge(array, base[row.name + SCALE] if quantised else None, row.shape[-1], module)
            continue
        yield row.name, array
        array.forget(0, len(array.data))


def missing_or_misshapen(expected: Mapping[str, Sequence[int]], arrays: Mapping[str, HostArray]) -> str:
    """Returns the first few names that `arrays` lack or have in another shape, as a list in words, or ""."""
    faults = [name for name in expected if name not in arrays]
    faults += [name for name in expected if name in arrays and arrays[name].shape != tuple(expected[name])]
    return ", ".join(faults[:5])

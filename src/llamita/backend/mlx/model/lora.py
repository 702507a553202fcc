"""Low-rank adapters on the model's linear maps: made for training or for use, merged into weights and out again.

The model fuses several linear maps into one matrix; an adapter has its own A and B for each of them, under its
canonical name. `Change` is one adapter at one fused matrix, `ModelAdapter` all of them. The model does not hold it: it
is an argument of each forward pass. What an adapter is stands in model/lora.py, its files in storage/peft_directory.py;
several in one pass are infer/adapters.py.

Letters beyond the usual: R the rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from llamita.backend import arrays as host_arrays
from llamita.backend.mlx.model import quantize
from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.head import OutputHead
from llamita.backend.mlx.model.llama import Linear, Llama
from llamita.backend.mlx.model.quantized import QuantizedLinear
from llamita.backend.mlx.model.weights import array_from_host, host_from_array
from llamita.model.host_array import HostArray
from llamita.model.lora import DOWN, HEAD, UP, Adapter, Factors, LoraSettings, initialize_adapter, linear_maps
from llamita.model.parameters import canonical_names


class Part(nn.Module):
    """A (R, n_in) and B (n_out, R) of the linear map that is number `index` of those fused into one matrix."""

    def __init__(self, module: str, index: int, down_RD: mx.array, up_CR: mx.array, scale: float) -> None:
        super().__init__()
        self.module, self.index, self.scale = module, index, scale
        self.down_RD, self.up_CR = down_RD, up_CR


class Change:
    """One adapter's change to the output of one fused matrix; `sizes` are the widths of the maps fused in it."""

    def __init__(self, parts: list[Part], sizes: tuple[int, ...]) -> None:
        self.parts, self.sizes = parts, sizes

    def __call__(self, x_D: mx.array, y_C: mx.array) -> mx.array:
        """Returns y + scale * B A x for every part; (..., D) and (..., C) to (..., C)."""
        pieces = list(mx.split(y_C, list(accumulate(self.sizes))[:-1], axis=-1))
        for part in self.parts:
            low_R = x_D.astype(part.down_RD.dtype) @ part.down_RD.T
            pieces[part.index] = pieces[part.index] + (low_R @ part.up_CR.T * part.scale).astype(y_C.dtype)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)


@dataclass(frozen=True)
class ModelAdapter:
    """An adapter with its parameters as arrays: its change to each fused matrix, by the matrix's name.

    Passed to a forward pass, it is for all that goes through the model there. `draws` are the dropouts on what goes
    into it at each matrix, none where it is used as it is.
    """

    changes: Mapping[str, Change]
    draws: Mapping[str, Dropout] = field(default_factory=dict)

    def changed(self, matrix: str, x: mx.array, y: mx.array) -> mx.array:
        change = self.changes.get(matrix)
        return y if change is None else change(self.dropped(matrix, x), y)

    def dropped(self, matrix: str, x: mx.array) -> mx.array:
        return self.draws[matrix](x) if matrix in self.draws else x

    def dropping(self, probability: float, key: mx.array) -> "ModelAdapter":
        """Returns the same adapter with dropout, drawn by each matrix from a key of its own."""
        draws = {}
        for matrix in self.changes if probability else ():
            key, own = mx.random.split(key)
            draws[matrix] = Dropout(probability, own)
        return replace(self, draws=draws)

    def astype(self, dtype: mx.Dtype) -> "ModelAdapter":
        """Returns the same adapter with A and B rounded to a type."""

        def rounded(part: Part) -> Part:
            return Part(part.module, part.index, part.down_RD.astype(dtype), part.up_CR.astype(dtype), part.scale)

        changes = {name: Change([*map(rounded, old.parts)], old.sizes) for name, old in self.changes.items()}
        return replace(self, changes=changes)

    def parts(self) -> Iterator[Part]:
        for change in self.changes.values():
            yield from change.parts

    def parameters(self) -> dict[str, mx.array]:
        """Returns A and B under canonical names."""
        return {fused.name: fused.parameter for fused in self.fused_parameters()}

    def fused_parameters(self) -> list[FusedParameter]:
        """Returns the parameters as the optimiser takes them."""
        return [
            FusedParameter(part.module + kind, part, key, (part.module + kind,), (part[key].shape[0],), True)
            for part in self.parts()
            for kind, key in ((DOWN, "down_RD"), (UP, "up_CR"))
        ]

    def output(self, hidden: Callable[..., mx.array], head: OutputHead) -> tuple[Callable[..., mx.array], OutputHead]:
        """Returns hidden states and output head as a loss takes them: where the output head is adapted, A's result
        stands beside the states and B beside the matrix, so that one product gives the adapted logits."""
        if HEAD not in self.changes:
            return hidden, head
        (part,) = self.changes[HEAD].parts

        def wide(*arguments: mx.array, **named: mx.array) -> mx.array:
            hidden_BTD = hidden(*arguments, **named)
            low_BTR = self.dropped(HEAD, hidden_BTD).astype(part.down_RD.dtype) @ part.down_RD.T
            return mx.concatenate([hidden_BTD, low_BTR.astype(hidden_BTD.dtype)], axis=-1)

        up_VR = (part.up_CR * part.scale).astype(head.weight_VD.dtype)
        return wide, replace(head, weight_VD=mx.concatenate([head.weight_VD, up_VR], axis=1))


def fresh_adapter(model: Llama, settings: LoraSettings, seed: int) -> ModelAdapter:
    """Returns a new adapter over a model, to be trained: float32, B zeros."""
    factors = settings.factors(model.config)
    values = {name: mx.array(array) for name, array in initialize_adapter(model.config, factors, seed)}
    return model_adapter(model, factors, values, mx.float32)


def loaded_adapter(model: Llama, adapter: Adapter) -> ModelAdapter:
    """Returns an adapter's values over a model, in the model's type."""
    values = {name: array_from_host(array) for name, array in adapter.arrays.items()}
    return model_adapter(model, adapter.factors, values, model.model.norm.weight.dtype)


def model_adapter(
    model: Llama, factors: Mapping[str, Factors], values: Mapping[str, mx.array], dtype: mx.Dtype
) -> ModelAdapter:
    """Returns an adapter's values, sorted by the fused matrices of a model; ValueError for NaN or infinity."""
    maps = linear_maps(model.config)

    def parameter(name: str) -> mx.array:
        if not mx.all(mx.isfinite(values[name])).item():
            raise ValueError(f"{name} of an adapter holds NaN or infinite values; its file is damaged")
        value = values[name].astype(dtype)
        mx.eval(value)  # a lazy array belongs to the thread that made it, and another may run the model
        return value

    changes = {}
    for name, layer in model.named_modules():
        modules = [part.removesuffix(".weight") for part in canonical_names(f"{name}.weight")]
        if not isinstance(layer, Linear | QuantizedLinear) or not set(modules) & factors.keys():
            continue
        parts = [
            Part(module, index, parameter(module + DOWN), parameter(module + UP), factors[module].scale)
            for index, module in enumerate(modules)
            if module in factors
        ]
        changes[name] = Change(parts, tuple(maps[module][0] for module in modules))
    return ModelAdapter(changes)


# --- merging ---------------------------------------------------------------------------------------------------------


def merge(model: Llama, adapter: Adapter, sign: float = 1.0) -> None:
    """Adds scale * B A to the weights of a model in memory; `unmerge` takes it away again, within rounding.

    What the adapter replaces whole (a classification head) is not touched: it is not a sum.
    """
    if model.config.quantization:
        raise ValueError(f"the weights are {model.config.quantization} and take no sums; pass the adapter with them")
    for fused in model.fused_parameters():
        modules = [name.removesuffix(".weight") for name in fused.parts]
        if not set(modules) & adapter.factors.keys():
            continue
        pieces = list(fused.split(fused.parameter))
        for i, module in enumerate(modules):
            if module in adapter.factors:
                change_CD = sign * product(adapter, module, adapter.factors[module])
                pieces[i] = pieces[i] + change_CD.astype(pieces[i].dtype)
        values = mx.concatenate(pieces)
        mx.eval(values)
        fused.replace(values)


def unmerge(model: Llama, adapter: Adapter) -> None:
    """Takes away again what `merge` added."""
    merge(model, adapter, -1.0)


def product(adapter: Adapter, module: str, factors: Factors) -> mx.array:
    """Returns scale * B A in float32."""
    down_RD, up_CR = (array_from_host(adapter.arrays[module + kind]).astype(mx.float32) for kind in (DOWN, UP))
    return factors.scale * (up_CR @ down_RD)


def merged_arrays(arrays: Mapping[str, HostArray], adapter: Adapter) -> Iterator[tuple[str, HostArray]]:
    """Yields the arrays of `arrays.merged_arrays`, summed here in float32."""

    def merged(array: HostArray, scale: HostArray | None, D: int, module: str) -> HostArray:
        weight = array_from_host(array)
        dtype = weight.dtype
        if scale is not None:
            weight, dtype = quantize.dequantize(weight, array_from_host(scale), D, mx.float32), mx.bfloat16
        if module in adapter.factors:
            weight = weight.astype(mx.float32) + product(adapter, module, adapter.factors[module])
        return host_from_array(weight.astype(dtype))

    return host_arrays.merged_arrays(arrays, adapter, merged)

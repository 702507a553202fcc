"""Low-rank adapters on the model's linear maps: made for training or for use, merged into weights and out again.

The model fuses several linear maps into one matrix; an adapter has its own A and B for each of them, under its
canonical name. `Change` is one adapter at one fused matrix, `ModelAdapter` all of them. The model does not hold it: it
is an argument of each forward pass. What an adapter is stands in model/lora.py, its files in storage/peft_directory.py;
several in one pass are infer/adapters.py.

Letters beyond the usual: R the rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend import arrays as host_arrays
from llamita.backend.torch.model import quantize
from llamita.backend.torch.model.dropout import drop
from llamita.backend.torch.model.fused import FusedParameter, canonical_names
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.llama import Linear, Llama
from llamita.backend.torch.model.quantized import QuantizedLinear
from llamita.backend.torch.model.weights import host_from_tensor, tensor_from_host
from llamita.model.host_array import HostArray
from llamita.model.lora import DOWN, HEAD, UP, Adapter, Factors, LoraSettings, initialize_adapter, linear_maps


@dataclass(frozen=True)
class Part:
    """A (R, n_in) and B (n_out, R) of the linear map that is number `index` of those fused into one matrix."""

    module: str
    index: int
    down_RD: nn.Parameter
    up_CR: nn.Parameter
    scale: float


class Change:
    """One adapter's change to the output of one fused matrix; `sizes` are the widths of the maps fused in it."""

    def __init__(
        self, parts: list[Part], sizes: tuple[int, ...], linear: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> None:
        self.parts, self.sizes, self.linear = parts, sizes, linear

    def __call__(self, x_D: Tensor, y_C: Tensor) -> Tensor:
        """Returns y + scale * B A x for every part; (..., D) and (..., C) to (..., C)."""
        pieces = list(y_C.split(self.sizes, dim=-1))
        for part in self.parts:
            low_R = self.linear(x_D.to(part.down_RD.dtype), part.down_RD)
            pieces[part.index] = pieces[part.index] + (self.linear(low_R, part.up_CR) * part.scale).to(y_C.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class ModelAdapter:
    """An adapter with its parameters on a model's device: its change to each fused matrix, by the matrix's name.

    Passed to a forward pass, it is for all that goes through the model there. `dropout` is drawn on what goes into it.
    """

    changes: Mapping[str, Change]
    dropout: float = 0.0

    def changed(self, matrix: str, x: Tensor, y: Tensor) -> Tensor:
        change = self.changes.get(matrix)
        return y if change is None else change(self.dropped(x), y)

    def dropped(self, x: Tensor) -> Tensor:
        return drop(x, self.dropout) if self.dropout else x

    def parts(self) -> Iterator[Part]:
        for change in self.changes.values():
            yield from change.parts

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns A and B under canonical names."""
        return {
            part.module + kind: value
            for part in self.parts()
            for kind, value in ((DOWN, part.down_RD), (UP, part.up_CR))
        }

    def fused_parameters(self) -> list[FusedParameter]:
        """Returns the parameters as the optimiser takes them."""
        return [
            FusedParameter(name, value, (name,), (value.shape[0],), True) for name, value in self.parameters().items()
        ]

    def output(self, hidden: Callable[..., Tensor], head: OutputHead) -> tuple[Callable[..., Tensor], OutputHead]:
        """Returns hidden states and output head as a loss takes them: where the output head is adapted, A's result
        stands beside the states and B beside the matrix, so that one product gives the adapted logits."""
        if HEAD not in self.changes:
            return hidden, head
        (part,) = self.changes[HEAD].parts

        def wide(*arguments: Tensor, **named: Tensor) -> Tensor:
            hidden_BTD = hidden(*arguments, **named)
            low_BTR = F.linear(self.dropped(hidden_BTD), part.down_RD)
            return torch.cat((hidden_BTD, low_BTR.to(hidden_BTD.dtype)), dim=-1)

        return wide, replace(head, weight_VD=torch.cat((head.weight_VD, part.up_CR * part.scale), dim=1))


def fresh_adapter(model: Llama, settings: LoraSettings, seed: int) -> ModelAdapter:
    """Returns a new adapter over a model, to be trained: float32, B zeros."""
    factors = settings.factors(model.config)
    values = {name: torch.from_numpy(array) for name, array in initialize_adapter(model.config, factors, seed)}
    return model_adapter(model, factors, values, torch.float32)


def loaded_adapter(model: Llama, adapter: Adapter) -> ModelAdapter:
    """Returns an adapter's values over a model, in the model's type."""
    values = {name: tensor_from_host(array) for name, array in adapter.arrays.items()}
    return model_adapter(model, adapter.factors, values, model.model.norm.weight.dtype)


def model_adapter(
    model: Llama, factors: Mapping[str, Factors], values: Mapping[str, Tensor], dtype: torch.dtype
) -> ModelAdapter:
    """Copies an adapter's values, sorted by the fused matrices of a model; ValueError for NaN or infinity."""
    maps, device = linear_maps(model.config), model.model.norm.weight.device

    def parameter(name: str) -> nn.Parameter:
        value = values[name].to(device=device, dtype=dtype, copy=True)
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} of an adapter holds NaN or infinite values; its file is damaged")
        return nn.Parameter(value)

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


@torch.no_grad()
def merge(model: Llama, adapter: Adapter, sign: float = 1.0) -> None:
    """Adds scale * B A to the weights of a model in memory; `unmerge` takes it away again, within rounding.

    What the adapter replaces whole (a classification head) is not touched: it is not a sum.
    """
    if model.config.quantization:
        raise ValueError(f"the weights are {model.config.quantization} and take no sums; pass the adapter with them")
    assert not model.reordered, "what is added to reordered weights would be lost"
    state = model.canonical_state()
    for module, factors in adapter.factors.items():
        weight_CD = state[f"{module}.weight"]
        weight_CD += (sign * product(adapter, module, factors)).to(weight_CD)


def unmerge(model: Llama, adapter: Adapter) -> None:
    """Takes away again what `merge` added."""
    merge(model, adapter, -1.0)


def product(adapter: Adapter, module: str, factors: Factors) -> Tensor:
    """Returns scale * B A in float32."""
    down_RD, up_CR = (tensor_from_host(adapter.arrays[module + kind]).float() for kind in (DOWN, UP))
    return factors.scale * (up_CR @ down_RD)


def merged_arrays(arrays: Mapping[str, HostArray], adapter: Adapter) -> Iterator[tuple[str, HostArray]]:
    """Yields the arrays of `arrays.merged_arrays`, summed here in float32."""

    def merged(array: HostArray, scale: HostArray | None, D: int, module: str) -> HostArray:
        weight = tensor_from_host(array)
        dtype = weight.dtype
        if scale is not None:
            weight, dtype = quantize.dequantize(weight, tensor_from_host(scale), D, torch.float32), torch.bfloat16
        if module in adapter.factors:
            weight = weight.float() + product(adapter, module, adapter.factors[module])
        return host_from_tensor(weight.to(dtype))

    return host_arrays.merged_arrays(arrays, adapter, merged)

"""A Llama whose parameters are divided between processes: tensor parallelism, FSDP2, and values into and out of parts.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053) follows the table's shard axes: rows of the
query, key, value, gate and up projections and of the embedding, columns of the output and down projections. FSDP2
(Zhao et al. 2023, arXiv:2304.11277) cuts what is left of each parameter along its first axis. Inside a divided model
the projections that are fused elsewhere stand apart, so that each part of a parameter is one slice of a canonical one.

Letters beyond the usual: O the outputs of a linear map.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

from llamita.backend.group import check_tensor_parallel
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.layers import FUSED, Adapters
from llamita.backend.torch.model.llama import Attention, Embedding, Linear, Llama, Product
from llamita.backend.torch.model.weights import model_without_values, tensor_from_host
from llamita.backend.torch.train.group import DATA, TENSOR, TorchGroup
from llamita.backend.torch.train.sharded import local, local_part
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import FUSED_PARTS, canonical_names, parameter_table


class Hooked(nn.Module):
    """A module whose forward is any computation with a model, since DDP and FSDP2 work by hooks around a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class SeparateLinears(nn.Module):
    """Linear maps of one input whose outputs are laid side by side: what is one fused matrix elsewhere."""

    def __init__(self, parts: Mapping[str, Linear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, adapters: Adapters | None = None, product: Product | None = None) -> Tensor:
        assert adapters is None, "an adapter changes fused maps"
        return torch.cat([part(x, None, product) for part in self.children()], dim=-1)


def divided_model(config: ModelConfig, group: TorchGroup, compile: bool) -> tuple[Llama, Hooked]:
    """Returns a model without values, divided as the group says, and what is called with it; `compile` its blocks."""
    check_divisible(config, group)
    model = model_without_values(config, torch.float32)
    separate(model)
    if group.settings.tensor_parallel > 1:
        divide_products(model, group.mesh[TENSOR])
    if compile:
        for block in model.model.layers:
            block.compile(dynamic=False)
    hooked = Hooked(model)
    if group.data_size > 1:
        mesh = group.mesh[DATA]
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(hooked, mesh=mesh)
    return model, hooked


def check_divisible(config: ModelConfig, group: TorchGroup) -> None:
    """ValueError, in one line, where the processes of a team cannot divide the model."""
    if config.quantization:
        raise ValueError("quantised weights are not divided between processes; use --parallel ddp")
    check_tensor_parallel(config, group.settings.tensor_parallel)


def separate(model: Llama) -> None:
    """Puts the linear maps of each fused matrix in its place, on the device where that is."""
    parts = {name.rpartition(".")[2]: parts for name, parts in FUSED_PARTS.items()}
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if name not in parts or not isinstance(child, Linear):
                continue
            n_in, device = child.weight.shape[1], child.weight.device
            if isinstance(owner, Attention):
                sizes = [owner.N * owner.H, owner.K * owner.H, owner.K * owner.H]
            else:
                sizes = [child.weight.shape[0] // 2] * 2
            with torch.device(device):
                made = {
                    part: Linear(size, n_in, child.bias is not None, FUSED)
                    for part, size in zip(parts[name], sizes, strict=True)
                }
            setattr(owner, name, SeparateLinears(made))


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def divide_products(model: Llama, mesh: DeviceMesh) -> None:
    """Divides every product by its row of the table; what is not divided is computed by each process of the team."""
    axes = {row.name: row.shard_axis for row in parameter_table(model.config)}

    def cut(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for kind, parameter in list(module.named_parameters(recurse=False)):
            axis = axes[of_module[module] + f".{kind}"]
            placement = Replicate() if axis is None else Shard(axis)
            module.register_parameter(kind, nn.Parameter(distribute_tensor(parameter, mesh, [placement])))

    of_module: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear | Embedding) or name in ("score", "lm_head"):
            continue
        (weight,) = canonical_names(f"{name}.weight")
        of_module[module] = weight.removesuffix(".weight")
        entered, left = (_rows_in, _rows_out) if axes[weight] == 0 else (_columns_in, _columns_out)
        if isinstance(module, Embedding):
            left = _columns_out  # each process finds the rows it holds; the sum is all of them
        distribute_module(module, mesh, cut, entered, left)  # type: ignore[arg-type] # its types deny what hooks return
    if hasattr(model, "lm_head"):
        head = model.lm_head
        head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
    for module in model.modules():
        if isinstance(module, Attention):
            module.N //= mesh.size()
            module.K //= mesh.size()


def _rows_in(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:])


def _rows_out(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    return output.to_local()


def _columns_in(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return (DTensor.from_local(inputs[0], mesh, [Shard(-1)], run_check=False), *inputs[1:])


def _columns_out(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    return output.redistribute(mesh, [Replicate()]).to_local()


def whole_head(head: OutputHead, partial: bool) -> OutputHead:
    """Returns an output head whose matrix the team holds in parts as one whole.

    `partial`: each process of the team takes a part of the loss, so that the gradients are to be summed.
    """
    weight_VD = head.weight_VD
    if not isinstance(weight_VD, DTensor):
        return head
    placement = Partial() if partial else Replicate()
    return OutputHead(weight_VD.full_tensor(grad_placements=[placement]), head.transform)


def summed_on_the_way_back(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns `x`, which all of a team hold, with a gradient that is the sum of theirs."""
    shared = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return shared.to_local(grad_placements=[Partial()])


# --- values ----------------------------------------------------------------------------------------------------------


def fill(state: Mapping[str, Tensor], arrays: Iterable[tuple[str, HostArray]]) -> None:
    """Gives each parameter its part of the array of its name; ValueError for NaN or infinity."""
    with torch.no_grad():
        for name, array in arrays:
            if name in state:
                held = state[name]
                part = local_part(tensor_from_host(array).to(held.device), held)
                if not torch.isfinite(part).all():
                    raise ValueError(f"{name} holds NaN or infinite values; the weights are damaged")
                local(held).copy_(part)


def divided_state(model: Llama) -> dict[str, Tensor]:
    """Returns the parameters of a divided model under canonical names, in the table's order."""
    held = {canonical_names(name)[0]: parameter.detach() for name, parameter in model.named_parameters()}
    return {row.name: held[row.name] for row in parameter_table(model.config)}


def number_of_parts(tensor: Tensor) -> int:
    """Returns how many parts a tensor is cut into, each of which one process holds or several."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())

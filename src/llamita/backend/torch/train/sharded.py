"""Tensors that may be sharded over processes, as an optimiser meets them: the part held here, the whole, and back.

A plain tensor is both its part and its whole. Of sharded ones (`torch.distributed.tensor.DTensor`) the functions here
are called by all processes of the mesh in the same order, since some of them communicate. A sharded one is known by its
methods: its class takes half a second to import, which a single process need not wait for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llamita.backend.torch.model.fused import FusedParameter


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Returns the part of a tensor that this process holds, which shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Returns a tensor with the parts of all processes in it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor, like: Any) -> Tensor:
    """Returns of a whole tensor, which every process has, the part that this process holds of one sharded as `like`."""
    if not is_sharded(like):
        return tensor
    everywhere = type(like).from_local(tensor, like.device_mesh, run_check=False)  # left out, placements are replicas
    return everywhere.redistribute(like.device_mesh, like.placements).to_local()


def computed_whole(tensors: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Computes a function of a stack (G, ...) of whole tensors entry by entry, each entry in one of the processes.

    The tensors have one shape and are sharded alike (`layout`). Returns the parts of all results that this process
    holds, stacked. A process has G / processes of the entries, perhaps none.
    """
    stack: Any = torch.stack(list(tensors))
    if not is_sharded(stack):
        return compute(stack)
    from torch.distributed.tensor import Shard

    shared = stack.redistribute(placements=[Shard(0)] * stack.device_mesh.ndim)
    results = type(shared).from_local(
        compute(shared.to_local()).contiguous(),
        shared.device_mesh,
        shared.placements,
        run_check=False,
        shape=shared.shape,
        stride=shared.stride(),
    )
    return results.redistribute(placements=stack.placements).to_local()


def layout(tensor: Any) -> str:
    """Returns how a tensor is sharded, the same text for tensors that are sharded alike."""
    return str(tensor.placements) if is_sharded(tensor) else ""


def processes_of(tensor: Any) -> int:
    """Returns how many processes hold a tensor together."""
    return tensor.device_mesh.size() if is_sharded(tensor) else 1


def gradient_of(item: FusedParameter) -> Tensor:
    """Returns the gradient of a parameter, sharded as it is."""
    parameter: Any = item.parameter
    gradient: Any = parameter.grad
    assert gradient is not None, f"{item.name} has no gradient"
    return gradient.redistribute(parameter.device_mesh, parameter.placements) if is_sharded(parameter) else gradient

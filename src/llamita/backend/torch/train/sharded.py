"""Tensors that may be sharded over processes, as an optimiser meets them: the part held here, the whole, and back.

A plain tensor is both its part and its whole. Of sharded ones (`torch.distributed.tensor.DTensor`) the functions here
are called by all processes of the mesh in the same order, since some of them communicate. A sharded one is known by its
methods: its class takes half a second to import, which a single process need not wait for.
"""

from typing import Any

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


def gradient_of(item: FusedParameter) -> Tensor:
    """Returns the gradient of a parameter, sharded as it is."""
    parameter: Any = item.parameter
    gradient: Any = parameter.grad
    assert gradient is not None, f"{item.name} has no gradient"
    return gradient.redistribute(parameter.device_mesh, parameter.placements) if is_sharded(parameter) else gradient

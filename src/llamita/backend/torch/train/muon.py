"""Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for all other parameters.

`muon_update` is the method in a dozen lines; `Muon.step` computes the same for all matrices of one shape at once. A
fused parameter is orthogonalised by its canonical parts. Knows nothing of models, losses or schedules.

Letters: G matrices of a group, N rows, M columns.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llamita.backend.adamw import MOMENTUM
from llamita.backend.muon import (
    NORM_FLOOR,
    NORM_MARGIN,
    MuonSettings,
    Part,
    Polynomial,
    check_momentum,
    check_parameters,
    groups_of_one_shape,
    polar_express,
    update_scale,
    updated_by_muon,
)
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.weights import host_from_tensor, tensor_from_host
from llamita.backend.torch.train.adamw import AdamW, AdamWSettings
from llamita.backend.torch.train.sharded import (
    computed_whole,
    gradient_of,
    layout,
    local,
    local_part,
    processes_of,
    whole,
)
from llamita.model.host_array import HostArray


def muon_update(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    learning_rate: float,
    settings: MuonSettings,
    weight_decay: float,
) -> None:
    """Updates a matrix and its `momentum`, both (N, M), in place; the readable form."""
    momentum.copy_(settings.momentum * momentum + gradient)
    direction = gradient + settings.momentum * momentum if settings.nesterov else momentum
    orthogonal = orthogonalized(direction, polar_express(settings.orthogonalization_steps))
    parameter -= learning_rate * weight_decay * parameter
    parameter -= learning_rate * update_scale(*parameter.shape) * orthogonal


def orthogonalized(
    matrices: Tensor, polynomials: Sequence[Polynomial], products: torch.dtype = torch.float32
) -> Tensor:
    """Returns about U V^T of each matrix U S V^T, (..., N, M), in float32; `products` is the type of the products.

    An odd polynomial of the singular values is one of the matrix: a X + b (X X^T) X + c (X X^T)^2 X.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices  # X X^T is then the smaller of the two
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = (x / (NORM_MARGIN * norm).clamp(min=NORM_FLOOR)).to(products)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if rows > columns else x).to(matrices.dtype)


class Muon:
    """The same update for all parameters of a model: Muon's for the matrices of its blocks, AdamW's for the rest.

    `products` is the type of the products in the orthogonalisation. Parameters may be sharded over processes: momentum
    is sharded alike, and each process orthogonalises some of the matrices, whole, for all.
    """

    def __init__(
        self,
        parameters: Iterable[FusedParameter],
        settings: MuonSettings | None = None,
        adamw: AdamWSettings | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        """ValueError where no matrix of a block is among the parameters."""
        self.settings = settings or MuonSettings()
        self.parameters = list(parameters)
        check_parameters(self.parameters)
        self._products = products
        self._matrices = [item for item in self.parameters if updated_by_muon(item)]
        self._rest = AdamW([item for item in self.parameters if not updated_by_muon(item)], adamw)
        self._momentum = [torch.zeros_like(item.parameter) for item in self._matrices]
        processes = max(processes_of(item.parameter) for item in self._matrices)
        self._groups = groups_of_one_shape(self._matrices, lambda item: layout(item.parameter), processes)

    @property
    def t(self) -> int:
        """The number of steps taken."""
        return self._rest.t

    @t.setter
    def t(self, steps: int) -> None:
        self._rest.t = steps

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its `.grad` times `gradient_scale` (what clipping to a norm multiplies by).

        The gradients may be scaled in place.
        """
        self._rest.step(learning_rate, gradient_scale)
        gradients = [gradient_of(item) for item in self._matrices]
        sums, added = [local(sum_) for sum_ in self._momentum], [local(gradient) for gradient in gradients]
        torch._foreach_mul_(sums, self.settings.momentum)
        torch._foreach_add_(sums, added, alpha=gradient_scale)
        polynomials = polar_express(self.settings.orthogonalization_steps)
        for group in self._groups:
            directions = [self._direction(part, gradients, gradient_scale) for part in group]
            orthogonal_GNM = computed_whole(
                directions, lambda stack_GNM: orthogonalized(stack_GNM, polynomials, self._products)
            )
            change = -learning_rate * update_scale(*group[0].shape)
            for part, orthogonal_NM in zip(group, orthogonal_GNM, strict=True):
                item = self._matrices[part.parameter]
                values = item.split(item.parameter)[part.position]
                if item.weight_decay:
                    local(values).mul_(1 - learning_rate * self._rest.settings.weight_decay)
                local(values).add_(orthogonal_NM, alpha=change)

    def _direction(self, part: Part, gradients: Sequence[Tensor], gradient_scale: float) -> Tensor:
        item = self._matrices[part.parameter]
        momentum = item.split(self._momentum[part.parameter])[part.position]
        if not self.settings.nesterov:
            return momentum
        return item.split(gradients[part.parameter])[part.position] * gradient_scale + self.settings.momentum * momentum

    def state(self) -> dict[str, HostArray]:
        """Returns momentum (`momentum.NAME`) or m and v under canonical names, and `t`, the number of steps taken."""
        momentum = {name: host_from_tensor(whole(values)) for name, values in self._canonical_momentum().items()}
        return momentum | self._rest.state()

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError for what is missing or misshapen, and for AdamW's state."""
        check_momentum(state, self._matrices)
        momentum = self._canonical_momentum()
        self._rest.load_state({name: array for name, array in state.items() if name not in momentum})
        for name, target in momentum.items():
            local(target).copy_(local_part(tensor_from_host(state[name]).to(target.device), target))

    def moments(self) -> dict[str, Tensor]:
        """Returns the tensors of the state themselves under canonical names, sharded as the parameters are."""
        return self._canonical_momentum() | self._rest.moments()

    def _canonical_momentum(self) -> dict[str, Tensor]:
        return {
            f"{MOMENTUM}{name}": view
            for item, momentum in zip(self._matrices, self._momentum, strict=True)
            for name, view in zip(item.parts, item.split(momentum), strict=True)
        }

"""Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for all other parameters.

`muon_update` is the method in a dozen lines; `Muon.step` computes the same for all matrices of one shape at once. A
fused parameter is orthogonalised by its canonical parts. Knows nothing of models, losses or schedules.

Letters: G matrices of a group, N rows, M columns.
"""

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from llamita.backend.adamw import MOMENTUM
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.weights import array_from_host, host_from_array
from llamita.backend.mlx.train.adamw import AdamW, AdamWSettings
from llamita.backend.muon import (
    NORM_FLOOR,
    NORM_MARGIN,
    MuonSettings,
    Polynomial,
    check_momentum,
    check_parameters,
    groups_of_one_shape,
    polar_express,
    update_scale,
    updated_by_muon,
)
from llamita.model.host_array import HostArray


def muon_update(
    parameter: mx.array,
    gradient: mx.array,
    momentum: mx.array,
    learning_rate: float,
    settings: MuonSettings,
    weight_decay: float,
) -> tuple[mx.array, mx.array]:
    """Returns a matrix and its `momentum`, both (N, M), after an update; the readable form."""
    momentum = settings.momentum * momentum + gradient
    direction = gradient + settings.momentum * momentum if settings.nesterov else momentum
    orthogonal = orthogonalized(direction, polar_express(settings.orthogonalization_steps))
    parameter = parameter - learning_rate * weight_decay * parameter
    return parameter - learning_rate * update_scale(*parameter.shape) * orthogonal, momentum


def orthogonalized(matrices: mx.array, polynomials: Sequence[Polynomial], products: mx.Dtype = mx.float32) -> mx.array:
    """Returns about U V^T of each matrix U S V^T, (..., N, M); `products` is the type of the products.

    An odd polynomial of the singular values is one of the matrix: a X + b (X X^T) X + c (X X^T)^2 X.
    """
    rows, columns = matrices.shape[-2:]
    x = mx.swapaxes(matrices, -1, -2) if rows > columns else matrices  # X X^T is then the smaller of the two
    norm = mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True))
    x = (x / mx.maximum(NORM_MARGIN * norm, NORM_FLOOR)).astype(products)
    for a, b, c in polynomials:
        gram = x @ mx.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (mx.swapaxes(x, -1, -2) if rows > columns else x).astype(matrices.dtype)


class Muon:
    """The same update for all parameters of a model: Muon's for the matrices of its blocks, AdamW's for the rest.

    `products` is the type of the products in the orthogonalisation.
    """

    def __init__(
        self,
        parameters: Iterable[FusedParameter],
        settings: MuonSettings | None = None,
        adamw: AdamWSettings | None = None,
        products: mx.Dtype = mx.float32,
    ) -> None:
        """ValueError where no matrix of a block is among the parameters."""
        self.settings = settings or MuonSettings()
        self.parameters = list(parameters)
        check_parameters(self.parameters)
        self._products = products
        self._matrices = [item for item in self.parameters if updated_by_muon(item)]
        self._rest = AdamW([item for item in self.parameters if not updated_by_muon(item)], adamw)
        self._momentum = [mx.zeros_like(item.parameter) for item in self._matrices]
        self._groups = groups_of_one_shape(self._matrices)

    @property
    def t(self) -> int:
        """The number of steps taken."""
        return self._rest.t

    @t.setter
    def t(self, steps: int) -> None:
        self._rest.t = steps

    def step(self, gradients: Sequence[mx.array], learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its gradient times `gradient_scale` (what clipping to a norm multiplies by).

        `gradients` are in the order of the parameters.
        """
        pairs = list(zip(self.parameters, gradients, strict=True))
        self._rest.step([found for item, found in pairs if not updated_by_muon(item)], learning_rate, gradient_scale)
        directions = []
        for i, found in enumerate(found for item, found in pairs if updated_by_muon(item)):
            gradient = found * gradient_scale
            self._momentum[i] = self.settings.momentum * self._momentum[i] + gradient
            nesterov = gradient + self.settings.momentum * self._momentum[i]
            directions.append(self._matrices[i].split(nesterov if self.settings.nesterov else self._momentum[i]))
        polynomials = polar_express(self.settings.orthogonalization_steps)
        changes = [list(parts) for parts in directions]
        for group in self._groups:
            stacked_GNM = mx.stack([directions[part.parameter][part.position] for part in group])
            scale = learning_rate * update_scale(*group[0].shape)
            orthogonal_GNM = scale * orthogonalized(stacked_GNM, polynomials, self._products)
            for part, change_NM in zip(group, orthogonal_GNM, strict=True):
                changes[part.parameter][part.position] = change_NM
        for item, parts in zip(self._matrices, changes, strict=True):
            decay = learning_rate * self._rest.settings.weight_decay if item.weight_decay else 0.0
            item.replace(item.parameter * (1 - decay) - mx.concatenate(parts))
        mx.eval([item.parameter for item in self._matrices], self._momentum)

    def state(self) -> dict[str, HostArray]:
        """Returns momentum (`momentum.NAME`) or m and v under canonical names, and `t`, the number of steps taken."""
        momentum = {
            f"{MOMENTUM}{name}": host_from_array(part)
            for item, momentum in zip(self._matrices, self._momentum, strict=True)
            for name, part in zip(item.parts, item.split(momentum), strict=True)
        }
        return momentum | self._rest.state()

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError for what is missing or misshapen, and for AdamW's state."""
        check_momentum(state, self._matrices)
        self._rest.load_state({name: array for name, array in state.items() if not name.startswith(MOMENTUM)})
        for i, item in enumerate(self._matrices):
            parts = [array_from_host(state[f"{MOMENTUM}{name}"]) for name in item.parts]
            self._momentum[i] = mx.concatenate(parts).astype(item.parameter.dtype)
        mx.eval(self._momentum)

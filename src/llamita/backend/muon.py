"""The part of Muon that every backend shares: its constants, its polynomials, what it updates, its saved state.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum with all singular
values made equal: of U S V^T it takes U V^T. Here are numbers alone; knows nothing of frameworks or models' layers.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from llamita.backend.adamw import MOMENTUM, check_arrays, optimizer_of
from llamita.backend.arrays import FusedParameter, part_shapes
from llamita.model.host_array import HostArray

OptimizerName = Literal["adamw", "muon"]
Polynomial = tuple[float, float, float]
"""(a, b, c) of the odd polynomial a x + b x^3 + c x^5."""

NORM_MARGIN = 1.01
"""A matrix is divided by so many times its Frobenius norm, so that rounding leaves no singular value above 1."""
NORM_FLOOR = 1e-15
"""The least norm that a matrix is divided by: one of zeros stays as it is."""

GROUP_NUMBERS = 2**24
"""Numbers in a group of matrices that are orthogonalised together: 64 MB in float32."""

LOWEST = 1e-3
CUSHION = 0.02407327424182761
SAFETY = 1.01
"""Of the polynomials: the least singular value that is brought to 1, the least share of the largest from which one is
fitted, and the factor of room for bfloat16 (all of arXiv:2505.16932, algorithm 1 and appendix G)."""


@dataclass(frozen=True)
class MuonSettings:
    """The constants of Muon. Weight decay and learning rate are those of AdamW, which `update_scale` makes fit."""

    momentum: float = 0.95
    """Decay of the sum of gradients that Muon moves the matrices of the blocks along."""
    nesterov: bool = True
    """Move along gradient + momentum x sum (Nesterov) rather than along the sum."""
    orthogonalization_steps: int = 5
    """Polynomials applied to the direction of an update; more bring its singular values closer to 1."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum!r} must lie in [0, 1); 0.95 is usual")
        if not 1 <= self.orthogonalization_steps <= 20:
            raise ValueError(
                f"orthogonalization_steps={self.orthogonalization_steps!r} must lie in 1 to 20; 5 is usual"
            )


@functools.cache
def polar_express(steps: int) -> tuple[Polynomial, ...]:
    """Returns the polynomials that bring singular values in (0, 1] to 1 when they are applied one after another.

    Each is the odd polynomial of degree 5 that is nearest to 1 on the interval where those before it have left the
    values, [lowest, 2 - lowest] after the first ("The Polar Express", Amsel et al. 2025, arXiv:2505.16932, theorem
    3.1). Where that interval is wide it is fitted on its upper part alone, and scaled so that both ends of the whole
    are equally far from 1. All but the last leave room for rounding upwards.
    """
    lowest, highest = LOWEST, 1.0
    polynomials = []
    for step in range(steps):
        fitted = nearest_to_one(max(lowest, CUSHION * highest), highest)
        middle = (value_at(fitted, lowest) + value_at(fitted, highest)) / 2
        a, b, c = (coefficient / middle for coefficient in fitted)
        lowest = value_at((a, b, c), lowest)
        highest = 2 - lowest
        room = SAFETY if step < steps - 1 else 1.0
        polynomials.append((a / room, b / room**3, c / room**5))
    return tuple(polynomials)


def nearest_to_one(lowest: float, highest: float) -> Polynomial:
    """Returns the odd polynomial of degree 5 whose largest distance from 1 on [lowest, highest] is the least.

    It touches 1 - E, 1 + E, 1 - E, 1 + E in turn: at the ends, and at two extrema between them (Chebyshev). Remez's
    exchange finds those: solve for the polynomial through four guesses, take its extrema as the next guesses.
    """
    if highest - lowest < 1e-5 * highest:  # the four points can no longer be told apart; this is the limit
        return 15 / 8 / highest, -10 / 8 / highest**3, 3 / 8 / highest**5
    points = np.linspace(lowest, highest, 4)
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(100):
        a, b, c, _ = np.linalg.solve(np.stack([points, points**3, points**5, signs], axis=1), np.ones(4))
        # The derivative a + 3 b y + 5 c y^2, y = x^2, is zero at the extrema.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        found = np.array([lowest, *inner, highest])
        if np.abs(found - points).max() < 1e-12:
            break
        points = found
    return float(a), float(b), float(c)


def value_at(polynomial: Polynomial, x: float) -> float:
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


def update_scale(rows: int, columns: int) -> float:
    """Returns the factor of an orthogonalised update, by which its root mean square is that of AdamW's, about 0.2.

    So AdamW's learning rate and weight decay serve Muon too (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    """
    return 0.2 * math.sqrt(max(rows, columns))


BLOCK_MATRIX = re.compile(r"model\.layers\.\d+\..*(?<!\.lora_[AB])\.weight")


def updated_by_muon(fused: FusedParameter) -> bool:
    """Returns whether Muon updates a parameter: a matrix of a block, no embedding, head, norm, bias or adapter."""
    return len(fused.parameter.shape) == 2 and all(BLOCK_MATRIX.fullmatch(name) for name in fused.parts)


class Part(NamedTuple):
    """A canonical matrix: the position of its parameter among those of Muon, and its own within that."""

    parameter: int
    position: int
    shape: tuple[int, int]


def groups_of_one_shape(
    matrices: Sequence[FusedParameter], layout: Callable[[FusedParameter], str] = lambda item: "", processes: int = 1
) -> list[list[Part]]:
    """Returns the canonical matrices in groups of one shape and one layout, to be orthogonalised together.

    A group has at most GROUP_NUMBERS numbers, or one matrix, for each of the processes that share it.
    """
    parts = [
        Part(i, position, (size, item.parameter.shape[1]))
        for i, item in enumerate(matrices)
        for position, size in enumerate(item.sizes)
    ]

    def kind(part: Part) -> tuple[tuple[int, int], str]:
        return part.shape, layout(matrices[part.parameter])

    groups = []
    for ((rows, columns), _), found in groupby(sorted(parts, key=kind), kind):
        alike, count = list(found), processes * max(1, GROUP_NUMBERS // (rows * columns))
        groups += [alike[start : start + count] for start in range(0, len(alike), count)]
    return groups


def check_parameters(parameters: Iterable[FusedParameter]) -> None:
    """Raises ValueError where there is no parameter for Muon: an adapter or a classifier's head is trained alone."""
    if not any(map(updated_by_muon, parameters)):
        raise ValueError(
            "--optimizer muon updates the matrices of the blocks, and none of them is trained here (an adapter's are "
            "low-rank factors); leave it out, or train the whole model with --tuning full"
        )


def check_momentum(state: Mapping[str, HostArray], parameters: Iterable[FusedParameter]) -> None:
    """Raises ValueError, in one line, for the state of another optimiser and for momentum that is not there."""
    if optimizer_of(state) != "muon":
        raise ValueError(
            "the saved state is of --optimizer adamw and cannot be gone on with by muon; resume with adamw"
        )
    check_arrays({f"{MOMENTUM}{name}": shape for name, shape in part_shapes(parameters).items()}, state)

"""What a check and a known mistake are, and the judgement of a result: right, wrong at which element, which mistake.

Nothing here knows a framework; results are numpy arrays. The names are found by running solutions with the mistake
planted in them: a result that equals theirs has that mistake.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Outputs = Mapping[str, np.ndarray]
"""The named results of a check. One that is no number, such as a dtype's name, is an array of one text."""
Run = Callable[[Any, Any], Outputs]
"""Runs a check on modules under judgement; the second argument holds the solutions' modules."""


@dataclass(frozen=True)
class Check:
    """One function of a lesson and how it is run."""

    name: str
    file: str
    """The module of the function, without `.py`."""
    run: Run
    rtol: float = 1e-4
    atol: float = 1e-5
    together: tuple[str, ...] = ()
    """Other modules that are the reader's too, where everything is judged at once."""
    also: tuple[str, ...] = ()
    """Checks whose mistakes show in this one too, where functions call each other and none is replaced."""


@dataclass(frozen=True)
class Mistake:
    """A mistake that is known by name, as changes to the source of a solution."""

    name: str
    check: str
    file: str
    changes: tuple[tuple[str, str], ...]
    """Pairs of a text, which occurs once, and what stands there instead."""
    source: str
    """The line of the paper that says how it should be."""

    def planted_in(self, source: str) -> str:
        """Returns the source with the mistake in it."""
        for old, new in self.changes:
            assert source.count(old) == 1, f"{self.name}: {old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)
        return source


@dataclass(frozen=True)
class Difference:
    """The first element in which a result is not the expected one."""

    where: str
    got: str
    expected: str
    shape: str
    """That of the result; empty where there is nothing to say of it."""

    def __str__(self) -> str:
        shape = f" (shape {self.shape})" if self.shape else ""
        return f"{self.where} is {self.got}, expected {self.expected}{shape}"


def difference(got: Outputs, expected: Outputs, rtol: float, atol: float) -> Difference | None:
    """Returns the first element that differs by more than atol + rtol * |expected|, None where none does.

    A NaN equals a NaN. Another shape is a difference too. Texts are equal or not.
    """
    for name, right in expected.items():
        mine = np.asarray(got[name])
        shape = str(tuple(right.shape))
        if mine.shape != right.shape:
            return Difference(f"the shape of {name}", str(tuple(mine.shape)), shape, "")
        if right.dtype.kind == "U":
            wrong = np.asarray(mine != right)
        else:
            wrong = ~np.isclose(mine, right, rtol=rtol, atol=atol, equal_nan=True)
        if wrong.any():
            index = tuple(int(place) for place in np.argwhere(wrong)[0])
            where = f"{name}[{', '.join(map(str, index))}]" if index else name
            return Difference(where, _shown(mine[index]), _shown(right[index]), shape if index else "")
    return None


def named(
    got: Outputs,
    expected: Outputs,
    check: Check,
    mistakes: Sequence[Mistake],
    run_with: Callable[[Sequence[Mistake]], Outputs | None],
    below: Sequence[Mistake] = (),
) -> tuple[Mistake, ...]:
    """Returns the mistakes that explain a wrong result: one, else two together, else none.

    `below` are mistakes of what the check's function calls, each tried alone: pairs of them would be too many.
    `run_with(mistakes)` gives the results of the solution with these planted, or None where they cannot be. Where
    several explain the result within the tolerance, the nearest does.
    """
    for candidates in (((each,) for each in (*mistakes, *below)), itertools.combinations(mistakes, 2)):
        best: tuple[Mistake, ...] = ()
        distance = np.inf
        for candidate in candidates:
            planted = run_with(candidate)
            if planted is None or difference(planted, expected, check.rtol, check.atol) is None:
                continue
            if difference(got, planted, check.rtol, check.atol) is None:
                apart = max(_distance(got[name], planted[name]) for name in expected)
                if apart < distance:
                    best, distance = candidate, apart
        if best:
            return best
    return ()


def _shown(element: Any) -> str:
    return str(element) if isinstance(element, str) else f"{element:.6g}"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The greatest difference of two results that are equal within a check's tolerance."""
    if b.dtype.kind == "U":
        return 0.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))

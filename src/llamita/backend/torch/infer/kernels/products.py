"""Products of activations with blocked weights: any number of rows, on all threads.

Each thread has some of the blocks. It takes one after the other, so that it reads memory in one stream, and all rows
past it while it is near: one row reads each weight once, at the speed of memory; many rows find it in the cache, at the
speed of arithmetic.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, typeof
from numba.extending import overload

from llamita.backend.torch.infer.kernels.simd import Static
from llamita.backend.torch.infer.kernels.threads import parallel
from llamita.backend.torch.infer.kernels.tiles import GROUP, SUMMED, multiply_tile, round_group, rounds_activations


def _can_keep() -> bool:
    """Returns whether Numba has a folder to keep compiled kernels in."""
    try:
        njit(cache=True)(_can_keep)
        return True
    except RuntimeError:
        return False


COMPILED: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": _can_keep()}

ONE, TWO, FOUR, EIGHT = Static(1), Static(2), Static(4), Static(8)
"""Rows that meet a block together: as many as their sums find registers for, and fewer for the last ones."""
GROUPS_ALONE = 512
"""Groups that are rounded by the calling thread: for fewer it takes longer to wake the others."""


def compiled_for(function: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """Returns a compiled function for arguments of just these types.

    It does not look at the types again, since that takes longer than many a product: whoever calls it gives the same
    ones, arrays being writable and contiguous, or memory is misread.
    """
    kinds = tuple(typeof(argument) for argument in arguments)
    function.compile(kinds)
    return function.overloads[kinds].entry_point


@njit(**COMPILED)
def multiply_rows(first, last, code, form, y, width, w, s, m, x, xs, sums, rows, n_in):
    """Multiplies all rows by blocks `first` to `last` - 1."""
    for block in range(first, last):
        row = 0
        while row + 8 <= rows:
            multiply_tile(code, form, EIGHT, y, width, w, s, m, block, x, xs, sums, row, n_in)
            row += 8
        if row + 4 <= rows:
            multiply_tile(code, form, FOUR, y, width, w, s, m, block, x, xs, sums, row, n_in)
            row += 4
        if row + 2 <= rows:
            multiply_tile(code, form, TWO, y, width, w, s, m, block, x, xs, sums, row, n_in)
            row += 2
        if row < rows:
            multiply_tile(code, form, ONE, y, width, w, s, m, block, x, xs, sums, row, n_in)


def prepared(threads: int, code: Static, form: Static, x: np.ndarray) -> Any:
    """Returns float32 activations as the product with a form takes them: as they are, as the bits of bfloat16, or as
    bytes; with their scales and their sums."""
    raise NotImplementedError("for compiled code")


@overload(prepared)
def _prepared(threads, code, form, x):
    if form.value.in_bytes:
        return _in_bytes
    return _in_bfloat16 if rounds_activations(form.value, code.value.instructions) else _as_they_are


def _as_they_are(threads, code, form, x):
    return x, np.empty(0, np.float32), np.empty(0, np.int32)


def _in_bfloat16(threads, code, form, x):
    bits, halves = x.view(np.uint32), np.empty(x.size, np.uint16)
    parallel(round_to_bfloat16, threads if x.size > GROUPS_ALONE * GROUP else 1, x.size, (bits, halves))
    return halves, np.empty(0, np.float32), np.empty(0, np.int32)


def _in_bytes(threads, code, form, x):
    groups = x.size // GROUP
    rounded, scales = np.empty(x.size, np.int8), np.empty(groups, np.float32)
    sums = np.empty(x.size // SUMMED, np.int32)
    parallel(round_groups, threads if groups > GROUPS_ALONE else 1, groups, (code, x, rounded, scales, sums))
    return rounded, scales, sums


@njit(**COMPILED)
def round_to_bfloat16(first, last, bits, halves):
    """Rounds float32, given as its bits, to the nearest bfloat16, to the even one where two are as near."""
    for place in range(first, last):
        word = bits[place]
        up = np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        halves[place] = np.uint16((word + up) >> np.uint32(16))


@njit(**COMPILED)
def round_groups(first, last, code, x, rounded, scales, sums):
    """Rounds groups `first` to `last` - 1 of the activations."""
    for group in range(first, last):
        round_group(code, x, rounded, scales, sums, group)


@njit(**COMPILED)
def linear(threads, code, x, rows, weight):
    """Returns y (R, outputs) of float32 rows x (R, I), flat, and a weight: its form, its arrays (numbers, scales and
    minimums), and the outputs of all its blocks."""
    form, (w, s, m), width = weight
    n_in = x.size // rows
    x, xs, sums = prepared(threads, code, form, x)
    y = np.empty(rows * width, np.float32)
    parallel(multiply_rows, threads, width // 16, (code, form, y, width, w, s, m, x, xs, sums, rows, n_in))
    return y

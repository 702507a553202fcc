"""Products of activations with blocked weights: any number of rows, on all threads.

Each thread has some of the blocks. It takes one or a few at a time, and all rows of activations past them while they
are near: one row reads each weight once, at the speed of memory; many rows find it in the cache, at the speed of
arithmetic.
"""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numba import njit, typeof
from numba.extending import overload

from llamita.backend.torch.infer.kernels.simd import LANES, Static
from llamita.backend.torch.infer.kernels.threads import parallel
from llamita.backend.torch.infer.kernels.tiles import (
    GROUP,
    SUMMED,
    multiply_tile,
    round_group,
    rounds_activations,
    unpack_block,
)


def _can_keep() -> bool:
    """Returns whether Numba has a folder to keep compiled kernels in."""
    try:
        njit(cache=True)(_can_keep)
        return True
    except RuntimeError:
        return False


COMPILED: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": _can_keep()}

ONE, TWO, FOUR, SIX, EIGHT = Static(1), Static(2), Static(4), Static(6), Static(8)
GROUPS_ALONE = 512
"""Groups that are rounded by the calling thread: for fewer it takes longer to wake the others."""


_COMPILED: dict[Hashable, Callable[..., Any]] = {}


def call(function: Any, statics: Hashable, *arguments: Any) -> Any:
    """Calls a compiled function, which is compiled once for what its `Static` arguments hold.

    The types of arguments are not looked at again, since that takes longer than many a product: whoever calls a
    function gives all others the same ones, arrays being writable and contiguous, or memory is misread.
    """
    key = (function.py_func, statics)
    if key not in _COMPILED:
        kinds = tuple(typeof(argument) for argument in arguments)
        function.compile(kinds)
        _COMPILED[key] = function.overloads[kinds].entry_point
    return _COMPILED[key](*arguments)


def tile_alone(form: Static) -> tuple[Static, int]:
    """Returns the blocks that a row alone takes at a time, and their number: of floating-point numbers four, so that
    memory is read in several streams, and sums do not wait for one another; a byte's arithmetic fills that time."""
    raise NotImplementedError("for compiled code")


@overload(tile_alone)
def _tile_alone(form):
    return (lambda form: (ONE, 1)) if form.value.in_bytes else (lambda form: (FOUR, 4))


def tile_of_many(code: Static, form: Static) -> tuple[Static, int, Static, int]:
    """Returns the blocks that several rows take at a time, and the rows, each with their number: as many as their sums
    find registers for, which bytes need twice."""
    raise NotImplementedError("for compiled code")


@overload(tile_of_many)
def _tile_of_many(code, form):
    if form.value.in_bytes:
        return lambda code, form: (ONE, 1, EIGHT, 8)
    if code.value.instructions == "avx512":
        return lambda code, form: (FOUR, 4, SIX, 6)
    return lambda code, form: (ONE, 1, SIX, 6)


@njit(**COMPILED)
def multiply_row(first, last, code, form, y, width, w, s, m, x, xs, sums, n_in):
    """Multiplies one row by blocks `first` to `last` - 1."""
    blocks, step = tile_alone(form)
    block = first
    while block + step <= last:
        multiply_tile(code, form, ONE, blocks, y, width, w, s, m, block, x, xs, sums, 0, n_in, 1)
        block += step
    while block < last:
        multiply_tile(code, form, ONE, ONE, y, width, w, s, m, block, x, xs, sums, 0, n_in, 1)
        block += 1


@njit(**COMPILED)
def multiply_rows(first, last, code, form, y, width, w, s, m, x, xs, sums, rows, n_in):
    """Multiplies all rows by blocks `first` to `last` - 1."""
    blocks, step, most, at_once = tile_of_many(code, form)
    block = first
    while block + step <= last:
        move_past(code, form, blocks, most, at_once, y, width, w, s, m, block, x, xs, sums, rows, n_in)
        block += step
    while block < last:
        move_past(code, form, ONE, most, at_once, y, width, w, s, m, block, x, xs, sums, rows, n_in)
        block += 1


@njit(**COMPILED)
def move_past(code, form, blocks, most, at_once, y, width, w, s, m, block, x, xs, sums, rows, n_in):
    """Multiplies all rows by the blocks of one tile."""
    row = 0
    while row + at_once <= rows:
        multiply_tile(code, form, most, blocks, y, width, w, s, m, block, x, xs, sums, row, n_in, rows)
        row += at_once
    if row + 4 <= rows:
        multiply_tile(code, form, FOUR, blocks, y, width, w, s, m, block, x, xs, sums, row, n_in, rows)
        row += 4
    if row + 2 <= rows:
        multiply_tile(code, form, TWO, blocks, y, width, w, s, m, block, x, xs, sums, row, n_in, rows)
        row += 2
    if row < rows:
        multiply_tile(code, form, ONE, blocks, y, width, w, s, m, block, x, xs, sums, row, n_in, rows)


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
    if rows == 1:
        parallel(multiply_row, threads, width // 16, (code, form, y, width, w, s, m, x, xs, sums, n_in))
    else:
        parallel(multiply_rows, threads, width // 16, (code, form, y, width, w, s, m, x, xs, sums, rows, n_in))
    return y


@njit(**COMPILED)
def look_up(first, last, code, form, w, s, m, rows, n_in, found):
    """Puts rows `first` to `last` - 1 of those wanted of a weight into `found`, float32 (R, I), flat."""
    block = np.empty(n_in * LANES, np.float32)
    for place in range(first, last):
        unpack_block(code, form, w, s, m, rows[place] // LANES, n_in, block)
        for i in range(n_in):
            found[place * n_in + i] = block[i * LANES + rows[place] % LANES]


@njit(**COMPILED)
def rows_of(threads, code, rows, n_in, weight):
    """Returns some rows of a weight, float32 (R, I), flat."""
    form, (w, s, m), _ = weight
    found = np.empty(rows.size * n_in, np.float32)
    parallel(look_up, threads if rows.size > 1 else 1, rows.size, (code, form, w, s, m, rows, n_in, found))
    return found

"""Products of activations with blocked weights: any number of rows, on all threads.

Each thread has some of the blocks. It takes one or a few at a time, and all rows of activations past them while they
are near: one row reads each weight once, at the speed of memory; many rows find it in the cache, at the speed of
arithmetic.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from llamita.backend.torch.infer.kernels.compiled import COMPILED, INSIDE
from llamita.backend.torch.infer.kernels.simd import LANES, Static
from llamita.backend.torch.infer.kernels.threads import meet, parallel, share
from llamita.backend.torch.infer.kernels.tiles import (
    GROUP,
    SUMMED,
    multiply_tile,
    round_group,
    rounds_activations,
    unpack_block,
)

ONE, TWO, FOUR, SIX, EIGHT = Static(1), Static(2), Static(4), Static(6), Static(8)


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


@njit(**INSIDE)
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


@njit(**INSIDE)
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


@njit(**INSIDE)
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


def room_for(code: Static, form: Static, size: int) -> Any:
    """Returns room for so many activations as the product with a form takes them: bytes, with their scales and their
    sums; the bits of bfloat16; or none where it takes them as they are."""
    raise NotImplementedError("for compiled code")


@overload(room_for)
def _room_for(code, form, size):
    if form.value.in_bytes:
        return lambda code, form, size: (
            np.empty(size, np.int8),
            np.empty(size // GROUP, np.float32),
            np.empty(size // SUMMED, np.int32),
        )
    if rounds_activations(form.value, code.value.instructions):
        return lambda code, form, size: (np.empty(size, np.uint16), np.empty(0, np.float32), np.empty(0, np.int32))
    return lambda code, form, size: (np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int32))


def prepare(code: Static, form: Static, x: np.ndarray, room: Any, first: int, last: int) -> None:
    """Puts activations `first` to `last` - 1, in whole groups, into the room for them."""
    raise NotImplementedError("for compiled code")


@overload(prepare)
def _prepare(code, form, x, room, first, last):
    if form.value.in_bytes:
        return lambda code, form, x, room, first, last: round_groups(code, x, room, first // GROUP, last // GROUP)
    if rounds_activations(form.value, code.value.instructions):
        return lambda code, form, x, room, first, last: round_to_bfloat16(x, room[0], first, last)
    return lambda code, form, x, room, first, last: None


@njit(**INSIDE)
def share_of_groups(team, size):
    """Returns the first of so many activations that a thread has to do, and the one after its last; in whole groups."""
    first, last = share(team, (size + GROUP - 1) // GROUP)
    return first * GROUP, min(last * GROUP, size)


def prepare_together(team: Any, code: Static, form: Static, x: np.ndarray, room: Any) -> None:
    """Puts all activations into the room for them, where the product with a form needs one."""
    raise NotImplementedError("for compiled code")


@overload(prepare_together)
def _prepare_together(team, code, form, x, room):
    if not form.value.in_bytes and not rounds_activations(form.value, code.value.instructions):
        return lambda team, code, form, x, room: None

    def together(team, code, form, x, room):
        first, last = share_of_groups(team, x.size)
        prepare(code, form, x, room, first, last)
        meet(team)

    return together


def operands(code: Static, form: Static, x: np.ndarray, room: Any) -> Any:
    """Returns activations as the product takes them, their scales and their sums."""
    raise NotImplementedError("for compiled code")


@overload(operands)
def _operands(code, form, x, room):
    if form.value.in_bytes or rounds_activations(form.value, code.value.instructions):
        return lambda code, form, x, room: room
    return lambda code, form, x, room: (x, room[1], room[2])


@njit(**INSIDE)
def round_to_bfloat16(x, halves, first, last):
    """Rounds float32 `first` to `last` - 1 to the nearest bfloat16, to the even one where two are as near."""
    bits = x.view(np.uint32)
    for place in range(first, last):
        word = bits[place]
        up = np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        halves[place] = np.uint16((word + up) >> np.uint32(16))


@njit(**INSIDE)
def round_groups(code, x, room, first, last):
    """Rounds groups `first` to `last` - 1 of the activations to bytes, with their scales and their sums."""
    rounded, scales, sums = room
    for group in range(first, last):
        round_group(code, x, rounded, scales, sums, group)


@njit(**INSIDE)
def multiply(team, code, weight, x, room, rows, n_in, y):
    """Puts this thread's share of the product of prepared rows (R, I) with a weight into y (R, outputs), flat."""
    form, (w, s, m), width = weight
    x, xs, sums = operands(code, form, x, room)
    first, last = share(team, width // LANES)
    if rows == 1:
        multiply_row(first, last, code, form, y, width, w, s, m, x, xs, sums, n_in)
    else:
        multiply_rows(first, last, code, form, y, width, w, s, m, x, xs, sums, rows, n_in)


@njit(**INSIDE)
def prepare_and_multiply(team, code, weight, x, room, rows, n_in, y):
    """Puts rows (R, I) into their room, and this thread's share of their product with a weight into y."""
    prepare_together(team, code, weight[0], x, room)
    multiply(team, code, weight, x, room, rows, n_in, y)


@njit(**COMPILED)
def linear(threads, code, x, rows, weight):
    """Returns y (R, outputs) of float32 rows x (R, I), flat, and a weight: its form, its arrays (numbers, scales and
    minimums), and the outputs of all its blocks."""
    form, _, width = weight
    y, room = np.empty(rows * width, np.float32), room_for(code, form, x.size)
    parallel(prepare_and_multiply, threads, (code, weight, x, room, rows, x.size // rows, y))
    return y


@njit(**INSIDE)
def look_up(team, code, weight, rows, n_in, found):
    """Puts this thread's share of the rows wanted of a weight into `found`, float32 (R, I), flat."""
    form, (w, s, m), _ = weight
    block = np.empty(n_in * LANES, np.float32)
    first, last = share(team, rows.size)
    for place in range(first, last):
        unpack_block(code, form, w, s, m, rows[place] // LANES, n_in, block)
        for i in range(n_in):
            found[place * n_in + i] = block[i * LANES + rows[place] % LANES]


@njit(**COMPILED)
def rows_of(threads, code, rows, n_in, weight):
    """Returns some rows of a weight, float32 (R, I), flat."""
    found = np.empty(rows.size * n_in, np.float32)
    parallel(look_up, threads if rows.size > 1 else 1, (code, weight, rows, n_in, found))
    return found

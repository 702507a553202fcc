"""Draws a token for each row of scores by the Gumbel-max trick, with noise for the few ids alone that it may carry.

The winner is the id of the largest score + noise, where noise = -ln(-ln(u)) with `noise.GumbelNoise`'s u. An id is at
most score - ln(1 - u), since -ln(u) >= 1 - u. So one whose 1 - u is above e^(score - reached) stays below what another
has reached, and needs no logarithms. They are looked for in float32, with a margin that its rounding stays within.

Letters beyond the usual: R rows.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llamita.backend.torch.infer.kernels.compiled import COMPILED, INSIDE, Kernel
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.infer.kernels.simd import LANES, target
from llamita.backend.torch.infer.kernels.threads import parallel, share
from llamita.backend.torch.infer.kernels.vectors import exponentials
from llamita.backend.torch.infer.noise import FIRST

PART = 4096
"""Scores that a thread looks through at a time."""
CHUNK = 64
"""Ids that are looked at together: only where one may win is each looked at."""
MULTIPLIER = np.int64(FIRST)
LOW_31, LOW_32, HALF = np.int64((1 << 31) - 1), np.int64((1 << 32) - 1), np.int64(1 << 51)
MARGIN = 1.001
"""By what float32's rounding of e^(score - largest), for exponents down to -87, is more than made up for."""


@njit(**INSIDE)
def random_bits(code_of_id, first_key, second_key):
    """Returns the 52 random bits of an id, as `GumbelNoise` has them."""
    bits = (code_of_id ^ first_key) * second_key
    return ((bits ^ ((bits >> 32) & LOW_32)) * MULTIPLIER >> 12) + HALF


@njit(**INSIDE)
def noise(bits):
    """Returns -ln(-ln(u)) for u halfway between two of 2^52 steps."""
    return -math.log(-math.log((bits + 0.5) * 2.0**-52))


@njit(**INSIDE)
def rest(bits):
    """Returns 1 - u in steps of 2^-31, rounded down."""
    return np.float32(np.int32(LOW_31 - (bits >> 21)))


@njit(**INSIDE)
def draw_parts(team, code, scores, width, codes, keys, values, ids):
    """Finds the largest score + noise, and its id, of this thread's share of the parts of rows of `width` scores."""
    first, last = share(team, values.size)
    parts = values.size // (scores.size // width)
    weights = np.empty(PART, np.float32)
    for part in range(first, last):
        row, begin = part // parts, part % parts * PART
        stop = min(begin + PART, width)
        at, first_key, second_key = row * width, keys[2 * row], keys[2 * row + 1]
        best = begin
        for place in range(begin, stop):
            best = place if scores[at + place] > scores[at + best] else best
        largest = scores[at + best]
        values[part], ids[part] = -np.inf, best
        if largest == -np.inf:
            continue
        for place in range(begin, stop):
            weights[place - begin] = scores[at + place] - largest
        padded = (stop - begin + LANES - 1) // LANES * LANES
        weights[stop - begin : padded] = -np.inf
        exponentials(code, weights, 0, np.float32(0.0), padded)
        value = largest + noise(random_bits(codes[best], first_key, second_key))
        factor = np.float32(MARGIN * math.exp(largest - value) * 2.0**31)
        for chunk in range(begin, stop, CHUNK):
            end, found = min(chunk + CHUNK, stop), 0
            for place in range(chunk, end):
                bits = random_bits(codes[place], first_key, second_key)
                found += rest(bits) <= weights[place - begin] * factor
            if found == 0:
                continue
            for place in range(chunk, end):
                bits = random_bits(codes[place], first_key, second_key)
                if rest(bits) <= weights[place - begin] * factor:
                    other = scores[at + place] + noise(bits)
                    if other > value or (other == value and place < best):
                        value, best = other, place
                        factor = np.float32(MARGIN * math.exp(largest - value) * 2.0**31)
        values[part], ids[part] = value, best


@njit(**COMPILED)
def draw(threads, code, scores, width, codes, keys):
    """Returns an id for each row of scores (R, V), flat."""
    rows, parts = scores.size // width, (width + PART - 1) // PART
    values, ids = np.empty(rows * parts), np.empty(rows * parts, np.int64)
    parallel(draw_parts, threads, (code, scores, width, codes, keys, values, ids))
    drawn = np.empty(rows, np.int64)
    for row in range(rows):
        drawn[row] = ids[row * parts + np.argmax(values[row * parts : (row + 1) * parts])]
    return drawn


class TokenDrawer:
    """Draws a token for each row of scores."""

    def __init__(self, instructions: Instructions) -> None:
        self._code, self._draw = target(instructions), Kernel(draw)

    def __call__(self, scores_RV: Tensor, codes_V: Tensor, keys_R2: Tensor) -> Tensor:
        """Returns ids [R, 1] drawn from softmax(scores), float64; any id where none may come.

        `codes_V` are those of `GumbelNoise`, `keys_R2` the `stream_keys` of the rows.
        """
        scores, codes, keys = (tensor.contiguous().view(-1).numpy() for tensor in (scores_RV, codes_V, keys_R2))
        drawn = self._draw(torch.get_num_threads(), self._code, scores, scores_RV.shape[1], codes, keys)
        return torch.from_numpy(drawn).unsqueeze(1)

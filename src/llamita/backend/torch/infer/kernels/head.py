"""The likeliest token after each row: the output head's product, its largest logit, and that one's log-probability.

Letters beyond the usual: R rows, P parts of a row's logits.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llamita.backend.torch.infer.kernels.blocked import BlockedWeight
from llamita.backend.torch.infer.kernels.compiled import COMPILED, INSIDE, Kernel
from llamita.backend.torch.infer.kernels.products import prepare_and_multiply, room_for
from llamita.backend.torch.infer.kernels.simd import LANES, target
from llamita.backend.torch.infer.kernels.threads import meet, parallel, share
from llamita.backend.torch.infer.kernels.vectors import exponentials, largest

PART = 1024
"""Logits that are looked through at a time: a multiple of a vector."""


@njit(**INSIDE)
def look_through(team, code, weight, x, room, rows, n_in, n_out, y, best, places, totals):
    """Puts logits into y, and of this thread's share of their parts finds the largest, its place in its row, and the
    sum of e^(y - largest), which takes the place of the logits."""
    prepare_and_multiply(team, code, weight, x, room, rows, n_in, y)
    meet(team)
    width, parts = weight[2], best.size // rows
    first, last = share(team, best.size)
    for part in range(first, last):
        row, begin = part // parts * width, part % parts * PART
        end = min(begin + PART, n_out)
        padded = (end - begin + LANES - 1) // LANES * LANES
        for place in range(end, begin + padded):
            y[row + place] = -np.inf
        best[part] = largest(code, y, row + begin, padded)
        for place in range(begin, end):
            if y[row + place] == best[part]:
                places[part] = place
                break
        totals[part] = 0.0
        if best[part] != -np.inf:
            totals[part] = exponentials(code, y, row + begin, best[part], padded)


@njit(**COMPILED)
def likeliest(threads, code, x, rows, weight, n_out):
    """Returns the id of the largest logit of each row (R, D), flat, and its log-probability; NaN where a logit is."""
    y, room = np.empty(rows * weight[2], np.float32), room_for(code, weight[0], x.size)
    parts = (n_out + PART - 1) // PART
    best, totals = np.empty(rows * parts, np.float32), np.empty(rows * parts, np.float32)
    places = np.zeros(rows * parts, np.int64)
    found = (y, best, places, totals)
    parallel(look_through, threads, (code, weight, x, room, rows, x.size // rows, n_out, *found))
    ids, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
    for row in range(rows):
        winner, total = row * parts, np.float32(0.0)
        for part in range(row * parts, (row + 1) * parts):  # the first of equal ones; NaN before all others
            if best[part] > best[winner] or (np.isnan(best[part]) and not np.isnan(best[winner])):
                winner = part
        for part in range(row * parts, (row + 1) * parts):
            total += totals[part] * np.exp(best[part] - best[winner])
        ids[row], logprobs[row] = places[winner], -np.log(total)
    return ids, logprobs


class GreedyHead:
    """Finds the likeliest token after each row."""

    def __init__(self, weight: BlockedWeight) -> None:
        self._weight, self._code, self._likeliest = weight, target(weight.instructions), Kernel(likeliest)

    def __call__(self, hidden_RD: Tensor) -> tuple[list[int], list[float]]:
        """Returns the token of the largest logit of each row, the first of equal ones, and its log-probability.

        It is NaN, or minus infinity, where a row's logits hold NaN, infinity, or nothing above minus infinity.
        """
        x, rows = hidden_RD.float().contiguous().numpy().reshape(-1), hidden_RD.shape[0]
        weight, n_out = self._weight.of_kernel, self._weight.n_out
        ids, logprobs = self._likeliest(torch.get_num_threads(), self._code, x, rows, weight, n_out)
        return ids.tolist(), logprobs.tolist()

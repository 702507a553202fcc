"""The likeliest token after each row: the output head's product, its largest logit, and that one's log-probability.

Letters beyond the usual: R rows, P parts of a row's logits.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llamita.backend.torch.infer.kernels.blocked import BlockedWeight
from llamita.backend.torch.infer.kernels.products import COMPILED, INSIDE, call, linear
from llamita.backend.torch.infer.kernels.simd import LANES, target
from llamita.backend.torch.infer.kernels.threads import parallel
from llamita.backend.torch.infer.kernels.vectors import exponentials, largest

PART = 1024
"""Logits that are looked through at a time: a multiple of a vector."""


@njit(**INSIDE)
def look_through(first, last, code, y, width, n_out, best, places, totals):
    """Finds the largest of each of parts `first` to `last` - 1, its place in its row, and the sum of e^(y - largest),
    which takes the place of the logits."""
    parts = best.size // (y.size // width)
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
    y = linear(threads, code, x, rows, weight)
    parts = (n_out + PART - 1) // PART
    best, totals = np.empty(rows * parts, np.float32), np.empty(rows * parts, np.float32)
    places = np.zeros(rows * parts, np.int64)
    parallel(look_through, threads, rows * parts, (code, y, y.size // rows, n_out, best, places, totals))
    ids, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
    for row in range(rows):
        of_row = slice(row * parts, (row + 1) * parts)
        winner = row * parts + np.argmax(best[of_row])  # the first of equal ones; NaN before all others
        ids[row] = places[winner]
        logprobs[row] = -np.log(np.sum(totals[of_row] * np.exp(best[of_row] - best[winner])))
    return ids, logprobs


def likeliest_tokens(hidden_RD: Tensor, weight: BlockedWeight) -> tuple[list[int], list[float]]:
    """Returns the token of the largest logit of each row, the first of equal ones, and its log-probability.

    It is NaN, or minus infinity, where a row's logits hold NaN, infinity, or nothing above minus infinity.
    """
    x = hidden_RD.float().contiguous().numpy().reshape(-1)
    statics, code, rows = (weight.form, weight.instructions), target(weight.instructions), len(hidden_RD)
    threads = torch.get_num_threads()
    ids, logprobs = call(likeliest, statics, threads, code, x, rows, weight.of_kernel, weight.n_out)
    return ids.tolist(), logprobs.tolist()

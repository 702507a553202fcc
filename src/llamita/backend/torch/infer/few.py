"""Finds, on a CPU, the few tokens of a row that truncation keeps, without sorting the vocabulary or masking it.

What is kept is what `sampling.truncate` keeps, decided in float64 too; a bound that so many scores reach is found from
the largest of a few numbers each, and only what reaches it is looked at closely. Knows no parameters but these three.

Letters beyond the usual: C some ids, in order, or columns; T scores of a column.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from llamita.backend.sampling_params import SamplingParams

LIKELIEST = (64, 1024)
"""Top-p looks for its nucleus among so many tokens before it looks among all that could be in it."""
TOGETHER = 64
"""Scores of which the largest is taken, at most."""


def kept_ids(scores_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Returns the ids that top-k, top-p and min-p, one of them at least, keep; none where no token may come."""
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    if params.top_k:
        steps.append(lambda scores_C: largest(scores_C, min(params.top_k, len(scores_C))))
    if params.top_p < 1:
        steps.append(lambda scores_C: nucleus(scores_C, params.top_p))
    if params.min_p > 0:
        steps.append(lambda scores_C: np.flatnonzero(scores_C >= scores_C.max() + math.log(params.min_p)))
    first, *others = steps
    ids_C = first(scores_V)
    for step in others:
        if len(ids_C):
            ids_C = ids_C[step(scores_V[ids_C])]
    return ids_C


def largest(scores_V: np.ndarray, count: int) -> np.ndarray:
    """Returns the ids of the `count` largest scores, and of any equal to the least of them."""
    ids_C = reaching(scores_V, count)
    scores_C = scores_V[ids_C]
    return ids_C if len(ids_C) <= count else ids_C[scores_C >= np.partition(scores_C, -count)[-count]]


def reaching(values_V: np.ndarray, count: int) -> np.ndarray:
    """Returns the ids of all values that reach a bound which at least `count` values do, and not many more."""
    together = max(1, min(TOGETHER, len(values_V) // (2 * count)))
    columns_TC = values_V[: len(values_V) // together * together].reshape(together, -1)
    return np.flatnonzero(values_V >= np.partition(columns_TC.max(axis=0), -count)[-count])


def nucleus(scores_V: np.ndarray, p: float) -> np.ndarray:
    """Returns the ids needed, the most probable first, to reach the mass p; the largest score is 0."""
    weights_V = torch.from_numpy(scores_V).exp().numpy()
    total = weights_V.sum()
    for count in LIKELIEST:
        ids_C = reaching(weights_V, min(count, len(weights_V)))
        if weights_V[ids_C].sum() > (p + 1e-9) * total:
            break
    else:  # all tokens rarer than (1 - p) / 2V together weigh less than 1 - p
        ids_C = np.flatnonzero(weights_V >= (1 - p) / (2 * len(weights_V)) * total)
    order_C = np.argsort(-weights_V[ids_C], kind="stable")
    before_C = weights_V[ids_C[order_C]].cumsum()[:-1] / total
    return np.sort(ids_C[order_C[: 1 + np.count_nonzero(before_C < p)]])

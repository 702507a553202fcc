"""Attention over arrays: the mask, one query head for each key and value head, and several.

T counts the queries, S the keys and values, H is the size of a head; N and K count the query heads and the key and
value heads. Where the arguments are float32, the result is float32 too.
"""

import math

import numpy as np
from functions import softmax


def causal_mask(T: int, S: int) -> np.ndarray:
    """Returns which keys each query may see. The result: (T, S), booleans, True where it may.

    The queries are the last T of S positions: query t is at position S - T + t, and sees the keys of its own position
    and of those before it. S is at least T, and more where the keys of a text's beginning are kept from before.

    Source: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), section 3.2.3.
    """
    # to do: compare the positions of the queries, a column, with those of the keys, a row.
    return np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]
    # done


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Returns the mean of the values for each query, weighted by how well the keys match it.

    query and the result: (..., T, H); key and value: (..., S, H); mask: booleans whose shape broadcasts with
    (..., T, S), True where a query may see a key, None where each sees all. Scores are divided by the root of H
    (`math.sqrt`: a float64 number of numpy's would make all of them float64); those that the mask forbids are minus
    infinity before the softmax over the keys. Each query sees at least one key.

    Source: Vaswani et al. 2017, equation 1.
    """
    # to do: `key.swapaxes(-1, -2)` transposes the last two axes; `np.where(mask, scores, -np.inf)` applies the mask.
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores) @ value
    # done


def grouped_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """The same where several query heads share one head of keys and values.

    query and the result: (..., N, T, H); key and value: (..., K, S, H), N being a multiple of K: query heads 0 to
    N / K - 1 share key and value head 0, the next N / K share head 1, and so on. mask: (T, S), or None. Count the axes
    from the end: heads are axis -3.

    Source: Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245), section 2.2.
    """
    # to do: each key and value head N / K times in a row, then `attention`.
    shared = query.shape[-3] // key.shape[-3]
    return attention(query, np.repeat(key, shared, axis=-3), np.repeat(value, shared, axis=-3), mask)
    # done

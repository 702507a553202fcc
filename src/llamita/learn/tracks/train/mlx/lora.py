"""Low-rank adapters: a large matrix stays as it is, and the product of two thin ones is learned beside it.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), section 4.1. I: the input's width; O: the output's; R: rank.
"""

import math

import mlx.core as mx


def fresh_factors(uniform: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """Returns A (R, I) and B (O, R) of an adapter that changes nothing yet.

    uniform: (R, I) numbers drawn from 0 to 1. A is to be uniform between -1 / sqrt(I) and 1 / sqrt(I), made from these
    in their order: 0 gives the lower end, 1 the upper one. B is zeros, of the same dtype. width: O.
    """
    # to do: stretch and shift the numbers that are given; zeros of the right shape.
    bound = 1 / math.sqrt(uniform.shape[1])
    return (2 * uniform - 1) * bound, mx.zeros((width, uniform.shape[0]), dtype=uniform.dtype)
    # done


def adapted(x: mx.array, weight: mx.array, a: mx.array, b: mx.array, alpha: float) -> mx.array:
    """Returns what an adapted linear map makes of x: (..., O).

    x: (..., I); weight: (O, I), as in a linear layer without a bias; a: (R, I); b: (O, R). To the map's own result
    alpha / R times that of the adapter is added. No (O, I) matrix is made here: x goes through a, then through b.
    """
    # to do: two products for the adapter, one for the weight.
    scale = alpha / a.shape[0]
    return x @ weight.T + scale * ((x @ a.T) @ b.T)
    # done


def merged_weight(weight: mx.array, a: mx.array, b: mx.array, alpha: float) -> mx.array:
    """Returns a new weight (O, I) that alone gives what `adapted` gives; what is passed in stays as it is."""
    # to do: one line.
    return weight + alpha / a.shape[0] * (b @ a)
    # done

"""The functions that everything else is made of: softmax, linear maps, embeddings, SiLU, and normalisation.

An array's shape is written with its axes' names, where `...` is any number of axes, or none. Where x is float32, the
result is float32 too. No function changes the arrays that it is given.
"""

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns exp(x) divided by its sum, both along the last axis: numbers from 0 to 1 that sum to 1. x: (..., n).

    exp(1000) is more than a number can hold, so the greatest element of each row is subtracted first, which changes
    nothing in the result. An element of minus infinity becomes 0; each row has at least one finite element.
    """
    # to do: two or three lines; `keepdims=True` keeps the last axis of a maximum or a sum.
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
    # done


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns x through a linear map without a bias. x: (..., inputs); weight: (outputs, inputs), a row an output.

    The result: (..., outputs), where number o is the dot product of x with row o of the weight.
    """
    # to do: one line.
    return x @ weight.T
    # done


def embedding(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns each token's vector. tokens: (...), integers from 0; weight: (vocabulary, width), row t for token t.

    The result: (..., width).
    """
    # to do: one line.
    return weight[tokens]
    # done


def silu(x: np.ndarray) -> np.ndarray:
    """Returns x * sigmoid(x), element by element, where sigmoid(x) = 1 / (1 + exp(-x)). The shape stays.

    In float32, exp(-x) becomes infinity for x below -88: numpy may warn of it, but the result is right, close to 0.

    Source: Ramachandran et al. 2017 (https://arxiv.org/abs/1710.05941), section 4 with beta = 1.
    """
    # to do: one line.
    return x / (1 + np.exp(-x))
    # done


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Returns x divided by the root of the mean of its squares over the last axis, times the weight.

    x and the result: (..., width); weight: (width,). `eps` is added to the mean of the squares, inside the root, so
    that a vector of zeros is not divided by 0. The mean of x is not subtracted.

    Source: Zhang and Sennrich 2019 (https://arxiv.org/abs/1910.07467), equation 4.
    """
    # to do: one or two lines.
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    # done

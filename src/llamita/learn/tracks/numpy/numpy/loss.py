"""Cross-entropy and gradients by hand: what a framework's `backward` would compute.

Gradients may be float32 or float64. No function changes the arrays that it is given.
"""

import numpy as np
from functions import softmax

IGNORED = -100
"""The label of a position that is not counted."""


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log(probability of the label), in nats, over the positions whose label is not IGNORED.

    logits: (..., vocabulary); labels: (...), integers, where `...` may be several axes; the result: a Python float.
    IGNORED is no index: choose the counted positions first, `logits[labels != IGNORED]`, (n, vocabulary). At least one
    is counted. The probabilities are the softmax of the logits; log(sum of exp) is computed with the greatest logit of
    a position subtracted first, since the logarithm of a probability that has become 0 would be infinite.
    """
    # to do: log-probabilities of all tokens; those of the labels; their mean.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    counted = labels != IGNORED
    chosen = np.take_along_axis(log_probabilities[counted], labels[counted][:, None], axis=-1)
    return float(-chosen.mean())
    # done


def cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the derivative of `cross_entropy` by each logit. The result: (..., vocabulary), as the logits.

    At a counted position it is the probability of each token, less 1 for the label, divided by the number of counted
    positions. At a position that is not counted it is 0 for all tokens.
    """
    # to do: softmax; subtract 1 at the labels; the positions that are not counted; the division.
    counted = labels != IGNORED
    gradient = softmax(logits)
    gradient[counted, labels[counted]] -= 1
    gradient[~counted] = 0
    return gradient / counted.sum()
    # done


def linear_gradients(x: np.ndarray, weight: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the derivatives of the loss by x and by the weight, where y = linear(x, weight).

    x: (n, inputs); weight: (outputs, inputs); gradient: (n, outputs), the derivative of the loss by each y. The
    results have the shapes of x and of the weight. The weight is used in all n rows, so its derivative is a sum.
    """
    # to do: two products of matrices; the shapes leave one way for each.
    return gradient @ weight, gradient.T @ x
    # done


def embedding_gradient(tokens: np.ndarray, vocabulary: int, gradient: np.ndarray) -> np.ndarray:
    """Returns the derivative of the loss by the embeddings' weight. The result: (vocabulary, width).

    tokens: (n,), integers; gradient: (n, width), the derivative of the loss by each token's vector. Row t is the sum
    over all places where token t stands, zeros where there is none.
    """
    # to do: `np.add.at(a, rows, b)` adds each row of b to a row of a, also where one is named twice; `a[rows] += b`
    #        adds the last of them alone.
    total = np.zeros((vocabulary, gradient.shape[-1]), gradient.dtype)
    np.add.at(total, tokens, gradient)
    return total
    # done

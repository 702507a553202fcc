"""Calibration: is a classifier as often right as it is sure? And one number that makes it so. numpy, float64.

Source: Guo et al. 2017 (https://arxiv.org/abs/1706.04599), equation 3 and section 4.2. n: texts; C: classes.
"""

import numpy as np


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Returns the mean distance between how sure a classifier is and how often it is right.

    probabilities: (n, C), rows that sum to 1; labels: integers (n,), the right classes. A text's confidence is its
    greatest probability, its prediction the class that has it. Bin k (from 1 to `bins`) holds the confidences above
    (k - 1) / bins and up to k / bins, that one included. In each bin that is not empty, take the distance between the
    share of right predictions and the mean confidence; return the mean of these, each bin weighted by its share of the
    texts.
    """
    # to do: confidences, right or wrong, the bin of each; a loop over the bins.
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = np.ceil(confidence * bins)
    error = 0.0
    for k in range(1, bins + 1):
        here = place == k
        if here.any():
            error += here.mean() * abs(right[here].mean() - confidence[here].mean())
    return float(error)
    # done


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature T between 0.01 and 100 for which softmax(logits / T) has the least mean -log p(label).

    logits: (n, C); labels: integers (n,), of texts that the model did not learn from. Right to three digits.

    With b = 1 / T, the loss has one valley. Its slope in b is the mean over the texts of

        sum over classes c of p(c) * logit(c)   -   logit(label),        p = softmax(b * logits)

    which is negative below the best b and positive above it. So halve an interval of log b again and again, and keep
    the half in which the sign changes; T is 1 / b. A slope of 0 counts as negative: T is 0.01 where no slope is
    positive, and 100 where all are.
    """
    # to do: the slope as a function of b; 60 halvings of the interval from log(1 / 100) to log(1 / 0.01).
    logits = np.asarray(logits, dtype=np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    of_label = logits[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        weights = np.exp(b * logits)
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return float(((probabilities * logits).sum(axis=1) - of_label).mean())

    low, high = np.log(1 / 100), np.log(1 / 0.01)
    for _ in range(60):
        middle = (low + high) / 2
        if slope(np.exp(middle)) > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-(low + high) / 2))
    # done

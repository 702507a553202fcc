"""Fits the temperature that makes a model's probabilities fit how often it is right.

Temperature scaling divides the logits of all labels by one number T, fitted on texts that the model did not learn from.
It changes no prediction, only how sure it is. Guo et al. 2017, arXiv:1706.04599. C: labels.
"""

import numpy as np

from llamita.evaluation.classification import log_softmax

COLDEST, HOTTEST = 1e-2, 1e3
"""The temperatures between which the fitted one is looked for."""
HALVINGS = 60


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature with the least negative log-likelihood: log p or logits (n, C), true labels (n,).

    In b = 1/T the negative log-likelihood is convex. Its slope is the mean over texts of the expected log p of a label
    less that of the true one, and rises with b: the root is found by halving an interval of log b. ValueError where
    there is nothing to fit, and where the likelihood grows without end towards either side.
    """
    scores_nC, n = np.asarray(log_probabilities, dtype=np.float64), len(labels)
    if not n or scores_nC.ndim != 2 or len(scores_nC) != n:
        raise ValueError(f"expected the labels' log-probabilities of at least one text, got {scores_nC.shape} for {n}")
    if not np.isfinite(scores_nC).all():
        raise ValueError(
            "a log-probability is not finite, so no temperature can be fitted; look at the model's weights"
        )
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"all {n} texts have one label; a temperature is fitted to texts of at least two")
    scores_nC = scores_nC - scores_nC.max(axis=1, keepdims=True)

    def slope(b: float) -> float:
        p_nC = np.exp(log_softmax(b * scores_nC))
        return float(((p_nC * scores_nC).sum(axis=1) - scores_nC[np.arange(n), labels]).mean())

    cold, hot = 1 / COLDEST, 1 / HOTTEST
    if slope(hot) >= 0:
        raise ValueError(
            f"the labels of the {n} texts fit the model's probabilities no better than chance, so that no temperature "
            "helps; look at the labels' order, or tune the model"
        )
    if slope(cold) <= 0:
        raise ValueError(
            f"the model is right about nearly all {n} texts, so that the likelihood grows with ever more certainty; "
            "give more or harder texts that the model did not learn from"
        )
    low, high = np.log(hot), np.log(cold)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(float(np.exp(middle))) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def with_temperature(log_probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Returns log p over the last axis at a temperature; they stay as they are at 1."""
    return log_probabilities if temperature == 1 else log_softmax(log_probabilities / temperature)

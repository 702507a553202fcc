"""Losses of both backends against PyTorch's cross entropy and the oracle, values and gradients, whole and in chunks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import reference
from tests.backend.frameworks import normal
from tests.backend.models import IGNORED
from tests.backend.tolerances import MODEL, relative_difference

TOLERANCE = MODEL["fp32"]
D, V = 16, 50


def example():
    hidden, weight = normal(3, 7, D), normal(V, D, seed=1, scale=3)
    labels = np.random.default_rng(2).integers(0, V, (3, 7))
    labels[0, 3:] = IGNORED
    labels[2, 0] = IGNORED
    return hidden, weight, labels


def by_pytorch(hidden, weight, function):
    """A value of all logits, float64, and its gradients."""
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (hidden, weight)]
    value = function(leaves[0] @ leaves[1].mT)
    value.backward()
    return value.item(), [leaf.grad.numpy() for leaf in leaves]


def check(framework, ours, hidden, weight, expected):
    given, (value, gradients) = [framework.array(x) for x in (hidden, weight)], expected
    assert float(framework.numbers(ours(*given))) == pytest.approx(value, rel=TOLERANCE)
    for found, theirs in zip(framework.gradients(ours, *given), gradients, strict=True):
        assert relative_difference(framework.numbers(found), theirs) < TOLERANCE


@pytest.mark.parametrize("chunk_size", [0, 1, 4, 5, 7, 21, 100])
def test_cross_entropy_and_its_gradients_whole_and_in_chunks(framework, chunk_size):
    hidden, weight, labels = example()
    labels_BT = framework.array(labels)

    def ours(hidden, weight):
        if not chunk_size:
            return framework.losses.cross_entropy(framework.layers.linear(hidden, weight), labels_BT) / 17
        return framework.losses.chunked_cross_entropy(hidden, weight, labels_BT, chunk_size) / 17

    def theirs(logits_BTV):
        labels_M = torch.from_numpy(labels).flatten()
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_M, ignore_index=IGNORED, reduction="sum") / 17

    expected = by_pytorch(hidden, weight, theirs)
    assert expected[0] == pytest.approx(reference.cross_entropy(hidden.astype(np.float64) @ weight.T, labels) / 17)
    check(framework, ours, hidden, weight, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_log_probabilities_in_chunks_and_their_gradients(framework, chunk_size):
    hidden, weight, labels = example()
    shares, labels_BT = normal(3, 7, seed=3), framework.array(labels)

    def theirs(logits_BTV):
        scored = torch.from_numpy(labels != IGNORED)
        picked = torch.from_numpy(labels).clamp(min=0)[..., None]
        found_BT = logits_BTV.log_softmax(-1).gather(-1, picked)[..., 0]
        return (torch.where(scored, found_BT, 0.0) * torch.from_numpy(shares)).sum()

    def ours(hidden, weight):
        return (
            framework.losses.chunked_log_probs(hidden, weight, labels_BT, chunk_size) * framework.array(shares)
        ).sum()

    check(framework, ours, hidden, weight, by_pytorch(hidden, weight, theirs))
    found = framework.losses.chunked_log_probs(framework.array(hidden), framework.array(weight), labels_BT, chunk_size)
    logits = torch.from_numpy(hidden.astype(np.float64) @ weight.astype(np.float64).T)
    expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(labels).clamp(min=0)[..., None])[..., 0].numpy()
    assert relative_difference(framework.numbers(found), np.where(labels == IGNORED, 0, expected)) < TOLERANCE


@pytest.mark.parametrize("loss", ["chunked_cross_entropy", "chunked_log_probs"])
def test_nothing_scored_is_zero_with_zero_gradients(framework, loss):
    hidden, weight, labels = example()
    nothing, given = framework.array(np.full_like(labels, IGNORED)), [framework.array(x) for x in (hidden, weight)]

    def ours(hidden, weight):
        return getattr(framework.losses, loss)(hidden, weight, nothing).sum()

    assert not framework.numbers(getattr(framework.losses, loss)(*given, nothing)).any()
    for gradient in framework.gradients(ours, *given):
        assert not framework.numbers(gradient).any()

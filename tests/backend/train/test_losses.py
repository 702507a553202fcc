"""Losses of both backends against PyTorch's cross entropy and the oracle, values and gradients, whole and in chunks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import reference
from tests.backend.frameworks import normal
from tests.backend.models import IGNORE_INDEX
from tests.backend.tolerances import MODEL, relative_difference

TOLERANCE = MODEL["fp32"]
D, V = 16, 50


def example():
    hidden, weight = normal(3, 7, D), normal(V, D, seed=1, scale=3)
    labels = np.random.default_rng(2).integers(0, V, (3, 7))
    labels[0, 3:] = IGNORE_INDEX
    labels[2, 0] = IGNORE_INDEX
    return hidden, weight, labels


HEADS = {"plain": (1.0, 0.0), "scaled": (4.0, 0.0), "capped": (2.0, 5.0)}
"""What logits are divided by, and their soft cap."""


def head_of(framework, weight, kind="plain"):
    module = framework.head
    return module.OutputHead(weight, module.LogitTransform(*HEADS[kind]))


def transformed(logits, kind):
    scaling, cap = HEADS[kind]
    return cap * torch.tanh(logits / scaling / cap) if cap else logits / scaling


def by_pytorch(hidden, weight, kind, function):
    """A value of all logits, float64, and its gradients."""
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (hidden, weight)]
    value = function(transformed(leaves[0] @ leaves[1].mT, kind))
    value.backward()
    return value.item(), [leaf.grad.numpy() for leaf in leaves]


def check(framework, ours, hidden, weight, expected):
    given, (value, gradients) = [framework.array(x) for x in (hidden, weight)], expected
    assert float(framework.numbers(ours(*given))) == pytest.approx(value, rel=TOLERANCE)
    for found, theirs in zip(framework.gradients(ours, *given), gradients, strict=True):
        assert relative_difference(framework.numbers(found), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_size", [0, 1, 4, 5, 7, 21, 100])
def test_cross_entropy_and_its_gradients_whole_and_in_chunks(framework, chunk_size, kind):
    hidden, weight, labels = example()
    labels_BT = framework.array(labels)

    def ours(hidden, weight):
        head = head_of(framework, weight, kind)
        if not chunk_size:
            return framework.losses.cross_entropy(head.logits(hidden), labels_BT) / 17
        return framework.losses.chunked_cross_entropy(hidden, head, labels_BT, chunk_size) / 17

    def theirs(logits_BTV):
        labels_M = torch.from_numpy(labels).flatten()
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_M, ignore_index=IGNORE_INDEX, reduction="sum") / 17

    expected = by_pytorch(hidden, weight, kind, theirs)
    logits_BTV = transformed(torch.from_numpy(hidden.astype(np.float64) @ weight.T.astype(np.float64)), kind)
    assert expected[0] == pytest.approx(reference.cross_entropy(logits_BTV, labels) / 17)
    check(framework, ours, hidden, weight, expected)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_log_probabilities_in_chunks_and_their_gradients(framework, chunk_size, kind):
    hidden, weight, labels = example()
    shares, labels_BT = normal(3, 7, seed=3), framework.array(labels)

    def picked(logits_BTV):
        found_BT = logits_BTV.log_softmax(-1).gather(-1, torch.from_numpy(labels).clamp(min=0)[..., None])[..., 0]
        return torch.where(torch.from_numpy(labels != IGNORE_INDEX), found_BT, 0.0)

    def log_probs(hidden, weight):
        return framework.losses.chunked_log_probs(hidden, head_of(framework, weight, kind), labels_BT, chunk_size)

    expected = by_pytorch(hidden, weight, kind, lambda x: (picked(x) * torch.from_numpy(shares)).sum())
    check(framework, lambda *given: (log_probs(*given) * framework.array(shares)).sum(), hidden, weight, expected)
    logits_BTV = transformed(torch.from_numpy(hidden.astype(np.float64) @ weight.T.astype(np.float64)), kind)
    found = framework.numbers(log_probs(framework.array(hidden), framework.array(weight)))
    assert relative_difference(found, picked(logits_BTV)) < TOLERANCE


@pytest.mark.parametrize("loss", ["chunked_cross_entropy", "chunked_log_probs"])
def test_nothing_scored_is_zero_with_zero_gradients(framework, loss):
    hidden, weight, labels = example()
    nothing, given = framework.array(np.full_like(labels, IGNORE_INDEX)), [framework.array(x) for x in (hidden, weight)]

    def ours(hidden, weight):
        return getattr(framework.losses, loss)(hidden, head_of(framework, weight), nothing)

    assert not framework.numbers(ours(*given)).any()
    for gradient in framework.gradients(lambda *leaves: ours(*leaves).sum(), *given):
        assert not framework.numbers(gradient).any()

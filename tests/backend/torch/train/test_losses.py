"""Losses against PyTorch's cross entropy and the oracle, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.train import losses
from tests import reference


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(50, (3, 7), generator=generator)
    labels[0, 3:] = losses.IGNORED
    labels[2, 0] = losses.IGNORED
    return hidden, weight, labels


def test_cross_entropy_against_pytorch_and_the_oracle():
    hidden, weight, labels = example()
    logits = hidden @ weight.mT
    ours = losses.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert abs(ours.item() - reference.cross_entropy(logits.detach(), labels)) < 1e-3


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk_size):
    hidden, weight, labels = example()
    plain = losses.cross_entropy(hidden @ weight.mT, labels) / 17
    chunked = losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, chunk_size) / 17
    torch.testing.assert_close(chunked, plain)
    expected = torch.autograd.grad(plain, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(chunked, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_chunked_loss_under_autocast_follows_float32():
    hidden, weight, labels = example()
    exact = torch.autograd.grad(losses.cross_entropy(hidden @ weight.mT, labels), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, 4)
    assert loss.dtype == torch.float32
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_nothing_scored_is_zero_with_zero_gradients():
    hidden, weight, labels = example()
    loss = losses.chunked_cross_entropy(hidden, OutputHead(weight), torch.full_like(labels, losses.IGNORED))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any()


def test_evaluation_computes_no_gradients():
    hidden, weight, labels = example()
    with torch.no_grad():
        loss = losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, 4)
    torch.testing.assert_close(loss, losses.cross_entropy(hidden @ weight.mT, labels).detach())

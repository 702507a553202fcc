"""PyTorch's losses under autocast and where no gradient is wanted, held to the plain form in float32."""

import torch
import torch.nn.functional as F

from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.train import losses
from tests.backend.models import IGNORE_INDEX


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(50, (3, 7), generator=generator)
    labels[0, 3:] = IGNORE_INDEX
    labels[2, 0] = IGNORE_INDEX
    return hidden, weight, labels


def test_chunked_loss_under_autocast_follows_float32():
    hidden, weight, labels = example()
    exact = torch.autograd.grad(losses.cross_entropy(hidden @ weight.mT, labels), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, 4)
    assert loss.dtype == torch.float32
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_log_probabilities_under_autocast_follow_float32():
    hidden, weight, labels = example()
    shares = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    logits = (hidden @ weight.mT).flatten(0, 1)
    exact = -F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.chunked_log_probs(hidden, OutputHead(weight), labels, 4)
    assert ours.dtype == torch.float32
    found, expected = (torch.autograd.grad((each * shares).sum(), (hidden, weight)) for each in (ours, exact))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.02


def test_evaluation_computes_no_gradients():
    hidden, weight, labels = example()
    with torch.no_grad():
        loss = losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, 4)
    torch.testing.assert_close(loss, losses.cross_entropy(hidden @ weight.mT, labels).detach())

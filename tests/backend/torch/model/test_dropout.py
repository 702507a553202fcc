"""Dropout on the CPU: shares, scale and gradients are those that the paper and `F.dropout` have."""

import math

import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.model.dropout import drop


@pytest.mark.parametrize("probability", [1e-3, 0.15, 0.5, 0.9])
def test_the_share_that_falls_is_the_probability(probability: float) -> None:
    torch.manual_seed(0)
    n = 1_000_000
    fallen = (drop(torch.ones(n), probability) == 0).sum().item()
    assert abs(fallen - n * probability) < 4 * math.sqrt(n * probability * (1 - probability)) + n * 2**-17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_stays_is_scaled_as_by_f_dropout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 11, dtype=dtype).T  # neither contiguous nor a multiple of four
    dropped, reference = drop(x, 0.15), F.dropout(x, 0.15)
    assert (dropped.dtype, dropped.shape) == (x.dtype, x.shape)
    both = (dropped != 0) & (reference != 0)
    assert both.sum() > 200
    torch.testing.assert_close(dropped[both], reference[both], rtol=max(2e-5, torch.finfo(dtype).eps), atol=0)


def test_gradients_pass_where_values_do() -> None:
    torch.manual_seed(0)
    x = torch.rand(500, requires_grad=True)
    dropped = drop(x, 0.3)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach() / x.detach())
    assert (x.grad == 0).any()


def test_neighbours_fall_independently() -> None:
    """The four elements of a draw, too: the share of each pattern of eight is that of a fair coin."""
    torch.manual_seed(0)
    n = 200_000
    fallen = (drop(torch.ones(n, 8), 0.5) == 0).long()
    counts = (fallen << torch.arange(8)).sum(-1).bincount(minlength=256)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert chi_squared < 255 + 4 * math.sqrt(2 * 255)


def test_the_generator_decides() -> None:
    torch.manual_seed(3)
    first, second = drop(torch.ones(1000), 0.5), drop(torch.ones(1000), 0.5)
    torch.manual_seed(3)
    assert torch.equal(drop(torch.ones(1000), 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("probability", [0.0, 2**-20])
def test_probabilities_below_the_grain_are_those_of_f_dropout(probability: float) -> None:
    torch.manual_seed(0)
    dropped = drop(torch.ones(4_000_000), probability)
    assert (dropped == 0).sum().item() == pytest.approx(4_000_000 * probability, abs=8)


def test_no_elements_are_no_elements() -> None:
    assert drop(torch.ones(0, 3), 0.5).shape == (0, 3)

"""PyTorch's AdamW in float64, to the last digits, and over parameters of any size and gradients of any order."""

import math

import numpy as np
import pytest
import torch

from llamita.backend.adamw import AdamWSettings
from llamita.backend.torch.train import adamw
from tests.backend.frameworks import Torch
from tests.backend.optimizers import DECAYS, by_the_paper, gradients, parameters, rates, run


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_follows_the_paper_in_float64(form, epsilon):
    settings = AdamWSettings(0.9, 0.999, epsilon, 0.05, form)
    ours = run(Torch(), settings, 300, np.float64).values()
    for a, b in zip(ours, by_the_paper(settings, 300), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_the_two_forms_are_the_same_update_with_the_same_epsilon_in_float64():
    textbook = AdamWSettings(epsilon=1e-2, bias_correction="textbook")
    efficient = AdamWSettings(epsilon=1e-2 * math.sqrt(1 - 0.95), bias_correction="efficient")
    a, b = (run(Torch(), settings, 1, np.float64).values()[1] for settings in (textbook, efficient))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("form", ["textbook", "efficient"])
def test_the_step_is_the_plain_form_s_update_in_float64(form, scale):
    settings, framework = AdamWSettings(weight_decay=0.3, bias_correction=form), Torch()
    fast = run(framework, settings, 50, np.float64, scale).values()
    for i, values in enumerate(parameters(np.float64)):
        plain, m, v = (framework.array(x) for x in (values, np.zeros_like(values), np.zeros_like(values)))
        for t in range(1, 51):
            gradient = framework.array(gradients(t, np.float64)[i] * scale)
            adamw.adamw_update(plain, gradient, m, v, t, rates(t), settings, DECAYS[i])
        np.testing.assert_allclose(fast[i], framework.numbers(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 4099])
def test_every_number_of_a_parameter_is_updated(size, beta1):
    """Whole vectors of the processor, and what is left over; both ways in which the kernel forms the mean."""
    settings, framework = AdamWSettings(beta1=beta1), Torch()
    values, *given = np.random.default_rng(size).standard_normal((4, size)).astype(np.float32)
    optimizer = framework.optimizer([values[None]], [True], settings)
    plain, m, v = (framework.array(x).double() for x in (values, np.zeros(size), np.zeros(size)))
    for t, gradient in enumerate(given, 1):
        optimizer.step([gradient[None]], 1e-2, 0.3)
        adamw.adamw_update(plain, framework.array(gradient).double() * 0.3, m, v, t, 1e-2, settings)
    np.testing.assert_allclose(optimizer.values()[0][0], plain.numpy(), rtol=0, atol=1e-6)


def test_gradients_may_lie_in_any_order_in_memory():
    framework, shape = Torch(), (40, 16)
    optimizers = [framework.optimizer([np.ones(shape, np.float32)], [True], AdamWSettings()) for _ in range(2)]
    for t in range(1, 4):
        gradient = torch.from_numpy(np.random.default_rng(t).standard_normal(shape[::-1]).astype(np.float32)).T
        assert not gradient.is_contiguous()
        for optimizer, own in zip(optimizers, (gradient, gradient.contiguous()), strict=True):
            optimizer.packed[0].parameter.grad = own.clone()  # it keeps the order
            optimizer.own.step(1e-2, 0.3)
    assert np.array_equal(*(optimizer.values()[0] for optimizer in optimizers))

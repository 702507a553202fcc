"""PyTorch's AdamW in float64, to the last digits, and in buckets of any size."""

import math

import numpy as np
import pytest

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


@pytest.mark.parametrize("bucket", [50, 100, adamw.BUCKET_NUMBERS])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("form", ["textbook", "efficient"])
def test_buckets_of_any_size_give_the_plain_form_s_update(form, scale, bucket, monkeypatch):
    monkeypatch.setattr(adamw, "BUCKET_NUMBERS", bucket)
    settings, framework = AdamWSettings(weight_decay=0.3, bias_correction=form), Torch()
    fast = run(framework, settings, 50, np.float64, scale).values()
    for i, values in enumerate(parameters(np.float64)):
        plain, m, v = (framework.array(x) for x in (values, np.zeros_like(values), np.zeros_like(values)))
        for t in range(1, 51):
            gradient = framework.array(gradients(t, np.float64)[i] * scale)
            adamw.adamw_update(plain, gradient, m, v, t, rates(t), settings, DECAYS[i])
        np.testing.assert_allclose(fast[i], framework.numbers(plain), rtol=0, atol=1e-12)

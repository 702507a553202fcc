"""The definition of a spike: by numpy's median over windows; over noise, falls, outliers; resumed at any point."""

import math

import numpy as np
import pytest

from llamita.training.spikes import LEAST_DEVIATION, NEAR, WINDOW, SpikeDetector


def detect(losses, deviations=7.0, warmup=0):
    """The numbers of the losses that are above their limits."""
    detector, found = SpikeDetector(deviations, warmup), []
    for i, loss in enumerate(losses):
        threshold = detector.threshold()
        if threshold is not None and loss > threshold.limit:
            found.append(i)
        detector.add(loss)
        assert detector.goes_on == (i in found)
    return found


def test_the_limit_is_that_of_the_definition():
    losses = 3 + 0.5 * np.random.default_rng(0).standard_normal(300)
    assert 1.4826 * np.median(np.abs(np.diff(losses))) / np.sqrt(2) == pytest.approx(0.5, rel=0.1)
    detector = SpikeDetector(5.0, 0)
    for i, loss in enumerate(losses):
        threshold = detector.threshold()
        if i < NEAR:
            assert threshold is None
        else:
            window = losses[max(0, i - WINDOW) : i]
            median = np.median(losses[i - NEAR : i])
            deviation = 1.4826 * np.median(np.abs(np.diff(window))) / np.sqrt(2)
            assert threshold.median == pytest.approx(median)
            assert threshold.deviation == pytest.approx(deviation)
            assert threshold.limit == pytest.approx(median + 5 * deviation)
        detector.add(float(loss))


def test_noise_and_a_falling_loss_make_no_spike_and_outliers_do():
    random = np.random.default_rng(1)
    steps = np.arange(5000)
    losses = 2 + 6 * np.exp(-steps / 300) + 0.1 * random.standard_normal(5000)
    assert detect(losses) == []
    losses[[700, 701, 2500]] += 1.5
    assert detect(losses) == [700, 701, 2500]


def test_a_loss_that_hardly_moves_needs_a_real_jump():
    losses = [0.0, 1e-9] * 30
    assert detect([*losses, 0.9 * 7 * LEAST_DEVIATION]) == []
    assert detect([*losses, 1.1 * 7 * LEAST_DEVIATION]) == [60]


def test_none_in_the_warm_up_and_none_where_switched_off():
    losses = [1.0] * 40 + [9.0] + [1.0] * 30 + [9.0]
    assert detect(losses) == [40, 71]
    assert detect(losses, warmup=41) == [71]
    assert detect(losses, deviations=0) == []


@pytest.mark.parametrize("cut", [0, 1, 19, 20, 21, 100, 101, 150, 151, 240])
def test_a_resumed_detector_is_the_one_that_went_through(cut):
    losses = list(2 + 0.1 * np.random.default_rng(2).standard_normal(250))
    losses[150] = 9.0
    whole, resumed = SpikeDetector(7.0, 30), SpikeDetector(7.0, 30)
    for loss in losses[:cut]:
        whole.add(loss)
    resumed.add(math.pi)  # what it knew is forgotten
    resumed.replay(losses[:cut])
    for loss in losses[cut:]:
        assert (resumed.threshold(), resumed.goes_on) == (whole.threshold(), whole.goes_on)
        whole.add(loss)
        resumed.add(loss)

"""Schedules against their closed forms, at every step."""

import math
from itertools import pairwise

import pytest

from llamita.training.schedule import Schedule


def test_cosine_rises_to_the_peak_and_ends_at_the_floor():
    schedule = Schedule("cosine", 1e-3, 1e-4, 100, warmup_steps=10)
    rates = [schedule.at(s) for s in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (s + 1) for s in range(10)])
    for s in range(10, 100):
        assert rates[s] == pytest.approx(1e-4 + 0.9e-3 * 0.5 * (1 + math.cos(math.pi * (s - 9) / 90)), rel=1e-12)
    assert rates[9] == 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[54] == pytest.approx((1e-3 + 1e-4) / 2)
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_constant():
    schedule = Schedule("constant", 2e-3, 0.0, 20, warmup_steps=4)
    assert [schedule.at(s) for s in range(6)] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3])
    assert schedule.at(10_000) == 2e-3  # needs no end


def test_warmup_stable_decay():
    schedule = Schedule("warmup-stable-decay", 1.0, 0.2, 20, warmup_steps=5, decay_steps=4)
    rates = [schedule.at(s) for s in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:16] == [1.0] * 11
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("name", ["cosine", "constant", "warmup-stable-decay"])
def test_edges(name):
    assert Schedule(name, 1.0, 0.0, 1).at(0) == (0.0 if name == "cosine" else 1.0)
    whole = Schedule(name, 1.0, 0.5, 5, warmup_steps=5)
    assert [whole.at(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "linear"}, "cosine, constant"),
        ({"peak": 0.0}, "learning_rate"),
        ({"peak": float("nan")}, "learning_rate"),
        ({"minimum": 2.0}, "minimum_learning_rate"),
        ({"steps": 0}, "steps"),
        ({"warmup_steps": 11}, "warmup_steps=11"),
        ({"decay_steps": 9, "warmup_steps": 2}, "decay_steps=9"),
    ],
)
def test_mistakes_are_named(changes, named):
    values = {"name": "cosine", "peak": 1.0, "minimum": 0.1, "steps": 10} | changes
    with pytest.raises(ValueError, match=named):
        Schedule(**values)

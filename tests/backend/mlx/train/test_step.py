"""What MLX's step alone has: losses that are watched or broken, the memory it takes, compiling with captured state."""

import dataclasses
import math

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.mlx.train import objectives
from llamita.backend.mlx.train import step as step_module
from tests.backend.frameworks import Mlx
from tests.backend.steps import CONFIG, batch, largest_difference, same, split

DROPOUT = dataclasses.replace(CONFIG, dropout=0.2)


def make(config=CONFIG, **options):
    return Mlx().train_step(config, max_grad_norm=1.0, **options)


def test_dropout_of_micro_batches_is_drawn_for_each(monkeypatch):
    step, row = make(dataclasses.replace(CONFIG, dropout=0.5)), batch(rows=1)
    seen = []

    def watched(hidden, head, tensors):
        seen.append(mx.stop_gradient(hidden(tensors.tokens_BT)))
        return objectives.next_token_loss(hidden, head, tensors)

    monkeypatch.setattr(step_module, "loss_function", lambda *_: watched)
    step.step([row, row], 0.0)
    assert len(seen) == 2
    assert not mx.allclose(*seen)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(monkeypatch):
    """A loss without fault whose slope at 0 is infinite."""

    def rooted(hidden, head, tensors):
        return objectives.LossOutput(mx.sum(mx.sqrt(mx.abs(0.0 * head.weight_VD))), {})

    monkeypatch.setattr(step_module, "loss_function", lambda *_: rooted)
    step = make()
    before = step.weights()
    metrics = step.step([batch()], 1e-2)
    assert (metrics.loss, metrics.faulty_micro_batches) == (0.0, ())
    assert not math.isfinite(metrics.grad_norm)
    assert same(step.weights(), before)
    assert step.optimizer.t == 0


def test_memory_does_not_grow_with_the_steps():
    step, active = make(), []
    for i in range(20):
        step.step(split(batch(seed=i), 4), 1e-3)
        active.append(mx.get_active_memory())
    assert max(active[10:]) < max(active[:10]) + 10_000, "a set of gradients has 19 KB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 2}, "threads=2 cannot be set"),
        ({"precision": "fp8"}, "MLX has no fp8 products to train with; use --precision bf16, or --backend torch"),
        ({"attention": "flex"}, "--attention flex is PyTorch's; leave it out, or use --backend torch on a GPU"),
    ],
)
def test_what_mlx_does_not_have_is_refused_in_a_line(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_conditions():
    conditions = make().conditions()
    assert conditions.pop("mlx")[0].isdigit()
    assert conditions == {"device": "cpu", "precision": "fp32", "compile": False}


@pytest.mark.medium
def test_compiled_follows_eager():
    """Two shapes in turn, with segments and without, dropout drawn anew in each update: none is built in as it was."""
    eager, compiled = (make(DROPOUT, compile=flag) for flag in (False, True))
    for i in range(6):
        data = split(batch(rows=4 if i % 3 else 6, seed=i, segments=i > 3), 2)
        a, b = eager.step(data, 1e-3), compiled.step(data, 1e-3)
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert compiled.weights().keys() == eager.weights().keys()
    assert largest_difference(compiled.weights(), eager.weights()) < 1e-5
    assert compiled.evaluate(data[0]).nats == pytest.approx(eager.evaluate(data[0]).nats, rel=1e-5)

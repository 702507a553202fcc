"""What MLX alone has of adapters: dropout drawn by keys, and compiling with captured state."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.weights import build_model
from tests.backend.adapters import CONFIG, EVERYTHING, WHOLE_GROUPS, batch
from tests.backend.frameworks import Mlx


def test_dropout_differs_between_steps_micro_batches_and_matrices(monkeypatch):
    step, row = Mlx().train_step(CONFIG, adapter=dataclasses.replace(EVERYTHING, dropout=0.5)), batch(rows=1)
    step.step([row], 1e-2)  # B is no longer zero
    assert len({step.step([row], 0.0).loss for _ in range(3)}) == 3
    seen = []

    def watched(adapter, matrix, x_D):
        seen.append(adapter.draws[matrix](mx.ones(x_D.shape)))
        return x_D

    monkeypatch.setattr(lora.ModelAdapter, "dropped", watched)
    step.step([row, row], 0.0)
    drawn = [np.array(mask).tobytes() for mask in seen]
    assert len(drawn) == len(set(drawn)) == 2 * (2 * 4 + 1)


def test_what_dropout_leaves_has_the_mean_of_the_whole():
    """One matrix, no depth: over many draws B A (dropped x) averages to B A x, which grows with 1 / sqrt(draws)."""
    model = build_model(CONFIG, seed=1)
    adapter = lora.fresh_adapter(model, EVERYTHING, seed=3)
    adapter.changes["lm_head"].parts[0].up_CR = mx.random.normal((61, 4), key=mx.random.key(1))
    x_RD, y_RC = mx.ones((4000, 32)), mx.zeros((4000, 61))
    whole_C = adapter.changed("lm_head", x_RD, y_RC)[0]
    dropping = adapter.dropping(0.5, mx.random.key(2))
    mean_C, deviation_C = (f(dropping.changed("lm_head", x_RD, y_RC), axis=0) for f in (mx.mean, mx.std))
    assert mx.all(mx.abs(mean_C - whole_C) < 5 * deviation_C / 4000**0.5).item()
    assert mx.all(deviation_C > 0).item()


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["", "int4"])
def test_a_compiled_step_trains_an_adapter_as_an_uncompiled_one(scheme):
    config = dataclasses.replace(WHOLE_GROUPS, quantization=scheme)
    settings = dataclasses.replace(EVERYTHING, dropout=0.3)
    eager, compiled = (Mlx().train_step(config, adapter=settings, compile=flag) for flag in (False, True))
    for i in range(4):
        data = [batch(i), batch(i + 9)]
        assert compiled.step(data, 1e-3).loss == pytest.approx(eager.step(data, 1e-3).loss, rel=1e-5)
    assert compiled.evaluate(batch()).nats == pytest.approx(eager.evaluate(batch()).nats, rel=1e-5)

"""One update in MLX: micro-batches change nothing, dropout's numbers, resuming (also across backends), faults, and the
loss curve of PyTorch over Meadow."""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.adamw import AdamWSettings
from llamita.backend.interface import TrainStep
from llamita.backend.mlx.model.weights import build_model
from llamita.backend.mlx.train import losses, objectives
from llamita.backend.mlx.train import step as step_module
from llamita.backend.mlx.train.step import MlxTrainStep, build_train_step
from llamita.backend.torch.train.step import build_train_step as build_torch
from llamita.data import meadow
from llamita.data.batches import NOT_SCORED, Batch
from llamita.model.config import ModelConfig
from tests.backend.torch.train.test_step import CONFIG, batch, same, split

OPTIONS = {"precision": "fp32", "device": "cpu", "seed": 3, "max_grad_norm": 1.0}
DROPOUT = dataclasses.replace(CONFIG, dropout=0.2)


def make(config=CONFIG, **options) -> MlxTrainStep:
    return build_train_step(config, **OPTIONS | options)


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max(np.abs(a[name].to_numpy() - b[name].to_numpy()).max() for name in a)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_do_not_change_the_update(size, segments):
    whole, parts = make(), make()
    for i in range(3):
        data = batch(seed=i, segments=segments)
        a = whole.step([data], 1e-2)
        b = parts.step(split(data, size), 1e-2)
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert a.targets == b.targets == data.num_targets
        if i == 0:  # Adam divides by the gradient's size, so later differences grow with the steps
            assert largest_difference(parts.weights(), whole.weights()) < 1e-6


def test_gradients_of_micro_batches_add_up_to_that_of_the_whole():
    step, seen = make(), []
    step.optimizer.step = lambda gradients, *_: seen.append([np.array(g) for g in gradients])
    data = batch(rows=8)
    step.step([data], 0.0)
    step.step(split(data, 1), 0.0)
    for a, b in zip(*seen, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_loss_is_nats_per_target_and_matches_the_plain_loss():
    step, data = make(), batch()
    logits = step.model(mx.array(data.tokens_BT)).logits_BTV
    plain = losses.cross_entropy(logits, mx.array(data.labels_BT)).item()
    nats, targets = step.evaluate(data).nats, step.evaluate(data).targets
    assert targets == data.num_targets
    assert nats == pytest.approx(plain, rel=1e-5)
    assert step.step([data], 1e-3).loss == pytest.approx(plain / targets, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["plain", "dropout"])
def test_the_same_run_twice_and_resumed_gives_the_same_bytes(config, precision):
    first, second = (make(config, precision=precision) for _ in range(2))
    for i in range(6):
        a = first.step(split(batch(seed=i), 3), 1e-2)
        mx.random.normal((7,))  # what others draw does not matter
        assert second.step(split(batch(seed=i), 3), 1e-2) == a
        if i == 2:
            resumed = make(config, precision=precision, initialization="gpt-2")
            resumed.load_state(first.weights(), first.state())
        if i > 2:
            assert resumed.step(split(batch(seed=i), 3), 1e-2) == a
    for other in (second, resumed):
        assert same(first.weights(), other.weights())
        assert same(first.state(), other.state())


def test_dropout_differs_between_steps_rows_and_micro_batches_and_leaves_the_generator_alone(monkeypatch):
    step, row = make(dataclasses.replace(CONFIG, dropout=0.5)), batch(rows=1)
    mx.random.seed(5)
    expected = mx.random.normal((3,))
    mx.random.seed(5)
    assert len({step.step([row], 0.0).loss for _ in range(3)}) == 3
    assert mx.array_equal(mx.random.normal((3,)), expected)
    assert step.evaluate(row) == step.evaluate(row)
    seen = []

    def watched(hidden, head, tensors):
        seen.append(mx.stop_gradient(hidden(tensors.tokens_BT)))
        return objectives.next_token_loss(hidden, head, tensors)

    monkeypatch.setattr(step_module, "loss_function", lambda *_: watched)
    step.step([row, row], 0.0)
    assert len(seen) == 2
    assert not mx.allclose(*seen)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("begun_on", ["torch", "mlx"])
def test_a_run_goes_on_in_the_other_backend(begun_on, precision):
    """Weights and moments are carried over bit for bit; 5 further updates differ by rounding alone: 1e-4 in float32 at
    a learning rate of 1e-2, and the losses by 1%, in bfloat16, whose products each backend rounds elsewhere."""
    builders = {"torch": build_torch, "mlx": build_train_step}
    options = OPTIONS | {"precision": precision, "optimizer": AdamWSettings(epsilon=1e-6)}
    begun = builders.pop(begun_on)(CONFIG, **options)
    other = next(iter(builders.values()))(CONFIG, **options | {"seed": 4})
    for i in range(5):
        begun.step([batch(seed=i)], 1e-2)
    other.load_state(begun.weights(), begun.state())
    assert same(other.weights(), begun.weights())
    assert same(other.state(), begun.state())
    for i in range(5, 10):
        a, b = begun.step([batch(seed=i)], 1e-2), other.step([batch(seed=i)], 1e-2)
        assert b.loss == pytest.approx(a.loss, rel=1e-5 if precision == "fp32" else 1e-2)
    if precision == "fp32":
        assert largest_difference(other.weights(), begun.weights()) < 1e-4


def test_bf16_keeps_float32_weights_and_learns_the_same():
    low, full = make(precision="bf16"), make()
    for _ in range(40):
        a, b = low.step([batch(unequal=False)], 1e-2), full.step([batch(unequal=False)], 1e-2)
    assert all(array.dtype == "F32" for array in low.weights().values())
    assert b.loss < 2.0
    assert a.loss == pytest.approx(b.loss, rel=0.05)
    assert a != b


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    step, faulty = make(), batch(seed=1)
    embedding = step.model.model.embed_tokens
    weight = np.array(embedding.weight)
    weight[7, 0] = np.inf
    embedding.weight = mx.array(weight)
    before, t = step.weights(), step.optimizer.t
    data = batch()
    data.tokens_BT[:], data.labels_BT[:] = 1, 2
    data.tokens_BT[4, 0] = 7
    metrics = step.step(split(data, 2), 1e-2)
    assert not math.isfinite(metrics.loss)
    assert 2 in metrics.faulty_micro_batches
    assert same(step.weights(), before)
    assert step.optimizer.t == t == 0
    weight[7, 0] = 0.0
    embedding.weight = mx.array(weight)
    metrics = step.step([faulty], 1e-2)
    assert math.isfinite(metrics.loss), "and it goes on"
    assert step.optimizer.t == 1


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


def test_a_step_without_targets_names_its_rows():
    data = batch(rows=2)
    data.labels_BT[:] = NOT_SCORED
    with pytest.raises(ValueError, match=r"rows \[100, 101\] have no target"):
        make().step([data], 1e-3)


def test_build_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="device='tpu'"):
        make(device="tpu")
    with pytest.raises(ValueError, match="threads=2 cannot be set"):
        make(threads=2)
    with pytest.raises(ValueError, match="beta1"):
        make(optimizer=AdamWSettings(beta1=1.5))
    with pytest.raises(ValueError, match="cannot be trained"):
        MlxTrainStep(build_model(dataclasses.replace(CONFIG, quantization="int8")))


def test_conditions_and_measurements():
    step: TrainStep = make()
    conditions = step.conditions()
    assert conditions.pop("mlx")[0].isdigit()
    assert conditions == {"device": "cpu", "precision": "fp32", "compile": False}
    assert step.memory_bytes() > 10_000_000
    assert step.peak_flops(seconds=0.05) > 1e8


def test_its_runner_reads_the_weights_of_the_last_update():
    step, tokens = make(), batch().tokens_BT
    before = step.runner().forward(tokens)["logits"]
    runner = step.runner()
    step.step([batch()], 1e-2)
    assert not np.allclose(runner.forward(tokens)["logits"], before)
    np.testing.assert_array_equal(runner.forward(tokens)["logits"], np.array(step.model(mx.array(tokens)).logits_BTV))


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


@pytest.mark.medium
def test_the_loss_over_meadow_follows_pytorch_s():
    """100 updates with a warm-up, from the same weights over the same stories, as bytes."""
    text = "\n".join(meadow.corpus(0, 400, "train")).encode()
    rows = np.frombuffer(text, dtype=np.uint8)[: 400 * 65].reshape(400, 65).astype(np.int32)
    config = ModelConfig(256, 32, 64, 2, 4, 2, 64, tie_word_embeddings=True)
    ours, theirs = make(config), build_torch(config, **OPTIONS)
    curve = []
    for i in range(100):
        part = rows[i * 4 : i * 4 + 4]
        data = [Batch(part[:, :-1], part[:, 1:].copy(), None, np.arange(4))]
        rate = 1e-2 * min(1.0, (i + 1) / 10)
        curve.append((ours.step(data, rate).loss, theirs.step(data, rate).loss))
    curve = np.array(curve)
    assert curve[-10:, 1].mean() < 0.6 * curve[0, 1]
    assert np.abs(curve[:, 0] / curve[:, 1] - 1).max() < 1e-4

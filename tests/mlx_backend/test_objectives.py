"""Objectives in MLX against PyTorch's: updates, evaluations and measures; the parameters that are left alone."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.data.batches import NOT_SCORED, Batch
from llamita.mlx_backend import objectives
from llamita.mlx_backend.train_step import build_train_step
from llamita.objective import Classification
from llamita.torch_backend.train_step import build_train_step as build_torch
from tests.mlx_backend.test_train_step import OPTIONS, largest_difference
from tests.torch_backend.test_train_step import CONFIG, batch, same, split

LABELS = dataclasses.replace(CONFIG, num_labels=3)
WEIGHTED = Classification(class_weights=(0.5, 1.0, 3.0))


def texts(seed=0, rows=8, T=12) -> Batch:
    """Texts of unequal length, each with its label at the last token."""
    random = np.random.default_rng(seed)
    labels = np.full((rows, T), NOT_SCORED, dtype=np.int32)
    labels[np.arange(rows), random.integers(2, T, rows)] = random.integers(0, 3, rows)
    tokens = random.integers(0, CONFIG.vocab_size, (rows, T), dtype=np.int32)
    return Batch(tokens, labels, None, np.arange(rows, dtype=np.int64))


@pytest.mark.parametrize("objective", [Classification(), WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_classification_is_pytorch_s(objective, precision):
    options = OPTIONS | {"objective": objective, "precision": precision, "epsilon": 1e-6}
    ours, theirs = build_train_step(LABELS, **options), build_torch(LABELS, **options)
    rough, close = (1e-5, 1e-4) if precision == "fp32" else (2e-2, np.inf)
    for i in range(6):
        data = split(texts(i), 3)
        a, b = ours.step(data, 1e-2), theirs.step(data, 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=rough)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2 * rough)
        assert a.targets == b.targets == 8
        if precision == "fp32":
            assert a.measures == b.measures
    a, b = ours.evaluate(texts(9)), theirs.evaluate(texts(9))
    assert a.nats == pytest.approx(b.nats, rel=5 * rough)
    assert a.targets == b.targets
    assert a.measures.keys() == b.measures.keys() == {"accuracy"}
    assert largest_difference(ours.weights(), theirs.weights()) < close


def test_dropout_before_a_classifier_s_head_acts_while_training_alone():
    step = build_train_step(LABELS, **OPTIONS, objective=Classification(dropout=0.5))
    assert len({step.step([texts()], 0.0).loss for _ in range(3)}) == 3
    assert step.evaluate(texts()) == step.evaluate(texts())
    assert step.evaluate(texts()) == build_train_step(LABELS, **OPTIONS, objective=Classification()).evaluate(texts())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_only_what_is_trainable_is_trained(compile):
    """The last block alone, as in PyTorch; what is loaded later counts, though nothing of it is trained."""

    def trainable(name):
        return name.startswith("model.layers.1.")

    ours = build_train_step(CONFIG, **OPTIONS, trainable=trainable, compile=compile)
    theirs, fresh = build_torch(CONFIG, **OPTIONS, trainable=trainable), ours.weights()
    assert set(ours.state()) == set(theirs.state())
    for i in range(3):
        a, b = ours.step([batch(seed=i)], 1e-2), theirs.step([batch(seed=i)], 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    trained = ours.weights()
    frozen = [name for name in fresh if not trainable(name)]
    assert same(*({name: arrays[name] for name in frozen} for arrays in (trained, fresh)))
    assert largest_difference(trained, theirs.weights()) < 1e-4
    other = build_train_step(CONFIG, **OPTIONS | {"seed": 8})
    for step in (ours, theirs):
        step.load_state(other.weights(), step.state())
    a, b = ours.step([batch(seed=7)], 1e-2), theirs.step([batch(seed=7)], 1e-2)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    with pytest.raises(ValueError, match="no parameter of the model is to be trained"):
        build_train_step(CONFIG, **OPTIONS, trainable=lambda name: False)


def test_training_goes_on_from_given_arrays():
    arrays = build_train_step(CONFIG, **OPTIONS | {"seed": 8}).weights()
    assert same(build_train_step(CONFIG, arrays, **OPTIONS).weights(), arrays)


def test_an_objective_without_a_loss_is_named():
    with pytest.raises(NotImplementedError, match="str has no loss here"):
        objectives.loss_function("sum", mx.random.key(0))

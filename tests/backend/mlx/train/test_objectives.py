"""Objectives in MLX against PyTorch's: updates, evaluations and measures; the parameters that are left alone."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
from llamita.backend.adamw import AdamWSettings
from llamita.backend.mlx.train.step import build_train_step
from llamita.backend.objectives import Classification, PolicyGradient, Preference
from llamita.backend.torch.train.step import build_train_step as build_torch
from llamita.data.batches import NOT_SCORED, Batch
from tests.backend.mlx.train.test_step import OPTIONS, largest_difference
from tests.backend.torch.train.test_step import CONFIG, batch, same, split

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
    options = OPTIONS | {"objective": objective, "precision": precision, "optimizer": AdamWSettings(epsilon=1e-6)}
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


def answers(objective, seed=0, rows=6, T=10) -> Batch:
    """Pairs of answers for a preference, or sampled answers with advantages, of which some are clipped."""
    random = np.random.default_rng(seed)

    def drawn():
        block = random.integers(0, CONFIG.vocab_size, (rows, T + 1), dtype=np.int32)
        labels = np.where(np.arange(T) < random.integers(1, 6, (rows, 1)), NOT_SCORED, block[:, 1:])
        return block[:, :-1], labels.astype(np.int32)

    (tokens, labels), (other_tokens, other_labels) = drawn(), drawn()
    if isinstance(objective, Preference):
        reference = (-30 + 3 * random.standard_normal((rows, 2))).astype(np.float32)
        extras = {"rejected_tokens_BT": other_tokens, "rejected_labels_BT": other_labels, "reference_B2": reference}
    else:
        old, further = (-4 + random.standard_normal((2, rows, T))).astype(np.float32)
        extras = {"advantages_B": random.standard_normal(rows).astype(np.float32)}
        extras |= {"old_log_probs_BT": old, "reference_log_probs_BT": further}
    return Batch(tokens, labels, None, np.arange(rows, dtype=np.int64), extras, row_is_target=True)


@pytest.mark.parametrize(
    "objective",
    [
        Preference(),
        Preference(beta=0.5, label_smoothing=0.2, normalize_lengths=True),
        Preference(form="ipo"),
        PolicyGradient(),
        PolicyGradient(clip=0.5, kl_weight=0.1, normalization="token"),
    ],
    ids=["dpo", "dpo by length", "ipo", "policy", "policy held to a reference"],
)
def test_answers_are_learned_from_as_in_pytorch(objective):
    options = OPTIONS | {"objective": objective, "optimizer": AdamWSettings(epsilon=1e-6)}
    ours, theirs = build_train_step(CONFIG, **options), build_torch(CONFIG, **options)
    for i in range(4):
        data = [answers(objective, i).rows(slice(0, 2)), answers(objective, i).rows(slice(2, 6))]
        a, b = ours.step(data, 3e-3), theirs.step(data, 3e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-4, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.measures.keys() == b.measures.keys()
        assert dict(a.measures) == pytest.approx(dict(b.measures), rel=1e-4, abs=1e-4)
    assert ours.evaluate(answers(objective, 9)).nats == pytest.approx(
        theirs.evaluate(answers(objective, 9)).nats, rel=1e-4, abs=1e-4
    )
    assert largest_difference(ours.weights(), theirs.weights()) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probabilities_are_pytorch_s(precision):
    options, data = OPTIONS | {"precision": precision}, batch(segments=True)
    ours, theirs = (build(CONFIG, **options).log_probs(data) for build in (build_train_step, build_torch))
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 if precision == "fp32" else 0.1)
    assert ((ours == 0) == (data.labels_BT == NOT_SCORED)).all()

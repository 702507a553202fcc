"""Learning from a teacher, on either backend, against PyTorch's own kl_div and cross_entropy in float64."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.backend.choice import load_backend
from llamita.backend.objectives import Distillation, NextToken
from llamita.backend.torch.model.head import OutputHead
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.config import ModelConfig
from llamita.training.trainer import split

B, T, D, V = 5, 9, 16, 40
OBJECTIVES = [Distillation(), Distillation(0.3, 2.5), Distillation(1.0, 0.7)]
MODEL = ModelConfig(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(params=["torch", "mlx"])
def name(request):
    if request.param == "mlx":
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    return request.param


def random_labels(random, rows=B):
    """Labels scored here and there, in two spans or more; a row has none, another all."""
    labels_BT = random.integers(0, V, (rows, T), dtype=np.int32)
    labels_BT[random.random((rows, T)) < 0.5] = IGNORE_INDEX
    labels_BT[0] = IGNORE_INDEX
    labels_BT[1] = random.integers(0, V, T)
    return labels_BT


def laid_out(teacher_MV, labels_BT, behind=0.0):
    """The rows of (M, V) as (B, S, V), with something behind each row's own."""
    counts_B = (labels_BT != IGNORE_INDEX).sum(-1)
    result_BSV = np.full((len(labels_BT), counts_B.max(), V), behind, dtype=np.float32)
    start = 0
    for row, count in zip(result_BSV, counts_B, strict=True):
        row[:count] = teacher_MV[start : start + count]
        start += count
    return result_BSV


def ours(name, objective, training, states_BTD, head_VD, labels_BT, teacher_BSV):
    """(nats, measures, gradients by states and head), all as numpy arrays, of one backend's loss."""
    module = importlib.import_module(f"llamita.backend.{name}.train.objectives")
    if name == "torch":
        inputs = [torch.from_numpy(array).requires_grad_() for array in (states_BTD, head_VD)]
        labels = torch.from_numpy(labels_BT).long()
        batch = module.TensorBatch(labels, labels, None, {"teacher_log_probs_BSV": torch.from_numpy(teacher_BSV)})
        head = OutputHead(inputs[1])
        loss = module.distillation_loss(objective, training, lambda *_, **__: inputs[0], head, batch)
        gradients = torch.autograd.grad(loss.nats, inputs)
        loss = loss._replace(nats=loss.nats.detach())
    else:
        import mlx.core as mx

        labels = mx.array(labels_BT)
        batch = module.TensorBatch(labels, labels, None, {"teacher_log_probs_BSV": mx.array(teacher_BSV)})

        head_of = importlib.import_module("llamita.backend.mlx.model.head").OutputHead

        def compute(states, weight):
            output = module.distillation_loss(objective, training, lambda *_, **__: states, head_of(weight), batch)
            return output.nats, output.measures

        with mx.stream(mx.cpu):
            inputs = [mx.array(states_BTD), mx.array(head_VD)]
            (nats, measures), gradients = mx.value_and_grad(compute, argnums=(0, 1))(*inputs)
            loss = module.LossOutput(nats, measures)
    measures = {key: float(value) for key, value in loss.measures.items()}
    return float(loss.nats), measures, [np.asarray(gradient) for gradient in gradients]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_loss_is_that_of_pytorch_s_own_functions(name, objective):
    random = np.random.default_rng(0)
    states_BTD, head_VD = (random.normal(size=size).astype(np.float32) for size in ((B, T, D), (V, D)))
    labels_BT = random_labels(random)
    scored_BT = torch.from_numpy(labels_BT != IGNORE_INDEX)
    teacher_MV = torch.from_numpy(random.normal(size=(int(scored_BT.sum()), V)) * 3).log_softmax(-1)

    weight, temperature = objective.teacher_weight, objective.teacher_temperature
    inputs = [torch.from_numpy(array).double().requires_grad_() for array in (states_BTD, head_VD)]
    logits_MV = (inputs[0] @ inputs[1].T)[scored_BT]
    cross_entropy = F.cross_entropy(logits_MV, torch.from_numpy(labels_BT).long()[scored_BT], reduction="sum")
    softened_MV = (logits_MV / temperature).log_softmax(-1)
    divergence = F.kl_div(softened_MV, teacher_MV, log_target=True, reduction="sum")
    measures = {"cross_entropy": cross_entropy.item(), "teacher_kl": divergence.item()}

    theirs = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
    for training, expected in ((True, theirs), (False, cross_entropy)):  # what is evaluated is comparable
        teacher_BSV = laid_out(teacher_MV.numpy(), labels_BT, behind=2.0)
        nats, measured, gradients = ours(name, objective, training, states_BTD, head_VD, labels_BT, teacher_BSV)
        assert nats == pytest.approx(expected.item(), rel=1e-5)
        assert measured == pytest.approx(measures, rel=1e-5)
        for gradient, reference in zip(
            gradients, torch.autograd.grad(expected, inputs, retain_graph=True), strict=True
        ):
            np.testing.assert_allclose(gradient, reference.numpy(), atol=2e-5, rtol=1e-4)


# --- in a step --------------------------------------------------------------------------------------------------------


def build(name, objective, seed=3, **options):
    options = {"precision": "fp32", "device": "cpu", "objective": objective} | options
    return load_backend(name).build_train_step(MODEL, seed=seed, **options)


def taught_batch(scorer, temperature, rows=6, seed=1):
    random = np.random.default_rng(seed)
    labels_BT = random_labels(random, rows)
    labels_BT[0, 3] = 7  # a row alone must have something to learn
    tokens_BT = random.integers(0, V, (rows, T), dtype=np.int32)
    batch = Batch(tokens_BT, labels_BT, None, np.arange(rows))
    teacher_BSV = laid_out(scorer.distributions(batch, temperature), labels_BT)
    return Batch(tokens_BT, labels_BT, None, np.arange(rows), {"teacher_log_probs_BSV": teacher_BSV})


def frozen(name, seed):
    arrays = build(name, NextToken(), seed).weights()
    return load_backend(name).build_scorer(MODEL, arrays, precision="fp32", device="cpu")


@pytest.mark.parametrize(
    "compiled", [{}, pytest.param({"compile": True}, marks=pytest.mark.medium)], ids=["plain", "compiled"]
)
def test_micro_batches_make_the_update_of_the_whole_batch(name, compiled):
    objective = Distillation(0.5, 2.0)
    batch = taught_batch(frozen(name, seed=8), 2.0)
    results = []
    for size in (6, 4, 1):
        step = build(name, objective, **(compiled if name == "mlx" else {}))
        metrics = step.step(split(batch, size), 1e-3)
        results.append((metrics, {key: array.to_numpy() for key, array in step.weights().items()}))
    whole, weights = results[0]
    assert whole.measures.keys() == {"cross_entropy", "teacher_kl"}
    mixed = 0.5 * whole.measures["cross_entropy"] + 0.5 * 4 * whole.measures["teacher_kl"]
    assert whole.loss == pytest.approx(mixed, rel=1e-5)
    for metrics, values in results[1:]:
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-5)
        assert metrics.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert metrics.measures == pytest.approx(whole.measures, rel=1e-4)
        for key, value in values.items():
            np.testing.assert_allclose(value, weights[key], atol=2e-5, err_msg=key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_comes_to_say_what_its_teacher_says(name, precision):
    """From the divergence alone; one that says it already has nothing to learn."""
    teacher = frozen(name, seed=8)
    batch = taught_batch(teacher, 1.0)
    step = build(name, Distillation(1.0), precision=precision)
    divergences = [step.step([batch], 1e-2).measures["teacher_kl"] for _ in range(60)]
    assert divergences[-1] < divergences[0] / 10
    same = build(name, Distillation(1.0), seed=8).step([batch], 0.0)
    assert same.measures["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert same.grad_norm == pytest.approx(0, abs=1e-4)


def test_an_evaluation_s_loss_is_that_without_a_teacher(name):
    batch = taught_batch(frozen(name, seed=8), 1.0)
    found = build(name, Distillation()).evaluate(batch)
    plain = build(name, NextToken()).evaluate(batch)
    assert found.nats == pytest.approx(plain.nats, rel=1e-5)
    assert found.targets == plain.targets == batch.num_targets
    assert found.measures["cross_entropy"] == found.nats
    assert found.measures["teacher_kl"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0,), "teacher_weight=0.0 must be above 0"),
        ((1.5,), "teacher_weight=1.5 must be"),
        ((float("nan"),), "teacher_weight=nan must be"),
        ((0.5, 0.0), "teacher_temperature=0.0 must be a number above 0"),
        ((0.5, float("inf")), "teacher_temperature=inf must be"),
    ],
)
def test_objectives_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Distillation(*values)

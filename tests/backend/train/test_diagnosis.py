"""A look at an update that is not made, in both backends: gradients by PyTorch's autograd, losses and activations by
the oracle, rows alone, for every objective; nothing is changed by it. And the limit above which no update is made."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from llamita.backend.objectives import Classification, Distillation, NextToken, PolicyGradient, Preference
from llamita.backend.torch.model.layers import PLAIN
from llamita.backend.torch.model.weights import build_model
from llamita.data.batches import IGNORE_INDEX
from llamita.model.lora import LoraSettings
from tests import reference
from tests.backend.models import loss_by_pytorch
from tests.backend.steps import CONFIG, batch, same, split
from tests.backend.train.test_objectives import LABELS, answers, texts


def autograd_norms(model, data):
    """The norm of each canonical parameter's gradient of the mean loss."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss_by_pytorch(model, data).backward()
    return {
        name: float(part.norm())
        for fused in model.fused_parameters()
        for name, part in zip(fused.parts, fused.split(fused.parameter.grad), strict=True)
    }


def root_sum(norms):
    return math.sqrt(sum(norm * norm for norm in norms))


@pytest.mark.parametrize("segments", [False, True])
def test_gradients_losses_and_activations_are_those_of_pytorch_and_the_oracle(framework, segments):
    step, data = framework.train_step(CONFIG), batch(segments=segments)
    arrays = {name: array.to_numpy() for name, array in step.weights().items()}
    found = step.diagnose(split(data, 3))
    model = build_model(CONFIG, step.weights(), operations=PLAIN)
    norms = autograd_norms(model, data)
    assert found.grad_norms.keys() == norms.keys() == arrays.keys()
    assert found.grad_norms == pytest.approx(norms, rel=1e-4)
    assert found.grad_norm == pytest.approx(root_sum(norms.values()), rel=1e-4)
    streams = [
        reference.forward(CONFIG, arrays, tokens, None if data.segments_BT is None else data.segments_BT[i])
        for i, tokens in enumerate(data.tokens_BT)
    ]
    places = ["embedding", "layers.0", "layers.1", "norm"]
    assert list(found.activations) == places
    for place in places:
        expected = math.sqrt(np.mean([stream[place] ** 2 for stream in streams]))
        assert found.activations[place] == pytest.approx(expected, rel=1e-5)
    for i, row in enumerate(found.rows):
        nats = reference.cross_entropy(streams[i]["logits"][None], data.labels_BT[i : i + 1])
        alone = data.rows(slice(i, i + 1))
        assert (row.row_id, row.targets) == (100 + i, alone.num_targets)
        assert row.loss == pytest.approx(nats / row.targets, rel=1e-5)
        assert row.grad_norm == pytest.approx(root_sum(autograd_norms(model, alone).values()), rel=1e-4)
    assert found.loss == pytest.approx(sum(r.loss * r.targets for r in found.rows) / data.num_targets, rel=1e-5)


def taught(rows=5, T=9):
    data = batch(rows, T)
    most = int((data.labels_BT != IGNORE_INDEX).sum(-1).max())
    logits_BSV = np.random.default_rng(4).standard_normal((rows, most, CONFIG.vocab_size)).astype(np.float32)
    teacher_BSV = torch.from_numpy(logits_BSV).log_softmax(-1).numpy()
    return dataclasses.replace(data, extras={"teacher_log_probs_BSV": teacher_BSV})


OBJECTIVES = {
    "next token": (CONFIG, NextToken(), batch),
    "classification": (LABELS, Classification(dropout=0.5, class_weights=(0.5, 1.0, 3.0)), texts),
    "preference": (CONFIG, Preference(beta=0.3), lambda: answers(Preference())),
    "policy": (CONFIG, PolicyGradient(kl_weight=0.1), lambda: answers(PolicyGradient())),
    "distillation": (CONFIG, Distillation(0.3, 2.0), taught),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_update_that_a_step_makes_for_every_objective(framework, name):
    """With dropout in the model, drawn as the step draws it; rows, without it, as steps that learn from one alone."""
    config, objective, data = OBJECTIVES[name]
    parts = split_all(data(), 3)
    dropping = framework.train_step(dataclasses.replace(config, dropout=0.2), objective=objective)
    before, state = dropping.weights(), dropping.state()
    found = dropping.diagnose(parts)
    assert same(dropping.weights(), before)
    assert same(dropping.state(), state)
    result = dropping.step(parts, 1e-3)
    assert found.loss == pytest.approx(result.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(result.grad_norm, rel=1e-4)
    assert root_sum(found.grad_norms.values()) == pytest.approx(found.grad_norm, rel=1e-9)
    plain = dataclasses.replace(objective, dropout=0.0) if name == "classification" else objective
    found = framework.train_step(config, objective=objective).diagnose(parts)
    for i, row in enumerate(found.rows):
        alone = framework.train_step(config, objective=plain).step([data().rows(slice(i, i + 1))], 1e-3)
        assert row.loss == pytest.approx(alone.loss, rel=1e-5)
        assert row.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)


def split_all(data, size):
    """Micro-batches with all that belongs to the rows."""
    return [data.rows(slice(i, i + size)) for i in range(0, len(data.row_ids), size)]


def test_a_diagnosis_leaves_the_next_update_as_it_was(framework):
    config = dataclasses.replace(CONFIG, dropout=0.2)
    looked, plain = framework.train_step(config), framework.train_step(config)
    for i in range(3):
        looked.diagnose([batch(seed=i)])
        assert looked.step([batch(seed=i)], 1e-2) == plain.step([batch(seed=i)], 1e-2)
    assert same(looked.weights(), plain.weights())


def test_of_an_adapter_its_own_matrices_are_named(framework):
    step = framework.train_step(CONFIG, framework.train_step(CONFIG).weights(), adapter=LoraSettings(rank=2))
    step.step([batch()], 1e-2)  # the second matrix of each is zero before it
    found = step.diagnose([batch()])
    assert found.grad_norms.keys() == step.weights().keys()
    assert found.grad_norm == pytest.approx(step.step([batch()], 1e-2).grad_norm, rel=1e-4)


def test_the_row_that_is_not_finite_is_named(framework):
    """An infinite embedding of a token that one row alone reads; a row without targets has no loss."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    step, name = framework.train_step(config), "model.embed_tokens.weight"
    table = step.weights()[name].to_numpy().copy()
    table[60, 3] = np.inf
    framework.set_values(step.model, name, table)
    data = batch(rows=4, unequal=False)
    data.tokens_BT[data.tokens_BT == 60] = 0
    data.tokens_BT[2, 5] = 60
    data.labels_BT[3] = IGNORE_INDEX
    found = step.diagnose(split(data, 2))
    assert [math.isfinite(row.loss) for row in found.rows[:3]] == [True, True, False]
    assert [math.isfinite(row.grad_norm) for row in found.rows[:3]] == [True, True, False]
    assert found.rows[3] == type(found.rows[3])(103, 0, None, None)
    assert not math.isfinite(found.loss)
    assert not math.isfinite(found.activations["layers.0"])


def test_a_loss_above_the_limit_makes_no_update(framework):
    config = dataclasses.replace(CONFIG, dropout=0.2)
    step, plain = framework.train_step(config), framework.train_step(config)
    before, state = step.weights(), step.state()
    refused = step.step(split(batch(), 3), 1e-2, 0.5)
    assert refused.loss > 0.5
    assert refused.is_finite
    assert not refused.is_update
    assert same(step.weights(), before)
    assert same(step.state(), state)
    made = step.step(split(batch(), 3), 1e-2, refused.loss)
    assert made.is_update
    assert made.loss == refused.loss == plain.step(split(batch(), 3), 1e-2).loss
    assert same(step.weights(), plain.weights())

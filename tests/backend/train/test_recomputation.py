"""Blocks that are computed a second time: the same bits of loss, gradients and weights, whatever else a step does."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from llamita.backend.objectives import Classification, PolicyGradient, Preference
from llamita.backend.train_step import recomputed_layers
from llamita.model.lora import LoraSettings
from tests.backend.frameworks import make
from tests.backend.models import small
from tests.backend.steps import CONFIG, batch, same, split

DEEP = dataclasses.replace(CONFIG, num_hidden_layers=4)
UNTIED = dataclasses.replace(DEEP, tie_word_embeddings=False)
CASES = {
    "plain": (DEEP, {}),
    "dropout": (dataclasses.replace(DEEP, dropout=0.2), {}),
    "bfloat16 and dropout": (dataclasses.replace(DEEP, dropout=0.2), {"precision": "bf16"}),
    "window": (dataclasses.replace(DEEP, sliding_window=4), {}),
    "qwen3 with biases": (dataclasses.replace(DEEP, query_key_norm=True, attention_bias=True), {}),
    "lora with dropout": (UNTIED, {"adapter": LoraSettings(rank=2, dropout=0.3, targets=("all", "lm_head"))}),
    "lora over int8": (
        dataclasses.replace(DEEP, hidden_size=32, intermediate_size=64, quantization="int8"),
        {"adapter": LoraSettings(rank=2, dropout=0.3)},
    ),
    "some parameters": (DEEP, {"trainable": lambda name: "mlp" in name}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("segments", [False, True], ids=["rows", "packed"])
def test_gradients_are_the_same_bits(framework, case, segments):
    config, options = CASES[case]
    plain, again = (
        framework.train_step(config, **{"max_grad_norm": 1.0, "recompute": recompute, **options})
        for recompute in ("none", 3)
    )
    pieces = split(batch(segments=segments), 3)
    (a, gradients), (b, others) = (framework.update_gradients(step, pieces) for step in (plain, again))
    assert a == b
    assert math.isfinite(a.loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert np.array_equal(gradient, others[name]), name
    assert any(np.abs(gradient).max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("recompute", [1, "all"])
def test_a_run_gives_the_same_weights(framework, recompute):
    config = dataclasses.replace(DEEP, dropout=0.1)
    plain, again = (framework.train_step(config, recompute=choice) for choice in ("none", recompute))
    for i in range(3):
        assert plain.step([batch(seed=i)], 1e-2) == again.step([batch(seed=i)], 1e-2)
    assert same(plain.weights(), again.weights())
    assert plain.evaluate(batch(seed=9)) == again.evaluate(batch(seed=9))
    assert plain.conditions() == again.conditions()


def with_extras(data, **extras):
    return dataclasses.replace(data, extras={name: np.asarray(values) for name, values in extras.items()})


def objectives():
    data = batch(rows=4, unequal=False)
    generator = np.random.default_rng(0)
    floats = generator.normal(size=data.labels_BT.shape).astype(np.float32)
    rejected = batch(rows=4, seed=5, unequal=False)
    labels_BT = np.full_like(data.labels_BT, -100)
    labels_BT[:, -1] = [0, 2, 1, 0]
    return {
        "preference": (
            DEEP,
            Preference(),
            with_extras(
                data,
                rejected_tokens_BT=rejected.tokens_BT,
                rejected_labels_BT=rejected.labels_BT,
                reference_B2=floats[:, :2],
            ),
        ),
        "policy": (
            DEEP,
            PolicyGradient(),
            with_extras(
                data,
                old_log_probs_BT=floats - 4,
                reference_log_probs_BT=floats - 4,
                advantages_B=floats[:, 0],
            ),
        ),
        "labels": (
            dataclasses.replace(DEEP, num_labels=3, tie_word_embeddings=False),
            Classification(dropout=0.1),
            dataclasses.replace(data, labels_BT=labels_BT),
        ),
    }


@pytest.mark.parametrize("name", ["preference", "policy", "labels"])
def test_every_objective(framework, name):
    config, objective, data = objectives()[name]
    plain, again = (framework.train_step(config, objective=objective, recompute=n) for n in ("none", "all"))
    for _ in range(2):
        assert plain.step([data], 1e-2) == again.step([data], 1e-2)
    assert same(plain.weights(), again.weights())


def test_less_is_kept_for_the_backward_pass():
    """Bytes of the tensors that autograd holds between the passes, by PyTorch's own hooks on them."""
    config = small(num_hidden_layers=6, hidden_size=64, intermediate_size=192)
    held = {}
    for recompute in ("none", 3, "all"):
        step = make("torch").train_step(config, recompute=recompute)
        weights = {parameter.untyped_storage().data_ptr() for parameter in step.parameters}
        stored: dict[int, int] = {}

        def keep(tensor, weights=weights, stored=stored):
            if tensor.untyped_storage().data_ptr() not in weights:
                stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.zeros(4, 64, dtype=torch.int64)
        hidden, _ = step.output(step.model.hidden, training=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = hidden(tokens)
        held[recompute] = sum(stored.values())
        assert kept.requires_grad
    assert held["all"] < held[3] < held["none"]
    assert held["all"] < 0.3 * held["none"]


@pytest.mark.slow
def test_compiled_by_torch():
    plain, again = (make("torch").train_step(DEEP, compile=True, recompute=n) for n in ("none", 2))
    for i in range(2):
        a, b = (step.step([batch(seed=i)], 1e-2) for step in (plain, again))
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [("none", ()), (0, ()), (1, (0,)), (2, (0, 3)), (3, (0, 2, 4)), ("all", (0, 1, 2, 3, 4, 5))],
)
def test_blocks_are_chosen_evenly(recompute, expected):
    assert recomputed_layers(6, recompute) == expected


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match="recompute=7 must lie between 0 and the model's 6 blocks"):
        recomputed_layers(6, 7)

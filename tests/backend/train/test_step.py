"""One update in both backends: micro-batches change nothing, clipping, precision, dropout's numbers, resuming (in the
other backend, too), faults, determinism; and the loss curves of both over Meadow."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from llamita.backend.adamw import AdamWSettings
from llamita.backend.interface import TrainStep
from llamita.backend.torch.model.layers import PLAIN
from llamita.backend.torch.model.weights import build_model
from llamita.data import meadow
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from tests import reference
from tests.backend.frameworks import NAMES, make
from tests.backend.models import loss_by_pytorch, small
from tests.backend.steps import CONFIG, batch, largest_difference, same, split

DROPOUT = dataclasses.replace(CONFIG, dropout=0.2, vocab_size=300)


def step_of(framework, config=CONFIG, **options):
    return framework.train_step(config, **{"max_grad_norm": 1.0, **options})


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_do_not_change_the_update(framework, size, segments):
    whole, parts = step_of(framework), step_of(framework)
    for i in range(5):
        data = batch(seed=i, segments=segments)
        a = whole.step([data], 1e-2)
        b = parts.step(split(data, size), 1e-2)
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert a.targets == b.targets == data.num_targets
        if i == 0:  # Adam divides by the gradient's size, so later differences grow with the steps
            assert largest_difference(parts.weights(), whole.weights()) < 1e-6


def test_gradients_of_micro_batches_add_up_to_that_of_the_whole(framework):
    step, data = step_of(framework), batch(rows=8)
    (_, whole), (_, parts) = (framework.update_gradients(step, pieces) for pieces in ([data], split(data, 1)))
    assert whole.keys() == parts.keys() == step.weights().keys()
    for name, gradient in whole.items():
        np.testing.assert_allclose(parts[name], gradient, rtol=1e-5, atol=1e-6)


def test_loss_is_nats_per_target_and_that_of_the_oracle(framework):
    step, data = step_of(framework), batch()
    arrays = {name: array.to_numpy() for name, array in step.weights().items()}
    logits_BTV = [reference.forward(CONFIG, arrays, row)["logits"] for row in data.tokens_BT]
    expected = reference.cross_entropy(np.stack(logits_BTV), data.labels_BT)
    nats, targets, measures = step.evaluate(data)
    assert targets == data.num_targets
    assert not measures
    assert nats == pytest.approx(expected, rel=1e-5)
    assert step.step([data], 1e-3).loss == pytest.approx(expected / targets, rel=1e-5)


def test_an_update_follows_torch_optim(framework):
    """Autograd's gradient of the mean loss, clipped by torch, stepped by torch.optim.AdamW."""
    step = step_of(framework, max_grad_norm=0.1)
    model, optimizer = by_torch_optim(CONFIG, step.weights(), 1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for i in range(4):
        data = batch(seed=i)
        metrics = step.step(split(data, 2), 1e-2)
        norm = update_by_torch_optim(model, optimizer, data, 0.1)
        assert norm > 0.1
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, array in step.weights().items():
        np.testing.assert_allclose(array.to_numpy(), model.canonical_state()[name], rtol=0, atol=2e-5)


def by_torch_optim(config, arrays, rate, weight_decay, **options):
    """The readable model and PyTorch's own optimiser over its parameters."""
    model = build_model(config, arrays, operations=PLAIN)
    table = list(model.fused_parameters())
    for item in table:
        item.parameter.requires_grad_(True)
    groups = [
        {"params": [p.parameter for p in table if p.weight_decay is flag], "weight_decay": weight_decay * flag}
        for flag in (True, False)
    ]
    return model, torch.optim.AdamW(groups, lr=rate, **options)


def update_by_torch_optim(model, optimizer, data, max_norm):
    optimizer.zero_grad()
    loss_by_pytorch(model, data).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    optimizer.step()
    return norm


def test_a_hundred_updates_follow_torch_optim(framework):
    """From the same weights over the same batches, with biases; epsilon is large enough for gradients near zero."""
    config = small(tie_word_embeddings=True, attention_bias=True)
    settings = AdamWSettings(epsilon=1e-6)
    step = step_of(framework, config, optimizer=settings)
    start = {name: HostArray.from_numpy(array.to_numpy().copy()) for name, array in step.weights().items()}
    model, optimizer = by_torch_optim(
        config, start, 1e-3, settings.weight_decay, eps=1e-6, betas=(settings.beta1, settings.beta2)
    )
    random = np.random.default_rng(0)
    for _ in range(100):
        rows = random.integers(0, config.vocab_size, (4, 13), dtype=np.int32)
        data = Batch(rows[:, :-1], rows[:, 1:].copy(), None, np.arange(4))
        step.step([data], 1e-3)
        update_by_torch_optim(model, optimizer, data, 1.0)
    found = step.weights()
    assert largest_difference(found, start) > 0.05
    for name, array in found.items():
        np.testing.assert_allclose(array.to_numpy(), model.canonical_state()[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["plain", "dropout"])
def test_the_same_run_twice_and_resumed_gives_the_same_bytes(framework, config, precision):
    """With two threads of PyTorch; what others draw in between does not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (step_of(framework, config, precision=precision) for _ in range(2))
        for i in range(4):
            a = first.step(split(batch(seed=i), 3), 1e-2)
            framework.draw()
            assert second.step(split(batch(seed=i), 3), 1e-2) == a
            if i == 1:
                resumed = step_of(framework, config, precision=precision, initialization="gpt-2")
                resumed.load_state(first.weights(), first.state())
            if i > 1:
                assert resumed.step(split(batch(seed=i), 3), 1e-2) == a
        for other in (second, resumed):
            assert same(first.weights(), other.weights())
            assert same(first.state(), other.state())
    finally:
        torch.set_num_threads(threads)


def test_dropout_differs_between_steps_and_leaves_the_global_generator_alone(framework):
    step, data = step_of(framework, dataclasses.replace(CONFIG, dropout=0.5)), batch()
    framework.seed(5)
    expected = framework.draw()
    framework.seed(5)
    assert len({step.step([data], 0.0).loss for _ in range(3)}) == 3
    assert framework.draw() == expected
    assert step.evaluate(data) == step.evaluate(data)


def test_micro_batches_of_a_step_draw_dropout_of_their_own(framework):
    """Twice the same row has another loss than twice its first loss."""
    row, config = batch(rows=1), dataclasses.replace(CONFIG, dropout=0.5)
    alone, twice = (step_of(framework, config).step([row] * count, 0.0).loss for count in (1, 2))
    assert twice != pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("begun_on", "other"), [NAMES, NAMES[::-1]])
def test_a_run_goes_on_in_the_other_backend(begun_on, other, precision):
    """Weights and moments are carried over bit for bit; 5 further updates differ by rounding alone: 1e-4 in float32 at
    a learning rate of 1e-2, and the losses by 1%, in bfloat16, whose products each backend rounds elsewhere."""
    options = {"precision": precision, "optimizer": AdamWSettings(epsilon=1e-6)}
    begun, other = step_of(make(begun_on), **options), step_of(make(other), **options, seed=4)
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


def test_bf16_keeps_float32_weights_and_learns_the_same(framework):
    low, full = step_of(framework, precision="bf16"), step_of(framework)
    for _ in range(40):
        a, b = low.step([batch(unequal=False)], 1e-2), full.step([batch(unequal=False)], 1e-2)
    assert all(array.dtype == "F32" for array in low.weights().values())
    assert b.loss < 2.0
    assert a.loss == pytest.approx(b.loss, rel=0.05)
    assert a != b


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(framework):
    step, name = step_of(framework), "model.embed_tokens.weight"
    values = step.weights()[name].to_numpy().copy()
    fine = values.copy()
    values[7, 0] = np.inf
    framework.set_values(step.model, name, values)
    before = step.weights()
    data = batch()
    data.tokens_BT[:], data.labels_BT[:] = 1, 2
    data.tokens_BT[4, 0] = 7
    # Tied weights: the head's row 7 spoils every row, unless nothing but the input meets it.
    metrics = step.step(split(data, 2), 1e-2)
    assert not math.isfinite(metrics.loss)
    assert 2 in metrics.faulty_micro_batches
    assert same(step.weights(), before)
    assert step.optimizer.t == 0
    framework.set_values(step.model, name, fine)
    assert math.isfinite(step.step([batch(seed=1)], 1e-2).loss), "and it goes on"
    assert step.optimizer.t == 1


def test_a_step_without_targets_names_its_rows(framework):
    data = batch(rows=2)
    data.labels_BT[:] = IGNORE_INDEX
    with pytest.raises(ValueError, match=r"rows \[100, 101\] have no target"):
        step_of(framework).step([data], 1e-3)


def test_build_refuses_what_it_cannot_do(framework):
    with pytest.raises(ValueError, match="device='tpu'"):
        step_of(framework, device="tpu")
    with pytest.raises(ValueError, match="cannot be trained"):
        framework.step_over(framework.weights.build_model(dataclasses.replace(CONFIG, quantization="int8")))


def test_measurements(framework):
    step: TrainStep = step_of(framework)
    assert step.conditions().items() >= {"device": "cpu", "precision": "fp32", "compile": False}.items()
    assert step.memory_bytes() > 10_000_000
    assert step.peak_flops(seconds=0.05) > 1e8


def test_its_runner_reads_the_weights_of_the_last_update(framework):
    step, tokens = step_of(framework), batch().tokens_BT
    runner = step.runner()
    before = runner.forward(tokens)["logits"]
    step.step([batch()], 1e-2)
    assert not np.allclose(runner.forward(tokens)["logits"], before)
    np.testing.assert_array_equal(runner.forward(tokens)["logits"], framework.logits(step.model, tokens))


@pytest.mark.medium
def test_the_losses_of_both_backends_over_meadow_are_the_same():
    """100 updates with a warm-up, from the same weights over the same stories, as bytes."""
    text = "\n".join(meadow.corpus(0, 400, "train")).encode()
    rows = np.frombuffer(text, dtype=np.uint8)[: 400 * 65].reshape(400, 65).astype(np.int32)
    config = ModelConfig(256, 32, 64, 2, 4, 2, 64, tie_word_embeddings=True)
    steps = [step_of(make(name), config) for name in NAMES]
    curve = []
    for i in range(100):
        part = rows[i * 4 : i * 4 + 4]
        data = [Batch(part[:, :-1], part[:, 1:].copy(), None, np.arange(4))]
        rate = 1e-2 * min(1.0, (i + 1) / 10)
        curve.append([step.step(data, rate).loss for step in steps])
    curve = np.array(curve)
    assert curve[-10:].mean() < 0.6 * curve[0].mean()
    assert np.abs(curve[:, 1] / curve[:, 0] - 1).max() < 1e-4

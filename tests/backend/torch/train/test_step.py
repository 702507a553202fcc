"""One update: micro-batches change nothing, clipping, precision, dropout's numbers, resuming, faults, determinism."""

import numpy as np
import pytest
import torch

from llamita.backend.torch.train import losses
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import NOT_SCORED, Batch
from llamita.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)


def make(config=CONFIG, **options):
    options = {"precision": "fp32", "device": "cpu", "seed": 3, "max_grad_norm": 1.0} | options
    return build_train_step(config, **options)


def batch(rows=8, T=12, seed=0, unequal=True, segments=False):
    """Rows whose numbers of targets differ widely: from all to one."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    block = generator.integers(0, CONFIG.vocab_size, (rows, T + 1), dtype=np.int32)
    labels = block[:, 1:].copy()
    if unequal:
        for row in range(rows):
            labels[row, : T - max(1, T >> row)] = NOT_SCORED
    segments_BT = np.cumsum(generator.random((rows, T)) < 0.2, axis=1, dtype=np.int32) + 1 if segments else None
    return Batch(block[:, :-1], labels, segments_BT, np.arange(rows, dtype=np.int64) + 100)


def split(whole, size):
    pieces = [slice(i, i + size) for i in range(0, len(whole.row_ids), size)]
    return [
        Batch(
            whole.tokens_BT[p],
            whole.labels_BT[p],
            None if whole.segments_BT is None else whole.segments_BT[p],
            whole.row_ids[p],
        )
        for p in pieces
    ]


def same(a, b):
    return a.keys() == b.keys() and all(bytes(a[name].data) == bytes(b[name].data) for name in a)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_do_not_change_the_update(size, segments):
    whole, parts = make(), make()
    for i in range(5):
        data = batch(seed=i, segments=segments)
        a = whole.step([data], 1e-2)
        b = parts.step(split(data, size), 1e-2)
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert a.targets == b.targets == data.num_targets
        if i == 0:  # Adam divides by the gradient's size, so later differences grow with the steps
            for name, array in whole.weights().items():
                np.testing.assert_allclose(parts.weights()[name].to_numpy(), array.to_numpy(), atol=1e-6)


def test_gradients_of_micro_batches_add_up_to_that_of_the_whole():
    step = make()
    gradients = []
    step.optimizer.step = lambda *_: gradients.append([p.grad.clone() for p in step.parameters])
    data = batch(rows=8)
    step.step([data], 0.0)
    step.step(split(data, 1), 0.0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_loss_is_nats_per_target_and_matches_the_plain_loss():
    step = make()
    data = batch()
    tokens, labels = (torch.from_numpy(x).long() for x in (data.tokens_BT, data.labels_BT))
    with torch.no_grad():
        plain = float(losses.cross_entropy(step.model(tokens).logits_BTV, labels))
    nats, targets, _ = step.evaluate(data)
    assert targets == data.num_targets
    assert nats == pytest.approx(plain, rel=1e-5)
    assert step.step([data], 1e-3).loss == pytest.approx(plain / targets, rel=1e-5)


def test_an_update_follows_torch_optim():
    """Autograd's gradient of the mean loss, clipped by torch, stepped by torch.optim.AdamW."""
    step, other = make(max_grad_norm=0.1), make()
    table = list(other.model.fused_parameters())
    groups = [
        {"params": [p.parameter for p in table if p.weight_decay is flag], "weight_decay": 0.1 * flag}
        for flag in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for i in range(4):
        data = batch(seed=i)
        metrics = step.step(split(data, 2), 1e-2)
        tokens, labels = (torch.from_numpy(x).long() for x in (data.tokens_BT, data.labels_BT))
        reference.zero_grad()
        (losses.cross_entropy(other.model(tokens).logits_BTV, labels) / data.num_targets).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(other.parameters, 0.1))
        assert norm > 0.1
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
        reference.step()
    for a, b in zip(step.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_run_twice_and_resumed_gives_the_same_bytes(precision):
    config = ModelConfig(**{**CONFIG.__dict__, "dropout": 0.2, "vocab_size": 300})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (make(config, precision=precision) for _ in range(2))
        for i in range(6):
            a = first.step(split(batch(seed=i), 3), 1e-2)
            torch.rand(7)  # what others draw does not matter
            b = second.step(split(batch(seed=i), 3), 1e-2)
            assert a == b
            if i == 2:
                resumed = make(config, precision=precision)
                resumed.load_state(first.weights(), first.state())
            if i > 2:
                assert resumed.step(split(batch(seed=i), 3), 1e-2) == a
        assert same(first.weights(), second.weights())
        assert same(first.weights(), resumed.weights())
        assert same(first.state(), resumed.state())
    finally:
        torch.set_num_threads(threads)


def test_dropout_differs_between_steps_and_leaves_the_global_generator_alone():
    config = ModelConfig(**{**CONFIG.__dict__, "dropout": 0.5})
    step = make(config)
    data = batch()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses_seen = {step.step([data], 0.0).loss for _ in range(3)}
    assert len(losses_seen) == 3
    assert torch.equal(torch.rand(3), expected)
    assert step.evaluate(data) == step.evaluate(data)


def test_bf16_keeps_float32_weights_and_learns_the_same():
    low, full = make(precision="bf16"), make()
    for _ in range(40):
        a, b = low.step([batch(unequal=False)], 1e-2), full.step([batch(unequal=False)], 1e-2)
    assert all(p.dtype == torch.float32 for p in low.parameters)
    assert b.loss < 2.0
    assert a.loss == pytest.approx(b.loss, rel=0.05)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    step = make()
    with torch.no_grad():
        step.model.model.embed_tokens.weight[7, 0] = float("inf")
    before = {name: bytes(array.data) for name, array in step.weights().items()}
    data = batch()
    data.tokens_BT[:] = 1
    data.labels_BT[:] = 2
    data.tokens_BT[4, 0] = 7
    # Tied weights: the head's row 7 spoils every row, unless nothing but the input meets it.
    metrics = step.step(split(data, 2), 1e-2)
    assert not np.isfinite(metrics.loss)
    assert 2 in metrics.faulty_micro_batches
    assert before == {name: bytes(array.data) for name, array in step.weights().items()}
    assert step.optimizer.t == 0


def test_a_step_without_targets_names_its_rows():
    data = batch(rows=2)
    data.labels_BT[:] = NOT_SCORED
    with pytest.raises(ValueError, match=r"rows \[100, 101\] have no target"):
        make().step([data], 1e-3)


def test_build_refuses_a_device_that_is_not_here():
    with pytest.raises(ValueError, match="device='tpu'"):
        make(device="tpu")


def test_conditions_and_measurements():
    step = make()
    assert step.conditions() == {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
    }
    assert step.memory_bytes() > 10_000_000
    assert step.peak_flops(seconds=0.05) > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_follows_eager_and_keeps_the_names(precision):
    eager, compiled = make(precision=precision), make(precision=precision, compile=True)
    assert compiled.weights().keys() == eager.weights().keys()
    for i in range(3):
        a, b = eager.step([batch(seed=i)], 1e-3), compiled.step([batch(seed=i)], 1e-3)
        assert b.loss == pytest.approx(a.loss, rel=1e-5 if precision == "fp32" else 1e-2)

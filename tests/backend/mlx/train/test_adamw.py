"""AdamW in MLX: the paper in float64, the PyTorch AdamW over 100 steps, clipping, state under canonical names."""

import numpy as np
import pytest
import torch

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx
import mlx.nn as nn

from llamita.backend.mlx.model import weights
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.train.adamw import AdamW, AdamWSettings, adamw_update, clipping_scale, global_norm
from llamita.backend.mlx.train.step import MlxTrainStep
from llamita.backend.torch.model import weights as torch_weights
from llamita.backend.torch.train import adamw as torch_adamw
from llamita.backend.torch.train.step import TorchTrainStep
from llamita.data.batches import Batch
from tests.backend.torch.model.test_model import small
from tests.backend.torch.train import test_adamw as twin


def fused():
    """The parameters of the PyTorch test, of which the first holds two canonical ones."""
    owner, items = nn.Module(), []
    for theirs in twin.fused(twin.parameters()):
        owner[theirs.name] = mx.array(theirs.parameter.detach().numpy())
        items.append(
            FusedParameter(theirs.name, owner, theirs.name, *(theirs.parts, theirs.sizes, theirs.weight_decay))
        )
    return items


def gradients(step):
    return [mx.array(g.numpy()) for g in twin.gradients(step)]


def run(settings, steps, scale=1.0):
    items = fused()
    optimizer = AdamW(items, settings)
    for t in range(1, steps + 1):
        optimizer.step(gradients(t), twin.rates(t), scale)
    return items, optimizer


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_follows_the_paper_and_pytorch_over_100_steps(form, epsilon):
    settings = AdamWSettings(0.9, 0.999, epsilon, 0.05, form)
    ours, _ = run(settings, 100)
    theirs, _ = twin.run(settings, 100)
    for item, a, b in zip(ours, theirs, twin.numpy_reference(settings, 100), strict=True):
        np.testing.assert_allclose(np.array(item.parameter), a.detach().numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.array(item.parameter), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["textbook", "efficient"])
def test_a_model_follows_pytorch_over_100_steps(form):
    """The same weights and batches: gradients too are each backend's own."""
    config = small(tie_word_embeddings=True, attention_bias=True)
    settings = AdamWSettings(epsilon=1e-6, bias_correction=form)
    ours = MlxTrainStep(weights.build_model(config, seed=1), settings, max_grad_norm=1.0)
    theirs = TorchTrainStep(torch_weights.build_model(config, seed=1), settings, max_grad_norm=1.0)
    random, start = np.random.default_rng(0), ours.weights()
    for _ in range(100):
        rows = random.integers(0, config.vocab_size, (4, 13), dtype=np.int32)
        batch = Batch(rows[:, :-1], rows[:, 1:].copy(), None, np.arange(4))
        ours.step([batch], 1e-3)
        theirs.step([batch], 1e-3)
    expected = theirs.weights()
    moved = max(np.abs(array.to_numpy() - start[name].to_numpy()).max() for name, array in expected.items())
    assert moved > 0.05
    for name, array in ours.weights().items():
        np.testing.assert_allclose(array.to_numpy(), expected[name].to_numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fast_step_equals_the_plain_form(form, scale):
    settings = AdamWSettings(weight_decay=0.3, bias_correction=form)
    fast, _ = run(settings, 20, scale)
    for i, item in enumerate(fused()):
        parameter, m, v = item.parameter, mx.zeros_like(item.parameter), mx.zeros_like(item.parameter)
        for t in range(1, 21):
            g = gradients(t)[i] * scale
            parameter, m, v = adamw_update(parameter, g, m, v, t, twin.rates(t), settings, item.weight_decay)
        assert mx.abs(fast[i].parameter - parameter).max().item() < 1e-6


def test_decay_alone_shrinks_only_the_flagged_rows():
    items = fused()
    before = [item.parameter for item in items]
    AdamW(items, AdamWSettings(weight_decay=0.5)).step([mx.zeros_like(p) for p in before], 0.1)
    for item, old in zip(items, before, strict=True):
        np.testing.assert_allclose(
            np.array(item.parameter), np.array(old * (0.95 if item.weight_decay else 1.0)), rtol=1e-6
        )


def test_state_has_canonical_names_continues_bit_for_bit_and_is_pytorch_s():
    settings = AdamWSettings()
    straight, _ = run(settings, 40)
    resumed, first = run(settings, 20)
    state = first.state()
    assert set(state) == {"t"} | {f"{k}.{n}" for k in "mv" for n in ("w0.q", "w0.k", "w1", "w2", "w3")}
    assert state["m.w0.k"].shape == (16, 16)
    second = AdamW(resumed, settings)
    second.load_state(state)
    for t in range(21, 41):
        second.step(gradients(t), twin.rates(t))
    assert all(mx.array_equal(a.parameter, b.parameter) for a, b in zip(straight, resumed, strict=True))

    params, theirs = twin.run(settings, 20)
    their_state = theirs.state()
    assert list(their_state) == list(state)
    for name, array in their_state.items():
        assert (array.dtype, array.shape) == (state[name].dtype, state[name].shape)
        np.testing.assert_allclose(state[name].to_numpy(), array.to_numpy(), rtol=1e-4, atol=1e-7)
    other_way = torch_adamw.AdamW(twin.fused(params), settings)
    other_way.load_state(state)
    assert all(bytes(other_way.state()[name].data) == bytes(array.data) for name, array in state.items())
    second.load_state(their_state)
    assert all(bytes(second.state()[name].data) == bytes(array.data) for name, array in their_state.items())

    del state["v.w2"]
    with pytest.raises(ValueError, match=r"v\.w2"):
        second.load_state(state)


def test_global_norm_and_clipping_are_pytorch_s():
    ours, theirs = float(global_norm(gradients(3)).item()), float(torch_adamw.global_norm(twin.gradients(3)))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours == pytest.approx(float(torch.cat([g.flatten() for g in twin.gradients(3)]).norm()), rel=1e-6)
    assert clipping_scale(ours, 1.0) * ours == pytest.approx(1.0)
    assert clipping_scale(7.0, 0.0) == 1.0

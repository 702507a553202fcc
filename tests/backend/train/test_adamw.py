"""AdamW of both backends: the paper in float64, torch.optim.AdamW over 1000 steps, clipping, state by its names."""

import math

import numpy as np
import pytest
import torch

from llamita.backend.adamw import AdamWSettings, clipping_scale
from tests.backend.frameworks import NAMES, make
from tests.backend.optimizers import DECAYS, by_the_paper, gradients, parameters, rates, run


def test_follows_torch_adamw_over_1000_steps(framework):
    settings = AdamWSettings(0.9, 0.95, 1e-8, 0.1)
    ours = run(framework, settings, 1000).values()
    for a, b in zip(ours, by_torch_optim(1000), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def by_torch_optim(steps):
    theirs = [torch.nn.Parameter(torch.from_numpy(values)) for values in parameters()]
    groups = [
        {"params": [p for p, d in zip(theirs, DECAYS, strict=True) if d], "weight_decay": 0.1},
        {"params": [p for p, d in zip(theirs, DECAYS, strict=True) if not d], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for t in range(1, steps + 1):
        for p, g in zip(theirs, gradients(t), strict=True):
            p.grad = torch.from_numpy(g)
        for group in optimizer.param_groups:
            group["lr"] = rates(t)
        optimizer.step()
    return [p.detach().numpy() for p in theirs]


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_follows_the_paper(framework, form, epsilon):
    settings = AdamWSettings(0.9, 0.999, epsilon, 0.05, form)
    ours = run(framework, settings, 100).values()
    for a, b in zip(ours, by_the_paper(settings, 100), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_two_forms_differ_only_in_what_epsilon_means(framework):
    """With epsilon-hat = epsilon sqrt(1 - beta2^t), constant over one step, the forms are the same update."""
    textbook = AdamWSettings(epsilon=1e-2, bias_correction="textbook")
    efficient = AdamWSettings(epsilon=1e-2 * math.sqrt(1 - 0.95), bias_correction="efficient")
    other = AdamWSettings(epsilon=1e-2, bias_correction="efficient")
    a, b, c = (run(framework, settings, 1).values()[1] for settings in (textbook, efficient, other))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert np.abs(a - c).max() > 1e-5


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_fast_step_equals_the_plain_form(framework, form, scale):
    settings = AdamWSettings(weight_decay=0.3, bias_correction=form)
    fast = run(framework, settings, 20, scale=scale)
    moments = fast.state()
    for i, values in enumerate(parameters()):
        state = [framework.array(x) for x in (values, np.zeros_like(values), np.zeros_like(values))]
        for t in range(1, 21):
            gradient = framework.array(gradients(t)[i] * np.float32(scale))
            updated = framework.adamw.adamw_update(state[0], gradient, *state[1:], t, rates(t), settings, DECAYS[i])
            state = updated or state  # new arrays, or the same, changed in place
        np.testing.assert_allclose(fast.values()[i], framework.numbers(state[0]), rtol=0, atol=1e-6)
        if i:  # the first is two canonical ones
            for kind, plain in zip("mv", map(framework.numbers, state[1:]), strict=True):
                np.testing.assert_allclose(moments[f"{kind}.w{i}"].to_numpy(), plain, rtol=1e-4, atol=1e-7)


def test_decay_alone_shrinks_only_the_flagged_rows(framework):
    before = parameters()
    optimizer = framework.optimizer(before, DECAYS, AdamWSettings(weight_decay=0.5))
    optimizer.step([np.zeros_like(values) for values in before], 0.1)
    for found, old, decays in zip(optimizer.values(), before, DECAYS, strict=True):
        np.testing.assert_allclose(found, old * (1 - 0.1 * 0.5 if decays else 1.0), rtol=1e-6)


def test_state_has_canonical_names_and_continues_bit_for_bit(framework):
    settings = AdamWSettings()
    straight, first = run(framework, settings, 40), run(framework, settings, 20)
    state = first.state()
    assert set(state) == {"t"} | {f"{k}.{n}" for k in "mv" for n in ("w0.q", "w0.k", "w1", "w2", "w3")}
    assert state["m.w0.k"].shape == (13, 16)
    resumed = framework.optimizer([values.astype(np.float32) for values in first.values()], DECAYS, settings)
    resumed.load_state(state)
    for t in range(21, 41):
        resumed.step(gradients(t), rates(t))
    assert all(np.array_equal(a, b) for a, b in zip(straight.values(), resumed.values(), strict=True))
    del state["v.w2"]
    with pytest.raises(ValueError, match=r"v\.w2"):
        resumed.load_state(state)


def test_the_state_of_one_backend_is_that_of_the_other():
    settings = AdamWSettings()
    ours, theirs = (run(make(name), settings, 20) for name in NAMES)
    states = [ours.state(), theirs.state()]
    assert list(states[0]) == list(states[1])
    for name, array in states[0].items():
        assert (array.dtype, array.shape) == (states[1][name].dtype, states[1][name].shape)
        np.testing.assert_allclose(array.to_numpy(), states[1][name].to_numpy(), rtol=1e-4, atol=1e-7)
    for optimizer, state in ((ours, states[1]), (theirs, states[0])):
        optimizer.load_state(state)
        assert all(bytes(optimizer.state()[name].data) == bytes(array.data) for name, array in state.items())


def test_global_norm_and_clipping_agree_with_torch(framework):
    grads = gradients(3)
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    theirs = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
    norm = float(framework.numbers(framework.adamw.global_norm([framework.array(g) for g in grads])))
    assert norm == pytest.approx(theirs, rel=1e-6)
    scale = clipping_scale(norm, 1.0)
    for p, g in zip(params, grads, strict=True):
        np.testing.assert_allclose(g * scale, p.grad, rtol=2e-6, atol=1e-9)
    assert clipping_scale(0.5, 1.0) == 1.0
    assert clipping_scale(7.0, 0.0) == 1.0


@pytest.mark.parametrize(
    "bad", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"bias_correction": "none"}]
)
def test_settings_name_what_is_wrong(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamWSettings(**bad)

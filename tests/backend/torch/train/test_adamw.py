"""AdamW: the paper in float64, torch.optim.AdamW over 1000 steps, clipping, state under canonical names."""

import math

import numpy as np
import pytest
import torch

from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.train import adamw
from llamita.backend.torch.train.adamw import AdamW, AdamWSettings, adamw_update, clipping_scale, global_norm

SHAPES = [(40, 16), (7,), (64, 3), (1,)]
DECAYS = [True, False, True, False]


def fused(parameters, decays=DECAYS):
    """Parameters as a model hands them out; the first holds two canonical tensors."""
    items = []
    for i, (parameter, decay) in enumerate(zip(parameters, decays, strict=True)):
        parts, sizes = (f"w{i}",), (parameter.shape[0],)
        if i == 0:
            parts, sizes = ("w0.q", "w0.k"), (24, 16)
        items.append(FusedParameter(f"p{i}", parameter, parts, sizes, decay))
    return items


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES
    ]


def gradients(step, dtype=torch.float32):
    """A deterministic, noisy stream over several magnitudes, some exactly zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    result = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (-i) for i, shape in enumerate(SHAPES)
    ]
    result[2][:, 0] = 0.0
    return [g.to(dtype) for g in result]


def rates(step):
    return 3e-3 * (0.55 + 0.45 * math.cos(step / 200))


def numpy_reference(settings, steps):
    """Kingma & Ba 2015, algorithm 1 and the end of section 2, with decoupled decay; float64."""
    theta = [p.detach().numpy().astype(np.float64) for p in parameters(torch.float64)]
    m = [np.zeros_like(p) for p in theta]
    v = [np.zeros_like(p) for p in theta]
    for t in range(1, steps + 1):
        lr = rates(t)
        for i, g in enumerate(gradients(t, torch.float64)):
            g = g.numpy()
            m[i] = settings.beta1 * m[i] + (1 - settings.beta1) * g
            v[i] = settings.beta2 * v[i] + (1 - settings.beta2) * g * g
            if DECAYS[i]:
                theta[i] = theta[i] - lr * settings.weight_decay * theta[i]
            if settings.bias_correction == "efficient":
                alpha = lr * np.sqrt(1 - settings.beta2**t) / (1 - settings.beta1**t)
                theta[i] = theta[i] - alpha * m[i] / (np.sqrt(v[i]) + settings.epsilon)
            else:
                m_hat, v_hat = m[i] / (1 - settings.beta1**t), v[i] / (1 - settings.beta2**t)
                theta[i] = theta[i] - lr * m_hat / (np.sqrt(v_hat) + settings.epsilon)
    return theta


def run(settings, steps, dtype=torch.float32):
    params = parameters(dtype)
    optimizer = AdamW(fused(params), settings)
    for t in range(1, steps + 1):
        for p, g in zip(params, gradients(t, dtype), strict=True):
            p.grad = g
        optimizer.step(rates(t))
    return params, optimizer


@pytest.mark.parametrize("bucket", [50, adamw.BUCKET_NUMBERS], ids=["split in pieces", "whole"])
def test_follows_torch_adamw_over_1000_steps(monkeypatch, bucket):
    monkeypatch.setattr(adamw, "BUCKET_NUMBERS", bucket)
    settings = AdamWSettings(0.9, 0.95, 1e-8, 0.1)
    ours, _ = run(settings, 1000)
    theirs = parameters()
    groups = [
        {"params": [p for p, d in zip(theirs, DECAYS, strict=True) if d], "weight_decay": 0.1},
        {"params": [p for p, d in zip(theirs, DECAYS, strict=True) if not d], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for t in range(1, 1001):
        for p, g in zip(theirs, gradients(t), strict=True):
            p.grad = g
        for group in reference.param_groups:
            group["lr"] = rates(t)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_follows_the_paper_in_float64(form, epsilon):
    settings = AdamWSettings(0.9, 0.999, epsilon, 0.05, form)
    ours, _ = run(settings, 300, torch.float64)
    for a, b in zip(ours, numpy_reference(settings, 300), strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=0, atol=1e-12)


def test_the_two_forms_differ_only_in_what_epsilon_means():
    """With epsilon-hat = epsilon sqrt(1 - beta2^t), constant over one step, the forms are the same update."""
    textbook = AdamWSettings(epsilon=1e-2, bias_correction="textbook")
    efficient = AdamWSettings(epsilon=1e-2 * math.sqrt(1 - 0.95), bias_correction="efficient")
    a, _ = run(textbook, 1, torch.float64)
    b, _ = run(efficient, 1, torch.float64)
    c, _ = run(AdamWSettings(epsilon=1e-2, bias_correction="efficient"), 1, torch.float64)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-14)
    assert (a[1] - c[1]).abs().max() > 1e-6


@pytest.mark.parametrize("form", ["textbook", "efficient"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fast_step_equals_the_plain_form(form, scale, monkeypatch):
    monkeypatch.setattr(adamw, "BUCKET_NUMBERS", 100)
    settings = AdamWSettings(weight_decay=0.3, bias_correction=form)
    fast, plain = parameters(torch.float64), parameters(torch.float64)
    optimizer = AdamW(fused(fast), settings)
    m, v = [torch.zeros_like(p) for p in plain], [torch.zeros_like(p) for p in plain]
    for t in range(1, 51):
        for i, g in enumerate(gradients(t, torch.float64)):
            fast[i].grad = g.clone()
            with torch.no_grad():
                adamw_update(plain[i], g * scale, m[i], v[i], t, rates(t), settings, DECAYS[i])
        optimizer.step(rates(t), gradient_scale=scale)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_decay_alone_shrinks_only_the_flagged_rows():
    params = [torch.nn.Parameter(torch.ones(40, 2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = AdamW(fused(params, [True, False]), AdamWSettings(weight_decay=0.5))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    torch.testing.assert_close(params[0], torch.full((40, 2), 1 - 0.1 * 0.5))
    torch.testing.assert_close(params[1], torch.ones(3))


def test_state_has_canonical_names_and_continues_bit_for_bit():
    settings = AdamWSettings()
    straight, _ = run(settings, 40)
    params = parameters()
    first = AdamW(fused(params), settings)
    for t in range(1, 21):
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = g
        first.step(rates(t))
    state = first.state()
    assert set(state) == {"t"} | {f"{k}.{n}" for k in "mv" for n in ("w0.q", "w0.k", "w1", "w2", "w3")}
    assert state["m.w0.k"].shape == (16, 16)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = AdamW(fused(resumed), settings)
    second.load_state(state)
    for t in range(21, 41):
        for p, g in zip(resumed, gradients(t), strict=True):
            p.grad = g
        second.step(rates(t))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    del state["v.w2"]
    with pytest.raises(ValueError, match=r"v\.w2"):
        second.load_state(state)


def test_global_norm_and_clipping_agree_with_torch():
    grads = gradients(3)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    theirs = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
    norm = float(global_norm(grads))
    assert norm == pytest.approx(theirs, rel=1e-6)
    scale = clipping_scale(norm, 1.0)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(g * scale, p.grad, rtol=2e-6, atol=1e-9)
    assert clipping_scale(0.5, 1.0) == 1.0
    assert clipping_scale(7.0, 0.0) == 1.0


@pytest.mark.parametrize(
    "bad", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"bias_correction": "none"}]
)
def test_settings_name_what_is_wrong(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamWSettings(**bad)

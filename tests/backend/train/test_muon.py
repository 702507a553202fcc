"""Muon of both backends: its polynomials, the singular values that they leave, the update beside float64 and PyTorch's
own, state by its names, and training steps with it."""

import numpy as np
import pytest
import torch

from llamita.backend.adamw import AdamWSettings
from llamita.backend.muon import MuonSettings, nearest_to_one, polar_express, update_scale, value_at
from llamita.model.lora import LoraSettings
from tests.backend.frameworks import NAMES, make
from tests.backend.optimizers import rates
from tests.backend.steps import CONFIG, batch, largest_difference, same, split

BLOCK = "model.layers.0"
PARTS = [
    ("model.embed_tokens.weight",),
    (f"{BLOCK}.self_attn.q_proj.weight", f"{BLOCK}.self_attn.k_proj.weight", f"{BLOCK}.self_attn.v_proj.weight"),
    (f"{BLOCK}.self_attn.q_proj.bias",),
    (f"{BLOCK}.mlp.gate_proj.weight", f"{BLOCK}.mlp.up_proj.weight"),
    (f"{BLOCK}.mlp.down_proj.weight",),
    ("model.norm.weight",),
    ("score.weight",),
]
SIZES = [(30,), (16, 8, 8), (16,), (24, 24), (16,), (16,), (3,)]
WIDTHS = [16, 16, 0, 16, 24, 0, 16]
SHAPES = [(sum(rows), width) if width else (sum(rows),) for rows, width in zip(SIZES, WIDTHS, strict=True)]
DECAYS = [len(shape) == 2 for shape in SHAPES]
OF_MUON = (1, 3, 4)

PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
"""The coefficients in algorithm 1 of arXiv:2505.16932, without the room for rounding."""


def values(seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def gradients(step):
    return [gradient * 10.0 ** (-i) for i, gradient in enumerate(values(1000 + step))]


def muon(framework, settings=None, adamw=None, start=None, *products):
    options = {"names": PARTS, "sizes": SIZES, "muon": (settings or MuonSettings(), *products)}
    return framework.optimizer(start or values(), DECAYS, adamw or AdamWSettings(), **options)


def run(framework, steps, *settings, scale=1.0):
    optimizer = muon(framework, *settings)
    for t in range(1, steps + 1):
        optimizer.step(gradients(t), rates(t), scale)
    return optimizer


def applied(polynomials, x):
    for polynomial in polynomials:
        x = value_at(polynomial, x)
    return x


def by_singular_values(matrix, steps):
    """The polynomials applied to the singular values themselves, in float64."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u * applied(polar_express(steps), s / (1.01 * np.linalg.norm(s))) @ v


# --- orthogonalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_the_polynomials_are_those_of_the_paper(steps):
    found = polar_express(steps)
    assert len(found) == steps
    for i, (polynomial, published) in enumerate(zip(found, PUBLISHED, strict=False)):
        room = 1.01 if i < steps - 1 else 1.0
        np.testing.assert_allclose(np.array(polynomial) * room ** np.array([1, 3, 5]), published, rtol=1e-7)


@pytest.mark.parametrize(("lowest", "highest"), [(0.02, 1.0), (0.3, 1.7), (0.9, 1.1)])
def test_the_nearest_polynomial_is_equally_far_from_one_at_four_points(lowest, highest):
    """Chebyshev: only the best one alternates so; a slightly different one is further off somewhere."""
    x = np.linspace(lowest, highest, 200_001)
    best = nearest_to_one(lowest, highest)
    error = value_at(best, x) - 1
    extrema = [error[0], *error[1:-1][np.diff(np.sign(np.diff(error))) != 0], error[-1]]
    np.testing.assert_allclose(extrema, np.abs(error).max() * np.array([-1, 1, -1, 1]), rtol=1e-5, atol=1e-13)
    for changed in np.eye(3):
        for factor in (1.0001, 0.9999):
            other = value_at(tuple(np.array(best) * factor**changed), x)
            assert np.abs(other - 1).max() > np.abs(error).max()


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(12, 12), (8, 40), (40, 8), (1, 9), (3, 24, 16)])
def test_orthogonalised_is_the_polynomial_of_the_singular_values(framework, shape, steps):
    matrices = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    found = framework.numbers(framework.muon.orthogonalized(framework.array(matrices), polar_express(steps)))
    pairs = [(matrices, found)] if len(shape) == 2 else zip(matrices, found, strict=True)
    for matrix, orthogonal in pairs:
        np.testing.assert_allclose(orthogonal, by_singular_values(matrix, steps), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("precision", "lowest", "highest"), [("fp32", 0.85, 1.13), ("bf16", 0.8, 1.18)])
def test_singular_values_come_near_one(framework, scale, precision, lowest, highest):
    """Those from a thousandth of the Frobenius norm up: here from 1 to 1/100 of the largest, of a random basis."""
    random = np.random.default_rng(5)
    u, v = (np.linalg.qr(random.standard_normal((size, 24)))[0] for size in (24, 64))
    matrix = (u * np.geomspace(1, 0.01, 24) @ v.T * scale).astype(np.float32)
    products = framework.dtype(precision)
    found = framework.numbers(framework.muon.orthogonalized(framework.array(matrix), polar_express(5), products))
    left = np.linalg.svd(found, compute_uv=False)
    assert lowest < left.min() <= left.max() < highest
    assert np.abs(found - u @ v.T).max() < 0.05, "U V^T itself, whose numbers are about 0.2"
    exact = framework.muon.orthogonalized(framework.array(matrix), polar_express(8))
    np.testing.assert_allclose(framework.numbers(exact), u @ v.T, rtol=0, atol=2e-5)


def test_a_matrix_of_zeros_stays_so(framework):
    found = framework.muon.orthogonalized(framework.array(np.zeros((4, 6), np.float32)), polar_express(5))
    assert not framework.numbers(found).any()


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_fast_step_equals_the_plain_form(framework, nesterov, scale):
    """Over the canonical parts of each fused matrix."""
    settings, adamw = MuonSettings(0.9, nesterov, 4), AdamWSettings(weight_decay=0.3)
    fast = run(framework, 10, settings, adamw, scale=scale)
    for i in OF_MUON:
        ends = np.cumsum(SIZES[i])[:-1]
        found = np.split(fast.values()[i], ends)
        for part, values_of_part in enumerate(np.split(values()[i], ends)):
            state = [framework.array(x) for x in (values_of_part, np.zeros_like(values_of_part))]
            for t in range(1, 11):
                gradient = framework.array(np.split(gradients(t)[i], ends)[part] * np.float32(scale))
                updated = framework.muon.muon_update(state[0], gradient, state[1], rates(t), settings, 0.3)
                state = updated or state  # new arrays, or the same, changed in place
            np.testing.assert_allclose(found[part], framework.numbers(state[0]), rtol=0, atol=1e-6)
            momentum = fast.state()[f"momentum.{PARTS[i][part]}"].to_numpy()
            np.testing.assert_allclose(momentum, framework.numbers(state[1]), rtol=1e-5, atol=1e-7)


def test_follows_the_papers_in_float64(framework):
    settings, adamw = MuonSettings(), AdamWSettings(weight_decay=0.1)
    found = run(framework, 20, settings, adamw).values()[4]
    weight, momentum = values()[4].astype(np.float64), 0.0
    for t in range(1, 21):
        gradient = gradients(t)[4].astype(np.float64)
        momentum = 0.95 * momentum + gradient
        orthogonal = by_singular_values(gradient + 0.95 * momentum, 5)
        weight = weight - rates(t) * (0.2 * np.sqrt(24) * orthogonal + 0.1 * weight)
    np.testing.assert_allclose(found, weight, rtol=0, atol=1e-5)


def test_follows_torch_muon(framework, monkeypatch):
    """PyTorch's has one polynomial for all steps and no margin, and casts to bfloat16, which is left out here."""
    polynomial = (3.4445, -4.7750, 2.0315)
    monkeypatch.setattr(framework.muon, "polar_express", lambda steps: (polynomial,) * steps)
    monkeypatch.setattr(framework.muon, "NORM_MARGIN", 1.0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours = muon(framework, None, AdamWSettings(weight_decay=0.1))
    theirs = [torch.nn.Parameter(torch.from_numpy(part)) for i in OF_MUON for part in parts_of(values(), i)]
    options = {"momentum": 0.95, "ns_coefficients": polynomial, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, **options)
    for t in range(1, 21):
        ours.step(gradients(t), 1e-2)
        for parameter, gradient in zip(theirs, [g for i in OF_MUON for g in parts_of(gradients(t), i)], strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    found = [part for i in OF_MUON for part in parts_of(ours.values(), i)]
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=2e-6)


def parts_of(arrays, i):
    return np.split(arrays[i], np.cumsum(SIZES[i])[:-1])


def test_the_rest_is_left_to_adamw_bit_for_bit(framework):
    adamw = AdamWSettings(weight_decay=0.3)
    ours, plain = run(framework, 5, None, adamw, scale=0.5), framework.optimizer(values(), DECAYS, adamw)
    for t in range(1, 6):
        plain.step(gradients(t), rates(t), 0.5)
    for i, (a, b) in enumerate(zip(ours.values(), plain.values(), strict=True)):
        assert np.array_equal(a, b) is (i not in OF_MUON)


def test_the_root_mean_square_of_an_update_is_that_of_adamw(framework):
    """0.2 times the learning rate where all singular values are 1, whatever the shape (Liu et al. 2025)."""
    for shape in ((16, 16), (8, 64), (64, 8)):
        matrix = framework.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        orthogonal = framework.numbers(framework.muon.orthogonalized(matrix, polar_express(8)))
        rms = np.sqrt(np.mean(np.square(update_scale(*shape) * orthogonal)))
        assert rms == pytest.approx(0.2, rel=1e-4)


# --- state -----------------------------------------------------------------------------------------------------------


def test_state_has_canonical_names_and_continues_bit_for_bit(framework):
    straight, first = run(framework, 12), run(framework, 6)
    state = first.state()
    names = [name for i in OF_MUON for name in PARTS[i]]
    others = [name for i, parts in enumerate(PARTS) if i not in OF_MUON for name in parts]
    assert set(state) == {"t", *(f"momentum.{name}" for name in names), *(f"{k}.{n}" for k in "mv" for n in others)}
    assert state["t"].to_numpy() == [6]
    assert state[f"momentum.{PARTS[1][1]}"].shape == (8, 16)
    resumed = muon(framework, None, None, [array.astype(np.float32) for array in first.values()])
    resumed.load_state(state)
    for t in range(7, 13):
        resumed.step(gradients(t), rates(t))
    assert all(np.array_equal(a, b) for a, b in zip(straight.values(), resumed.values(), strict=True))
    del state[f"momentum.{PARTS[1][1]}"]
    with pytest.raises(ValueError, match=r"lacks momentum\.model\.layers\.0\.self_attn\.k_proj"):
        resumed.load_state(state)


def test_the_state_of_one_backend_is_that_of_the_other():
    ours, theirs = (run(make(name), 6) for name in NAMES)
    states = [ours.state(), theirs.state()]
    assert list(states[0]) == list(states[1])
    for name, array in states[0].items():
        np.testing.assert_allclose(array.to_numpy(), states[1][name].to_numpy(), rtol=1e-4, atol=1e-7)
    ours.load_state(states[1])
    assert same(ours.state(), states[1])
    theirs.load_state(states[0])
    assert same(theirs.state(), states[0])


def test_the_state_of_another_optimizer_is_refused(framework):
    ours, plain = run(framework, 1), framework.optimizer(values(), DECAYS, AdamWSettings())
    with pytest.raises(ValueError, match="of --optimizer muon and cannot be gone on with by adamw"):
        plain.load_state(ours.state())
    with pytest.raises(ValueError, match="of --optimizer adamw and cannot be gone on with by muon"):
        ours.load_state(plain.state())


@pytest.mark.parametrize("bad", [{"momentum": 1.0}, {"momentum": -0.1}, {"orthogonalization_steps": 0}])
def test_settings_name_what_is_wrong(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MuonSettings(**bad)


# --- training steps --------------------------------------------------------------------------------------------------


def step_of(framework, **options):
    return framework.train_step(CONFIG, **{"muon": MuonSettings(), "max_grad_norm": 1.0, **options})


def test_a_step_moves_the_matrices_of_blocks_by_muon(framework):
    """Against AdamW from the same start: embedding and norms get the same, the blocks another, of the same size."""
    ours, plain = step_of(framework), step_of(framework, muon=None)
    before = {name: array.to_numpy().copy() for name, array in ours.weights().items()}
    for step in (ours, plain):
        step.step([batch()], 1e-2)
    a, b = ours.weights(), plain.weights()
    for name, start in before.items():
        if name.startswith("model.layers.") and len(start.shape) == 2:
            way = a[name].to_numpy() - start * (1 - 1e-2 * 0.1)
            singular = np.linalg.svd(way, compute_uv=False) / (1e-2 * update_scale(*start.shape))
            assert singular.max() < 1.13
            assert singular.mean() > 0.8
            assert not np.array_equal(a[name].to_numpy(), b[name].to_numpy())
        else:
            assert np.array_equal(a[name].to_numpy(), b[name].to_numpy())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_run_twice_and_resumed_gives_the_same_bytes(framework, precision):
    first, second = (step_of(framework, precision=precision) for _ in range(2))
    for i in range(6):
        a = first.step(split(batch(seed=i), 3), 1e-2)
        assert second.step(split(batch(seed=i), 3), 1e-2) == a
        if i == 2:
            resumed = step_of(framework, precision=precision, seed=8)
            resumed.load_state(first.weights(), first.state())
        if i > 2:
            resumed.seed = first.seed
            assert resumed.step(split(batch(seed=i), 3), 1e-2) == a
    for other in (second, resumed):
        assert same(first.weights(), other.weights())
        assert same(first.state(), other.state())


def test_both_backends_go_the_same_way():
    steps = [step_of(make(name), optimizer=AdamWSettings(epsilon=1e-6)) for name in NAMES]
    for i in range(8):
        losses = [step.step([batch(seed=i % 2)], 1e-2).loss for step in steps]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(*(step.weights() for step in steps)) < 1e-3
    assert steps[0].evaluate(batch()).nats < step_of(make(NAMES[0])).evaluate(batch()).nats


@pytest.mark.parametrize("options", [{"adapter": LoraSettings(2, 4)}, {"trainable": "model.norm.weight".__eq__}])
def test_it_is_refused_where_no_matrix_of_a_block_is_trained(framework, options):
    with pytest.raises(ValueError, match="--optimizer muon updates the matrices of the blocks, and none"):
        step_of(framework, **options)

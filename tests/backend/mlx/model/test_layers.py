"""What MLX alone has of the layers: products in the type of the weight, rotations by its kernel, dropout by a key."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.mlx.model import attention, layers
from tests import reference

RANDOM = np.random.default_rng(0)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def randn(*shape, dtype="float32"):
    return mx.array(RANDOM.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))


def wide(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def close(ours, expected, dtype="float32"):
    expected = wide(expected) if isinstance(expected, mx.array) else expected
    np.testing.assert_allclose(wide(ours), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def gradients(function, *inputs):
    """Of a sum in which every output has another weight."""

    def total(*inputs):
        out = function(*inputs).astype(mx.float32)
        return mx.sum(out * mx.cos(mx.arange(out.size).reshape(out.shape)))

    return mx.grad(total, argnums=tuple(range(len(inputs))))(*inputs)


def same_both_ways(plain, fused, *inputs):
    close(fused(*inputs), plain(*inputs))
    for ours, expected in zip(gradients(fused, *inputs), gradients(plain, *inputs), strict=True):
        close(ours, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_type_of_its_weight(bias):
    x, weight, b = randn(2, 5, 8), randn(6, 8), randn(6) if bias else None
    expected = wide(x) @ wide(weight).T + (wide(b) if bias else 0.0)
    for form in (layers.linear, layers.linear_fused):
        low = form(x, weight.astype(mx.bfloat16), None if b is None else b.astype(mx.bfloat16))
        assert low.dtype == mx.bfloat16
        np.testing.assert_allclose(wide(low), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("given", ["counted", "one row", "every row"])
def test_rotations(given, scale):
    """Positions 0, 1, ..., or given for all rows at once or for each: as complex numbers turn."""
    B, T, N, H = 2, 7, 3, 8
    x, frequencies = randn(B, T, N, H), 100.0 ** (-np.arange(0, H, 2) / H)
    positions = np.arange(T)[None]
    if given != "counted":
        positions = RANDOM.integers(0, 300, (1 if given == "one row" else B, T))
    asked = None if given == "counted" else mx.array(positions)
    positions = np.broadcast_to(positions, (B, T))
    expected = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            expected[b, :, n] = reference.rope(wide(x)[b, :, n], positions[b], frequencies, scale)
    frequencies_E = mx.array(frequencies.astype(np.float32))
    for form in (layers.rotate, layers.rotate_fused):
        np.testing.assert_allclose(wide(form(x, asked, frequencies_E, scale)), expected, atol=1e-4)
    forms = [lambda x, form=form: form(x, asked, frequencies_E, scale) for form in (layers.rotate, layers.rotate_fused)]
    same_both_ways(*forms, x)
    assert layers.rotate_fused(x.astype(mx.bfloat16), asked, frequencies_E, scale).dtype == mx.bfloat16


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean():
    x = mx.ones((200, 100))
    drops = [attention.Dropout(0.25, mx.random.key(seed)) for seed in (1, 1, 2)]
    first, again, other = (wide(drop(x)) for drop in drops)
    assert set(np.unique(first).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs((first == 0).mean() - 0.25) < 0.02
    assert (first == again).all()
    assert 0.3 < (first != other).mean() < 0.45, "independent masks differ at 2 x 0.25 x 0.75 of the places"
    assert 0.3 < (first != wide(drops[0](x))).mean() < 0.45
    q, k, v = (randn(1, 4, 5, 8) for _ in range(3))
    ours = attention.attention_fused(q, k, v, causal=True, dropout=attention.Dropout(0.25, mx.random.key(1)))
    plain = attention.attention(q, k, v, causal=True, dropout=attention.Dropout(0.25, mx.random.key(1)))
    assert mx.array_equal(ours, plain)
    assert not mx.allclose(ours, attention.attention_fused(q, k, v, causal=True))

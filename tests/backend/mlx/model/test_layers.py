"""Each operation of the MLX backend: plain against the float64 oracle, fused against plain, and their gradients."""

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


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm(dtype):
    x, weight = randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype)
    expected = reference.rms_norm(wide(x), wide(weight), 1e-5)
    for form in (layers.rms_norm, layers.rms_norm_fused):
        close(form(x, weight, 1e-5), expected, dtype)
        assert form(x, weight, 1e-5).dtype == x.dtype
    x, weight = randn(3, 5), randn(5)
    same_both_ways(lambda *a: layers.rms_norm(*a, 0.1), lambda *a: layers.rms_norm_fused(*a, 0.1), x, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_type_of_its_weight(bias):
    x, weight, b = randn(2, 5, 8), randn(6, 8), randn(6) if bias else None
    expected = wide(x) @ wide(weight).T + (wide(b) if bias else 0.0)
    for form in (layers.linear, layers.linear_fused):
        close(form(x, weight, b), expected)
        low = form(x, weight.astype(mx.bfloat16), None if b is None else b.astype(mx.bfloat16))
        assert low.dtype == mx.bfloat16
        np.testing.assert_allclose(wide(low), expected, rtol=0.05, atol=0.05)
    same_both_ways(layers.linear, layers.linear_fused, *([x, weight] + ([b] if bias else [])))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_silu(dtype):
    gate_up = randn(3, 10, dtype=dtype) * 5
    expected = reference.silu(wide(gate_up)[:, :5]) * wide(gate_up)[:, 5:]
    for form in (layers.gated_silu, layers.gated_silu_fused):
        close(form(gate_up), expected, dtype)
    if dtype == "float32":
        same_both_ways(layers.gated_silu, layers.gated_silu_fused, gate_up)


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


def test_reordered_weights_give_the_other_layout_the_same_scores():
    N, H, D, T = 3, 8, 12, 5
    w_q, w_k, x = randn(N * H, D), randn(N * H, D), randn(1, T, D)
    cos, sin = layers.rope_table(mx.arange(T)[None], mx.array(10000.0 ** (-np.arange(0, H, 2) / H)))

    def scores(w_q, w_k, rotate):
        q, k = (rotate((x @ w.T).reshape(1, T, N, H), cos, sin).swapaxes(1, 2) for w in (w_q, w_k))
        return q @ k.swapaxes(-1, -2)

    interleaved = scores(w_q, w_k, layers.apply_rope_interleaved)
    reordered = [layers.halves_from_interleaved(w, H) for w in (w_q, w_k)]
    close(scores(*reordered, layers.apply_rope), interleaved)
    assert mx.array_equal(layers.interleaved_from_halves(reordered[0], H), w_q)
    bias = randn(N * H)
    assert mx.array_equal(layers.interleaved_from_halves(layers.halves_from_interleaved(bias, H), H), bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "mask", "both"])
def test_attention_against_the_oracle(dtype, leading, K, masking):
    N, T, S, H = 4, 5, 7, 8
    q, k, v = (randn(*leading, heads, n, H, dtype=dtype) for heads, n in ((N, T), (K, S), (K, S)))
    mask = (RANDOM.random((T, S)) < 0.5) | np.eye(T, S, k=S - T, dtype=bool) if masking in ("mask", "both") else None
    causal = masking in ("causal", "both")
    allowed = np.ones((T, S), dtype=bool) if mask is None else mask
    allowed = allowed & np.tri(T, S, S - T, dtype=bool) if causal else allowed
    expected = np.zeros((*leading, N, T, H))
    for place in np.ndindex(*leading, N):
        row, head = place[:-1], place[-1]
        its_k, its_v = (wide(x)[(*row, head // (N // K))] for x in (k, v))
        expected[place] = reference.attention(wide(q)[place], its_k, its_v, allowed)
    for form in (attention.attention, attention.attention_fused):
        close(form(q, k, v, None if mask is None else mx.array(mask), causal), expected, dtype)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradients_of_plain_and_fused_attention_agree(K):
    mask = attention.segment_mask(mx.array([[1] * 2 + [2] * 3, [1] * 3 + [0] * 2]))
    for arguments in ({"causal": True}, {"mask": mask}):
        forms = [
            lambda *qkv, form=form, arguments=arguments: form(*qkv, **arguments)
            for form in (attention.attention, attention.attention_fused)
        ]
        same_both_ways(*forms, *(randn(2, heads, 5, 8) for heads in (4, K, K)))


def test_softmax_survives_large_scores():
    x = np.array([[1e4, 1e4 - 1.0, -1e4]])
    close(attention.softmax(mx.array(x.astype(np.float32))), reference.softmax(x))


def test_masks_as_tables():
    mask = np.array(attention.segment_mask(mx.array([[1, 1, 2, 0, 0]]))[0, 0]).astype(int).tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert np.array(attention.window_mask(4, 2)).astype(int).tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]
    ]  # fmt: skip
    assert np.array(attention.causal_mask(2, 4)).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


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

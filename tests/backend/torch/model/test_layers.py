"""Each operation, plain and fused, against PyTorch's own operators and the papers' formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.infer import exact
from llamita.backend.torch.model import attention, layers

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def close(ours, theirs, dtype=torch.float32):
    return torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [layers.rms_norm, layers.rms_norm_fused])
def test_rms_norm(norm, dtype):
    x, weight = randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(norm(x, weight, 1e-5), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    x, weight, b = randn(2, 5, 8, dtype=dtype), randn(6, 8, dtype=dtype), randn(6, dtype=dtype) if bias else None
    close(layers.linear(x, weight, b), F.linear(x, weight, b), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu(dtype):
    gate_up = randn(3, 10, dtype=dtype) * 5
    expected = F.silu(gate_up[..., :5].double()) * gate_up[..., 5:].double()
    for form in (layers.gated_silu, layers.gated_silu_fused):
        close(form(gate_up), expected, dtype)
    close(layers.silu(gate_up), F.silu(gate_up), dtype)


def frequencies(H, theta):
    return theta ** (-torch.arange(0, H, 2) / H)


def test_rope_turns_pairs_by_the_paper_s_angles():
    T, H, theta = 7, 8, 100.0
    x = randn(1, T, 2, H)
    cos, sin = layers.rope_table(torch.arange(T)[None], frequencies(H, theta))
    halves = layers.apply_rope(x, cos, sin)
    pairs = layers.apply_rope_interleaved(x, cos, sin)
    for t in range(T):
        for i in range(H // 2):
            angle = t * theta ** (-2 * i / H)
            rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            for n in range(2):
                vector = x[0, t, n]
                expected = rotation @ [vector[i], vector[i + H // 2]]
                np.testing.assert_allclose([halves[0, t, n, i], halves[0, t, n, i + H // 2]], expected, atol=1e-5)
                expected = rotation @ [vector[2 * i], vector[2 * i + 1]]
                np.testing.assert_allclose(pairs[0, t, n, 2 * i : 2 * i + 2], expected, atol=1e-5)


def test_rope_scores_depend_on_distance_alone():
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16)

    def score(t, s):
        turned = [
            layers.apply_rope(x, *layers.rope_table(torch.tensor([[p]]), frequencies(16, 10000.0)))
            for x, p in ((q, t), (k, s))
        ]
        return (turned[0] * turned[1]).sum()

    close(score(5, 2), score(105, 102))


def test_reordered_weights_give_the_other_layout_the_same_scores():
    N, H, D, T = 3, 8, 12, 5
    w_q, w_k, x = randn(N * H, D), randn(N * H, D), randn(1, T, D)
    cos, sin = layers.rope_table(torch.arange(T)[None], frequencies(H, 10000.0))

    def scores(w_q, w_k, rotate):
        q, k = (rotate((x @ w.mT).unflatten(-1, (N, H)), cos, sin).transpose(1, 2) for w in (w_q, w_k))
        return q @ k.mT

    interleaved = scores(w_q, w_k, layers.apply_rope_interleaved)
    reordered = [layers.halves_from_interleaved(w, H) for w in (w_q, w_k)]
    close(scores(*reordered, layers.apply_rope), interleaved)
    assert torch.equal(layers.interleaved_from_halves(reordered[0], H), w_q)
    bias = randn(N * H)
    assert torch.equal(layers.interleaved_from_halves(layers.halves_from_interleaved(bias, H), H), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "mask", "both"])
def test_attention_against_pytorch(dtype, leading, K, masking):
    N, T, H = 4, 6, 8
    q, k, v = randn(*leading, N, T, H, dtype=dtype), randn(*leading, K, T, H, dtype=dtype), None
    v = randn(*leading, K, T, H, dtype=dtype)
    mask = None
    if masking in ("mask", "both"):
        mask = torch.rand(T, T, generator=GENERATOR) < 0.5
        mask |= torch.eye(T, dtype=torch.bool)
    causal = masking in ("causal", "both")
    allowed = torch.ones(T, T, dtype=torch.bool) if mask is None else mask
    if causal:
        allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
    wide = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(
        wide[0], *(x.repeat_interleave(N // K, dim=-3) for x in wide[1:]), attn_mask=allowed
    )
    for form in (attention.attention, attention.attention_fused):
        close(form(q, k, v, mask, causal), expected, dtype)
    close(attention.attention_by_products(q, k, v, None if masking == "none" else allowed), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (130, 130), (256, 300), (70, 600)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_query_tiles_against_pytorch(dtype, leading, K, T, S, masked):
    """Keys and values as the engine has them, heads in between; queries at the end of the keys."""
    N, H = 4, 24
    q, k, v = (randn(*leading, n, m, H, dtype=dtype).transpose(-3, -2) for n, m in ((T, N), (S, K), (S, K)))
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if masked:
        allowed = allowed.triu(S - T - 40)
    wide = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(
        wide[0], *(x.repeat_interleave(N // K, dim=-3) for x in wide[1:]), attn_mask=allowed
    )
    mask = allowed if masked else None
    close(attention.attention_by_query_tiles(q, k, v, mask), expected, dtype)
    close(attention.attention_fused(q, k, v, mask, causal=not masked), expected, dtype)


@pytest.mark.parametrize("form", [attention.attention, attention.attention_fused])
def test_causal_attention_of_few_queries_over_many_keys(form):
    q, k, v = randn(2, 4, 9, 8), randn(2, 2, 9, 8), randn(2, 2, 9, 8)
    whole = form(q, k, v, causal=True)
    close(form(q[:, :, 6:], k, v, causal=True), whole[:, :, 6:])


@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradients_of_plain_and_fused_attention_agree(K):
    inputs = [randn(2, n, 5, 8, dtype=torch.float64).requires_grad_() for n in (4, K, K)]
    direction = randn(2, 4, 5, 8, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((form(*inputs, causal=True) * direction).sum(), inputs)
        for form in (attention.attention, attention.attention_fused)
    ]
    for plain, fused in zip(*gradients, strict=True):
        close(fused, plain, torch.float32)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_training_in_bfloat16_follows_float32(K):
    """On a CPU it takes another path, two products around a softmax."""
    wide = [randn(2, n, 12, 8).requires_grad_() for n in (4, K, K)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    mask = attention.segment_mask(torch.tensor([[1] * 5 + [2] * 7, [1] * 10 + [0] * 2]))
    direction = randn(2, 4, 12, 8)
    for arguments in ({"causal": True}, {"mask": mask}):
        expected = attention.attention(*wide, **arguments)
        ours = attention.attention_fused(*narrow, **arguments)
        assert (ours - expected).norm() / expected.norm() < 0.01
        gradients = [torch.autograd.grad((out * direction).sum(), x) for out, x in ((expected, wide), (ours, narrow))]
        for theirs, mine in zip(*gradients, strict=True):
            assert (mine - theirs).norm() / theirs.norm() < 0.02


def test_softmax_survives_large_scores():
    x = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    close(attention.softmax(x), F.softmax(x, dim=-1))


def test_segment_mask_as_a_table():
    mask = attention.segment_mask(torch.tensor([[1, 1, 2, 0, 0]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_the_exact_operations_give_a_row_the_same_bits_wherever_it_stands(threads):
    """Sizes and thread counts at which PyTorch's own operations do not on every processor. The last assertion: bits
    hang on the order of a sum, so that equality is no matter of course."""
    before, other_order_differs = torch.get_num_threads(), False
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        for D, C in (
            (33, 5),
            (97, 18),
            (257, 10),
            (385, 97),
            (52, 36),
            (34, 7),
            (688, 64),
            (2816, 10),
            (2048, 512),
            (8191, 17),
        ):
            x_TD, gate_up_TE = (torch.randn(96, width, generator=generator) for width in (D, 2 * D))
            weight_CD = torch.randn(C, D, generator=generator)
            for name, fast, own, rows in (
                ("linear", layers.FUSED.linear, exact.linear, x_TD),
                ("silu", layers.FUSED.gates["silu"], exact.GATES["silu"], gate_up_TE),
            ):
                weights = (weight_CD,) if name == "linear" else ()
                whole, fast_whole = own(rows, *weights), fast(rows, *weights)
                torch.testing.assert_close(whole, fast_whole, rtol=1e-4, atol=1e-4)
                for start, count in ((0, 16), (1, 16), (7, 48), (16, 80), (31, 64)):
                    part = rows[start : start + count].clone()
                    assert torch.equal(own(part, *weights), whole[start : start + count]), (name, D, C)
            other_order = exact.linear(x_TD.flip(1), weight_CD.flip(1))
            other_order_differs |= not torch.equal(other_order, exact.linear(x_TD, weight_CD))
    finally:
        torch.set_num_threads(before)
    assert other_order_differs

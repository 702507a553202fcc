"""The forms of attention that PyTorch's backend alone has, and the exact operations, against PyTorch's own."""

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "mask", "both"])
def test_attention_by_products_against_pytorch(dtype, leading, K, masking):
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

"""Each operation of both backends, attention included, plain and fused, against the float64 oracle and PyTorch's own.

tests/course asks the same of more shapes; here are the types, gradients and layouts that it leaves out.
"""

import functools
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.model.config import AttentionSpec
from tests import reference
from tests.backend.frameworks import normal
from tests.backend.tolerances import ELEMENT, assert_each_close

PRECISIONS = ["fp32", "bf16"]
FORMS = ["PLAIN", "FUSED"]


def check(framework, precision, found, expected):
    assert found.dtype == framework.dtype(precision)
    assert_each_close(framework.numbers(found), expected, ELEMENT[precision])


def same_both_ways(framework, plain, fused, *inputs):
    """Values and gradients, of a sum in which every output has another weight."""
    arrays = [framework.array(each) for each in inputs]
    expected = framework.numbers(plain(*arrays))
    assert_each_close(framework.numbers(fused(*arrays)), expected, ELEMENT["fp32"])
    weights = framework.array(np.cos(np.arange(expected.size)).reshape(expected.shape).astype(np.float32))
    ours, theirs = (
        framework.gradients(lambda *inputs, form=form: (form(*inputs) * weights).sum(), *arrays)
        for form in (fused, plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_each_close(framework.numbers(a), framework.numbers(b), ELEMENT["fp32"])


def forms(framework, operation):
    return [getattr(getattr(framework.layers, form), operation) for form in FORMS]


GATES = {"silu": F.silu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh")}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm(framework, form, precision):
    x, weight = normal(2, 3, 16, precision=precision), normal(16, precision=precision, seed=1)
    norm = getattr(framework.layers, form).rms_norm
    found = norm(framework.array(x, precision), framework.array(weight, precision), 1e-5)
    check(framework, precision, found, reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(framework, bias, form, precision):
    x, weight, b = (normal(*shape, precision=precision) for shape in ((2, 5, 8), (6, 8), (6,)))
    given = [framework.array(each, precision) for each in ([x, weight, b] if bias else [x, weight])]
    expected = x.astype(np.float64) @ weight.astype(np.float64).T + (b if bias else 0.0)
    check(framework, precision, getattr(framework.layers, form).linear(*given), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(framework, gate, form, precision):
    gate_up = normal(3, 10, precision=precision, scale=5)
    gates, ups = torch.from_numpy(gate_up.astype(np.float64)).chunk(2, dim=-1)
    found = getattr(framework.layers, form).gates[gate](framework.array(gate_up, precision))
    check(framework, precision, found, (GATES[gate](gates) * ups).numpy())
    if gate == "silu":
        silu = framework.layers.silu(framework.array(gate_up[:, :5], precision))
        check(framework, precision, silu, reference.silu(gates.numpy()))


def test_gradients_of_plain_and_fused_operations_agree(framework):
    norms = [lambda *a, norm=norm: norm(*a, 0.1) for norm in forms(framework, "rms_norm")]
    same_both_ways(framework, *norms, normal(3, 5), normal(5))
    x, weight, bias = normal(2, 5, 8), normal(6, 8), normal(6)
    same_both_ways(framework, *forms(framework, "linear"), x, weight)
    same_both_ways(framework, *forms(framework, "linear"), x, weight, bias)
    for gate in GATES:
        plain, fused = (gates[gate] for gates in forms(framework, "gates"))
        same_both_ways(framework, plain, fused, normal(3, 10, scale=5))


def frequencies(H, theta):
    return (theta ** (-np.arange(0, H, 2) / H)).astype(np.float32)


def table(framework, positions, H, theta=10000.0):
    return framework.layers.rope_table(
        framework.array(np.array(positions)[None]), framework.array(frequencies(H, theta))
    )


def test_rope_turns_pairs_by_the_paper_s_angles(framework):
    T, H, theta = 7, 8, 100.0
    x = normal(1, T, 2, H)
    cos, sin = table(framework, np.arange(T), H, theta)
    halves, pairs = (
        framework.numbers(apply(framework.array(x), cos, sin))
        for apply in (framework.layers.apply_rope, framework.layers.apply_rope_interleaved)
    )
    for t in range(T):
        for i in range(H // 2):
            angle = t * theta ** (-2 * i / H)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            for n in range(2):
                vector = x[0, t, n]
                expected = rotation @ [vector[i], vector[i + H // 2]]
                np.testing.assert_allclose([halves[0, t, n, i], halves[0, t, n, i + H // 2]], expected, atol=1e-5)
                expected = rotation @ [vector[2 * i], vector[2 * i + 1]]
                np.testing.assert_allclose(pairs[0, t, n, 2 * i : 2 * i + 2], expected, atol=1e-5)


def test_rope_scores_depend_on_distance_alone(framework):
    q, k = (framework.array(normal(1, 1, 1, 16, seed=seed)) for seed in (0, 1))

    def score(t, s):
        turned = [framework.layers.apply_rope(x, *table(framework, [p], 16)) for x, p in ((q, t), (k, s))]
        return framework.numbers((turned[0] * turned[1]).sum())

    assert_each_close(score(5, 2), score(105, 102), ELEMENT["fp32"])


def test_reordered_weights_give_the_other_layout_the_same_scores(framework):
    N, H, D, T = 3, 8, 12, 5
    layers = framework.layers
    w_q, w_k, x = normal(N * H, D), normal(N * H, D, seed=1), normal(1, T, D)
    cos, sin = table(framework, np.arange(T), H)

    def scores(w_q, w_k, rotate):
        q, k = (
            framework.numbers(
                rotate(framework.array((x @ framework.numbers(w).T.astype(np.float32)).reshape(1, T, N, H)), cos, sin)
            )
            for w in (w_q, w_k)
        )
        return np.einsum("btnh,bsnh->bnts", q, k)

    given = [framework.array(w) for w in (w_q, w_k)]
    interleaved = scores(*given, layers.apply_rope_interleaved)
    reordered = [layers.halves_from_interleaved(w, H) for w in given]
    assert_each_close(scores(*reordered, layers.apply_rope), interleaved, ELEMENT["fp32"])
    assert np.array_equal(framework.numbers(layers.interleaved_from_halves(reordered[0], H)), w_q)
    bias = framework.array(normal(N * H))
    again = layers.interleaved_from_halves(layers.halves_from_interleaved(bias, H), H)
    assert np.array_equal(framework.numbers(again), framework.numbers(bias))


# --- attention ---


def by_pytorch(q, k, v, allowed):
    q, k, v = (torch.from_numpy(x).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(allowed)).numpy()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(("T", "S"), [(6, 6), (5, 7)])
@pytest.mark.parametrize("masking", ["none", "causal", "mask", "both"])
def test_attention_against_pytorch(framework, precision, leading, K, T, S, masking):
    N, H = 4, 8
    q, k, v = (
        normal(*leading, heads, n, H, precision=precision, seed=seed)
        for seed, (heads, n) in enumerate(((N, T), (K, S), (K, S)))
    )
    allowed = mask = np.ones((T, S), dtype=bool)
    if masking in ("mask", "both"):
        allowed = mask = (np.random.default_rng(0).random((T, S)) < 0.5) | np.eye(T, S, k=S - T, dtype=bool)
    causal = masking in ("causal", "both")
    allowed = mask & np.tri(T, S, S - T, dtype=bool) if causal else mask
    given = [framework.array(x, precision) for x in (q, k, v)]
    asked = framework.array(mask) if masking in ("mask", "both") else None
    for attend in forms(framework, "attention"):
        check(framework, precision, attend(*given, asked, causal), by_pytorch(q, k, v, allowed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(soft_cap=0.7), AttentionSpec(0.3, 0.7)], ids=str)
def test_attention_with_another_scale_and_a_soft_cap(framework, spec, precision, form):
    attend = getattr(framework.layers, form).attention
    q, k, v = (normal(4, 6, 8, precision=precision, seed=seed) for seed in range(3))
    found = attend(*(framework.array(x[None], precision) for x in (q, k, v)), causal=True, spec=spec)
    expected = [
        reference.attention(*(x[head].astype(np.float64) for x in (q, k, v)), np.tri(6, dtype=bool), *astuple(spec)[:2])
        for head in range(4)
    ]
    check(framework, precision, found, np.stack(expected)[None])


@pytest.mark.parametrize("form", FORMS)
def test_causal_attention_of_few_queries_over_many_keys(framework, form):
    attend = getattr(framework.layers, form).attention
    q, k, v = (framework.array(normal(2, heads, 9, 8, seed=seed)) for seed, heads in enumerate((4, 2, 2)))
    whole = framework.numbers(attend(q, k, v, causal=True))
    assert_each_close(framework.numbers(attend(q[:, :, 6:], k, v, causal=True)), whole[:, :, 6:], ELEMENT["fp32"])


@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradients_of_plain_and_fused_attention_agree(framework, K):
    mask = framework.attention.segment_mask(framework.array(np.array([[1] * 2 + [2] * 3, [1] * 3 + [0] * 2])))
    inputs = [normal(2, heads, 5, 8, seed=seed) for seed, heads in enumerate((4, K, K))]
    for arguments in ({"causal": True}, {"mask": mask}):
        same_both_ways(
            framework,
            *(lambda *qkv, form=form, a=arguments: form(*qkv, **a) for form in forms(framework, "attention")),
            *inputs,
        )


def test_softmax_survives_large_scores(framework):
    x = np.array([[1e4, 1e4 - 1.0, -1e4]], dtype=np.float32)
    found = framework.numbers(framework.attention.softmax(framework.array(x)))
    assert_each_close(found, F.softmax(torch.from_numpy(x).double(), dim=-1).numpy(), ELEMENT["fp32"])


def test_masks_as_tables(framework):
    def of(mask):
        return framework.numbers(mask).astype(int).tolist()

    mask = of(framework.attention.segment_mask(framework.array(np.array([[1, 1, 2, 0, 0]]))))[0][0]
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert of(framework.attention.window_mask(4, 2)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert of(framework.attention.causal_mask(2, 4)) == [[1, 1, 1, 0], [1, 1, 1, 1]]

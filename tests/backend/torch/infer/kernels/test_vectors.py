"""The operations of a decoding step on vectors, against float64."""

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels import vectors  # noqa: E402
from llamita.backend.torch.infer.kernels.choice import supported  # noqa: E402
from llamita.backend.torch.infer.kernels.simd import Static, target  # noqa: E402

SETS = [target(name) for name in supported()]
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@numba.njit
def exponentials(code, x, largest):
    return vectors.exponentials(code, x, 0, largest, x.size)


@numba.njit
def gated(code, gates, ups, out):
    for place in range(0, out.size, 16):
        vectors.gate(code, gates, place, ups, place, out, place)


@numba.njit
def scored(code, kind, rows, count, queries, keys, at, step, scale, scores):
    vectors.score(code, kind, rows, count, queries, 0, 64, keys, at, step, 64, scale, scores, 2, 5)


@numba.njit
def mixed(code, kind, count, out, memory, at, step, weights):
    vectors.mix(code, kind, count, out, 0, memory, at, step, out.size, weights, 1)


@numba.njit
def mixed_rows(code, kind, rows, out, memory, at, step, count, weights):
    vectors.mix_rows(code, kind, rows, out, 0, 64, memory, at, step, count, 64, weights, 1, count + 1)


@numba.njit
def saved(code, kind, memory, at, x):
    vectors.save(code, kind, memory, at, x, 0, x.size)


def in_memory(x: torch.Tensor, kind: str) -> np.ndarray:
    """Numbers as the cache holds them, those of two bytes as bits."""
    stored = x.to(KINDS[kind])
    return (stored if kind == "float32" else stored.view(torch.uint16)).numpy()


@pytest.mark.parametrize("code", SETS, ids=supported())
def test_exponential(code) -> None:
    x = np.concatenate([np.linspace(-87, 88, 160_000), np.linspace(-1e-3, 1e-3, 160), [-np.inf, -1e30] * 8])
    x = x.astype(np.float32)
    found = x.copy()
    exponentials(code, found, np.float32(0))
    exact = np.exp(x.astype(np.float64))
    ordinary = x >= -87
    error = np.abs(found[ordinary] - exact[ordinary]) / np.spacing(exact[ordinary].astype(np.float32))
    assert error.max() <= 2.0
    assert (found[~ordinary] == 0).all()
    unknown = np.array([np.nan, 0.0] * 8, dtype=np.float32)
    exponentials(code, unknown, np.float32(0))
    np.testing.assert_array_equal(unknown, np.array([np.nan, 1.0] * 8, dtype=np.float32))
    small = np.linspace(-20, 0, 1600, dtype=np.float32)
    total = exponentials(code, small.copy(), np.float32(0.5))
    assert total == pytest.approx(np.exp(small.astype(np.float64) - 0.5).sum(), rel=1e-6)


@pytest.mark.parametrize("code", SETS, ids=supported())
def test_gate(code) -> None:
    gates, ups = np.linspace(-100, 100, 1600, dtype=np.float32), np.linspace(2, -1, 1600, dtype=np.float32)
    found = np.empty_like(gates)
    gated(code, gates, ups, found)
    wide = gates.astype(np.float64)
    wanted = wide / (1 + np.exp(-wide)) * ups
    np.testing.assert_allclose(found, wanted, rtol=5e-7, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", SETS, ids=supported())
def test_reading_and_writing_a_memory(code, kind) -> None:
    x, memory = torch.randn(64), torch.randn(300)
    stored = in_memory(memory, kind)
    wide = memory.to(KINDS[kind]).double().numpy()
    at = 37
    queries = torch.randn(8, 64)
    for rows, count in ((1, 1), (1, 4), (4, 1), (4, 4)):
        keys = np.stack([wide[at + 33 * key : at + 33 * key + 64] for key in range(count)])
        scores = np.zeros(24, np.float32)
        of_rows, flat = queries[:rows].double().numpy(), queries.numpy().reshape(-1)
        scored(code, Static(kind), Static(rows), Static(count), flat, stored, at, 33, np.float32(0.5), scores)
        wanted = np.zeros(24)
        for row, found in enumerate(0.5 * of_rows @ keys.T):
            wanted[2 + 5 * row : 2 + 5 * row + count] = found
        np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
        out, weights = x.numpy().copy(), np.arange(8, dtype=np.float32)
        mixed(code, Static(kind), Static(count), out, stored, at, 33, weights)
        wanted = x.double().numpy() + weights[1 : 1 + count].astype(np.float64) @ keys
        np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=2e-6)
    for count in (1, 7):
        keys = np.stack([wide[at + 33 * key : at + 33 * key + 64] for key in range(count)])
        weights = torch.rand(8, count + 1)
        out, flat = queries.numpy().copy(), np.append(np.float32(0), weights.numpy().reshape(-1))
        mixed_rows(code, Static(kind), Static(8), out.reshape(-1), stored, at, 33, count, flat)
        wanted = queries.double().numpy() + weights[:, :count].double().numpy() @ keys
        np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=4e-6)
    saved(code, Static(kind), stored, at, x.numpy())
    np.testing.assert_array_equal(stored[at : at + 64], in_memory(x, kind))
    np.testing.assert_array_equal(stored[:at], in_memory(memory, kind)[:at])

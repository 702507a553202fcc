"""MLX's cross-entropy over a bfloat16 weight, and the memory that it takes."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.mlx.model.head import OutputHead
from llamita.backend.mlx.train import losses
from tests.backend.models import IGNORE_INDEX


def example(M=60, D=16, V=50, seed=0):
    random = np.random.default_rng(seed)
    hidden, weight = random.standard_normal((2, M // 2, D)), random.standard_normal((V, D)) * 3
    labels = random.integers(0, V, (2, M // 2))
    labels[0, 3:9] = IGNORE_INDEX
    labels[1, -1] = IGNORE_INDEX
    return mx.array(hidden.astype(np.float32)), mx.array(weight.astype(np.float32)), mx.array(labels.astype(np.int32))


def test_a_bfloat16_weight_gives_bfloat16_products_and_gradients_close_to_those_of_float32():
    hidden, weight, labels = example()

    def chunked(hidden, weight, labels):
        return losses.chunked_cross_entropy(hidden, OutputHead(weight), labels)

    f = mx.value_and_grad(chunked, argnums=(0, 1))
    loss, (grad_hidden, grad_weight) = f(hidden, weight, labels)
    low_loss, (low_hidden, low_weight) = f(hidden, weight.astype(mx.bfloat16), labels)
    assert low_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert low_hidden.dtype == mx.float32
    assert low_weight.dtype == mx.bfloat16
    for low, full in ((low_hidden, grad_hidden), (low_weight.astype(mx.float32), grad_weight)):
        assert mx.linalg.norm(low - full).item() < 0.05 * mx.linalg.norm(full).item()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_memory_does_not_grow_with_the_positions(compile):
    """At 1 MB of logits a chunk, thousands of positions more take only their own hidden states and gradients."""

    def forward(hidden, weight, labels):
        return losses.chunked_cross_entropy(hidden, OutputHead(weight), labels, 128)

    peaks = []
    for function in (forward, mx.value_and_grad(forward, argnums=(0, 1))):
        function = mx.compile(function) if compile else function
        for M in (1024, 6144):
            arrays = example(M, 8, 2000)
            mx.eval(arrays)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(function(*arrays))
            peaks.append(mx.get_peak_memory() - before)
    logits_bytes = 6144 * 2000 * 4
    assert peaks[1] < peaks[0] + 0.1 * logits_bytes
    assert peaks[3] < peaks[2] + 0.1 * logits_bytes
    assert max(peaks) < 0.5 * logits_bytes

"""MLX's sampler in float32, as on Metal, which has no float64; and that it forgets sequences that are gone."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import SampleSpec  # noqa: E402
from llamita.backend.mlx.infer.noise import GumbelNoise, stream_keys  # noqa: E402
from llamita.backend.mlx.infer.sampling import Sampler  # noqa: E402
from llamita.backend.sampling_params import SamplingParams  # noqa: E402
from tests.backend.specs import SIZE  # noqa: E402


def test_noise_in_float32_is_as_fine_in_both_tails() -> None:
    """As on Metal, which has no float64."""
    keys_R2 = stream_keys(list(range(20)), list(range(20)))
    wide_RV = np.array(GumbelNoise(50_000).rows(mx.array(keys_R2)))
    narrow_RV = np.array(GumbelNoise(50_000, mx.float32).rows(mx.array(keys_R2)))
    assert narrow_RV.dtype == np.float32
    assert wide_RV.max() > 12
    assert wide_RV.min() < -2.5
    np.testing.assert_allclose(narrow_RV, wide_RV, rtol=1e-6, atol=1e-6)


def test_in_float32_nearly_every_draw_is_that_of_float64() -> None:
    """Of 2,000 draws, those alone may differ whose two best lie within rounding."""
    specs = [SampleSpec(SamplingParams(top_p=0.95), row, 9) for row in range(2000)]
    logits_RV = mx.array(np.random.default_rng(0).normal(0, 3, (2000, SIZE)).astype(np.float32))
    wide, narrow = Sampler(SIZE), Sampler(SIZE)
    narrow.dtype, narrow._noise = mx.float32, GumbelNoise(SIZE, mx.float32)
    pairs = zip(*(sampler.sample(logits_RV, specs, range(2000)) for sampler in (wide, narrow)), strict=True)
    assert sum(one.token_id != other.token_id for one, other in pairs) <= 2


def test_forgotten_sequences_are_gone() -> None:
    sampler, params = Sampler(50), SamplingParams(presence_penalty=1.0)
    for count in (64, 3, 1):
        specs = [SampleSpec(params, 1, 1, [row % 50, 1], 1) for row in range(count)]
        sampler.sample(mx.zeros((count, 50)), specs, range(1000 + count, 1000 + 2 * count))
        assert len(sampler._counts._known) == count

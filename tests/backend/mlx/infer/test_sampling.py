"""MLX's sampler against PyTorch's on the same logits: the same tokens, whatever is asked for; and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import SampledToken, SampleSpec  # noqa: E402
from llamita.backend.mlx.infer.noise import GumbelNoise, stream_keys  # noqa: E402
from llamita.backend.mlx.infer.sampling import Columns, Sampler, logsumexp, truncate  # noqa: E402
from llamita.backend.sampling_params import SamplingParams  # noqa: E402
from llamita.backend.torch.infer import noise as torch_noise  # noqa: E402
from llamita.backend.torch.infer.sampling import Sampler as TorchSampler  # noqa: E402
from tests.backend.torch.infer.test_sampling import (  # noqa: E402
    PINNED_NOISE,
    SIZE,
    distributions,
    logit_rows,
    mask_of,
    mixed_specs,
    near_a_border,
    rows,
    truncations,
)

SEEDS, POSITIONS = [0, 1, 2**63, 2**64 - 1, 12345678901234567890], [0, 1, 131071, 2**40, 7]


def random_logits(count: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (count, size)).astype(np.float32)


def sample(logits_RV: np.ndarray, specs: list[SampleSpec], sampler: Sampler | None = None) -> list[SampledToken]:
    return (sampler or Sampler(logits_RV.shape[1])).sample(mx.array(logits_RV), specs, range(len(specs)))


def assert_alike(found: list[SampledToken], expected: list[SampledToken]) -> None:
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    assert [[i for i, _ in token.top] for token in found] == [[i for i, _ in token.top] for token in expected]
    np.testing.assert_allclose([t.logprob for t in found], [t.logprob for t in expected], atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose([p for _, p in ours.top], [p for _, p in theirs.top], atol=1e-5)


# --- the noise ------------------------------------------------------------


def test_noise_is_that_of_pytorch() -> None:
    expected_R2 = torch_noise.stream_keys(SEEDS, POSITIONS)
    keys_R2 = stream_keys(SEEDS, POSITIONS)
    np.testing.assert_array_equal(keys_R2.view(np.int64), expected_R2)
    expected_RV = torch_noise.GumbelNoise(50_000).rows(torch.from_numpy(expected_R2)).numpy()
    found_RV = np.array(GumbelNoise(50_000).rows(mx.array(keys_R2)))
    assert found_RV.dtype == np.float64
    np.testing.assert_allclose(found_RV, expected_RV, rtol=1e-13, atol=1e-15)
    some = GumbelNoise(50_000).rows(mx.array(keys_R2), mx.array([4, 40_000]))
    np.testing.assert_array_equal(np.array(some), found_RV[:, [4, 40_000]])
    pinned = GumbelNoise(3).rows(mx.array(stream_keys([2**64 - 1], [7])))
    np.testing.assert_allclose(np.array(pinned)[0], PINNED_NOISE, rtol=1e-12)


def test_noise_in_float32_is_as_fine_in_both_tails() -> None:
    """As on Metal, which has no float64."""
    keys_R2 = stream_keys(list(range(20)), list(range(20)))
    wide_RV = np.array(GumbelNoise(50_000).rows(mx.array(keys_R2)))
    narrow_RV = np.array(GumbelNoise(50_000, mx.float32).rows(mx.array(keys_R2)))
    assert narrow_RV.dtype == np.float32
    assert wide_RV.max() > 12
    assert wide_RV.min() < -2.5
    np.testing.assert_allclose(narrow_RV, wide_RV, rtol=1e-6, atol=1e-6)


# --- whole rows ------------------------------------------------------------


@given(asked=st.lists(rows(), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_rows_that_differ_in_everything_get_pytorchs_tokens(
    asked: list[tuple[SampleSpec, set[int] | None]], seed: int
) -> None:
    logits_RV, specs = random_logits(len(asked), seed=seed), [spec for spec, _ in asked]
    expected = TorchSampler(SIZE).sample(torch.from_numpy(logits_RV), specs, range(len(specs)))
    assert_alike(sample(logits_RV, specs), expected)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_a_large_vocabulary_gets_pytorchs_tokens(top_p: float, spread: float) -> None:
    """The nucleus of 0.9 lies among the likeliest thousand for a spread of 3, and beyond them for 0.2."""
    logits_RV = random_logits(6, 20_000) * np.float32(spread / 3)
    params = SamplingParams(top_p=top_p, temperature=0.9, top_logprobs=3)
    specs = [
        SampleSpec(dataclasses.replace(params, top_k=k), 3, row) for row, k in enumerate((0, 2**63, 5000, 50, 1, 0))
    ]
    expected = TorchSampler(20_000).sample(torch.from_numpy(logits_RV), specs, range(6))
    assert_alike(sample(logits_RV, specs), expected)


@given(logits=logit_rows, params=st.lists(truncations, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_kept_tokens_and_their_masses_are_pytorchs(logits: np.ndarray, params: list[SamplingParams]) -> None:
    rows_RV = np.stack([np.roll(logits, row) for row in range(len(params))])
    columns, scores_RV = Columns(params), mx.array(rows_RV.astype(np.float64), dtype=mx.float64)
    kept_RV = truncate((scores_RV - scores_RV.max(-1, keepdims=True)) / columns.temperature_R1, columns)
    found_RV = np.exp(np.array(kept_RV - logsumexp(kept_RV)))
    for row_V, found_V, expected_V, each in zip(rows_RV, found_RV, distributions(rows_RV, params), params, strict=True):
        if not near_a_border(row_V, each):
            np.testing.assert_allclose(found_V, expected_V, atol=1e-5)


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    specs, logits_RV = mixed_specs(), random_logits(7)
    together = sample(logits_RV, specs)
    assert together == [sample(logits_RV[[row]], [specs[row]])[0] for row in range(7)]
    sampler = Sampler(SIZE)
    assert together == sample(logits_RV, specs, sampler)
    assert together == sample(logits_RV, specs, sampler)  # nothing was used up
    assert together[::-1] == sample(logits_RV[::-1].copy(), specs[::-1], sampler)
    assert together * 3 == sample(np.tile(logits_RV, (3, 1)), specs * 3, sampler)


def test_penalties_go_with_histories_that_grow_shrink_and_fork() -> None:
    """Calls in a row on one sampler, as the engine makes them; PyTorch's sampler is given the same."""
    chance, size = np.random.default_rng(0), 12
    ours, theirs = Sampler(size), TorchSampler(size)
    params = SamplingParams(repetition_penalty=1.21, presence_penalty=0.53, frequency_penalty=0.37)
    histories = {name: chance.integers(0, size, 5).tolist() for name in range(4)}
    for _ in range(60):
        asked: list[tuple[int, SampleSpec]] = []
        for name in chance.permutation(4)[: chance.integers(0, 5)].tolist():
            history = histories[name]
            kind = chance.integers(0, 5)
            tails: list[list[int]] = [[]]
            if kind == 0:  # drafted tokens, each row one further
                draft = chance.integers(0, size, 3).tolist()
                tails = [draft[:count] for count in range(4)]
            elif kind == 1:  # several continuations
                tails = [chance.integers(0, size, 2).tolist() for _ in range(3)]
            elif kind == 2:  # some of the output was taken back
                del history[chance.integers(3, len(history) + 1) :]
            elif kind == 3:  # another text under the same number
                history[:] = chance.integers(0, size, 5).tolist()
            else:
                history += chance.integers(0, size, 2).tolist()
            begin = min(3, len(history)) - int(chance.random() < 0.1)
            asked += [(name, SampleSpec(params, 5, len(history), history + tail, begin)) for tail in tails]
        specs, names = [spec for _, spec in asked], [name for name, _ in asked]
        logits_RV = random_logits(len(specs), size, seed=int(chance.integers(2**32)))
        expected = theirs.sample(torch.from_numpy(logits_RV), specs, names)
        assert_alike(ours.sample(mx.array(logits_RV), specs, names), expected)
    assert len(ours._counts._known) <= 4 * 4, "forgotten sequences are gone"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_takes_the_first_of_the_largest_in_every_type(dtype: str) -> None:
    logits_RV = mx.array([[0.0, 2.0, 2.0, -1.0]]).astype(getattr(mx, dtype))
    spec = SampleSpec(SamplingParams(temperature=0), 7, 5)
    for each in (spec, dataclasses.replace(spec, banned=(0,))):
        assert Sampler(4).sample(logits_RV, [each], [0])[0].token_id == 1


def test_in_float32_nearly_every_draw_is_that_of_float64() -> None:
    """As on Metal: of 2,000 draws, those alone may differ whose two best lie within rounding."""
    specs = [SampleSpec(SamplingParams(top_p=0.95), row, 9) for row in range(2000)]
    logits_RV, narrow = random_logits(2000), Sampler(SIZE)
    narrow.dtype, narrow._noise = mx.float32, GumbelNoise(SIZE, mx.float32)
    pairs = zip(sample(logits_RV, specs), sample(logits_RV, specs, narrow), strict=True)
    assert sum(wide.token_id != other.token_id for wide, other in pairs) <= 2


# --- what is refused ------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)], ids=str
)
@pytest.mark.parametrize("banned", [(), (3,)])
def test_logits_that_are_not_finite_are_an_error_of_their_row(
    bad: float, params: SamplingParams, banned: tuple[int, ...]
) -> None:
    logits_RV = np.zeros((2, 5), np.float32)
    logits_RV[1, 3] = bad
    specs = [SampleSpec(params, 1, 1, banned=banned)] * 2
    good, broken = sample(logits_RV, specs)
    assert good == sample(logits_RV[:1], specs[:1])[0]
    assert not good.error
    assert broken.error.startswith("the model's logits are not finite")


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5)], ids=str)
@pytest.mark.parametrize(("banned", "allowed"), [((0, 1, 2, 3, 4), None), ((2,), {2}), ((), set())])
def test_no_token_left_is_an_error_in_a_line(
    params: SamplingParams, banned: tuple[int, ...], allowed: set[int] | None
) -> None:
    mask = None if allowed is None else mask_of(allowed, 5)
    (token,) = sample(np.zeros((1, 5), np.float32), [SampleSpec(params, 1, 1, banned=banned, allowed=mask)])
    assert token.error == "no token may come next: the banned tokens and the grammar leave none"


def test_a_bias_outside_the_vocabulary_is_refused_and_no_rows_give_no_tokens() -> None:
    spec = SampleSpec(SamplingParams(logit_bias={5: 1.0}), 7, 5)
    with pytest.raises(ValueError, match="logit_bias has token id 5, but this model's ids are 0 to 4"):
        sample(np.zeros((1, 5), np.float32), [spec])
    assert sample(np.zeros((0, 5), np.float32), []) == []

"""Sampling against a float64 oracle, against transformers' processors, and against the chi-square law of many draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llamita.plan import SampleSpec, SamplingParams
from llamita.torch_backend import sampling
from llamita.torch_backend.sampling import filter_logits, gumbel_noise, sample

# Multiples of 1/1024: their differences are exact, so that equal logits, and no others, stay equal in either order.
logit_rows = hnp.arrays(
    np.float32, st.integers(1, 30), elements=st.integers(-12 * 1024, 12 * 1024).map(lambda number: number / 1024)
)
probabilities = st.floats(0.01, 0.999)


def oracle(logits_V: np.ndarray, params: SamplingParams, history: tuple[int, ...] = ()) -> np.ndarray:
    """The distribution a token is drawn from, token by token, in float64."""
    logits = [float(x) for x in logits_V]
    for token in set(history):
        logits[token] = (
            logits[token] / params.repetition_penalty
            if logits[token] > 0
            else logits[token] * params.repetition_penalty
        )
    scaled = [x / params.temperature for x in logits]
    kept = set(range(len(scaled)))

    def mass(tokens: set[int]) -> dict[int, float]:
        top = max(scaled[t] for t in tokens)
        weights = {t: math.exp(scaled[t] - top) for t in tokens}
        total = math.fsum(weights.values())
        return {t: w / total for t, w in weights.items()}

    if params.top_k:
        kth = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        kept = {t for t in kept if scaled[t] >= kth}
    if params.top_p < 1:
        share, nucleus, total = mass(kept), set(), 0.0
        for token in sorted(kept, key=lambda t: (-share[t], t)):
            nucleus.add(token)
            total += share[token]
            if total >= params.top_p:
                break
        kept = nucleus
    if params.min_p > 0:
        share = mass(kept)
        kept = {t for t in kept if share[t] >= params.min_p * max(share.values())}
    result = np.zeros(len(scaled))
    for token, weight in mass(kept).items():
        result[token] = weight
    return result


def distribution(logits_V: np.ndarray, params: SamplingParams, history: tuple[int, ...] = ()) -> np.ndarray:
    return filter_logits(torch.from_numpy(logits_V)[None], params, history)[0].softmax(-1).numpy()


def near_a_border(logits_V: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding, rather than the rule, decides what is kept."""
    share = np.sort(oracle(logits_V, SamplingParams(temperature=params.temperature, top_k=params.top_k)))[::-1]
    at_p = np.abs(np.cumsum(share) - params.top_p).min() < 1e-9 if params.top_p < 1 else False
    at_min = np.abs(share - params.min_p * share[0]).min() < 1e-9 * share[0] if params.min_p else False
    return bool(at_p or at_min)


@given(
    logits=logit_rows,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 35),
    top_p=st.one_of(st.just(1.0), probabilities),
    min_p=st.one_of(st.just(0.0), probabilities),
)
@settings(max_examples=150, deadline=None)
def test_the_kept_tokens_and_their_masses_are_the_oracles(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got, expected = distribution(logits, params), oracle(logits, params)
    if not near_a_border(logits, params):
        np.testing.assert_array_equal(got > 0, expected > 0)
        np.testing.assert_allclose(got, expected, atol=1e-12)
    assert got.sum() == pytest.approx(1)
    assert got[logits >= logits.max() - 1e-6].max() > 0


@given(logits=logit_rows, temperature=st.floats(0.05, 10))
@settings(deadline=None)
def test_temperature_alone_is_softmax_of_logits_over_temperature(logits: np.ndarray, temperature: float) -> None:
    exact = torch.softmax(torch.from_numpy(logits).double() / temperature, dim=-1).numpy()
    np.testing.assert_allclose(distribution(logits, SamplingParams(temperature=temperature)), exact, rtol=1e-12)


@given(logits=logit_rows, p=probabilities)
@settings(deadline=None)
def test_the_nucleus_is_the_smallest_set_with_the_mass(logits: np.ndarray, p: float) -> None:
    full, kept = distribution(logits, SamplingParams()), distribution(logits, SamplingParams(top_p=p)) > 0
    assert full[kept].sum() >= p - 1e-12
    assert full[kept].sum() - full[kept].min() < p + 1e-12  # without its rarest token it would not suffice
    assert kept.all() or full[kept].min() >= full[~kept].max()


@given(logits=logit_rows, p=probabilities, q=probabilities, k=st.integers(1, 30), j=st.integers(1, 30))
@settings(deadline=None)
def test_a_stricter_setting_keeps_a_subset(logits: np.ndarray, p: float, q: float, k: int, j: int) -> None:
    (p, q), (k, j) = sorted((p, q)), sorted((k, j))
    for strict, loose in (
        (SamplingParams(top_p=p), SamplingParams(top_p=q)),
        (SamplingParams(top_k=k), SamplingParams(top_k=j)),
        (SamplingParams(min_p=q), SamplingParams(min_p=p)),
    ):
        assert not ((distribution(logits, strict) > 0) & (distribution(logits, loose) == 0)).any()


@given(data=st.data(), logits=hnp.arrays(np.float32, 20, elements=st.floats(-8, 8, width=32), unique=True))
@settings(deadline=None)
def test_renumbering_the_tokens_renumbers_the_distribution(data: st.DataObject, logits: np.ndarray) -> None:
    order = np.array(data.draw(st.permutations(range(20))))
    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.8, min_p=0.05)
    np.testing.assert_allclose(distribution(logits[order], params), distribution(logits, params)[order], atol=1e-12)


def test_of_equal_tokens_the_nucleus_keeps_the_first() -> None:
    assert (distribution(np.zeros(8, np.float32), SamplingParams(top_p=0.5)) > 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.85),
        SamplingParams(min_p=0.08),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=1.4, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
        SamplingParams(temperature=0.5, top_k=50, top_p=0.6, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_distributions_equal_those_of_transformers(params: SamplingParams) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    history = torch.tensor([[3, 5, 5, 60, 199]])
    logits_BV = torch.randn(1, 200, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    expected = processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, logits_BV.clone())
    expected = processors.TemperatureLogitsWarper(params.temperature)(history, expected)
    if params.top_k:
        expected = processors.TopKLogitsWarper(params.top_k)(history, expected)
    if params.top_p < 1:
        expected = processors.TopPLogitsWarper(params.top_p)(history, expected)
    if params.min_p:
        expected = processors.MinPLogitsWarper(params.min_p)(history, expected)
    got = filter_logits(logits_BV, params, history[0].tolist())
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), rtol=1e-10, atol=1e-14)
    assert 0 < int((got > sampling.DROPPED).sum()) <= 200


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=8, top_p=0.9, min_p=0.03)],
    ids=str,
)
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_many_draws_follow_the_distribution(params: SamplingParams, varied: str) -> None:
    logits_V = np.linspace(0, 3, 16).astype(np.float32)[np.random.default_rng(1).permutation(16)]
    expected = oracle(logits_V, params)
    draws = 20_000
    counts = np.zeros(16)
    filtered_V = filter_logits(torch.from_numpy(logits_V)[None], params)[0].numpy()
    for i in range(draws):
        seed, position = (11, i) if varied == "position" else (i, 11)
        counts[(filtered_V + gumbel_noise(seed, position, 16)).argmax()] += 1
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Chi-square with 15 degrees of freedom exceeds 45 once in 13,000 times; fewer degrees, less often.
    assert chi_square(counts[kept], draws * expected[kept]) < 45


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    tokens = np.array([[gumbel_noise(seed, position, 4).argmax() for position in range(60)] for seed in range(100)])
    for first, second in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        pairs = np.bincount((4 * first + second).ravel(), minlength=16)
        assert chi_square(pairs, np.full(16, pairs.sum() / 16)) < 45


def specs(params: SamplingParams, count: int, seed: int = 7) -> list[SampleSpec]:
    return [SampleSpec(params, seed + row, position=100 + row) for row in range(count)]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.7)], ids=str
)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(params: SamplingParams) -> None:
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 2
    asked = specs(params, 6)
    together = sample(logits_BV, asked)
    assert together == [sample(logits_BV[row : row + 1], [asked[row]])[0] for row in range(6)]
    assert together[::-1] == sample(logits_BV.flip(0), asked[::-1])
    assert together == sample(logits_BV, asked)  # nothing was used up


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    assert sample(logits_BV, specs(SamplingParams(temperature=0), 1))[0].token_id == 1


def test_greedy_heeds_the_repetition_penalty() -> None:
    spec = SampleSpec(SamplingParams(temperature=0, repetition_penalty=2.0), 0, 5, history=[1, 1, 3])
    assert sample(torch.tensor([[1.5, 2.0, 0.0, -1.0]]), [spec])[0].token_id == 0
    penalized = sampling.penalize_repetition(torch.tensor([[1.5, 2.0, 0.0, -1.0]]), [1, 1, 3], 2.0)
    assert penalized.tolist() == [[1.5, 1.0, 0.0, -2.0]]


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    logits_BV = torch.tensor([[-300.0, 250.0, 300.0, 120.0]])
    assert sample(logits_BV, specs(SamplingParams(temperature=temperature), 1))[0].token_id == 2


def test_a_vast_temperature_is_uniform() -> None:
    flat = distribution(np.array([-300.0, 0.0, 300.0], np.float32), SamplingParams(temperature=1e300))
    np.testing.assert_allclose(flat, np.full(3, 1 / 3))


def test_the_log_probability_is_the_models_own() -> None:
    logits_BV = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    params = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.5)
    expected = logits_BV.float().log_softmax(-1)
    for row, token in enumerate(sample(logits_BV, specs(params, 3))):
        assert token.logprob == pytest.approx(expected[row, token.token_id].item(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits_BV = torch.zeros(2, 5)
    logits_BV[1, 3] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(logits_BV, specs(SamplingParams(temperature=temperature), 2))


def test_noise_is_that_of_this_seed_and_position_for_good() -> None:
    """Seeds are promised to give the same text later: these values may not change."""
    noise = gumbel_noise(2**64 - 1, 7, 3)
    assert noise.dtype == np.float64
    np.testing.assert_allclose(noise, PINNED_NOISE, rtol=1e-12)


PINNED_NOISE = [4.577405690905196, -1.5086895132730815, -0.9250640529993822]

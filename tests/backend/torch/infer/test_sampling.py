"""Sampling against a float64 oracle, against transformers' processors, and against the chi-square law of many draws."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llamita.backend.interface import SampledToken, SampleSpec
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer import sampling, token_counts
from llamita.backend.torch.infer.noise import GumbelNoise, stream_keys
from llamita.backend.torch.infer.sampling import Columns, Sampler, penalize, truncate, unpack_bits

# Multiples of 1/1024: their differences are exact, so that equal logits, and no others, stay equal in either order.
logit_rows = hnp.arrays(
    np.float32, st.integers(1, 30), elements=st.integers(-12 * 1024, 12 * 1024).map(lambda number: number / 1024)
)
probabilities = st.floats(0.01, 0.999)


def mask_of(ids: set[int], size: int) -> np.ndarray:
    bits = np.zeros((size + 31) // 32 * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def oracle(logits_V: np.ndarray, spec: SampleSpec | SamplingParams, allowed: set[int] | None = None) -> np.ndarray:
    """The distribution a token is drawn from, token by token, in float64. A temperature of 0 puts all on one token."""
    if isinstance(spec, SamplingParams):
        spec = SampleSpec(spec, 0, 1)
    params = spec.params
    logits = [float(x) + params.logit_bias.get(token, 0) for token, x in enumerate(logits_V)]
    for token in set(spec.history):
        positive = logits[token] > 0
        logits[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token, count in Counter(spec.history[spec.prompt_length :]).items():
        logits[token] -= params.presence_penalty + count * params.frequency_penalty
    kept = set(range(len(logits))) - set(spec.banned)
    if allowed is not None:
        kept &= allowed
    if params.temperature == 0:
        return np.eye(len(logits))[max(kept, key=lambda t: (logits[t], -t))]
    scaled = [x / params.temperature for x in logits]

    def mass(tokens: set[int]) -> dict[int, float]:
        top = max(scaled[t] for t in tokens)
        weights = {t: math.exp(scaled[t] - top) for t in tokens}
        total = math.fsum(weights.values())
        return {t: w / total for t, w in weights.items()}

    if params.top_k:
        kth = sorted((scaled[t] for t in kept), reverse=True)[min(params.top_k, len(kept)) - 1]
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


def distributions(logits_RV: np.ndarray, params: list[SamplingParams]) -> np.ndarray:
    columns, scores_RV = Columns(params), torch.from_numpy(logits_RV).double()
    return truncate((scores_RV - scores_RV.amax(-1, True)) / columns.temperature_R1, columns).softmax(-1).numpy()


def distribution(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    return distributions(logits_V[None], [params])[0]


def near_a_border(logits_V: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding, rather than the rule, decides what is kept."""
    share = np.sort(oracle(logits_V, SamplingParams(temperature=params.temperature, top_k=params.top_k)))[::-1]
    at_p = np.abs(np.cumsum(share) - params.top_p).min() < 1e-9 if params.top_p < 1 else False
    at_min = np.abs(share - params.min_p * share[0]).min() < 1e-9 * share[0] if params.min_p else False
    return bool(at_p or at_min)


truncations = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 35),
    top_p=st.one_of(st.just(1.0), probabilities),
    min_p=st.one_of(st.just(0.0), probabilities),
)


@given(logits=logit_rows, params=st.lists(truncations, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_the_kept_tokens_and_their_masses_are_the_oracles(logits: np.ndarray, params: list[SamplingParams]) -> None:
    rows = np.stack([np.roll(logits, row) for row in range(len(params))])
    for row, got, each in zip(rows, distributions(rows, params), params, strict=True):
        expected = oracle(row, each)
        if not near_a_border(row, each):
            np.testing.assert_array_equal(got > 0, expected > 0)
            np.testing.assert_allclose(got, expected, atol=1e-12)
        assert got.sum() == pytest.approx(1)
        assert got[row >= row.max() - 1e-6].max() > 0


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


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0, 3.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_sorting_all_of_it(spread: float) -> None:
    logits_RV = np.random.default_rng(2).normal(0, spread, (3, 20_000)).round(1).astype(np.float32)  # with many ties
    params = [SamplingParams(top_p=p) for p in (0.1, 0.6, 0.97)]
    for got, logits_V, each in zip(distributions(logits_RV, params), logits_RV, params, strict=True):
        share = np.exp(logits_V.astype(float) - logits_V.max())
        order = np.argsort(-share, kind="stable")
        before = np.cumsum(share[order] / share.sum()) - share[order] / share.sum()
        needed = order[before < each.top_p]
        assert abs(len(needed) - (got > 0).sum()) <= 1  # a sum in another order may differ in its last digits
        kept = np.flatnonzero(got)
        assert set(needed[: len(kept)].tolist()) == set(kept.tolist()) or set(kept[:-1]) <= set(needed)


def test_of_equal_tokens_the_nucleus_keeps_the_first() -> None:
    assert (distribution(np.zeros(8, np.float32), SamplingParams(top_p=0.5)) > 0).tolist() == [True] * 4 + [False] * 4


TRANSFORMERS_KNOWS = [
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.85),
    SamplingParams(min_p=0.08),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.4, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(temperature=0.5, top_k=50, top_p=0.6, repetition_penalty=0.8),
]


def test_distributions_equal_those_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    history = torch.tensor([[3, 5, 5, 60, 199]])
    rows = len(TRANSFORMERS_KNOWS)
    logits_RV = torch.randn(rows, 200, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    columns = Columns(TRANSFORMERS_KNOWS)
    seen_RV = torch.zeros(rows, 200, dtype=torch.bool).index_fill(1, history[0], True)
    scores_RV = penalize(logits_RV.clone(), seen_RV, torch.zeros(rows, 200, dtype=torch.int32), columns)
    got_RV = truncate((scores_RV - scores_RV.amax(-1, True)) / columns.temperature_R1, columns)
    for row, params in enumerate(TRANSFORMERS_KNOWS):
        expected = processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, logits_RV[[row]])
        expected = processors.TemperatureLogitsWarper(params.temperature)(history, expected)
        if params.top_k:
            expected = processors.TopKLogitsWarper(params.top_k)(history, expected)
        if params.top_p < 1:
            expected = processors.TopPLogitsWarper(params.top_p)(history, expected)
        if params.min_p:
            expected = processors.MinPLogitsWarper(params.min_p)(history, expected)
        torch.testing.assert_close(got_RV[[row]].softmax(-1), expected.softmax(-1), rtol=1e-10, atol=1e-14)
        assert 0 < int((got_RV[row] > sampling.DROPPED).sum()) <= 200


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
    asked = [SampleSpec(params, 11, i) if varied == "position" else SampleSpec(params, i, 11) for i in range(draws)]
    tokens = Sampler(16).sample(torch.from_numpy(logits_V).expand(draws, 16), asked, range(draws))
    counts = np.bincount([token.token_id for token in tokens], minlength=16)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Chi-square with 15 degrees of freedom exceeds 45 once in 13,000 times; fewer degrees, less often.
    assert chi_square(counts[kept], draws * expected[kept]) < 45


# --- whole rows: one call, everything different ------------------------------------------------------------

SIZE = 45  # no multiple of 32


@st.composite
def rows(draw: st.DrawFn) -> tuple[SampleSpec, set[int] | None]:
    """A spec that may ask for anything at once, and the ids that its mask allows."""
    token_ids = st.integers(0, SIZE - 1)
    history = draw(st.lists(token_ids, max_size=12))
    allowed = draw(st.none() | st.sets(token_ids, min_size=6))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0, 0.5, 1, 1.7])),
        top_k=draw(st.sampled_from([0, 0, 3, 100])),
        top_p=draw(st.sampled_from([1, 1, 0.311, 0.911])),
        min_p=draw(st.sampled_from([0, 0, 0.0511])),
        repetition_penalty=draw(st.sampled_from([1, 0.7, 1.3])),
        presence_penalty=draw(st.sampled_from([0, 0, 1.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0, 0, 0.7, -0.2])),
        logit_bias=draw(st.dictionaries(token_ids, st.sampled_from([-100.0, -1.0, 2.5]), max_size=4)),
        top_logprobs=draw(st.integers(0, 3)),
    )
    banned = draw(st.lists(st.integers(0, SIZE + 20), max_size=5).map(tuple))
    seed, position = draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 10**6))
    mask = None if allowed is None else mask_of(allowed, SIZE)
    return SampleSpec(params, seed, position, history, draw(st.integers(0, len(history))), banned, mask), allowed


@given(asked=st.lists(rows(), min_size=1, max_size=6), numbers=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_rows_that_differ_in_everything_each_get_the_oracles_token(
    asked: list[tuple[SampleSpec, set[int] | None]], numbers: object
) -> None:
    logits_RV = np.random.default_rng(numbers.randrange(2**32)).normal(0, 3, (len(asked), SIZE)).astype(np.float32)
    specs = [spec for spec, _ in asked]
    tokens = Sampler(SIZE).sample(torch.from_numpy(logits_RV), specs, range(len(specs)))
    noise_RV = noise([spec.seed for spec in specs], [spec.position for spec in specs], SIZE)
    logprobs_RV = torch.from_numpy(logits_RV).double().log_softmax(-1).numpy()
    for row, ((spec, allowed), token) in enumerate(zip(asked, tokens, strict=True)):
        with np.errstate(divide="ignore"):
            scores_V = np.log(oracle(logits_RV[row], spec, allowed))
        assert token.token_id == (scores_V + noise_RV[row]).argmax()
        assert token.logprob == pytest.approx(logprobs_RV[row, token.token_id], abs=1e-5)
        likeliest = np.argsort(-logprobs_RV[row])[: spec.params.top_logprobs]
        assert [i for i, _ in token.top] == likeliest.tolist()
        np.testing.assert_allclose([p for _, p in token.top], logprobs_RV[row, likeliest], atol=1e-5)


def mixed_specs() -> list[SampleSpec]:
    history = [3, 3, 8, 40, 41]
    each = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.7, top_k=9),
        SamplingParams(temperature=0, presence_penalty=2, repetition_penalty=1.4),
        SamplingParams(temperature=0.5, frequency_penalty=1, min_p=0.1, logit_bias={4: 3.0}, top_logprobs=4),
        SamplingParams(top_p=0.99, temperature=1.5),
        SamplingParams(temperature=2),
    ]
    masks = [None, mask_of(set(range(0, SIZE, 2)), SIZE)] * 4
    return [
        SampleSpec(params, 2**63 + row, 100 + row, history, 2, (5, 6), mask)
        for row, (params, mask) in enumerate(zip(each, masks, strict=False))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_gets_the_same_token_alone_and_in_any_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, numbers = mixed_specs(), range(7)
    logits_RV = (torch.randn(7, SIZE, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    given_RV = logits_RV.clone()
    together = Sampler(SIZE).sample(logits_RV, specs, numbers)
    assert torch.equal(logits_RV, given_RV)  # the caller's logits are left alone
    assert together == [Sampler(SIZE).sample(logits_RV[[row]], [specs[row]], [row])[0] for row in numbers]
    sampler = Sampler(SIZE)
    assert together[::-1] == sampler.sample(logits_RV.flip(0), specs[::-1], numbers[::-1])
    assert together == sampler.sample(logits_RV, specs, numbers)  # nothing was used up
    assert together * 3 == sampler.sample(logits_RV.repeat(3, 1), specs * 3, [*numbers] * 3)
    monkeypatch.setattr(sampling, "CPU_BLOCK", SIZE)
    assert together * 3 == sampler.sample(logits_RV.repeat(3, 1), specs * 3, range(21))


def test_rows_may_share_their_logits_and_lie_anywhere_in_memory() -> None:
    wide = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(4))
    specs = [SampleSpec(SamplingParams(logit_bias={3: 1.0}), row, 9, banned=(1, 2)) for row in range(3)]
    for logits_RV in (wide[:, 0].expand(3, SIZE), wide.T, wide.double().T):
        assert Sampler(SIZE).sample(logits_RV, specs, [5] * 3) == Sampler(SIZE).sample(
            logits_RV.clone(), specs, range(3)
        )


def greedy(logits: list[list[float]], *specs: SampleSpec) -> list[int]:
    tokens = Sampler(len(logits[0])).sample(torch.tensor(logits), specs, range(len(specs)))
    return [token.token_id for token in tokens]


def spec(params: SamplingParams | None = None, history: tuple[int, ...] = (), prompt_length: int = 0) -> SampleSpec:
    return SampleSpec(params or SamplingParams(temperature=0), 7, 5, history, prompt_length)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert greedy([[0.0, 2.0, 2.0, -1.0]], spec()) == [1]
    assert greedy([[0.0, 2.0, 2.0, -1.0]], dataclasses.replace(spec(), banned=(0,))) == [1]


def test_greedy_heeds_the_repetition_penalty() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert greedy([[1.5, 2.0, 0.0, -1.0]], spec(params, (1, 1, 3))) == [0]
    columns, seen_RV = Columns([params]), torch.tensor([[False, True, False, True]])
    penalized = penalize(torch.tensor([[1.5, 2.0, 0.0, -1.0]]).double(), seen_RV, seen_RV.int(), columns)
    assert penalized.tolist() == [[1.5, 1.0, 0.0, -2.0]]


def test_presence_and_frequency_count_the_output_alone_and_repetition_the_prompt_too() -> None:
    logits = [[5.0, 4.9, 4.8, 4.0]]
    presence, frequency = (SamplingParams(temperature=0, **{f"{x}_penalty": 0.15}) for x in ("presence", "frequency"))
    assert greedy(logits, spec(presence, (0, 0), 2)) == [0]  # all of it is the prompt's
    assert greedy(logits, spec(presence, (0, 0, 0), 1)) == [1]  # once, however often it came
    assert greedy(logits, spec(frequency, (0, 0, 1), 1)) == [0]  # 4.85 to 4.75 and 4.8
    assert greedy(logits, spec(frequency, (1, 0, 1, 0), 1)) == [2]  # 4.7 and 4.75 to 4.8
    repetition = SamplingParams(temperature=0, repetition_penalty=1.03)
    assert greedy(logits, spec(repetition, (0,), 1)) == [1]


def test_bias_comes_before_penalties_and_a_ban_after_both() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=4.0, logit_bias={0: 4.0})
    assert greedy([[1.0, 1.2]], spec(params, (0,), 1)) == [0]  # (1 + 4) / 4 = 1.25; after them it would be 4.25
    assert greedy([[0.1, 1.2]], spec(params, (0,), 1)) == [1]  # (0.1 + 4) / 4 = 1.025; after them it would be 4.025
    banned = dataclasses.replace(spec(SamplingParams(temperature=0, logit_bias={0: 1e6})), banned=(0,))
    assert greedy([[0.0, 1.0]], banned) == [1]


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    assert greedy([[-300.0, 250.0, 300.0, 120.0]], spec(SamplingParams(temperature=temperature))) == [2]


def test_a_vast_temperature_is_uniform() -> None:
    flat = distribution(np.array([-300.0, 0.0, 300.0], np.float32), SamplingParams(temperature=1e300))
    np.testing.assert_allclose(flat, np.full(3, 1 / 3))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 97])
def test_the_bits_of_a_mask_are_taken_in_order(size: int) -> None:
    ids = set(np.flatnonzero(np.random.default_rng(size).random(size) < 0.5).tolist())
    words = mask_of(ids, size) | (np.int32(-1) << np.int32(size % 32) if size % 32 and size > 32 else np.int32(0))
    got = unpack_bits(torch.from_numpy(np.stack([words, mask_of(set(range(size)), size)])), size)
    assert set(torch.nonzero(got[0]).flatten().tolist()) >= ids
    assert [bool(word >> bit & 1) for word in words.tolist() for bit in range(32)][:size] == got[0].tolist()
    assert got[1].all()


def test_as_many_likeliest_tokens_as_each_row_asks_for_and_no_more_than_there_are() -> None:
    wanted = [0, 2, 100]
    specs = [spec(SamplingParams(temperature=t, top_logprobs=n)) for n in wanted for t in (0, 1)]
    tokens = Sampler(5).sample(torch.randn(6, 5), specs, range(6))
    assert [len(token.top) for token in tokens] == [0, 0, 2, 2, 5, 5]
    assert all(math.fsum(math.exp(p) for _, p in token.top) == pytest.approx(1, abs=1e-6) for token in tokens[4:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)], ids=str
)
@pytest.mark.parametrize("banned", [(), (3,)])
def test_logits_that_are_not_finite_are_an_error_of_their_row(
    bad: float, params: SamplingParams, banned: tuple[int, ...]
) -> None:
    logits_RV = torch.zeros(2, 5)
    logits_RV[1, 3] = bad
    specs = [SampleSpec(params, 1, 1, banned=banned)] * 2
    good, broken = Sampler(5).sample(logits_RV, specs, [0, 1])
    assert good == Sampler(5).sample(logits_RV[:1], specs[:1], [0])[0]
    assert not good.error
    assert broken.error.startswith("the model's logits are not finite")


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5)], ids=str)
@pytest.mark.parametrize(("banned", "allowed"), [((0, 1, 2, 3, 4), None), ((2,), {2}), ((), set())])
def test_no_token_left_is_an_error_in_a_line(
    params: SamplingParams, banned: tuple[int, ...], allowed: set[int] | None
) -> None:
    mask = None if allowed is None else mask_of(allowed, 5)
    (token,) = Sampler(5).sample(torch.zeros(1, 5), [SampleSpec(params, 1, 1, banned=banned, allowed=mask)], [0])
    assert token.error == "no token may come next: the banned tokens and the grammar leave none"


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias has token id 5, but this model's ids are 0 to 4"):
        Sampler(5).sample(torch.zeros(1, 5), [spec(SamplingParams(logit_bias={5: 1.0}))], [0])


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(5).sample(torch.zeros(0, 5), [], []) == []


# --- counts of the history ------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_penalties_are_right_whatever_became_of_the_sequences(data: st.DataObject) -> None:
    """Sequences grow, shrink, change, fork, go and come back, in a call and between calls."""
    sampler, size = Sampler(12), 12
    chance = data.draw(st.randoms(use_true_random=False))
    logits_V = np.round(np.random.default_rng(chance.randrange(2**32)).normal(0, 2, size), 3).astype(np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=1.21, presence_penalty=0.53, frequency_penalty=0.37)
    prompts = {name: chance.choices(range(size), k=chance.randrange(1, 5)) for name in range(5)}
    histories = {name: list(prompt) for name, prompt in prompts.items()}
    for _ in range(chance.randrange(2, 14)):
        asked: list[tuple[int, SampleSpec]] = []
        for name in chance.sample(range(5), chance.randrange(6)):
            history, begin = histories[name], len(prompts[name])
            match chance.randrange(6):
                case 0:  # drafted tokens, each row one further
                    draft = chance.choices(range(size), k=3)
                    tails = [draft[:n] for n in range(4)]
                case 1:  # several continuations, some of them alike
                    tails = [chance.choices(range(size), k=chance.randrange(3)) for _ in range(3)]
                case 2:  # some of the output was taken back
                    del history[chance.randrange(begin, len(history) + 1) :]
                    tails = [[]]
                case 3:  # a token in the middle is another
                    history[chance.randrange(len(history))] = chance.randrange(size)
                    tails = [[]]
                case 4:  # the same number for another request
                    prompts[name] = chance.choices(range(size), k=chance.randrange(1, 5))
                    history[:] = prompts[name]
                    tails, begin = [[]], len(prompts[name])
                case _:
                    history += chance.choices(range(size), k=chance.randrange(3))
                    tails = [[]]
            each = dataclasses.replace(params, presence_penalty=chance.choice([0.53, 0]))
            asked += [(name, SampleSpec(each, 0, 1, history + tail, begin)) for tail in tails]
            if chance.random() < 0.2:  # a row that reads no history, in between
                asked.append((name, SampleSpec(SamplingParams(temperature=0), 0, 1, history, begin)))
        chance.shuffle(asked)
        specs = [each for _, each in asked]
        tokens = sampler.sample(torch.from_numpy(logits_V).expand(len(specs), size), specs, [name for name, _ in asked])
        for got, each in zip(tokens, specs, strict=True):
            wanted = oracle(logits_V, each).argmax()
            assert got.token_id == wanted, (each.history, each.prompt_length)


def test_a_prompt_may_have_become_longer_or_shorter_under_the_same_history() -> None:
    """As where a number is given to another request that takes up the first one's text."""
    sampler, params = Sampler(2), SamplingParams(temperature=0, presence_penalty=1.0)
    for prompt_length, wanted in ((2, 0), (1, 1), (2, 0)):
        (token,) = sampler.sample(torch.tensor([[1.0, 0.5]]), [spec(params, (0, 0), prompt_length)], [3])
        assert token.token_id == wanted


def test_what_a_long_history_costs_is_its_new_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, history = Sampler(50), list(np.random.default_rng(3).integers(0, 50, 3000).tolist())
    moved: list[int] = []
    plain = token_counts.to_device
    monkeypatch.setattr(
        token_counts, "to_device", lambda array, device: moved.append(array.size) or plain(array, device)
    )
    params, logits_RV = SamplingParams(presence_penalty=1.0), torch.zeros(4, 50)
    for step in range(4):
        moved.clear()
        drafts = [SampleSpec(params, 1, 1, history + [7] * n, 1000) for n in range(4)]
        sampler.sample(logits_RV, drafts, [9] * 4)
        history.append(step)  # the drafts are refused, another token came
        assert sum(moved) > 3000 if step == 0 else sum(moved) < 80


def test_forgotten_sequences_give_their_memory_back() -> None:
    sampler, params = Sampler(50), SamplingParams(presence_penalty=1.0)
    for count in (64, 3, 64, 1, 0):
        specs = [SampleSpec(params, 1, 1, [row % 50, 1], 1) for row in range(count)]
        sampler.sample(torch.zeros(count, 50), specs, range(1000 + count, 1000 + 2 * count))
        rows = len(sampler._counts._table_SV)
        assert count <= rows <= 128
    sampler.sample(torch.zeros(1, 50), [spec()], [0])
    assert len(sampler._counts._table_SV) == 0


# --- noise ------------------------------------------------------------


def noise(seeds: list[int], positions: list[int], size: int) -> np.ndarray:
    return GumbelNoise(size).rows(torch.from_numpy(stream_keys(seeds, positions))).numpy()


def uniform(seeds: list[int], positions: list[int], size: int) -> np.ndarray:
    return np.exp(-np.exp(-noise(seeds, positions, size)))


def slow_noise(seed: int, position: int, token_id: int) -> float:
    """The same hash in whole numbers without bounds, reduced by hand."""
    full = (1 << 64) - 1
    golden, first, second = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * first & full
        x = (x ^ x >> 27) * second & full
        return x ^ x >> 31

    key = mix((mix(seed ^ second) + position * golden) & full)
    multiplier = mix((key + golden) & full) | 1
    bits = (mix((token_id + 1) * golden & full) ^ key) * multiplier & full
    bits = (bits ^ bits >> 32) * first & full
    # As in two's complement: the upper half of the numbers is below zero, and so comes first.
    step = ((bits >> 12) + (1 << 51)) % (1 << 52)
    return -math.log(-math.log((step + 0.5) / 2**52))


def test_noise_is_the_hash_in_plain_whole_numbers() -> None:
    seeds, positions = [0, 1, 2**63, 2**64 - 1, 12345678901234567890], [0, 1, 131071, 2**40, 7]
    got = noise(seeds, positions, 40)
    assert got.dtype == np.float64
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        expected = [slow_noise(seed, position, token_id) for token_id in range(40)]
        np.testing.assert_allclose(got[row], expected, rtol=1e-12)


def test_noise_is_that_of_this_seed_and_position_for_good() -> None:
    """Seeds are promised to give the same text later: these values may not change."""
    np.testing.assert_allclose(noise([2**64 - 1], [7], 3)[0], PINNED_NOISE, rtol=1e-12)


def test_noise_does_not_depend_on_the_size_of_the_vocabulary_or_the_batch() -> None:
    whole = noise([5, 6], [1, 2], 1000)
    np.testing.assert_array_equal(noise([6], [2], 10)[0], whole[1, :10])


COORDINATES = {
    "ids": ([3], [5], 400_000),
    "positions": ([3] * 20_000, list(range(20_000)), 20),
    "seeds": (list(range(20_000)), [3] * 20_000, 20),
    "high seeds": ([i << 44 for i in range(20_000)], [3] * 20_000, 20),
}


@pytest.mark.parametrize("along", COORDINATES)
def test_noise_is_uniform_underneath_in_its_middle_its_tails_and_its_lowest_bits(along: str) -> None:
    numbers = uniform(*COORDINATES[along]).ravel()
    total = numbers.size
    assert total == 400_000
    counts = np.bincount((numbers * 1000).astype(int), minlength=1000)
    assert abs(chi_square(counts, np.full(1000, total / 1000)) - 999) < 5 * math.sqrt(2 * 999)
    for edge in (1e-3, 1e-4):  # how many lie in a tail is a Poisson number
        for inside in (numbers < edge, numbers > 1 - edge):
            assert abs(inside.sum() - total * edge) < 5 * math.sqrt(total * edge)
    assert 0.002 < numbers.min() * total < 14
    assert 0.002 < (1 - numbers.max()) * total < 14
    for bit in (20, 30, 40):
        ones = ((numbers * 2**bit).astype(np.int64) & 1).sum()
        assert abs(ones - total / 2) < 5 * math.sqrt(total) / 2


def test_noise_is_fine_far_out_in_its_tail() -> None:
    """A token of one in a billion is drawn that often only if the largest values of the noise are that fine."""
    largest = np.sort(noise([1] * 60, list(range(60)), 50_000).ravel())[-200:]
    assert len(np.unique(largest)) == 200
    assert 13 < largest[-1] < 25  # about log(3e6) = 14.9
    assert slow_noise(0, 0, 0) < -math.log(-math.log(1 - 2**-53)) < 37


@pytest.mark.parametrize("along", ["positions", "seeds", "ids", "diagonal"])
@pytest.mark.parametrize("apart", [1, 2, 7])
def test_neighbours_are_independent(along: str, apart: int) -> None:
    """Pairs of neighbouring numbers fill a grid of 20 x 20 evenly, and their ranks have no correlation."""
    seeds, positions = ([9] * 600, range(600)) if along == "positions" else (range(600), [9] * 600)
    if along == "diagonal":
        seeds, positions = range(600), range(600, 0, -1)
    table = uniform(list(seeds), list(positions), 500)
    first, second = (table[:, :-apart], table[:, apart:]) if along == "ids" else (table[:-apart], table[apart:])
    pairs = ((first * 20).astype(int) * 20 + (second * 20).astype(int)).ravel()
    counts = np.bincount(pairs, minlength=400)
    assert abs(chi_square(counts, np.full(400, pairs.size / 400)) - 399) < 5 * math.sqrt(2 * 399)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(pairs.size)


def test_every_bit_of_a_seed_and_of_a_position_changes_everything() -> None:
    base = uniform([0x0123456789ABCDEF], [1000], 4000)[0]
    flipped = uniform([0x0123456789ABCDEF ^ 1 << bit for bit in range(64)], [1000] * 64, 4000)
    moved = uniform([0x0123456789ABCDEF] * 40, [1000 ^ 1 << bit for bit in range(40)], 4000)
    for other in (*flipped, *moved):
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(4000)
        assert not (base == other).any()


def test_swapping_seed_and_position_gives_other_noise() -> None:
    assert not (noise([3], [8], 100) == noise([8], [3], 100)).any()


PINNED_NOISE = [-0.49129074352657925, 0.6945107437065406, 0.9036418225662604]


def test_tokens_are_plain_values() -> None:
    (token,) = Sampler(5).sample(torch.zeros(1, 5), [spec()], [0])
    assert token == SampledToken(0, pytest.approx(-math.log(5)))
    assert (type(token.token_id), type(token.logprob)) == (int, float)

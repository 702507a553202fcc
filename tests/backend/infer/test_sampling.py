"""Sampling in both backends against a float64 oracle, transformers' processors, and chi-square over many draws."""

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
from tests.backend.frameworks import NAMES, make, normal
from tests.backend.specs import SIZE, mask_of, mixed_specs, spec
from tests.backend.tolerances import BORDER, DRAW

# Multiples of 1/1024: their differences are exact, so that equal logits, and no others, stay equal in either order.
logit_rows = hnp.arrays(
    np.float32, st.integers(1, 30), elements=st.integers(-12 * 1024, 12 * 1024).map(lambda number: number / 1024)
)
probabilities = st.floats(0.01, 0.999)


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


def distribution(framework, logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    return framework.distributions(logits_V[None], [params])[0]


def near_a_border(logits_V: np.ndarray, params: SamplingParams, within: float) -> bool:
    """Whether rounding, rather than the rule, decides what is kept."""
    share = np.sort(oracle(logits_V, SamplingParams(temperature=params.temperature, top_k=params.top_k)))[::-1]
    at_p = np.abs(np.cumsum(share) - params.top_p).min() < within if params.top_p < 1 else False
    at_min = np.abs(share - params.min_p * share[0]).min() < within * share[0] if params.min_p else False
    return bool(at_p or at_min)


def sample(framework, logits_RV, specs, names=None, sampler=None) -> list[SampledToken]:
    """By a sampler of its own unless one is given; each row is another sequence unless `names` says otherwise."""
    logits_RV = np.asarray(logits_RV, dtype=np.float32)
    sampler = sampler or framework.sampling.Sampler(logits_RV.shape[1])
    return sampler.sample(framework.array(logits_RV), specs, range(len(specs)) if names is None else names)


truncations = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 35),
    top_p=st.one_of(st.just(1.0), probabilities),
    min_p=st.one_of(st.just(0.0), probabilities),
)


@given(logits=logit_rows, params=st.lists(truncations, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_the_kept_tokens_and_their_masses_are_the_oracles(framework, logits, params) -> None:
    rows, tolerance = np.stack([np.roll(logits, row) for row in range(len(params))]), DRAW[framework.name]
    for row, got, each in zip(rows, framework.distributions(rows, params), params, strict=True):
        expected = oracle(row, each)
        if not near_a_border(row, each, BORDER[framework.name]):
            np.testing.assert_array_equal(got > 0, expected > 0)
            np.testing.assert_allclose(got, expected, atol=tolerance)
        assert got.sum() == pytest.approx(1)
        assert got[row >= row.max() - 1e-6].max() > 0


@given(logits=logit_rows, temperature=st.floats(0.05, 10))
@settings(deadline=None)
def test_temperature_alone_is_softmax_of_logits_over_temperature(framework, logits, temperature) -> None:
    exact = torch.softmax(torch.from_numpy(logits).double() / temperature, dim=-1).numpy()
    found = distribution(framework, logits, SamplingParams(temperature=temperature))
    np.testing.assert_allclose(found, exact, rtol=DRAW[framework.name], atol=1e-300)


@given(logits=logit_rows, p=probabilities)
@settings(deadline=None)
def test_the_nucleus_is_the_smallest_set_with_the_mass(framework, logits, p) -> None:
    full, kept = (distribution(framework, logits, each) for each in (SamplingParams(), SamplingParams(top_p=p)))
    kept, within = kept > 0, DRAW[framework.name]
    assert full[kept].sum() >= p - within
    assert full[kept].sum() - full[kept].min() < p + within  # without its rarest token it would not suffice
    assert kept.all() or full[kept].min() >= full[~kept].max()


@given(logits=logit_rows, p=probabilities, q=probabilities, k=st.integers(1, 30), j=st.integers(1, 30))
@settings(deadline=None)
def test_a_stricter_setting_keeps_a_subset(framework, logits, p, q, k, j) -> None:
    (p, q), (k, j) = sorted((p, q)), sorted((k, j))
    for strict, loose in (
        (SamplingParams(top_p=p), SamplingParams(top_p=q)),
        (SamplingParams(top_k=k), SamplingParams(top_k=j)),
        (SamplingParams(min_p=q), SamplingParams(min_p=p)),
    ):
        kept, kept_loosely = (distribution(framework, logits, each) > 0 for each in (strict, loose))
        assert not (kept & ~kept_loosely).any()


@given(data=st.data(), logits=hnp.arrays(np.float32, 20, elements=st.floats(-8, 8, width=32), unique=True))
@settings(deadline=None)
def test_renumbering_the_tokens_renumbers_the_distribution(framework, data: st.DataObject, logits) -> None:
    order = np.array(data.draw(st.permutations(range(20))))
    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.8, min_p=0.05)
    if not near_a_border(logits, params, BORDER[framework.name]):
        found, plain = (distribution(framework, each, params) for each in (logits[order], logits))
        np.testing.assert_allclose(found, plain[order], atol=DRAW[framework.name])


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0, 3.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_sorting_all_of_it(framework, spread: float) -> None:
    logits_RV = np.random.default_rng(2).normal(0, spread, (3, 20_000)).round(1).astype(np.float32)  # with many ties
    params = [SamplingParams(top_p=p) for p in (0.1, 0.6, 0.97)]
    for got, logits_V, each in zip(framework.distributions(logits_RV, params), logits_RV, params, strict=True):
        share = np.exp(logits_V.astype(float) - logits_V.max())
        order = np.argsort(-share, kind="stable")
        before = np.cumsum(share[order] / share.sum()) - share[order] / share.sum()
        needed = order[before < each.top_p]
        assert abs(len(needed) - (got > 0).sum()) <= 1  # a sum in another order may differ in its last digits
        kept = np.flatnonzero(got)
        assert set(needed[: len(kept)].tolist()) == set(kept.tolist()) or set(kept[:-1]) <= set(needed)


def test_of_equal_tokens_the_nucleus_keeps_the_first(framework) -> None:
    found = distribution(framework, np.zeros(8, np.float32), SamplingParams(top_p=0.5))
    assert (found > 0).tolist() == [True] * 4 + [False] * 4


TRANSFORMERS_KNOWS = [
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.85),
    SamplingParams(min_p=0.08),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.4, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(temperature=0.5, top_k=50, top_p=0.6, repetition_penalty=0.8),
]


def test_distributions_equal_those_of_transformers(framework) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    history = torch.tensor([[3, 5, 5, 60, 199]])
    rows = len(TRANSFORMERS_KNOWS)
    logits_RV = torch.randn(rows, 200, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    seen_RV = np.zeros((rows, 200), dtype=bool)
    seen_RV[:, history[0]] = True
    got_RV = framework.distributions(logits_RV.numpy(), TRANSFORMERS_KNOWS, seen_RV)
    for row, params in enumerate(TRANSFORMERS_KNOWS):
        expected = processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, logits_RV[[row]])
        expected = processors.TemperatureLogitsWarper(params.temperature)(history, expected)
        if params.top_k:
            expected = processors.TopKLogitsWarper(params.top_k)(history, expected)
        if params.top_p < 1:
            expected = processors.TopPLogitsWarper(params.top_p)(history, expected)
        if params.min_p:
            expected = processors.MinPLogitsWarper(params.min_p)(history, expected)
        tolerance = min(100 * DRAW[framework.name], 1e-5)
        np.testing.assert_allclose(got_RV[row], expected.softmax(-1)[0], rtol=tolerance, atol=tolerance / 1e4)
        assert 0 < (got_RV[row] > 0).sum() <= 200


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=8, top_p=0.9, min_p=0.03)],
    ids=str,
)
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_many_draws_follow_the_distribution(framework, params: SamplingParams, varied: str) -> None:
    logits_V = np.linspace(0, 3, 16).astype(np.float32)[np.random.default_rng(1).permutation(16)]
    expected = oracle(logits_V, params)
    draws = 20_000
    asked = [SampleSpec(params, 11, i) if varied == "position" else SampleSpec(params, i, 11) for i in range(draws)]
    tokens = sample(framework, np.broadcast_to(logits_V, (draws, 16)), asked)
    counts = np.bincount([token.token_id for token in tokens], minlength=16)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Chi-square with 15 degrees of freedom exceeds 45 once in 13,000 times; fewer degrees, less often.
    assert chi_square(counts[kept], draws * expected[kept]) < 45


# --- whole rows: one call, everything different ------------------------------------------------------------


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
def test_rows_that_differ_in_everything_each_get_the_oracles_token(framework, asked, numbers) -> None:
    logits_RV = np.random.default_rng(numbers.randrange(2**32)).normal(0, 3, (len(asked), SIZE)).astype(np.float32)
    specs = [spec for spec, _ in asked]
    tokens = sample(framework, logits_RV, specs)
    noise_RV = framework.noise_of([each.seed for each in specs], [each.position for each in specs], SIZE)
    logprobs_RV = torch.from_numpy(logits_RV).double().log_softmax(-1).numpy()
    for row, ((asked_for, allowed), token) in enumerate(zip(asked, tokens, strict=True)):
        with np.errstate(divide="ignore"):
            scores_V = np.log(oracle(logits_RV[row], asked_for, allowed))
        assert token.token_id == (scores_V + noise_RV[row]).argmax()
        assert token.logprob == pytest.approx(logprobs_RV[row, token.token_id], abs=1e-5)
        likeliest = np.argsort(-logprobs_RV[row])[: asked_for.params.top_logprobs]
        assert [i for i, _ in token.top] == likeliest.tolist()
        np.testing.assert_allclose([p for _, p in token.top], logprobs_RV[row, likeliest], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_gets_the_same_token_alone_and_in_any_batch(framework, precision) -> None:
    specs, numbers, logits_RV = mixed_specs(), [*range(7)], normal(7, SIZE, scale=2)

    def drawn(rows, sampler=None):
        given = framework.array(logits_RV[rows], precision)
        before = framework.numbers(given)
        sampler = sampler or framework.sampling.Sampler(SIZE)
        found = sampler.sample(given, [specs[row] for row in rows], rows)
        assert np.array_equal(framework.numbers(given), before), "the caller's logits are left alone"
        return found

    together, sampler = drawn(numbers), framework.sampling.Sampler(SIZE)
    assert together == [drawn([row])[0] for row in numbers]
    assert together[::-1] == drawn(numbers[::-1], sampler)
    assert together == drawn(numbers, sampler)  # nothing was used up
    assert together * 3 == drawn(numbers * 3, sampler)


def greedy(framework, logits: list[list[float]], *specs: SampleSpec) -> list[int]:
    return [token.token_id for token in sample(framework, logits, specs)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_greedy_takes_the_first_of_the_largest_in_every_type(framework, precision) -> None:
    logits_RV = framework.array(np.array([[0.0, 2.0, 2.0, -1.0]], np.float32), precision)
    for each in (spec(), dataclasses.replace(spec(), banned=(0,))):
        assert framework.sampling.Sampler(4).sample(logits_RV, [each], [0])[0].token_id == 1


def test_greedy_heeds_the_repetition_penalty(framework) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert greedy(framework, [[1.5, 2.0, 0.0, -1.0]], spec(params, (1, 1, 3))) == [0]
    seen_RV = np.array([[False, True, False, True]])
    logits_RV, seen_RV, outputs_RV = map(framework.array, (np.array([[1.5, 2.0, 0.0, -1.0]]), seen_RV, 1 * seen_RV))
    columns = framework.sampling.Columns([params])
    penalized = framework.sampling.penalize(logits_RV, seen_RV, outputs_RV, columns)
    assert framework.numbers(penalized).tolist() == [[1.5, 1.0, 0.0, -2.0]]


def test_presence_and_frequency_count_the_output_alone_and_repetition_the_prompt_too(framework) -> None:
    logits = [[5.0, 4.9, 4.8, 4.0]]
    presence, frequency = (SamplingParams(temperature=0, **{f"{x}_penalty": 0.15}) for x in ("presence", "frequency"))
    assert greedy(framework, logits, spec(presence, (0, 0), 2)) == [0]  # all of it is the prompt's
    assert greedy(framework, logits, spec(presence, (0, 0, 0), 1)) == [1]  # once, however often it came
    assert greedy(framework, logits, spec(frequency, (0, 0, 1), 1)) == [0]  # 4.85 to 4.75 and 4.8
    assert greedy(framework, logits, spec(frequency, (1, 0, 1, 0), 1)) == [2]  # 4.7 and 4.75 to 4.8
    repetition = SamplingParams(temperature=0, repetition_penalty=1.03)
    assert greedy(framework, logits, spec(repetition, (0,), 1)) == [1]


def test_bias_comes_before_penalties_and_a_ban_after_both(framework) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=4.0, logit_bias={0: 4.0})
    assert greedy(framework, [[1.0, 1.2]], spec(params, (0,), 1)) == [
        0
    ]  # (1 + 4) / 4 = 1.25; after them it would be 4.25
    assert greedy(framework, [[0.1, 1.2]], spec(params, (0,), 1)) == [
        1
    ]  # (0.1 + 4) / 4 = 1.025; after them it would be 4.025
    banned = dataclasses.replace(spec(SamplingParams(temperature=0, logit_bias={0: 1e6})), banned=(0,))
    assert greedy(framework, [[0.0, 1.0]], banned) == [1]


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_and_finite(framework, temperature: float) -> None:
    assert greedy(framework, [[-300.0, 250.0, 300.0, 120.0]], spec(SamplingParams(temperature=temperature))) == [2]


def test_a_vast_temperature_is_uniform(framework) -> None:
    flat = distribution(framework, np.array([-300.0, 0.0, 300.0], np.float32), SamplingParams(temperature=1e300))
    np.testing.assert_allclose(flat, np.full(3, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 97])
def test_the_bits_of_a_mask_are_taken_in_order(framework, size: int) -> None:
    ids = set(np.flatnonzero(np.random.default_rng(size).random(size) < 0.5).tolist())
    words = mask_of(ids, size) | (np.int32(-1) << np.int32(size % 32) if size % 32 and size > 32 else np.int32(0))
    given = framework.array(np.stack([words, mask_of(set(range(size)), size)]))
    got = framework.numbers(framework.sampling.unpack_bits(given, size)) > 0
    assert set(np.flatnonzero(got[0]).tolist()) >= ids
    assert [bool(word >> bit & 1) for word in words.tolist() for bit in range(32)][:size] == got[0].tolist()
    assert got[1].all()


def test_as_many_likeliest_tokens_as_each_row_asks_for_and_no_more_than_there_are(framework) -> None:
    wanted = [0, 2, 100]
    specs = [spec(SamplingParams(temperature=t, top_logprobs=n)) for n in wanted for t in (0, 1)]
    tokens = sample(framework, normal(6, 5), specs)
    assert [len(token.top) for token in tokens] == [0, 0, 2, 2, 5, 5]
    assert all(math.fsum(math.exp(p) for _, p in token.top) == pytest.approx(1, abs=1e-6) for token in tokens[4:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)], ids=str
)
@pytest.mark.parametrize("banned", [(), (3,)])
def test_logits_that_are_not_finite_are_an_error_of_their_row(framework, bad, params, banned) -> None:
    logits_RV = np.zeros((2, 5), np.float32)
    logits_RV[1, 3] = bad
    specs = [SampleSpec(params, 1, 1, banned=banned)] * 2
    good, broken = sample(framework, logits_RV, specs)
    assert good == sample(framework, logits_RV[:1], specs[:1])[0]
    assert not good.error
    assert broken.error.startswith("the model's logits are not finite")


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5)], ids=str)
@pytest.mark.parametrize(("banned", "allowed"), [((0, 1, 2, 3, 4), None), ((2,), {2}), ((), set())])
def test_no_token_left_is_an_error_in_a_line(framework, params, banned, allowed) -> None:
    mask = None if allowed is None else mask_of(allowed, 5)
    (token,) = sample(framework, np.zeros((1, 5)), [SampleSpec(params, 1, 1, banned=banned, allowed=mask)])
    assert token.error == "no token may come next: the banned tokens and the grammar leave none"


def test_a_bias_outside_the_vocabulary_is_refused(framework) -> None:
    with pytest.raises(ValueError, match="logit_bias has token id 5, but this model's ids are 0 to 4"):
        sample(framework, np.zeros((1, 5)), [spec(SamplingParams(logit_bias={5: 1.0}))])


def test_no_rows_give_no_tokens(framework) -> None:
    assert sample(framework, np.zeros((0, 5)), []) == []


# --- counts of the history ------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_penalties_are_right_whatever_became_of_the_sequences(framework, data: st.DataObject) -> None:
    """Sequences grow, shrink, change, fork, go and come back, in a call and between calls."""
    sampler, size = framework.sampling.Sampler(12), 12
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
        logits_RV = np.broadcast_to(logits_V, (len(specs), size))
        tokens = sample(framework, logits_RV, specs, [name for name, _ in asked], sampler)
        for got, each in zip(tokens, specs, strict=True):
            wanted = oracle(logits_V, each).argmax()
            assert got.token_id == wanted, (each.history, each.prompt_length)


def test_a_prompt_may_have_become_longer_or_shorter_under_the_same_history(framework) -> None:
    """As where a number is given to another request that takes up the first one's text."""
    sampler, params = framework.sampling.Sampler(2), SamplingParams(temperature=0, presence_penalty=1.0)
    for prompt_length, wanted in ((2, 0), (1, 1), (2, 0)):
        (token,) = sample(framework, [[1.0, 0.5]], [spec(params, (0, 0), prompt_length)], [3], sampler)
        assert token.token_id == wanted


# --- noise ------------------------------------------------------------


def uniform(framework, seeds: list[int], positions: list[int], size: int) -> np.ndarray:
    return np.exp(-np.exp(-framework.noise_of(seeds, positions, size)))


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


def test_noise_is_the_hash_in_plain_whole_numbers(framework) -> None:
    seeds, positions = [0, 1, 2**63, 2**64 - 1, 12345678901234567890], [0, 1, 131071, 2**40, 7]
    got = framework.noise_of(seeds, positions, 40)
    assert got.dtype == np.float64
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        expected = [slow_noise(seed, position, token_id) for token_id in range(40)]
        np.testing.assert_allclose(got[row], expected, rtol=1e-12)


def test_noise_is_that_of_this_seed_and_position_for_good(framework) -> None:
    """Seeds are promised to give the same text later: these values may not change."""
    np.testing.assert_allclose(framework.noise_of([2**64 - 1], [7], 3)[0], PINNED_NOISE, rtol=1e-12)


def test_noise_does_not_depend_on_the_size_of_the_vocabulary_or_the_batch(framework) -> None:
    whole = framework.noise_of([5, 6], [1, 2], 1000)
    np.testing.assert_array_equal(framework.noise_of([6], [2], 10)[0], whole[1, :10])
    np.testing.assert_array_equal(framework.noise_of([5, 6], [1, 2], 1000, [4, 999]), whole[:, [4, 999]])


COORDINATES = {
    "ids": ([3], [5], 400_000),
    "positions": ([3] * 20_000, list(range(20_000)), 20),
    "seeds": (list(range(20_000)), [3] * 20_000, 20),
    "high seeds": ([i << 44 for i in range(20_000)], [3] * 20_000, 20),
}


@pytest.mark.parametrize("along", COORDINATES)
def test_noise_is_uniform_underneath_in_its_middle_its_tails_and_its_lowest_bits(framework, along: str) -> None:
    numbers = uniform(framework, *COORDINATES[along]).ravel()
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


def test_noise_is_fine_far_out_in_its_tail(framework) -> None:
    """A token of one in a billion is drawn that often only if the largest values of the noise are that fine."""
    largest = np.sort(framework.noise_of([1] * 60, list(range(60)), 50_000).ravel())[-200:]
    assert len(np.unique(largest)) == 200
    assert 13 < largest[-1] < 25  # about log(3e6) = 14.9
    assert slow_noise(0, 0, 0) < -math.log(-math.log(1 - 2**-53)) < 37


@pytest.mark.parametrize("along", ["positions", "seeds", "ids", "diagonal"])
@pytest.mark.parametrize("apart", [1, 2, 7])
def test_neighbours_are_independent(framework, along: str, apart: int) -> None:
    """Pairs of neighbouring numbers fill a grid of 20 x 20 evenly, and their ranks have no correlation."""
    seeds, positions = ([9] * 600, range(600)) if along == "positions" else (range(600), [9] * 600)
    if along == "diagonal":
        seeds, positions = range(600), range(600, 0, -1)
    table = uniform(framework, list(seeds), list(positions), 500)
    first, second = (table[:, :-apart], table[:, apart:]) if along == "ids" else (table[:-apart], table[apart:])
    pairs = ((first * 20).astype(int) * 20 + (second * 20).astype(int)).ravel()
    counts = np.bincount(pairs, minlength=400)
    assert abs(chi_square(counts, np.full(400, pairs.size / 400)) - 399) < 5 * math.sqrt(2 * 399)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(pairs.size)


def test_every_bit_of_a_seed_and_of_a_position_changes_everything(framework) -> None:
    base = uniform(framework, [0x0123456789ABCDEF], [1000], 4000)[0]
    flipped = uniform(framework, [0x0123456789ABCDEF ^ 1 << bit for bit in range(64)], [1000] * 64, 4000)
    moved = uniform(framework, [0x0123456789ABCDEF] * 40, [1000 ^ 1 << bit for bit in range(40)], 4000)
    for other in (*flipped, *moved):
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(4000)
        assert not (base == other).any()


def test_swapping_seed_and_position_gives_other_noise(framework) -> None:
    assert not (framework.noise_of([3], [8], 100) == framework.noise_of([8], [3], 100)).any()


PINNED_NOISE = [-0.49129074352657925, 0.6945107437065406, 0.9036418225662604]


def test_tokens_are_plain_values(framework) -> None:
    (token,) = sample(framework, np.zeros((1, 5)), [spec()])
    assert token == SampledToken(0, pytest.approx(-math.log(5)))
    assert (type(token.token_id), type(token.logprob)) == (int, float)


# --- both backends beside each other ------------------------------------------------------------


def test_the_noise_of_both_backends_is_the_same() -> None:
    seeds, positions = [0, 1, 2**63, 2**64 - 1, 12345678901234567890], [0, 1, 131071, 2**40, 7]
    frameworks = [make(name) for name in NAMES]
    keys = [np.asarray(each.noise.stream_keys(seeds, positions)).view(np.int64) for each in frameworks]
    np.testing.assert_array_equal(*keys)
    ours, theirs = (each.noise_of(seeds, positions, 50_000) for each in frameworks)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_a_large_vocabulary_gets_the_same_tokens_in_both_backends(top_p: float, spread: float) -> None:
    """The nucleus of 0.9 lies among the likeliest thousand for a spread of 3, and beyond them for 0.2."""
    logits_RV = np.random.default_rng(0).normal(0, 3, (6, 20_000)).astype(np.float32) * np.float32(spread / 3)
    params = SamplingParams(top_p=top_p, temperature=0.9, top_logprobs=3)
    specs = [
        SampleSpec(dataclasses.replace(params, top_k=k), 3, row) for row, k in enumerate((0, 2**63, 5000, 50, 1, 0))
    ]
    pairs = zip(*(sample(make(name), logits_RV, specs) for name in NAMES), strict=True)
    for one, other in pairs:
        assert one.token_id == other.token_id
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
        np.testing.assert_allclose(
            [one.logprob, *(p for _, p in one.top)], [other.logprob, *(p for _, p in other.top)], atol=1e-5
        )

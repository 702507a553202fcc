"""What requests get of the engine: endings, limits, refusals in one line, continuations, and counts that add up."""

from collections.abc import Sequence
from itertools import starmap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.backend.interface import LONGEST_CHUNK
from llamita.backend.sampling_params import MAX_SEED, SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import PromptTarget, Request
from llamita.model.config import ModelConfig
from tests.inference.hash_model import (
    POSITIONS,
    HashRunner,
    alone,
    expected,
    expected_scores,
    expected_targets,
    serve,
    shape,
)

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


def definition(prompt: Sequence[int] = PROMPT, config: ModelConfig | None = None, **params: Any) -> list:
    return expected(prompt, SamplingParams(**{"seed": 1, "max_tokens": 12, **params}), config or shape())


def lengths(runner: HashRunner) -> list[int]:
    return [len(chunk.tokens) for plan in runner.recorded for chunk in plan.chunks]


def test_each_token_is_run_once_and_the_last_one_never() -> None:
    runner = HashRunner()
    answer = alone(PROMPT, runner, EngineConfig(prefill_tokens=4))
    assert answer.said == definition()
    run = [token for plan in runner.recorded for chunk in plan.chunks for token in chunk.tokens]
    assert run == [*PROMPT, *answer.tokens[:-1]]
    assert lengths(runner) == [4, 4, 2] + [1] * 11
    assert [len(plan.chunks[0].samples) for plan in runner.recorded] == [0, 0] + [1] * 12


@pytest.mark.parametrize("window", [0, 20])
def test_no_chunk_is_longer_than_the_longest(window: int) -> None:
    runner = HashRunner(shape(window, positions=3000))
    prompt = tuple(place % 50 for place in range(1100))
    answer = alone(prompt, runner, EngineConfig(prefill_tokens=2000), max_tokens=2)
    assert lengths(runner) == [LONGEST_CHUNK, LONGEST_CHUNK, 76, 1]
    assert answer.said == definition(prompt, runner.config, max_tokens=2)


def test_max_tokens_ends_with_length() -> None:
    assert [event.finish_reason for event in alone(PROMPT, max_tokens=3).events] == [None, None, "length"]


def test_generation_past_the_models_positions_is_cut_and_ends_with_length() -> None:
    answer = alone(PROMPT, max_tokens=2**63)
    assert len(PROMPT) + len(answer.said) == POSITIONS
    assert answer.reason == "length"
    assert len(alone((1,) * (POSITIONS - 1)).said) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, ()), "the prompt is empty"),
        (Request(0, (1,) * 96), r"has 96 tokens, but this model has 96 positions .* at most 95"),
        (Request(0, (1,) * 1000), "has 1000 tokens"),
        (Request(0, (1,) * 64), "has 64 tokens, and the memory holds 64"),
        (Request(0, (1, 50)), "the prompt has token id 50, but this model's ids are 0 to 49"),
        (Request(0, (-1,)), "token id -1"),
        (Request(0, (1, 2.5)), "token id 2.5"),
        (Request(0, (1, "2")), "token id '2'"),
        (Request(0, PROMPT, SamplingParams(logit_bias={50: 1.0})), "logit_bias has token id 50"),
        (Request(0, PROMPT, SamplingParams(stop_token_ids=(99,))), "stop_token_ids has token id 99"),
        (Request(0, PROMPT, SamplingParams(n=5)), "n=5 is more than the 4 sequences"),
        (Request(0, PROMPT, SamplingParams(stop=("x",))), "stop strings need a tokenizer"),
        (Request(0, PROMPT, SamplingParams(choices=("x",))), "structured output needs a tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(request_: Request, message: str) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(blocks=4, max_sequences=4))
    with pytest.raises(ValueError, match=message) as error:
        engine.add(request_)
    assert "\n" not in str(error.value)
    assert not engine.has_work
    assert serve(engine, [Request(0, PROMPT, SamplingParams(seed=1, max_tokens=12))])[0, 0].said == definition()


@pytest.mark.parametrize(
    ("field", "value"), [("max_sequences", 0), ("block_size", 0), ("blocks", -1), ("prefill_tokens", 1.5)]
)
def test_an_engines_limits_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value} is not allowed; give a whole number >= "):
        EngineConfig(**{field: value})


def test_a_classifier_cannot_generate() -> None:
    config = ModelConfig(50, 8, 8, 1, 1, 1, POSITIONS, num_labels=2)
    with pytest.raises(ValueError, match="classification head and cannot generate"):
        Engine(HashRunner(config))


def test_an_eos_token_ends_the_request_unless_ignored() -> None:
    def endings(eos: tuple[int, ...], **params: Any) -> list[tuple[int | None, str | None]]:
        engine = Engine(HashRunner(script=[7, 8, 9, 2, 4]), eos_token_ids=eos)
        request = Request(0, PROMPT, SamplingParams(max_tokens=5, **params))
        return [(event.token_id, event.finish_reason) for event in serve(engine, [request])[0, 0].events]

    whole = [(7, None), (8, None), (9, None), (2, None), (4, "length")]
    assert endings((2,)) == [(7, None), (8, None), (9, None), (2, "stop")]
    assert endings((2, 8)) == [(7, None), (8, "stop")]
    assert endings((2, 8), ignore_eos=True) == endings(()) == whole
    assert endings((), stop_token_ids=(9,)) == endings((9,), ignore_eos=True, stop_token_ids=(9,))
    assert endings((), stop_token_ids=(9,)) == [(7, None), (8, None), (9, "stop")]
    assert endings((4,)) == [*whole[:-1], (4, "stop")]  # a stop token at the last place is a stop


@pytest.mark.parametrize("eos", [5, (4, 5), None])
def test_eos_comes_from_the_models_config(eos: int | tuple[int, ...] | None) -> None:
    config = ModelConfig(50, 8, 8, 1, 1, 1, POSITIONS, bos_token_id=1, eos_token_id=eos)
    assert len(alone(PROMPT, HashRunner(config, script=[3, 5, 6]), max_tokens=3).said) == (3 if eos is None else 2)


@given(least=st.integers(0, 20), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_no_end_comes_before_min_tokens(least: int, seed: int) -> None:
    config, eos = shape(vocabulary=10), (2,)
    params = SamplingParams(seed=seed, max_tokens=20, min_tokens=least, stop_token_ids=(3,))
    answer = serve(Engine(HashRunner(config), eos_token_ids=eos), [Request(0, PROMPT, params)])[0, 0]
    assert answer.said == expected(PROMPT, params, config, eos)
    assert not {2, 3} & set(answer.tokens[:least])


@pytest.mark.parametrize(
    "config", [EngineConfig(), EngineConfig(block_size=3, blocks=12), EngineConfig(max_sequences=4)]
)
def test_n_continuations_are_n_requests_with_seeds_in_a_row(config: EngineConfig) -> None:
    for seed in (5, MAX_SEED - 1):
        params = SamplingParams(seed=seed, n=4, max_tokens=20, prompt_logprobs=True)
        answers = serve(Engine(HashRunner(), config=config), [Request(9, PROMPT, params)])
        assert sorted(answers) == [(9, index) for index in range(4)]
        for index in range(4):
            one = alone(PROMPT, seed=(seed + index) & MAX_SEED, max_tokens=20, prompt_logprobs=True)
            assert answers[9, index].said == one.said
            assert answers[9, index].events[0].prompt_logprobs == one.events[0].prompt_logprobs != ()
            assert answers[9, index].events[0].statistics.seed == (seed + index) & MAX_SEED


def test_a_seed_is_kept_and_without_one_each_request_draws_its_own() -> None:
    assert alone(PROMPT, seed=1).said == alone(PROMPT, seed=1).said != alone(PROMPT, seed=2).said
    answers = serve(Engine(HashRunner()), [Request(i, PROMPT, SamplingParams(max_tokens=4)) for i in range(4)])
    seeds = {answer.events[0].statistics.seed: answer for answer in answers.values()}
    assert len(seeds) == 4
    assert all(answer.said == definition(seed=seed, max_tokens=4) for seed, answer in seeds.items())


@pytest.mark.parametrize(
    "config", [EngineConfig(), EngineConfig(prefill_tokens=3), EngineConfig(block_size=1, blocks=30)]
)
def test_prompt_logprobs_come_with_the_first_event_and_are_those_of_a_cold_run(config: EngineConfig) -> None:
    engine = Engine(HashRunner(), config=config)
    params = SamplingParams(seed=1, max_tokens=9, prompt_logprobs=True)
    for _ in range(2):  # the second finds its prompt in the prefix cache
        answers = serve(engine, [Request(i, PROMPT[: 10 - i], params) for i in range(5)])
        for (i, _), answer in answers.items():
            assert list(answer.events[0].prompt_logprobs) == expected_scores(PROMPT[: 10 - i], shape())
            assert not any(event.prompt_logprobs for event in answer.events[1:])
            assert answer.said == definition(PROMPT[: 10 - i], max_tokens=9)


@pytest.mark.parametrize(
    "config", [EngineConfig(), EngineConfig(prefill_tokens=3), EngineConfig(block_size=1, blocks=30)]
)
def test_targets_are_judged_at_their_positions_whatever_is_cached(config: EngineConfig) -> None:
    engine = Engine(HashRunner(), config=config)
    asked = [(1, 7), (4, 5), (4, 1), (9, 3), (10, 0), (10, 49)]
    params = SamplingParams(seed=1, max_tokens=3)
    for first in (5, 0, 3, 0):  # what is asked for later finds more in the prefix cache
        request = Request(first, PROMPT, params, targets=tuple(starmap(PromptTarget, asked[first:])))
        events = serve(engine, [request])[first, 0].events
        assert list(events[0].prompt_logprobs) == expected_targets(request, shape())
        assert [event.token_id for event in events] == [token for token, _ in definition(max_tokens=3)]
        assert not any(event.prompt_logprobs for event in events[1:])


@pytest.mark.parametrize(("position", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8)])
def test_all_full_blocks_before_the_first_target_may_be_cached(position: int, cached: int) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(block_size=4))
    params = SamplingParams(seed=1, max_tokens=1)
    serve(engine, [Request(0, PROMPT, params)])
    request = Request(1, PROMPT, params, targets=(PromptTarget(position, 3), PromptTarget(10, 1)))
    (event,) = serve(engine, [request])[1, 0].events
    assert event.statistics.cached_tokens == cached
    assert list(event.prompt_logprobs) == expected_targets(request, shape())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([(0, 1)], "in the order of their positions, from 1 to the prompt's length of 10"),
        ([(3, 1), (2, 1)], "in the order of their positions"),
        ([(3, 1), (11, 1)], "from 1 to the prompt's length of 10"),
        ([(3, 50)], "a target has token id 50, but this model's ids are 0 to 49"),
        ([(3, -1)], "a target has token id -1"),
    ],
)
def test_targets_that_cannot_be_judged_are_refused(targets: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(HashRunner()).add(Request(0, PROMPT, targets=tuple(starmap(PromptTarget, targets))))
    both = Request(0, PROMPT, SamplingParams(prompt_logprobs=True), targets=(PromptTarget(1, 1),))
    with pytest.raises(ValueError, match="give one of them"):
        Engine(HashRunner()).add(both)


# --- what is counted --------------------------------------------------------------------------------------------------


def test_statistics_add_up() -> None:
    statistics = alone(PROMPT, seed=9, max_tokens=6).events[-1].statistics
    assert (statistics.seed, statistics.prompt_tokens, statistics.cached_tokens) == (9, 10, 0)
    assert (statistics.generated_tokens, statistics.decode_tokens) == (6, 5)
    # Decoding reads all weights, and the keys and values of the token itself and of all before it.
    assert statistics.decode_bytes == 5 * 1000 + 10 * (11 + 12 + 13 + 14 + 15)
    assert statistics.prefill_seconds > 0
    assert statistics.decode_tokens_per_second == pytest.approx(5 / statistics.decode_seconds)
    assert statistics.decode_bytes_per_second == pytest.approx(statistics.decode_bytes / statistics.decode_seconds)
    assert statistics.prefill_tokens_per_second == pytest.approx(10 / statistics.prefill_seconds)


@pytest.mark.parametrize(("length", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (10, 8)])
def test_cached_tokens_are_the_full_blocks_before_the_last_prompt_token(length: int, cached: int) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(block_size=4))
    params = SamplingParams(seed=1, max_tokens=1)
    answers = serve(engine, [Request(0, PROMPT, params)]) | serve(engine, [Request(1, PROMPT[:length], params)])
    statistics = answers[1, 0].events[-1].statistics
    assert statistics.cached_tokens == cached
    assert statistics.prefill_tokens_per_second == pytest.approx((length - cached) / statistics.prefill_seconds)
    forks = serve(engine, [Request(2, PROMPT, SamplingParams(seed=1, max_tokens=1, n=2))])
    for index in range(2):
        one = forks[2, index].events[-1].statistics
        assert (one.cached_tokens, one.queue_seconds > 0, one.prefill_seconds > 0) == (8, True, True)


def test_what_a_request_computed_before_it_was_preempted_is_not_called_cached() -> None:
    engine = Engine(HashRunner(), config=EngineConfig(block_size=2, prefill_tokens=4))
    engine.add(Request(0, PROMPT, SamplingParams(seed=1, max_tokens=2)))
    engine.step()
    (sequence,) = engine.scheduler.running
    queued = sequence.statistics.queue_seconds
    engine.scheduler._preempt(sequence)
    statistics = serve(engine)[0, 0].events[-1].statistics
    assert (statistics.cached_tokens, statistics.preemptions, statistics.queue_seconds) == (0, 1, queued)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_counters_are_the_sums_of_what_each_request_reports(data: st.DataObject) -> None:
    runner = HashRunner(shape(vocabulary=3))
    config = EngineConfig(block_size=2, blocks=data.draw(st.integers(20, 60)))
    engine = Engine(runner, config=config)
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=6))
    answers = serve(engine, [Request(i, tuple(p), SamplingParams(max_tokens=6)) for i, p in enumerate(prompts)])
    statistics = [answer.events[-1].statistics for answer in answers.values()]
    for (i, _), answer in answers.items():
        assert answer.events[-1].statistics.generated_tokens == len(answer.said)
        assert answer.events[-1].statistics.prompt_tokens == len(prompts[i])
    assert sum(one.preemptions for one in statistics) == engine.scheduler.preemptions
    if not engine.scheduler.preemptions:
        assert sum(lengths(runner)) == sum(
            one.prompt_tokens - one.cached_tokens + one.decode_tokens for one in statistics
        )

"""Whatever the engine does with its memory and its batches, each request gets the tokens it would get alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.block_manager import Prefixes, chained_key
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.config import ModelConfig
from tests.inference.hash_model import HashRunner, Said, alone, check_invariants, expected, serve, shape
from tests.inference.workloads import (
    BEGINNING,
    BLOCK_SIZES,
    DRAFTERS,
    arrivals,
    drafter,
    judge,
    limits,
    play,
    prompts,
    sampling,
    servable,
    shapes,
)

some = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)
Plan = list[tuple[int, Request]]


def outcome(plan: Plan, config: ModelConfig, limit: EngineConfig, guesses: str = "none") -> Engine:
    """An engine that has served the plan, every answer judged."""
    engine = Engine(HashRunner(config), config=limit, drafter=drafter(guesses, config))
    plan = servable(plan, engine)
    judge(play(engine, plan), [request for _, request in plan], engine)
    return engine


@given(plan=arrivals(), config=shapes, limit=limits())
@some
def test_batched_is_alone(plan: Plan, config: ModelConfig, limit: EngineConfig) -> None:
    outcome(plan, config, limit)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@given(plan=arrivals(), config=shapes, order=st.randoms(use_true_random=False), data=st.data())
@few
def test_paged_is_contiguous(
    block_size: int, plan: Plan, config: ModelConfig, order: random.Random, data: st.DataObject
) -> None:
    engine = Engine(HashRunner(config), config=data.draw(limits((60, 300), block_size)))
    for pool in engine.manager.pools:
        blocks = list(pool.free)
        order.shuffle(blocks)
        pool.free = type(pool.free).fromkeys(blocks)
    plan = servable(plan, engine)
    judge(play(engine, plan), [request for _, request in plan], engine)


@pytest.mark.parametrize("config", [shape(), shape(7), shape(7, 1)], ids=lambda config: str(config.attention_windows))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefix_hit_is_cold_run(block_size: int, config: ModelConfig) -> None:
    params = SamplingParams(seed=1, max_tokens=5)
    for cut in (
        0,
        1,
        2,
        3,
        4,
        14,
        15,
        16,
        17,
        20,
        31,
        32,
        33,
        34,
        35,
    ):  # repeat where it is all of it, else part there, in mid-block or not
        runner = HashRunner(config)
        engine = Engine(runner, config=EngineConfig(block_size=block_size, blocks=200 // block_size))
        prompt = (*BEGINNING[:cut], 9, 8, 7)[: len(BEGINNING)]
        serve(engine, [Request(0, BEGINNING, params)])
        before = len(runner.recorded)
        answer = serve(engine, [Request(1, prompt, params)])[1, 0]
        assert answer.said == expected(prompt, params, config)
        cached = answer.events[-1].statistics.cached_tokens
        assert runner.recorded[before].chunks[0].start == cached < len(prompt)  # the last one is always run again
        assert cached == min(cut, len(prompt) - 1) // block_size * block_size


@pytest.mark.parametrize("full_layers", [0, 1])
def test_a_window_finds_a_prefix_whose_beginning_was_evicted(full_layers: int) -> None:
    config, params = shape(7, full_layers), SamplingParams(seed=1, max_tokens=1)
    engine = Engine(HashRunner(config), config=EngineConfig(block_size=2, blocks=20))
    serve(engine, [Request(0, BEGINNING, params)])
    serve(engine, [Request(1, (9,) * 16, params)])  # takes what was used least recently: a window's first blocks
    answer = serve(engine, [Request(2, BEGINNING, params)])[2, 0]
    assert answer.said == expected(BEGINNING, params, config)
    assert answer.events[-1].statistics.cached_tokens == (24 if full_layers else 34)


@given(
    plan=arrivals(most=5),
    again=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    config=shapes,
    limit=limits((45, 90)),
)
@few
def test_prefix_hit_is_cold_run_after_evictions_and_preemptions(
    plan: Plan, again: list[int], config: ModelConfig, limit: EngineConfig
) -> None:
    repeated = [(20 + 3 * i, plan[number % len(plan)][1]) for i, number in enumerate(again)]
    together = [*plan, *((at, Request(100 + i, one.prompt, one.params)) for i, (at, one) in enumerate(repeated))]
    outcome(together, config, limit)


WEAK_KEYS = {
    "constant": lambda parent, tokens: b"",
    "one bit": lambda parent, tokens: bytes([sum(tokens) % 2]),
    "one block alone": lambda parent, tokens: chained_key(b"", tokens),
    "first byte": lambda parent, tokens: chained_key(parent, tokens)[:1],
}


@pytest.mark.parametrize("key", WEAK_KEYS)
@given(plan=arrivals(), config=shapes, limit=limits((45, 200)))
@few
def test_prefix_key_is_sound(key: str, plan: Plan, config: ModelConfig, limit: EngineConfig) -> None:
    engine = Engine(HashRunner(config), config=limit)
    engine.manager.prefixes = Prefixes(WEAK_KEYS[key])
    plan = servable(plan, engine)
    judge(play(engine, plan), [request for _, request in plan], engine)


def test_prefix_key_covers_the_whole_prefix() -> None:
    params = SamplingParams(seed=1, max_tokens=1)
    engine = Engine(HashRunner(), config=EngineConfig(block_size=4))
    prompts = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (0, 2, 3, 4, 9, 9, 9, 9, 9), (0, 2, 3, 4, 5, 6, 7, 8, 9)]
    answers = [serve(engine, [Request(0, prompt, params)])[0, 0] for prompt in prompts]
    assert [answer.events[-1].statistics.cached_tokens for answer in answers] == [0, 0, 4]
    assert [answer.said for answer in answers] == [expected(prompt, params, shape()) for prompt in prompts]
    assert len(chained_key(b"", [1, 2])) == 32
    assert len({chained_key(parent, tokens) for parent in (b"", b"x") for tokens in ([1, 2], [2, 1], [1])}) == 6


@pytest.mark.parametrize("config", [shape(), shape(5), shape(5, 1)], ids=lambda config: str(config.attention_windows))
def test_chunked_prefill_is_whole(config: ModelConfig) -> None:
    whole = expected(BEGINNING, SamplingParams(seed=1, max_tokens=6), config)
    for size in range(1, len(BEGINNING) + 1):
        runner = HashRunner(config)
        limit = EngineConfig(prefill_tokens=size, block_size=4)
        assert alone(BEGINNING, runner, limit, max_tokens=6).said == whole
        lengths = [len(plan.chunks[0].tokens) for plan in runner.recorded]
        assert lengths == [size] * (35 // size) + [35 % size] * (35 % size > 0) + [1] * 5


@given(late=st.lists(st.tuples(st.integers(3, 12), prompts()), max_size=5), mixed=st.integers(1, 9))
@few
def test_decodes_advance_at_every_step_whatever_prompts_are_read(late: list, mixed: int) -> None:
    runner = HashRunner()
    engine = Engine(runner, config=EngineConfig(prefill_tokens=16, mixed_prefill_tokens=mixed, block_size=4))
    params = SamplingParams(seed=1, max_tokens=40)
    for i in range(3):
        engine.add(Request(i, (i, 1, 2), params))
    engine.step()
    for step in range(1, 40):
        for i, (at, prompt) in enumerate(late):
            if at == step:
                engine.add(Request(10 + i, prompt * 2, params))
        decoding = [one.id for one in engine.scheduler.running if one.is_decoding]
        events = engine.step()
        assert {0, 1, 2} <= {event.request_id for event in events}
        chunks = {chunk.sequence_id: len(chunk.tokens) for chunk in runner.recorded[-1].chunks}
        assert all(chunks.pop(one) == 1 for one in decoding)
        assert sum(chunks.values()) <= max(mixed, len(decoding))
    serve(engine)


def said(engine: Engine, *requests: Request) -> list[list[Said]]:
    answers = serve(engine, requests)
    return [answers[request.id, 0].said for request in requests]


@given(prompt=prompts(), params=sampling(n=1), company=st.lists(prompts(), max_size=6), limit=limits((100, 300)))
@few
def test_seed_is_independent_of_the_batch(
    prompt: tuple[int, ...], params: SamplingParams, company: list[tuple[int, ...]], limit: EngineConfig
) -> None:
    engine = Engine(HashRunner(), config=limit)
    first, *others = said(engine, *(Request(i, one, params) for i, one in enumerate((prompt, *company))))
    assert said(engine, *(Request(i, one, params) for i, one in enumerate((*company, prompt)))) == [*others, first]


@pytest.mark.parametrize("guesses", DRAFTERS)
@given(plan=arrivals(most=5), config=shapes, limit=limits((45, 200)))
@few
def test_speculation_is_neutral(guesses: str, plan: Plan, config: ModelConfig, limit: EngineConfig) -> None:
    outcome(plan, config, limit, guesses)


@pytest.mark.parametrize(
    ("guesses", "least", "most"),
    [("oracle 0", 0, 0), ("oracle 60", 0.2, 0.9), ("oracle 100", 1, 1), ("model 60", 0.2, 0.9), ("model 100", 1, 1)],
)
def test_speculation_keeps_what_was_guessed_right(guesses: str, least: float, most: float) -> None:
    config = shape()
    runner = HashRunner(config)
    engine = Engine(runner, drafter=drafter(guesses, config))
    requests = [Request(i, BEGINNING[i:], SamplingParams(seed=i, max_tokens=50)) for i in range(3)]
    answers = serve(engine, requests)
    judge(answers, requests, engine)
    for answer in answers.values():
        statistics = answer.events[-1].statistics
        assert least <= statistics.accepted_tokens / statistics.drafted_tokens <= most
        assert statistics.generated_tokens == 50
    if most == 1:  # five tokens a step
        assert len(runner.recorded) == 11


@pytest.mark.parametrize("full_layers", [0, 1])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@given(window=st.integers(1, 20), chunk=st.integers(1, 30), guesses=st.sampled_from(DRAFTERS))
@few
def test_a_sliding_window_gives_back_what_it_no_longer_sees(
    full_layers: int, block_size: int, window: int, chunk: int, guesses: str
) -> None:
    config = shape(window, full_layers)
    limit = EngineConfig(block_size=block_size, prefill_tokens=chunk, blocks=200 // block_size)
    engine = Engine(HashRunner(config), config=limit, drafter=drafter(guesses, config))
    engine.add(Request(0, BEGINNING, SamplingParams(seed=1, max_tokens=30)))
    most, tokens = 0, []
    while engine.has_work:
        tokens += [(event.token_id, event.logprob) for event in engine.step()]
        check_invariants(engine)
        most = max(most, sum(count > 0 for count in engine.manager.pools[-1].references))
    assert tokens == expected(BEGINNING, SamplingParams(seed=1, max_tokens=30), config)
    longest = max(chunk, 5) + window - 1  # positions that are held at once; five in a step where tokens are guessed
    assert most <= -(-longest // block_size) + 1

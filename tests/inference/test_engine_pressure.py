"""Too little memory, too many requests, and cancellations: nothing leaks, nobody starves, no answer changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.inference.scheduler import serving_order
from llamita.model.config import ModelConfig
from tests.inference.hash_model import Answer, Answers, HashRunner, check_invariants, expected, serve, shape
from tests.inference.workloads import BEGINNING, DRAFTERS, arrivals, drafter, judge, limits, play, servable, shapes

few = settings(max_examples=25, deadline=None)
Plan = list[tuple[int, Request]]


@given(plan=arrivals(), config=shapes, limit=limits((45, 90)), cancelled=st.sets(st.integers(0, 6)))
@few
def test_no_leaked_block(plan: Plan, config: ModelConfig, limit: EngineConfig, cancelled: set[int]) -> None:
    engine = Engine(HashRunner(config), config=limit)
    for _, request in servable(plan, engine):
        engine.add(request)
        engine.step()
        check_invariants(engine)
        for pool in engine.manager.pools:
            used = sum(count > 0 for count in pool.references)
            cached = sum(pool.prefix_of[block] is not None for block in pool.free)
            unused = sum(pool.prefix_of[block] is None for block in pool.free)
            assert used + cached + unused == pool.blocks
        if request.id in cancelled:
            engine.abort(request.id)
    serve(engine)
    capacity = engine.manager.layout.blocks * engine.manager.block_size
    longest = min(capacity, config.max_position_embeddings) - 1  # what was cached is no obstacle
    prompt = tuple(place % 3 for place in range(longest))
    assert len(serve(engine, [Request(99, prompt, SamplingParams(max_tokens=1))])[99, 0].said) == 1


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_nothing_unservable_is_admitted_and_growth_past_the_pool_ends_with_length(block_size: int) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(block_size=block_size, blocks=-(-45 // block_size)))
    capacity = engine.manager.layout.blocks * block_size
    with pytest.raises(ValueError, match=f"the prompt has {capacity} tokens, and the memory holds {capacity}"):
        engine.add(Request(0, (1,) * capacity))
    requests = [
        Request(i, tuple(range(i, i + length)), SamplingParams(seed=i, max_tokens=80 if i != 1 else 5))
        for i, length in enumerate((10, 20, 3, min(40, capacity - 1)))
    ]
    answers = serve(engine, requests)
    judge(answers, requests, engine)
    for i in (0, 2, 3):  # the last token is said from a full pool, and has no place itself
        assert (answers[i, 0].reason, answers[i, 0].events[-1].token_id) == ("length", None)
        assert len(requests[i].prompt) + len(answers[i, 0].said) == capacity + 1


def test_one_that_is_preempted_with_more_than_the_pool_holds_ends_with_length() -> None:
    engine = Engine(HashRunner(), config=EngineConfig(block_size=2, blocks=6))
    request = Request(0, BEGINNING[:9], SamplingParams(seed=1, max_tokens=20))
    engine.add(request)
    answer = Answer()
    for _ in range(4):
        answer.take(*engine.step())
    engine.scheduler._preempt(engine.scheduler.running[0])
    while engine.has_work:
        for event in engine.step():
            answer.take(event)
    judge({(0, 0): answer}, [request], engine)
    assert answer.reason == "length"


def progress(engine: Engine) -> tuple[int, int] | None:
    """Of the one that is served first: who it is, and how far it is."""
    queue = sorted([*engine.scheduler.running, *engine.scheduler.waiting], key=serving_order)
    return (queue[0].id, queue[0].computed + len(queue[0].tokens)) if queue else None


@pytest.mark.parametrize(
    ("config", "guesses"),
    [
        (shape(), "none"),
        (shape(30), "none"),
        (shape(12, 1), "none"),
        (shape(vocabulary=3), "lookup"),
        (shape(20), "model 60"),
    ],
    ids=["full", "window", "both", "lookup", "draft model"],
)
def test_preemption_is_neutral_and_the_oldest_always_progresses(config: ModelConfig, guesses: str) -> None:
    limit = EngineConfig(block_size=2, blocks=24, max_sequences=16)
    engine = Engine(HashRunner(config, recorded=None), config=limit, drafter=drafter(guesses, config))
    params = [SamplingParams(seed=i, max_tokens=36, n=1 + (i % 5 == 0)) for i in range(70)]
    requests = [Request(i, (i % 3, *BEGINNING[: i % 8]), params[i]) for i in range(70)]
    answers: Answers = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        before = progress(engine)
        for event in engine.step():
            answers.setdefault((event.request_id, event.index), Answer()).take(event)
        check_invariants(engine)
        after = progress(engine)
        assert after is None or after[0] != before[0] or after[1] > before[1]
    judge(answers, requests, engine)
    assert engine.scheduler.preemptions >= (100 if guesses == "model 60" else 200)


@given(
    plan=arrivals(),
    config=shapes,
    limit=limits((45, 150)),
    cancels=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 7)), min_size=1, max_size=6),
    guesses=st.sampled_from(DRAFTERS),
)
@few
def test_cancel_anywhere(
    plan: Plan, config: ModelConfig, limit: EngineConfig, cancels: list[tuple[int, int]], guesses: str
) -> None:
    engine = Engine(HashRunner(config), config=limit, drafter=drafter(guesses, config))
    left = sorted(servable(plan, engine), key=lambda one: one[0])
    requests, gone, answers = [request for _, request in left], set(), {}
    for step in range(10_000):
        while left and left[0][0] <= step:
            engine.add(left.pop(0)[1])
        for at, request_id in cancels:  # queued, reading, decoding, done, unknown or not come yet; some of them twice
            if at == step:
                gone |= {request_id} & {one.request.id for one in engine.scheduler.select(request_id)}
                engine.abort(request_id)
                check_invariants(engine)
                assert not engine.scheduler.select(request_id)
        for event in engine.step():
            answers.setdefault((event.request_id, event.index), Answer()).take(event)
            assert event.request_id not in gone
        check_invariants(engine)
        if not left and not engine.has_work:
            break
    judge(answers, [request for request in requests if request.id not in gone], engine)


@pytest.mark.parametrize(
    ("where", "steps"),
    [("queued", 0), ("in mid-prompt", 1), ("its prompt read", 3), ("in mid-answer", 5), ("done", 30)],
)
@pytest.mark.parametrize("n", [1, 3])
def test_a_cancelled_request_is_gone_at_once_and_its_neighbour_unchanged(where: str, steps: int, n: int) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(prefill_tokens=8, block_size=4))
    neighbour = Request(1, BEGINNING, SamplingParams(seed=1, max_tokens=20))
    engine.add(Request(0, BEGINNING[:20], SamplingParams(seed=1, max_tokens=9, n=n)))
    said = []
    for step in range(30):
        if step == steps:
            engine.abort(0)
            engine.abort(0)
            assert engine.manager.available == engine.manager.layout.blocks
            engine.add(neighbour)
        said += [(event.token_id, event.logprob) for event in engine.step() if event.request_id == 1]
    if steps == 30:
        engine.abort(0)
        said = serve(engine, [neighbour])[1, 0].said
    said += [(event.token_id, event.logprob) for _ in range(30) for event in engine.step()]
    assert said == expected(BEGINNING, neighbour.params, shape())


def starts(engine: Engine, arrive: dict[int, list[Request]], most: int = 400) -> list[int]:
    """The order in which requests say their first token."""
    first: list[int] = []
    for step in range(most):
        for request in arrive.get(step, ()):
            engine.add(request)
        first += [event.request_id for event in engine.step() if event.request_id not in first]
    return first


@pytest.mark.parametrize("priority", [0, 3, 10])
def test_fairness_a_request_waits_for_no_more_than_its_priority_of_later_ones(priority: int) -> None:
    # More short requests come than can be served, for ever; one with a prompt that fills the memory came among them.
    engine = Engine(HashRunner(), config=EngineConfig(block_size=2, blocks=20, max_sequences=4))
    short = SamplingParams(seed=1, max_tokens=4)
    arrive = {step: [Request(2 * step + i, (step % 50, i, 7), short) for i in range(2)] for step in range(1, 400)}
    victim = Request(0, tuple(i % 50 for i in range(38)), SamplingParams(seed=1, max_tokens=2), priority)
    arrive[10].insert(1, victim)
    order = starts(engine, arrive)
    later = [one for one in order[: order.index(0)] if one > 20]
    assert len(later) == priority
    assert sorted(order[:60]) == sorted([0, *range(2, 61)])


@given(ranks=st.lists(st.integers(-5, 5), min_size=2, max_size=12))
@few
def test_each_unit_of_priority_is_one_request_later(ranks: list[int]) -> None:
    engine = Engine(HashRunner(), config=EngineConfig(max_sequences=1))
    requests = [Request(i, (i, 1), SamplingParams(seed=1, max_tokens=2), rank) for i, rank in enumerate(ranks)]
    expected_order = sorted(range(len(ranks)), key=lambda i: (i + ranks[i], ranks[i]))
    assert starts(engine, {0: requests}, 40) == expected_order


def test_a_wide_request_is_not_starved_by_narrow_ones() -> None:
    engine = Engine(HashRunner(), config=EngineConfig(max_sequences=4))
    narrow = SamplingParams(seed=1, max_tokens=7)
    arrive = {step: [Request(step, (step % 50, 1), narrow)] for step in range(1, 200)}
    arrive[20].append(Request(1000, (1, 2), SamplingParams(seed=1, max_tokens=5, n=4)))
    order = starts(engine, arrive, 200)
    assert order.index(1000) <= 20


def test_prompts_share_what_is_being_read_and_play_counts_it() -> None:
    requests = [(i, Request(i, BEGINNING, SamplingParams(seed=i, max_tokens=3))) for i in range(4)]
    engine = Engine(HashRunner(), config=EngineConfig(block_size=4))
    answers = play(engine, requests)
    judge(answers, [request for _, request in requests], engine)
    assert [answers[i, 0].events[-1].statistics.cached_tokens for i in range(4)] == [0, 32, 32, 32]


def test_long_prompts_of_a_windowed_model_run_side_by_side() -> None:
    """Each holds a window and a chunk of blocks, however long it is; two whole prompts would not fit the memory."""
    config = shape(window=6)
    engine = Engine(HashRunner(config), config=EngineConfig(block_size=2, blocks=40, prefill_tokens=8))
    prompts = [tuple((place * step) % 50 for place in range(80)) for step in range(1, 5)]
    requests = [Request(i, prompt, SamplingParams(seed=i, max_tokens=12)) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    answers: Answers = {}
    together = 0
    while engine.has_work:
        for event in engine.step():
            answers.setdefault((event.request_id, event.index), Answer()).take(event)
        check_invariants(engine)
        together = max(together, len(engine.scheduler.running))
    judge(answers, requests, engine)
    assert together >= 2
    assert engine.scheduler.preemptions == 0

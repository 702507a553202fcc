"""Ten thousand short requests with random cancellations: every block comes back, and memory does not grow."""

import gc
import random
import tracemalloc

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.block_manager import Prefix
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.inference.sequence import Sequence
from tests.inference.hash_model import Answer, Answers, HashRunner, check_invariants, expected, shape


def alive(kind: type) -> int:
    return sum(type(one) is kind for one in gc.get_objects())


def soak(engine: Engine, targets: tuple[int, ...], seed: int) -> list[tuple[int, int, int]]:
    """Traced bytes, sequences and prefixes alive after so many requests, the engine idle then."""
    order, found, added, cancelled = random.Random(seed), [], 0, 0
    answers: Answers = {}
    requests: dict[int, Request] = {}
    for target in targets:
        while added < target or engine.has_work:
            while added < target and len(engine.scheduler.waiting) < 8:
                prompt = tuple(order.choices(range(3), k=order.randint(1, 20)))
                params = SamplingParams(seed=added, max_tokens=order.randint(1, 12), n=order.choice([1, 1, 1, 2]))
                requests[added] = Request(added, prompt, params, order.randint(-2, 2))
                engine.add(requests[added])
                added += 1
            for event in engine.step():
                answers.setdefault((event.request_id, event.index), Answer()).take(event)
            if order.random() < 0.3:
                request_id = order.choice(list(requests))
                cancelled += bool(engine.scheduler.select(request_id))
                engine.abort(request_id)
                requests.pop(request_id)
            for request_id in [one for one in requests if not engine.scheduler.select(one)]:
                judge(
                    {key: answers.pop(key) for key in list(answers) if key[0] == request_id},
                    requests.pop(request_id),
                    engine,
                )
        check_invariants(engine)
        assert not requests
        answers.clear()
        gc.collect()
        found.append((tracemalloc.get_traced_memory()[0], alive(Sequence), alive(Prefix)))
    assert cancelled > targets[-1] / 50
    assert engine.scheduler.preemptions > targets[-1] / 200
    return found


def judge(answers: Answers, request: Request, engine: Engine) -> None:
    for index in range(request.params.n):
        said = answers[request.id, index].said
        assert len(said) == request.params.max_tokens
        if request.id % 10 == 0:  # the reference is slow
            assert said == expected(request.prompt, request.params, engine._runner.config, index=index)


def run(targets: tuple[int, ...], window: int, drafter: Drafter | None) -> None:
    limit = EngineConfig(
        block_size=2, blocks=12 if window else 40, max_sequences=12, prefill_tokens=24, mixed_prefill_tokens=16
    )
    engine = Engine(HashRunner(shape(window, vocabulary=3), recorded=None), config=limit, drafter=drafter)
    gc.collect()
    others = {kind: alive(kind) for kind in (Sequence, Prefix)}  # of engines that earlier tests here have kept
    tracemalloc.start()
    try:
        found = soak(engine, targets, seed=window)
    finally:
        tracemalloc.stop()
    assert engine.manager.available == engine.manager.layout.blocks
    assert [sequences - others[Sequence] for _, sequences, _ in found] == [0] * len(targets)
    bound = 40 * 16  # each block may keep the prefixes before it alive
    assert all(prefixes - others[Prefix] <= bound for _, _, prefixes in found)
    assert found[-1][0] < found[0][0] + 60_000


def test_a_few_hundred_requests_leave_nothing_behind() -> None:
    run((100, 200), 0, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "drafter"), [(0, None), (6, None), (0, PromptLookup())], ids=["full", "window", "lookup"]
)
def test_ten_thousand_requests_leave_nothing_behind(window: int, drafter: Drafter | None) -> None:
    run((2_500, 5_000, 7_500, 10_000), window, drafter)

"""The engine as a state machine: requests, steps, cancellations, preemptions, evictions and failures in any order.

Between any two of them the invariants hold, and whatever ends has said what it says alone.
"""

from collections import Counter
from typing import Any, ClassVar

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.config import ModelConfig
from tests.inference.hash_model import Answer, Answers, HashRunner, check_invariants
from tests.inference.workloads import DRAFTERS, drafter, judge, limits, prompts, sampling, shapes


class EngineMachine(RuleBasedStateMachine):
    """Rules do one thing to the engine each; `actions` counts them over all runs."""

    actions: ClassVar[Counter[str]] = Counter()

    @initialize(config=shapes, limit=limits((10, 120)), guesses=st.sampled_from(DRAFTERS), caching=st.booleans())
    def start(self, config: ModelConfig, limit: EngineConfig, guesses: str, caching: bool) -> None:
        self.runner = HashRunner(config, recorded=None, fails_at=set())
        self.engine = Engine(self.runner, config=limit, drafter=drafter(guesses, config))
        self.engine.manager._caching = caching
        self.answers: Answers = {}
        self.requests: dict[int, Request] = {}
        self.gone: set[int] = set()

    def count(self, name: str) -> None:
        self.actions[name] += 1

    @rule(prompt=prompts(), params=sampling(most=12), rank=st.integers(-3, 3))
    def add(self, prompt: tuple[int, ...], params: SamplingParams, rank: int) -> None:
        request = Request(len(self.requests), prompt, params, rank)
        self.requests[request.id] = request
        if self.engine.manager.fits(len(prompt) + 1):
            self.engine.add(request)
        else:
            self.gone.add(request.id)
            with pytest.raises(ValueError, match="the memory holds"):
                self.engine.add(request)
        self.count("add")

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.engine.step():
                assert event.request_id not in self.gone
                assert event.error == ""
                self.answers.setdefault((event.request_id, event.index), Answer()).take(event)
            check_invariants(self.engine)
            self.count("step")

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, len(self.requests)))
        if self.engine.scheduler.select(request_id):
            self.gone.add(request_id)
        self.engine.abort(request_id)
        assert not self.engine.scheduler.select(request_id)
        self.count("cancel")

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.engine.scheduler._preempt(data.draw(st.sampled_from(self.engine.scheduler.running)))
        self.count("preempt")

    @rule()
    def evict(self) -> None:
        self.engine.manager.forget_unused()
        assert all(pool.prefix_of[block] is None for pool in self.engine.manager.pools for block in pool.free)
        self.count("evict")

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def fail(self) -> None:
        """A step that fails ends those it ran, each with an event, and nobody else."""
        self.runner.fails_at = {self.runner.calls}
        before = {(one.request.id, one.index) for one in self._all()}
        for event in self.engine.step():
            if event.finish_reason == "error":
                assert event.error == "out of memory"
                self.gone.add(event.request_id)
                before.discard((event.request_id, event.index))
            self.answers.setdefault((event.request_id, event.index), Answer()).take(event)
        self.runner.fails_at = set()
        ended = {key for key in before if self.answers.get(key, Answer()).reason}
        assert before - ended == {(one.request.id, one.index) for one in self._all()}
        for request_id in self.gone:  # what is left of them would be judged in part
            self.engine.abort(request_id)
        self.count("fail")

    def _all(self) -> list:
        scheduler = self.engine.scheduler
        return [one for first in (*scheduler.running, *scheduler.waiting) for one in (first, *first.forks)]

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            check_invariants(self.engine)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(10_000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work
        judge(self.answers, [one for number, one in self.requests.items() if number not in self.gone], self.engine)


def run(examples: int, steps: int, **more: Any) -> Counter[str]:
    """What was done, and how often."""
    EngineMachine.actions.clear()
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck), **more,
        ),
    )  # fmt: skip
    return EngineMachine.actions


def test_the_invariants_hold_whatever_happens() -> None:
    assert run(examples=25, steps=40).total() > 500


@pytest.mark.slow
def test_the_invariants_hold_over_ten_thousand_steps() -> None:
    actions = run(examples=400, steps=60)
    assert actions["step"] >= 10_000
    assert all(actions[name] >= 200 for name in ("add", "cancel", "preempt", "evict", "fail")), actions

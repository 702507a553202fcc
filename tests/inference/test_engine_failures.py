"""A step that fails, is interrupted, or meets a grammar that gives up: whom it ends, and that all else goes on."""

import math
from dataclasses import replace

import numpy as np
import pytest

from llamita.backend.interface import Plan, SampledToken, StepResult
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import DraftModel, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.text.tokenizer import Tokenizer
from tests.inference.hash_model import HashRunner, Memory, check_invariants, expected, serve, shape

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("n", [1, 3])
def test_a_failed_step_ends_its_requests_alone_and_the_next_one_works(step: int, n: int) -> None:
    engine = Engine(HashRunner(fails_at={step}), config=EngineConfig(prefill_tokens=8, block_size=4))
    params = SamplingParams(seed=1, max_tokens=6, n=n)
    answers = serve(engine, [Request(i, tuple(range(i, i + 10)), params) for i in range(3)])
    assert sorted(answers) == [(i, index) for i in range(3) for index in range(n)]
    failed = [key for key, answer in answers.items() if answer.reason == "error"]
    assert failed
    assert {answers[key].error for key in failed} == {"out of memory"}
    assert all(answers[key].events[-1].token_id is None for key in failed)
    again = serve(engine, [Request(i, tuple(range(i, i + 10)), params) for i in range(3)])
    for (i, index), answer in [*again.items(), *((key, answers[key]) for key in answers.keys() - set(failed))]:
        assert answer.said == expected(range(i, i + 10), params, shape(), index=index)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_ctrl_c_in_a_step_leaves_a_working_engine(step: int) -> None:
    engine = Engine(HashRunner(fails_at={step}, failure=KeyboardInterrupt()), config=EngineConfig(prefill_tokens=8))
    for i in range(3):
        engine.add(Request(i, PROMPT, SamplingParams(seed=i, max_tokens=5, n=2)))
    with pytest.raises(KeyboardInterrupt):
        serve(engine)
    check_invariants(engine)
    serve(engine)
    answers = serve(engine, [Request(7, PROMPT, SamplingParams(seed=1, max_tokens=12))])
    assert answers[7, 0].said == expected(PROMPT, SamplingParams(seed=1, max_tokens=12), shape())


class Exhausted:
    """A matcher that allows everything until it can be followed no further, after so many tokens."""

    is_complete = False

    def __init__(self, left: int) -> None:
        self.left = left

    @property
    def error(self) -> str:
        return "" if self.left else "too expensive"

    def accept(self, token_id: int) -> None:
        if not self.left:
            raise ValueError(self.error)
        self.left -= 1


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_a_grammar_that_gives_up_ends_its_continuations_alone(
    left: int, n: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shape(vocabulary=tokenizer.vocab_size)
    engine = Engine(HashRunner(config), tokenizer, eos_token_ids=())
    masks = lambda matchers: [np.full(1, -1 if one.left else 0) for one in matchers]  # noqa: E731
    monkeypatch.setattr("llamita.inference.engine.fill", masks)
    monkeypatch.setattr("llamita.inference.engine.Grammars.matcher", lambda self, params: Exhausted(left))
    plain = SamplingParams(seed=1, max_tokens=12)
    answers = serve(
        engine, [Request(0, PROMPT, plain), Request(1, PROMPT, SamplingParams(seed=1, choices=("a",), n=n))]
    )
    assert answers[0, 0].said == expected(PROMPT, plain, config)
    for index in range(n):
        answer = answers[1, index]
        assert (answer.reason, answer.error, len(answer.said)) == ("error", "too expensive", left)
        assert answer.events[-1].statistics.generated_tokens == left


class Overflowing(HashRunner):
    """Has no token for the sequence with id 1 at position 12, as where the logits of one row are not finite."""

    def run(self, plan: Plan, memory: Memory) -> StepResult:
        result = super().run(plan, memory)
        broken = SampledToken(0, math.nan, error="not finite")
        sampled = [
            tuple(
                broken if (chunk.sequence_id, sample.position) == (1, 12) else token
                for sample, token in zip(chunk.samples, tokens, strict=True)
            )
            for chunk, tokens in zip(plan.chunks, result.sampled, strict=True)
        ]
        return replace(result, sampled=tuple(sampled))


@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_a_row_without_a_token_ends_its_request_alone(drafter: PromptLookup | None) -> None:
    engine = Engine(Overflowing(script=[7, 8] * 20), drafter=drafter)
    params = SamplingParams(seed=1, max_tokens=8)
    answers = serve(engine, [Request(i, PROMPT, params) for i in range(3)])
    assert [(answers[i, 0].reason, len(answers[i, 0].said)) for i in range(3)] == [
        ("length", 8), ("error", 2), ("length", 8)
    ]  # fmt: skip
    assert answers[1, 0].error == "not finite"
    assert answers[0, 0].said == answers[2, 0].said
    check_invariants(engine)


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_drafter_that_fails_is_switched_off_and_no_token_is_lost(fails_at: int) -> None:
    engine = Engine(HashRunner(), drafter=DraftModel(HashRunner(fails_at={fails_at}, agreement=70, salt=1)))
    params = SamplingParams(seed=1, max_tokens=12)
    with pytest.warns(UserWarning, match="guessing ahead failed and is switched off: out of memory"):
        answers = serve(engine, [Request(i, PROMPT, params) for i in range(2)])
    assert [answers[i, 0].said for i in range(2)] == [expected(PROMPT, params, shape())] * 2
    check_invariants(engine)


def test_an_id_is_given_to_one_request_at_a_time() -> None:
    engine = Engine(HashRunner())
    request = Request(3, PROMPT, SamplingParams(max_tokens=2))
    engine.add(request)
    with pytest.raises(ValueError, match="a request with the id 3 is being served"):
        engine.add(request)
    serve(engine)
    assert serve(engine, [request])[3, 0].reason == "length"

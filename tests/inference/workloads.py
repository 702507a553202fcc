"""Random work for an engine over the hash model, and what must have come of it.

Prompts have few different tokens and share their beginnings, so that the prefix cache is hit; pools are small, so that
sequences are preempted. `judge` compares with the definition.
"""

import dataclasses
from collections import abc
from collections.abc import Iterable

from hypothesis import strategies as st

from llamita.backend.interface import BlockCopy, CacheLayout, ScheduledChunk
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter, DraftModel, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import PromptTarget, Request
from llamita.inference.sequence import Sequence
from llamita.model.config import ModelConfig
from tests.inference.hash_model import Answer, Answers, HashRunner, check_invariants, expected, expected_targets, shape

BEGINNING = (0, 2, 1, 0, 0, 1, 2, 2, 0, 1, 1, 2, 0, 1, 2, 0, 2, 2, 1, 0, 1, 0, 0, 2, 1, 1, 0, 2, 0, 1, 2, 1, 0, 0, 2)
SHAPES = [
    shape(window, full_layers, vocabulary)
    for window, full_layers in ((0, 0), (1, 0), (7, 0), (16, 0), (7, 1), (5, 1))
    for vocabulary in (3, 50)
]
BLOCK_SIZES = (1, 3, 16)

shapes = st.sampled_from(SHAPES)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Parts from the common beginning anywhere."""
    cut = draw(st.integers(0, len(BEGINNING)))
    return BEGINNING[:cut] + tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))


@st.composite
def sampling(draw: st.DrawFn, most: int = 16, n: int = 3) -> SamplingParams:
    least = draw(st.integers(0, most))
    return SamplingParams(
        seed=draw(st.integers(0, 3)),
        temperature=draw(st.sampled_from([0, 1])),
        max_tokens=max(1, least),
        min_tokens=draw(st.integers(0, least)),
        n=draw(st.integers(1, n)),
        stop_token_ids=draw(st.sampled_from([(), (), (1,)])),
        presence_penalty=draw(st.sampled_from([0, 0, 0, 1])),
        prompt_logprobs=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def arrivals(draw: st.DrawFn, most: int = 7, n: int = 3) -> list[tuple[int, Request]]:
    """Requests and the steps before which they come."""
    parts = st.tuples(st.integers(0, 20), prompts(), sampling(n=n), st.integers(-3, 3))
    drawn = draw(st.lists(parts, min_size=1, max_size=most))
    return [
        (step, Request(i, prompt, params, rank, targets=() if params.prompt_logprobs else draw(targets(len(prompt)))))
        for i, (step, prompt, params, rank) in enumerate(drawn)
    ]


def targets(length: int) -> st.SearchStrategy[tuple[PromptTarget, ...]]:
    """Tokens to judge at some positions of a prompt, mostly its last."""
    position = st.integers(1, length) | st.integers(max(1, length - 2), length)
    drawn = st.lists(st.builds(PromptTarget, position, st.integers(0, 2)), max_size=5)
    return drawn.map(lambda asked: tuple(sorted(asked)))


@st.composite
def limits(draw: st.DrawFn, positions: tuple[int, int] | None = None, block_size: int = 0) -> EngineConfig:
    """`positions` is between how many the pool holds; without it, it holds everything."""
    size = block_size or draw(st.sampled_from(BLOCK_SIZES))
    return EngineConfig(
        max_sequences=draw(st.integers(3, 8)),
        prefill_tokens=draw(st.integers(1, 64)),
        mixed_prefill_tokens=draw(st.integers(1, 32)),
        draft_tokens=draw(st.integers(1, 5)),
        block_size=size,
        blocks=-(-(1300 if positions is None else draw(st.integers(*positions))) // size),
    )


def play(engine: Engine, plan: Iterable[tuple[int, Request]]) -> Answers:
    """Add each request before its step; all events until nothing is left, invariants checked between steps."""
    left, answers, step = sorted(plan, key=lambda one: one[0]), {}, 0
    while left or engine.has_work:
        while left and left[0][0] <= step:
            engine.add(left.pop(0)[1])
        for event in engine.step():
            answers.setdefault((event.request_id, event.index), Answer()).take(event)
        check_invariants(engine)
        step += 1
        assert step < 10_000, "the engine does not come to an end"
    return answers


def judge(answers: Answers, requests: Iterable[Request], engine: Engine) -> None:
    """Every continuation ended and said what it must; where the pool is too small for it alone, the beginning of it."""
    config, layout = engine._runner.config, engine.manager.layout
    for request in requests:
        for index in range(request.params.n):
            answer = answers[request.id, index]
            whole = expected(request.prompt, request.params, config, index=index)
            if answer.said:
                assert list(answer.events[0].prompt_logprobs) == expected_targets(request, config)
            assert answer.error == ""
            if answer.events[-1].token_id is None:
                capacity = layout.blocks * layout.block_size
                assert answer.reason == "length"
                assert len(request.prompt) + len(answer.said) == capacity + 1
                whole = whole[: len(answer.said)]
            assert answer.said == whole
            assert answer.reason == ("stop" if answer.tokens[-1] in request.params.stop_token_ids else "length")


def servable(plan: Iterable[tuple[int, Request]], engine: Engine) -> list[tuple[int, Request]]:
    """Without those that the pool could not hold the prompt of."""
    return [(step, request) for step, request in plan if engine.manager.fits(len(request.prompt) + 1)]


@dataclasses.dataclass
class Oracle:
    """Guesses what will come, rightly so often of 100; `config` is the model's."""

    config: ModelConfig
    right: int

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        assert config == self.config

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """It needs none of it."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        guesses = []
        for sequence, count in wanted:
            params = dataclasses.replace(
                sequence.params, max_tokens=max(sequence.generated + count, sequence.params.min_tokens)
            )
            said = expected(sequence.request.prompt, params, self.config, index=sequence.index)
            after = [token for token, _ in said[sequence.generated : sequence.generated + count]]
            wrong = [hash((place, *sequence.tokens)) % 100 >= self.right for place in range(len(after))]
            guesses.append([(token + miss) % self.config.vocab_size for token, miss in zip(after, wrong, strict=True)])
        return guesses


def drafter(name: str, config: ModelConfig) -> Drafter | None:
    """One of DRAFTERS."""
    kind, _, number = name.partition(" ")
    if kind == "lookup":
        return PromptLookup()
    if kind == "oracle":
        return Oracle(config, int(number))
    if kind == "model":
        return DraftModel(HashRunner(config, salt=1, agreement=int(number), recorded=None))
    return None


DRAFTERS = ("none", "lookup", "oracle 0", "oracle 60", "oracle 100", "model 0", "model 60", "model 100")

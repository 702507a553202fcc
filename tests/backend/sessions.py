"""A runner with memory for a few sequences, used as an engine would, for the tests of runners and engines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

import numpy as np

from llamita.backend.interface import CacheLayout, Plan, SampledToken, SampleSpec, ScheduledChunk, StepResult, Target
from llamita.backend.sampling_params import SamplingParams
from llamita.model.config import ModelConfig
from tests.backend.frameworks import Framework
from tests.backend.paged import shuffled_tables

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PROMPT = tuple(np.random.default_rng(0).integers(0, 97, 23).tolist())
GREEDY = SamplingParams(temperature=0)


class Session:
    """Memory for four sequences of up to 64 tokens, sequence i in blocks of its own in mixed order."""

    def __init__(self, runner: Any, block_size: int = 8, longest: int = 64) -> None:
        self.runner = runner
        layout = CacheLayout(block_size, 4 * -(-longest // block_size), runner.config.attention_windows)
        self.memory, self.tables = runner.allocate(layout), shuffled_tables(layout, [longest] * 4)

    def chunk(
        self,
        tokens: Sequence[int],
        start: int,
        sequence: int = 0,
        draws: Sequence[int] = (-1,),
        targets: Sequence[int] = (),
    ) -> ScheduledChunk:
        """`draws`: after which of the tokens one is drawn; `targets`: what follows the first of them, ..."""
        ends = [range(start, start + len(tokens))[draw] + 1 for draw in draws]
        samples = tuple(SampleSpec(GREEDY, 5, end) for end in ends)
        followers = tuple(starmap(Target, enumerate(targets)))
        return ScheduledChunk(sequence, tuple(tokens), start, self.tables[sequence], samples, followers)

    def step(self, *chunks: ScheduledChunk) -> StepResult:
        return self.runner.run(Plan(chunks), self.memory)

    def run(self, *chunks: ScheduledChunk) -> tuple[tuple[SampledToken, ...], ...]:
        return self.step(*chunks).sampled

    def token(self, tokens: Sequence[int], start: int, sequence: int = 0) -> SampledToken:
        """The one drawn after a chunk that runs alone."""
        return self.run(self.chunk(tokens, start, sequence))[0][0]


def greedy(runner: Any, prompt: Sequence[int], count: int, block_size: int = 8) -> Iterator[SampledToken]:
    session = Session(runner, block_size)
    tokens, start = list(prompt), 0
    for _ in range(count):
        token = session.token(tokens[start:], start)
        yield token
        start = len(tokens)
        tokens.append(token.token_id)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def assert_greedy(found: Sequence[SampledToken], logits_RV: np.ndarray, tolerance: float = 1e-5) -> None:
    """The likeliest token of each row of logits, with its log-probability."""
    logprobs_RV = log_softmax(logits_RV)
    assert [token.token_id for token in found] == logprobs_RV.argmax(-1).tolist()
    np.testing.assert_allclose([token.logprob for token in found], logprobs_RV.max(-1), atol=tolerance)


def check_targets(runner: Any) -> None:
    """Of a text read in pieces beside others, more targets in a chunk than logits are held of at once."""
    session = Session(runner, 16, 400)
    text = np.random.default_rng(1).integers(0, 97, 400).tolist()
    expected = log_softmax(runner.forward([text])["logits"][0])[np.arange(399), text[1:]]
    found: list[float] = []
    for start, end in ((0, 3), (3, 4), (4, 300), (300, 400)):
        beside = session.chunk(text[start:end], start, 1)
        scored = session.chunk(text[start:end], start, 0, (), text[start + 1 : end + 1])
        result = session.step(beside, scored)
        assert result.target_logprobs[0] == ()
        assert [len(sampled) for sampled in result.sampled] == [1, 0]
        found += result.target_logprobs[1]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    asked = ((0, 5), (2, 7), (2, 0), (2, 7), (2, 96))  # several after one token, none after another
    session = Session(runner, 16, 400)
    chunk = replace(session.chunk(text[:3], 0), targets=tuple(starmap(Target, asked)))
    offsets, ids = zip(*asked, strict=True)
    expected = log_softmax(runner.forward([text[:3]])["logits"][0])[list(offsets), list(ids)]
    np.testing.assert_allclose(session.step(chunk).target_logprobs[0], expected, atol=2e-5)
    session = Session(runner, 16, 400)
    chunk = replace(session.chunk(text[:3], 0), targets=tuple(starmap(Target, asked)), target_top=3)
    (tops,) = session.step(chunk).target_tops
    for offset, top in zip(offsets, tops, strict=True):
        logprobs = log_softmax(runner.forward([text[: offset + 1]])["logits"][0])[-1]
        assert [token_id for token_id, _ in top] == list(np.argsort(-logprobs, kind="stable")[:3])
        np.testing.assert_allclose([value for _, value in top], np.sort(logprobs)[::-1][:3], atol=2e-5)


def check_that_broken_numbers_stay(framework: Framework, runner: Any) -> None:
    """Blocks full of NaN, as broken sequences leave them behind, hurt neither their next owners nor neighbours."""
    session = Session(runner)
    framework.fill(session.memory.cache, np.full((256, 2, 8), np.nan, np.float32))
    texts = [list(text) for text in (PROMPT, PROMPT[:20], PROMPT[:16], PROMPT[:2])]
    found = session.run(*(session.chunk(text, 0, number) for number, text in enumerate(texts)))
    for token in range(11):
        for sampled, text in zip(found, texts, strict=True):
            assert_greedy(sampled, runner.forward([text])["logits"][0, -1:])
            text.append(token)
        found = session.run(*(session.chunk([token], len(t) - 1, number) for number, t in enumerate(texts)))

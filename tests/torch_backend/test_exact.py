"""The exact mode: the logits after a text are the same bits however it came there, compared as arrays of numbers.

A spy keeps the logits of every token that is drawn, under the text that they follow. A request's are held to those of
an engine that serves it alone, in one piece, without guesses.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from llamita.config import ModelConfig
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import DraftModel, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.plan import SamplingParams
from llamita.torch_backend.runner import TorchRunner
from llamita.torch_backend.sampling import Sampler
from llamita.torch_backend.weights import build_model

Logits = dict[tuple[int, int, int], np.ndarray]  # by request, continuation, position

MODELS = {
    "grouped heads": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "odd widths": {"hidden_size": 36, "intermediate_size": 52, "head_dim": 6},
    "odd numbers": {"hidden_size": 37, "intermediate_size": 53, "head_dim": 10, "vocab_size": 91},
    "sliding window": {"sliding_window": 20},
    "window in later layers": {"sliding_window": 9, "full_attention_layers": 1, "query_key_value_bias": True},
    "qwen3": {"query_key_norm": True, "head_dim": 16},
    "wide": {"hidden_size": 96, "intermediate_size": 1376, "num_hidden_layers": 2},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of logits under teacher forcing on the fast path, as a share of the largest: bfloat16 has 8 bits, rounded at every
operation of three layers."""


def model_of(dtype: torch.dtype = torch.float32, **changes):
    values = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    return build_model(ModelConfig(**(values | changes)), seed=1, dtype=dtype)


def requests(vocabulary: int, count: int = 9, longest: int = 140, n: int = 1, **params) -> list[Request]:
    """Prompts of mixed length with stretches that come again, some of them with the same beginning; all drawn."""
    random = np.random.default_rng(0)
    beginning = random.integers(0, vocabulary, 40).tolist()
    found = []
    for number, length in enumerate(random.integers(1, longest, count).tolist()):
        tokens = np.tile(random.integers(0, vocabulary, max(1, length // 3)), 3).tolist()
        prompt = (beginning[: 13 * (number % 3)] + tokens)[:longest]
        own = {"temperature": number % 2, "seed": 10 * number, "max_tokens": 24, "ignore_eos": True, "n": n} | params
        found.append(Request(number, tuple(prompt), SamplingParams(**own)))
    return found


class Spy:
    """Keeps what is given to `Sampler.sample` while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[tuple[int, int, np.ndarray]] = []  # seed, position, logits
        sample = Sampler.sample

        def spied(sampler, logits_RV, specs, *rest):
            for spec, row_V in zip(specs, logits_RV, strict=True):
                self.logits.append((spec.seed, spec.position, row_V.float().numpy().copy()))
            return sample(sampler, logits_RV, specs, *rest)

        monkeypatch.setattr(Sampler, "sample", spied)


class Served:
    """What came of an engine: texts by request and continuation, logits by seed and position, and the engine."""

    def __init__(self, runner, waves: Sequence[Sequence[Request]], drafter=None, **limits) -> None:
        self.engine = Engine(runner, config=EngineConfig(**limits), drafter=drafter)
        self.texts = {(request.id, i): list(request.prompt) for wave in waves for request in wave
                      for i in range(request.params.n)}  # fmt: skip
        self.last = {}
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(patch)
            for number, wave in enumerate(waves):
                for request in wave:
                    self.engine.add(request)
                steps = 0
                while self.engine.has_work and (number == len(waves) - 1 or steps < 5):
                    steps += 1
                    for event in self.engine.step():
                        assert not event.error, event.error
                        self.texts[event.request_id, event.index].append(event.token_id)
                        self.last[event.request_id, event.index] = event.statistics
        self.rows = spy.logits

    def logits_of(self, key: tuple[int, int]) -> dict[int, list[np.ndarray]]:
        """By position, those that a kept token was drawn from, as often as they were computed."""
        seed, length = self.last[key].seed, len(self.texts[key])
        found: dict[int, list[np.ndarray]] = {}
        for its_seed, position, row_V in self.rows:
            if its_seed == seed and position < length:
                found.setdefault(position, []).append(row_V)
        return found


def alone(runner, each: Sequence[Request]) -> list[Served]:
    return [Served(runner, [[request]], blocks=200, prefix_caching=False) for request in each]


def check(served: Served, expected: Sequence[Served], guessed: bool = False) -> None:
    """The same text, and at each position the same bits; where tokens were guessed, those of right guesses too."""
    for one in expected:
        for key, text in one.texts.items():
            assert served.texts[key] == text, key
            ours, theirs = served.logits_of(key), one.logits_of(key)
            assert ours.keys() == theirs.keys()
            for position, (row_V,) in theirs.items():
                same = [np.array_equal(other_V, row_V) for other_V in ours[position]]
                # a wrong guess at an earlier position gives logits of another text, which are not kept
                assert any(same) if guessed else all(same), (key, position)


def scenarios(runner) -> list[tuple[str, Callable[[], Served], Sequence[Served], bool]]:
    each = requests(runner.config.vocab_size)
    expected = alone(runner, each)
    greedy_and_penalised = [
        Request(100 + i, each[i].prompt, SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.3,
                                                        seed=9000 + i, max_tokens=30, ignore_eos=True))
        for i in range(4)
    ]  # fmt: skip
    forked = requests(runner.config.vocab_size, count=4, n=3)
    # a continuation alone is a request of its own seed
    draft = TorchRunner(build_model(ModelConfig(runner.config.vocab_size, 16, 32, 1, 2, 1, 256), seed=4))
    plain = len(runner.config.attention_windows) == 1 and runner.config.attention_windows[0] == 0
    ways: list[tuple[str, Callable[[], Served], Sequence[Served], bool]] = [
        ("together", lambda: Served(runner, [each]), expected, False),
        ("at random times", lambda: Served(runner, [each[5:], each[2:5], each[:2]]), expected, False),
        ("chunks of 1", lambda: Served(runner, [each], prefill_tokens=1, mixed_prefill_tokens=1), expected, False),
        ("chunks of 7", lambda: Served(runner, [each], prefill_tokens=7, mixed_prefill_tokens=3), expected, False),
        ("chunks of 65", lambda: Served(runner, [each], prefill_tokens=65, block_size=5), expected, False),
        ("little memory", lambda: Served(runner, [each], blocks=70, block_size=3), expected, False),
        ("beside others", lambda: Served(runner, [greedy_and_penalised, each]), expected, False),
        ("twice, the second time cached", lambda: _twice(runner, each), expected, False),
        ("n-grams", lambda: Served(runner, [each], PromptLookup()), expected, True),
        ("n-grams, little memory", lambda: Served(runner, [each], PromptLookup(), blocks=70, block_size=3),
         expected, True),
        ("forked", lambda: Served(runner, [forked]), alone(runner, _parts(forked)), False),
        ("forked, little memory", lambda: Served(runner, [forked], blocks=16), alone(runner, _parts(forked)), False),
    ]  # fmt: skip
    if plain:
        ways.append(("draft model", lambda: Served(runner, [each], DraftModel(draft)), expected, True))
    return ways


def _twice(runner, each: Sequence[Request]) -> Served:
    """Each request, and once the first ones are done, again under other numbers; what is checked is the second."""
    again = [Request(request.id, request.prompt, request.params) for request in each]
    first = [Request(1000 + request.id, request.prompt, request.params) for request in each]
    engine = Served(runner, [first, [], again], blocks=200)
    assert any(served.cached_tokens for served in engine.last.values())
    return engine


def _parts(forked: Sequence[Request]) -> list[Request]:
    return forked


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_bits_however_a_text_came_there(name):
    runner = TorchRunner(model_of(**MODELS[name]), exact=True)
    for way, serve, expected, guessed in scenarios(runner):
        served = serve()
        try:
            check(served, expected, guessed)
        except AssertionError as error:
            raise AssertionError(f"{name}, {way}: {error}") from error
        if "memory" in way:
            assert served.engine.scheduler.preemptions > 0

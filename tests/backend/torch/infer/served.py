"""Engines over small models of PyTorch's, and the logits of every token that they drew, under the text these follow."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.infer.sampling import Sampler
from llamita.backend.torch.model.weights import build_model
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.config import ModelConfig


def model_of(dtype: torch.dtype = torch.float32, **changes):
    values = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    return build_model(ModelConfig(**(values | changes)), seed=1, dtype=dtype)


def requests(vocabulary: int, count: int = 9, longest: int = 140, seed: int = 0, **params) -> list[Request]:
    """Prompts of mixed length with stretches that come again, some of them with the same beginning; all drawn."""
    random = np.random.default_rng(0)
    beginning = random.integers(0, vocabulary, 40).tolist()
    found = []
    for number, length in enumerate(random.integers(1, longest, count).tolist()):
        tokens = np.tile(random.integers(0, vocabulary, max(1, length // 3)), 3).tolist()
        prompt = (beginning[: 13 * (number % 3)] + tokens)[:longest]
        own = {"temperature": number % 2, "seed": seed + 10 * number, "max_tokens": 24, "ignore_eos": True} | params
        found.append(Request(number, tuple(prompt), SamplingParams(**own)))
    return found


class Served:
    """What came of an engine: each continuation's text and statistics by request and index, and what it drew from."""

    def __init__(self, runner: TorchRunner, waves: Sequence[Sequence[Request]], drafter=None, **limits) -> None:
        """Each wave is added five steps after the one before."""
        names = tuple(runner.adapters)
        self.engine = Engine(runner, config=EngineConfig(**limits), drafter=drafter, adapters=names)
        self.texts = {(request.id, i): list(request.prompt)
                      for wave in waves for request in wave for i in range(request.params.n)}  # fmt: skip
        self.statistics, self.rows = {}, []
        with pytest.MonkeyPatch.context() as patch:
            self._spy(patch, runner)
            for number, wave in enumerate(waves):
                for request in wave:
                    self.engine.add(request)
                for _ in range(5 if number < len(waves) - 1 else 100_000):
                    for event in self.engine.step() if self.engine.has_work else ():
                        assert not event.error, event.error
                        self.texts[event.request_id, event.index].append(event.token_id)
                        self.statistics[event.request_id, event.index] = event.statistics
                    if number == len(waves) - 1 and not self.engine.has_work:
                        break

    def _spy(self, patch: pytest.MonkeyPatch, runner: TorchRunner) -> None:
        """Keep seed, the chunk's tokens before the drawn one, where they begin, and the logits, of each draw."""
        draw, sample = runner._sample, Sampler.sample
        given: list[tuple[int, tuple[int, ...], int]] = []

        def spied_draw(chunks, hidden_TD, sampler):
            given[:] = [(spec.seed, chunk.tokens[: spec.position - chunk.start], chunk.start)
                        for chunk in chunks for spec in chunk.samples]  # fmt: skip
            return draw(chunks, hidden_TD, sampler)

        def spied_sample(sampler, logits_RV, specs, *rest):
            if given:  # else a draft model draws
                self.rows += [(*one, row_V.float().numpy().copy()) for one, row_V in zip(given, logits_RV, strict=True)]
                given.clear()
            return sample(sampler, logits_RV, specs, *rest)

        patch.setattr(runner, "_sample", spied_draw)
        patch.setattr(Sampler, "sample", spied_sample)

    def logits_of(self, key: tuple[int, int]) -> dict[int, list[np.ndarray]]:
        """By position, as often as they were computed; those after a wrong guess are of another text."""
        text, seed = self.texts[key], self.statistics[key].seed
        found: dict[int, list[np.ndarray]] = {}
        for its_seed, tokens, start, row_V in self.rows:
            position = start + len(tokens)
            if its_seed == seed and position < len(text) and list(tokens) == text[start:position]:
                found.setdefault(position, []).append(row_V)
        return found


Alone = dict[tuple[int, int], tuple[list[int], dict[int, list[np.ndarray]]]]


def alone(runner: TorchRunner, each: Sequence[Request]) -> Alone:
    """Texts and logits of each continuation served by an engine of its own, in one piece."""
    found: Alone = {}
    for request in each:
        for index in range(request.params.n):
            params = dataclasses.replace(request.params, n=1, seed=request.params.seed + index)
            own = dataclasses.replace(request, id=0, params=params)
            one = Served(runner, [[own]], blocks=200, prefix_caching=False)
            found[request.id, index] = one.texts[0, 0], one.logits_of((0, 0))
    return found

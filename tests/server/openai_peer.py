"""OpenAI's own client, and what a model says when it is asked without a server."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import openai
import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.conversation import with_end_of_turn
from llamita.inference.request import Generation
from llamita.server.model import ServedModel

CLOSE = 1e-5
"""Most difference of two log-probabilities of a token: batches differ in the order of their sums."""


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def async_client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def answered(model: ServedModel, messages: Sequence[Mapping[str, Any]], **params: Any) -> Generation:
    """What the engine of a model answers to a conversation; all tokens that there is room for, unless said."""
    assert model.chat is not None
    prompt = model.chat.encode(messages).tokens
    params = {"max_tokens": model.config.max_position_embeddings - len(prompt), **params}
    return model.require_llm().generate(prompt, with_end_of_turn(SamplingParams(**params), model.chat))


def same_scores(found: Sequence[float | None], expected: Sequence[float]) -> None:
    assert len(found) == len(expected)
    assert found == pytest.approx(list(expected), abs=CLOSE)


class Streamed:
    """The choices of a stream of chat completions, put together from their chunks; checks the form of the stream."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self.chunks = list(chunks)
        self.text: dict[int, str] = {}
        self.reasoning: dict[int, str] = {}
        self.scores: dict[int, list[Any]] = {}
        self.reason: dict[int, str] = {}
        self.usage = None
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in self.chunks}) == 1
        for number, chunk in enumerate(self.chunks):
            assert chunk.object == "chat.completion.chunk"
            if chunk.usage is not None:
                assert not chunk.choices
                assert number == len(self.chunks) - 1
                self.usage = chunk.usage
            for choice in chunk.choices:
                self._take(choice)

    def _take(self, choice: Any) -> None:
        delta, index = choice.delta, choice.index
        if index not in self.text:
            assert delta.role == "assistant"
            assert not delta.content
            self.text[index], self.reasoning[index], self.scores[index] = "", "", []
            return
        assert delta.role is None
        assert index not in self.reason, "nothing comes after the reason of the end"
        self.text[index] += delta.content or ""
        self.reasoning[index] += getattr(delta, "reasoning_content", None) or ""
        if choice.logprobs is not None:
            self.scores[index] += choice.logprobs.content
        if choice.finish_reason is not None:
            assert delta.content is None
            assert delta.tool_calls is None
            self.reason[index] = choice.finish_reason

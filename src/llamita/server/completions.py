"""POST /v1/completions: OpenAI's form of continued text, of one prompt or many, whole or as a stream of chunks."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llamita.backend.sampling_params import SamplingParams
from llamita.inference import request as engine
from llamita.inference.inspection import piece_text
from llamita.inference.request import Statistics, TokenEvent
from llamita.server import wording
from llamita.server.chat_jobs import room_for
from llamita.server.errors import ApiError, bad_value
from llamita.server.model import ServedModel
from llamita.server.routes import JsonRoute
from llamita.server.sampling import check_top_logprobs, chosen_max_tokens, sampling_params, schema_of
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.openai import CompletionRequest, TextCompletion
from llamita.server.serving import Job, Serving
from llamita.server.streaming import DONE, TextEvent, data, whole_or_stream

DEFAULT_TOKENS = 16
"""Most tokens where a request does not say, as in OpenAI's API."""


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=ERRORS)

    @routes.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses={200: {"content": {"text/event-stream": {}}, "description": "The continuations, or their chunks."}},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues texts."""
        reply = Reply(serving, body)
        return await whole_or_stream(request, serving.limits, body.stream, lambda: whole(reply), lambda: stream(reply))

    return routes


class Reply:
    """A request, checked, and what all parts of its answer have in common."""

    def __init__(self, serving: Serving, body: CompletionRequest) -> None:
        self.serving, self.body, limits = serving, body, serving.limits
        self.tokenizer = serving.model.tokenizer
        self.adapter = serving.model.adapter_of(body.model)
        self.prompts = listed_prompts(body.prompt)
        self.echo = bool(body.echo)
        if len(self.prompts) > limits.max_n:
            raise bad_value("prompt", f"prompt has {len(self.prompts)} prompts; give at most {limits.max_n}")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad_value("best_of", f"best_of={body.best_of} is not supported; leave it out, or make it equal to n")
        self.silent = body.max_tokens == 0 and self.echo
        """The prompt alone is asked for: the engine writes one token, which is left out."""
        asked = DEFAULT_TOKENS if body.max_tokens is None else 1 if self.silent else body.max_tokens
        self.top = check_top_logprobs(body.logprobs, "logprobs", limits)
        self.logprobs = body.logprobs is not None
        self.params: SamplingParams = sampling_params(
            body,
            serving.model.defaults,
            limits,
            chosen_max_tokens(asked, "max_tokens", 1),
            top_logprobs=self.top,
            prompt_logprobs=self.echo and self.logprobs,
            json_schema=schema_of(body.response_format),
        )
        if len(self.prompts) * self.params.n > limits.max_n:
            raise bad_value("n", f"prompts times n are {len(self.prompts) * self.params.n}; at most {limits.max_n}")
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.counts_always = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self.head = {
            "id": wording.new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or serving.model.name,
            "system_fingerprint": wording.FINGERPRINT,
        }

    def requests(self) -> Sequence[engine.Request]:
        """Returns the engine's requests, a prompt each; ValueError for one that it cannot serve."""
        return [self._request(self.serving.model, prompt) for prompt in self.prompts]

    def _request(self, model: ServedModel, prompt: str | list[int]) -> engine.Request:
        if isinstance(prompt, str):
            model.require_tokenizer()
        tokens = model.require_llm().encode(prompt)
        room_for(model, len(tokens), "prompt")  # refuses a prompt that leaves none
        return model.require_llm().request(tokens, self.params, self.adapter)

    def index(self, place: int, continuation: int) -> int:
        return place * self.params.n + continuation

    def choice(self, index: int, text: str, scores: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}

    def counts(self, rows: Sequence["Row"], places: int) -> dict[str, Any]:
        """Returns the counts of the call, and the times of its first prompt, whichever continuation was first."""
        prompts = []
        for place in range(places):
            own = rows[self.index(place, 0) : self.index(place + 1, 0)]
            begun = (row.statistics for row in own if row.statistics is not None)
            prompts.append(next(begun, Statistics(0, len(own[0].prompt))))
        generated = 0 if self.silent else sum(len(row.tokens) for row in rows)
        return {"usage": wording.usage(prompts, generated), "timings": wording.timings(prompts[0])}


@dataclass
class Row:
    """One continuation so far."""

    prompt: Sequence[int]
    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    prompt_logprobs: Sequence[float] = ()
    prompt_top: Sequence[Sequence[tuple[int, float]]] = ()
    reason: str = "stop"
    statistics: Statistics | None = None
    offset: int = 0  # characters that the log-probabilities given so far stand for


def listed_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], field: str = "prompt"
) -> list[str | list[int]]:
    """Returns the prompts of a request, each a text or token ids; `field` is where they stand in it."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or prompt == [[]]:
        raise bad_value(field, f"{field} is empty; give a text, token ids, or a list of either")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


async def whole(reply: Reply) -> dict[str, Any]:
    """Returns the answer as one object."""
    async with reply.serving.job(reply.requests) as job:
        rows = _rows(reply, job)
        async with contextlib.aclosing(job.events()) as batches:
            async for batch in batches:
                for place, event in batch:
                    _take(rows[reply.index(place, event.index)], event)
        choices = []
        for index, row in enumerate(rows):
            before = _echoed(reply, row) if reply.echo else ""
            generated = "" if reply.silent else row.text
            scores = _logprobs(reply, row, row.tokens, reply.echo) if reply.logprobs else None
            choices.append(reply.choice(index, before + generated, scores, "length" if reply.silent else row.reason))
        return {**reply.head, "choices": choices, **reply.counts(rows, len(job.requests))}


async def stream(reply: Reply) -> AsyncGenerator[bytes]:
    """Yields the answer as server-sent events."""
    async with reply.serving.job(reply.requests) as job:
        rows = _rows(reply, job)

        def chunk(index: int, text: str, scores: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
            more: dict[str, Any] = {"usage": None} if reply.include_usage else {}
            if reply.counts_always:
                more = {"usage": reply.counts(rows, len(job.requests))["usage"]}
            return {**reply.head, "choices": [reply.choice(index, text, scores, reason)], **more}

        text_events = [TextEvent(partial(chunk, index, scores=None, reason=None)) for index in range(len(rows))]
        begun: set[int] = set()
        yield b""  # admitted: what goes wrong from here on is told in the stream
        try:
            async with contextlib.aclosing(job.events()) as batches:
                async for batch in batches:
                    pieces = []
                    for place, event in batch:
                        index = reply.index(place, event.index)
                        row = rows[index]
                        _take(row, event)
                        text = "" if reply.silent else event.text
                        echoes = reply.echo and index not in begun
                        if echoes:
                            text = _echoed(reply, row) + text
                        begun.add(index)
                        news = [event] if event.token_id is not None else []
                        scores = _logprobs(reply, row, news, echoes) if reply.logprobs else None
                        reason = event.finish_reason and ("length" if reply.silent else event.finish_reason)
                        if scores is None and reason is None and not reply.counts_always:
                            if text:
                                pieces.append(text_events[index](text))
                        elif text or reason or (scores and scores["tokens"]):
                            pieces.append(data(chunk(index, text, scores, reason)))
                    if pieces:
                        yield b"".join(pieces)
        except ApiError as error:
            yield data(error.body())
            return
        if reply.include_usage:
            yield data({**reply.head, "choices": [], **reply.counts(rows, len(job.requests))})
        yield DONE


def _rows(reply: Reply, job: Job) -> list[Row]:
    return [Row(request.prompt) for request in job.requests for _ in range(reply.params.n)]


def _take(row: Row, event: TokenEvent) -> None:
    row.text += event.text
    row.statistics = event.statistics
    if event.prompt_logprobs:
        row.prompt_logprobs, row.prompt_top = event.prompt_logprobs, event.prompt_top_logprobs
    if event.token_id is not None:
        row.tokens.append(event)
    if event.finish_reason is not None:
        row.reason = event.finish_reason


def _echoed(reply: Reply, row: Row) -> str:
    """Returns the prompt as text; for a prompt of token ids, what they stand for."""
    for prompt in reply.prompts:
        if isinstance(prompt, str) and row.prompt == reply.serving.model.require_llm().encode(prompt):
            return prompt
        if not isinstance(prompt, str) and list(row.prompt) == prompt:
            break
    return "".join(piece_text(reply.tokenizer, token_id) for token_id in row.prompt)


def _logprobs(reply: Reply, row: Row, news: Sequence[TokenEvent], with_prompt: bool) -> dict[str, Any]:
    """Returns tokens with their log-probabilities and alternatives: those of the prompt first, where asked for."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(token_id: int, value: float | None, top: Sequence[tuple[int, float]]) -> None:
        text = piece_text(reply.tokenizer, token_id)
        found["tokens"].append(text)
        found["token_logprobs"].append(value)
        found["top_logprobs"].append(None if value is None else _alternatives(reply, token_id, value, top))
        found["text_offset"].append(row.offset)
        row.offset += len(text)

    if with_prompt:
        values = [None, *row.prompt_logprobs]
        tops = [(), *row.prompt_top] if row.prompt_top else [()] * len(row.prompt)
        for token_id, value, top in zip(row.prompt, values, tops, strict=True):
            add(token_id, value, top)
    if not reply.silent:
        for event in news:
            assert event.token_id is not None
            add(event.token_id, event.logprob, event.top_logprobs)
    return found


def _alternatives(reply: Reply, token_id: int, value: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Returns the likeliest tokens and the one that is there, by their texts; of equal texts the likeliest."""
    found: dict[str, float] = {}
    for other, its in (*top, (token_id, value)):
        text = piece_text(reply.tokenizer, other)
        found[text] = max(found.get(text, -float("inf")), its)
    return found

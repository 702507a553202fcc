"""POST /v1/chat/completions: OpenAI's form of a conversation's answer, whole or as a stream of chunks."""

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llamita.inference.request import Statistics
from llamita.server import wording
from llamita.server.chat_jobs import (
    CallDelta,
    ChatEvent,
    ChatJob,
    ChatTask,
    chat_job,
    check_continuation,
    plain_messages,
)
from llamita.server.errors import ApiError, bad_value
from llamita.server.routes import JsonRoute
from llamita.server.sampling import check_tools, check_top_logprobs, chosen_max_tokens, sampling_params, schema_of
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.openai import ChatCompletion, ChatRequest, NamedTool
from llamita.server.serving import Serving
from llamita.server.streaming import DONE, TextEvent, data, whole_or_stream
from llamita.server.thinking import effort_variables


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=ERRORS)

    @routes.post("/chat/completions", include_in_schema=False, response_model=None)  # for a base URL without /v1
    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {}}, "description": "The answer, or its chunks."}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        task = task_of(serving, body)
        reply = Reply(serving, body)
        return await whole_or_stream(
            request,
            serving.limits,
            body.stream,
            lambda: whole(serving, task, reply),
            lambda: stream(serving, task, reply),
        )

    return routes


def task_of(serving: Serving, body: ChatRequest) -> ChatTask:
    """Returns the task that a request describes; `ApiError` that names a field that is not allowed."""
    limits = serving.limits
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_value("top_logprobs", "top_logprobs needs logprobs; set logprobs to true")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_value("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
    check_continuation(body)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    variables = {
        **effort_variables(serving.model, body.reasoning_effort, "reasoning_effort"),
        **(body.chat_template_kwargs or {}),
    }
    check_tools(body.tools, limits)
    top = check_top_logprobs(body.top_logprobs, "top_logprobs", limits)
    chosen_max_tokens(asked, field, 1)
    build = lambda room: sampling_params(  # noqa: E731
        body,
        serving.model.defaults,
        limits,
        chosen_max_tokens(asked, field, room),
        top_logprobs=top,
        json_schema=schema_of(body.response_format),
    )
    build(1 if body.min_tokens is None else max(1, body.min_tokens))  # refuses what is wrong before a place is taken
    choice = body.tool_choice or ("auto" if body.tools else "none")
    return ChatTask(
        messages=plain_messages(body.messages),
        params=build,
        adapter=serving.model.adapter_of(body.model),
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice,
        parallel_calls=body.parallel_tool_calls is not False,
        variables=variables,
        continue_final=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
    )


class Reply:
    """What all chunks of an answer have in common."""

    def __init__(self, serving: Serving, body: ChatRequest) -> None:
        self.tokenizer = serving.model.tokenizer
        self.logprobs = bool(body.logprobs)
        self.reasons = serving.model.answer_format.reasoning is not None
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.counts_always = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self.head = {
            "id": wording.new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": body.model or serving.model.name,
            "system_fingerprint": wording.FINGERPRINT,
        }

        self._text_events: dict[int, TextEvent] = {}

    def text_chunk(self, job: ChatJob, index: int, text: str) -> bytes:
        """Returns the chunk of a text alone, which most chunks are."""
        if self.counts_always:
            return data(self._chunk(job, index, {"content": text}, None, None))
        if index not in self._text_events:
            self._text_events[index] = TextEvent(lambda text: self._chunk(job, index, {"content": text}, None, None))
        return self._text_events[index](text)

    def chunk(
        self, job: ChatJob, index: int, delta: dict[str, Any], scores: list[Any] | None, reason: str | None
    ) -> bytes:
        return data(self._chunk(job, index, delta, scores, reason))

    def _chunk(
        self, job: ChatJob, index: int, delta: dict[str, Any], scores: list[Any] | None, reason: str | None
    ) -> dict[str, Any]:
        logprobs = {"content": scores, "refusal": None} if scores is not None else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more: dict[str, Any] = {"usage": None} if self.include_usage else {}
        if self.counts_always:
            more = {"usage": self.usage(job)}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **more}

    def usage(self, job: ChatJob) -> dict[str, Any]:
        prompts = [job.statistics[0]] if 0 in job.statistics else [Statistics(0, job.prompt_tokens)]
        return wording.usage(prompts, job.generated, job.reasoning_tokens if self.reasons else None)

    def counts(self, job: ChatJob) -> dict[str, Any]:
        first = job.statistics[0]
        return {"usage": self.usage(job), "timings": wording.timings(first)}


async def whole(serving: Serving, task: ChatTask, reply: Reply) -> dict[str, Any]:
    """Returns the answer as one object."""
    async with chat_job(serving, task) as job:
        messages = [Message() for _ in range(job.n)]
        scores: list[list[Any]] = [[] for _ in range(job.n)]
        async with contextlib.aclosing(job.events()) as batches:
            async for batch in batches:
                for event in batch:
                    messages[event.index].take(event)
                    if reply.logprobs and event.token.token_id is not None:
                        scores[event.index].append(wording.chat_logprob(reply.tokenizer, event.token))
        choices = [
            {
                "index": index,
                "message": message.to_dict(),
                "logprobs": {"content": scores[index], "refusal": None} if reply.logprobs else None,
                "finish_reason": message.finish_reason,
            }
            for index, message in enumerate(messages)
        ]
        return {**reply.head, "object": "chat.completion", "choices": choices, **reply.counts(job)}


class Message:
    """The message of one continuation, put together from its parts."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._arguments: list[list[str]] = []
        self.finish_reason: str = "stop"

    def take(self, event: ChatEvent) -> None:
        self._text.append(event.text)
        self._reasoning.append(event.reasoning)
        for call in event.calls:
            if call.name:
                self._calls.append(call)
                self._arguments.append([])
            self._arguments[call.index].append(call.arguments)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason

    def to_dict(self) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "".join(arguments)}}
                for call, arguments in zip(self._calls, self._arguments, strict=True)
            ]
        return message


async def stream(serving: Serving, task: ChatTask, reply: Reply) -> AsyncGenerator[bytes]:
    """Yields the answer as server-sent events: the role, the text as it comes, the reason of the end, the counts."""
    async with chat_job(serving, task) as job:
        role = {"role": "assistant", "content": None if task.must_call else ""}  # as OpenAI begins
        yield b"".join(reply.chunk(job, index, role, None, None) for index in range(job.n))
        try:
            async with contextlib.aclosing(job.events()) as batches:
                async for batch in batches:
                    pieces = []
                    for event in batch:
                        scores = None
                        if reply.logprobs and event.token.token_id is not None:
                            scores = [wording.chat_logprob(reply.tokenizer, event.token)]
                        if scores or event.reasoning or event.calls:
                            delta = delta_of(event) or {"content": ""}
                            pieces.append(reply.chunk(job, event.index, delta, scores, None))
                        elif event.text:
                            pieces.append(reply.text_chunk(job, event.index, event.text))
                        if event.finish_reason is not None:
                            pieces.append(reply.chunk(job, event.index, {}, None, event.finish_reason))
                    if pieces:
                        yield b"".join(pieces)
        except ApiError as error:
            yield data(error.body())
            return
        if reply.include_usage:
            yield data({**reply.head, "object": "chat.completion.chunk", "choices": [], **reply.counts(job)})
        yield DONE


def delta_of(event: ChatEvent) -> dict[str, Any]:
    """Returns what an event adds to a message; empty where that is nothing."""
    delta: dict[str, Any] = {}
    if event.reasoning:
        delta["reasoning_content"] = event.reasoning
    if event.text:
        delta["content"] = event.text
    if event.calls:
        delta["tool_calls"] = [_call_delta(call) for call in event.calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name:
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": call.id, "type": "function", "function": function}
    return {"index": call.index, "function": {"arguments": call.arguments}}

"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a conversation's answer, whole or as events."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from llamita.backend.sampling_params import SamplingParams
from llamita.server import wording
from llamita.server.chat_jobs import ChatEvent, ChatJob, ChatTask, chat_job, encode_messages
from llamita.server.errors import ApiError, bad_value, refuse_fields
from llamita.server.messages_input import goes_on, messages_of
from llamita.server.messages_output import Blocks
from llamita.server.routes import JsonRoute
from llamita.server.sampling import check_tools, chosen_max_tokens, sampling_params, schema_of, stop_texts
from llamita.server.schemas import openai
from llamita.server.schemas.messages import (
    MESSAGES_ERRORS,
    REFUSED,
    CountTokensRequest,
    MessageObject,
    MessagesRequest,
    NoChoice,
    TokenCount,
    ToolChoice,
)
from llamita.server.serving import Serving
from llamita.server.streaming import data, unless_gone, whole_or_stream
from llamita.server.thinking import effort_variables, thinking_variables
from llamita.text.answers.grammar import Choice

PATH = "/v1/messages"
PING = data({"type": "ping"}, "ping")
CHOICES: dict[str, Choice] = {"auto": "auto", "any": "required", "none": "none"}
"""Anthropic's words for the choice of tools, and the task's."""


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["Anthropic"], responses=MESSAGES_ERRORS)

    @routes.post(
        PATH,
        response_model=MessageObject,
        responses={200: {"content": {"text/event-stream": {}}, "description": "The message, or its events."}},
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answers a conversation, in the form of Anthropic's Messages."""
        reply = Reply(serving, body)
        return await whole_or_stream(
            request, serving.limits, body.stream, lambda: whole(reply), lambda: stream(reply), PING
        )

    @routes.post(f"{PATH}/count_tokens", response_model=TokenCount)
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        """Counts the tokens of a conversation as the chat template lays it out."""
        task = task_of(serving, body, lambda room: serving.model.defaults)
        prepared = serving.prepared(lambda: len(encode_messages(serving.model, task).tokens))
        return JSONResponse({"input_tokens": await unless_gone(request, prepared)})

    return routes


def task_of(serving: Serving, body: CountTokensRequest, params: Callable[[int], SamplingParams]) -> ChatTask:
    """Returns the task that a request describes; `ApiError` that names a field that is not allowed."""
    refuse_fields(body, {name: why for name, why in REFUSED.items() if name in type(body).model_fields})
    tools = body.tools or []
    check_tools(tools, serving.limits)
    choice = body.tool_choice
    if isinstance(choice, ToolChoice) and choice.name not in [tool.name for tool in tools]:
        raise bad_value("tool_choice", f"tool_choice names {choice.name!r:.80}, which tools does not have")
    if choice is not None and choice.type == "any" and not tools:
        raise bad_value("tool_choice", "tool_choice is any, and there are no tools to choose from")
    continues = goes_on(body)
    config = body.output_config
    return ChatTask(
        messages=messages_of(body),
        params=params,
        adapter=serving.model.adapter_of(body.model),
        tools=[
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description is not None else {}),
                    "parameters": tool.input_schema,
                    **({"strict": tool.strict} if tool.strict is not None else {}),
                },
            }
            for tool in tools
        ],
        tool_choice=_chosen(body),
        parallel_calls=choice is None or isinstance(choice, NoChoice) or not choice.disable_parallel_tool_use,
        variables={
            **effort_variables(serving.model, config.effort if config else None, "output_config.effort"),
            **thinking_variables(serving.model, body.thinking.type if body.thinking else None, "thinking"),
            **(body.chat_template_kwargs or {}),
        },
        continue_final=continues,
        add_generation_prompt=not continues,
        names={"response_format": "output_config.format"},
    )


def _chosen(body: CountTokensRequest) -> Choice | dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return "auto" if body.tools else "none"
    if isinstance(choice, ToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return CHOICES[choice.type]


class Reply:
    """A request, checked, and what all events of its answer have in common."""

    def __init__(self, serving: Serving, body: MessagesRequest) -> None:
        self.serving, self.body = serving, body
        self.stops = stop_texts(body.stop_sequences, serving.limits, "stop_sequences")
        self._params(1)  # refuses what is wrong before a place is taken
        self.task = task_of(serving, body, self._params)
        self.blocks = Blocks()
        self.ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head = {
            "id": wording.new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": body.model or serving.model.name,
        }

    def take(self, event: ChatEvent) -> list[dict[str, Any]]:
        """Takes what one token adds; returns the events that tell of it."""
        if event.finish_reason is not None:
            stop = event.token.stop_string if event.token.stop_string in self.stops else None
            reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
            reason = reasons.get(event.finish_reason, "end_turn" if stop is None else "stop_sequence")
            self.ending = {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}
        return self.blocks.take(event)

    def message(self, job: ChatJob) -> dict[str, Any]:
        """Returns the message as it stands."""
        content = [dict(block) for block in self.blocks.content]
        return {**self._head, "content": content, **self.ending, "usage": self.usage(job)}

    def usage(self, job: ChatJob) -> dict[str, int]:
        """Returns the counts; until the prompt was read, none of it counts as found in the prefix cache."""
        cached = job.statistics[0].cached_tokens if job.statistics else 0
        return {
            "input_tokens": job.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": job.generated,
        }

    def _params(self, room: int) -> SamplingParams:
        body = self.body
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        form = body.output_config.format if body.output_config else None
        schema = (
            openai.JsonObjectFormat.model_validate({"type": "json_object", "schema": form.schema_}) if form else None
        )
        return sampling_params(
            openai.Sampling(stop=list(self.stops), **{name: getattr(body, name) for name in names}),
            self.serving.model.defaults,
            self.serving.limits,
            chosen_max_tokens(body.max_tokens, "max_tokens", room),
            json_schema=schema_of(schema),
        )


async def whole(reply: Reply) -> dict[str, Any]:
    """Returns the message as one object."""
    async with chat_job(reply.serving, reply.task) as job:
        async with contextlib.aclosing(job.events()) as batches:
            async for batch in batches:
                for event in batch:
                    reply.take(event)
        reply.blocks.end()
        return reply.message(job)


async def stream(reply: Reply) -> AsyncGenerator[bytes]:
    """Yields the message as server-sent events; a fault is an `error`, which is the last."""
    async with chat_job(reply.serving, reply.task) as job:
        yield _written({"type": "message_start", "message": reply.message(job)}) + PING
        try:
            async with contextlib.aclosing(job.events()) as batches:
                async for batch in batches:
                    if pieces := [_written(told) for event in batch for told in reply.take(event)]:
                        yield b"".join(pieces)
        except ApiError as error:
            yield _written(error.body(PATH))
            return
        ended = [
            *reply.blocks.end(),
            {"type": "message_delta", "delta": reply.ending, "usage": reply.usage(job)},
            {"type": "message_stop"},
        ]
        yield b"".join(map(_written, ended))


def _written(event: dict[str, Any]) -> bytes:
    return data(event, event["type"])

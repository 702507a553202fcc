"""POST /v1/responses: OpenAI's Responses, without stored state: an answer's items, whole or as a stream of events."""

import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from llamita.backend.sampling_params import SamplingParams
from llamita.server import wording
from llamita.server.chat_jobs import ChatJob, ChatTask, chat_job
from llamita.server.errors import ApiError, bad_value, refuse_fields, unsupported
from llamita.server.responses_input import messages_of
from llamita.server.responses_output import Output
from llamita.server.routes import JsonRoute
from llamita.server.sampling import (
    check_streaming,
    check_tools,
    check_top_logprobs,
    chosen_max_tokens,
    sampling_params,
    schema_of,
)
from llamita.server.schemas import openai
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.responses import (
    LOGPROBS,
    REFUSED,
    STATELESS,
    ChosenFunction,
    ObjectFormat,
    ResponseObject,
    ResponsesRequest,
    SchemaFormat,
)
from llamita.server.serving import Serving
from llamita.server.streaming import DONE, data, whole_or_stream
from llamita.server.thinking import effort_variables

Ending = Literal["completed", "incomplete"]


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=ERRORS)

    @routes.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses={200: {"content": {"text/event-stream": {}}, "description": "The response, or its events."}},
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation, in the form of OpenAI's Responses. Nothing is kept."""
        reply = Reply(serving, body)
        return await whole_or_stream(request, serving.limits, body.stream, lambda: whole(reply), lambda: stream(reply))

    for methods, path in (
        (["GET", "DELETE", "POST"], "/v1/responses/{response_id}"),
        (["POST"], "/v1/responses/{response_id}/cancel"),
        (["GET"], "/v1/responses/{response_id}/input_items"),
    ):
        routes.add_api_route(path, _none_kept, methods=methods, include_in_schema=False)
    return routes


async def _none_kept(response_id: str) -> Response:
    raise ApiError(404, f"there is no response {response_id!r:.80}: {STATELESS}", param="response_id")


class Reply:
    """A request, checked, and what all events of its answer have in common."""

    def __init__(self, serving: Serving, body: ResponsesRequest) -> None:
        self.serving, self.body = serving, body
        _check(body, serving)
        self.logprobs = LOGPROBS in (body.include or ())
        self.params = self._params(1)  # refuses what is wrong before a place is taken
        self.task = self._task()
        self.output = Output(serving.model.tokenizer, self.logprobs)
        self._head = {"id": wording.new_id("resp_"), "object": "response", "created_at": int(time.time())}
        self._settings = self._echoed()

    def resource(self, status: str, job: ChatJob | None = None, error: ApiError | None = None) -> dict[str, Any]:
        """Returns the response as it stands; its counts where the answer has begun."""
        return {
            **self._head,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": {"code": "server_error", "message": error.message} if error is not None else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [dict(item) for item in self.output.items],
            "usage": self._usage(job) if job is not None and job.statistics else None,
            **self._settings,
        }

    def _usage(self, job: ChatJob) -> dict[str, Any]:
        first = job.statistics[0]
        return {
            "input_tokens": first.prompt_tokens,
            "input_tokens_details": {"cached_tokens": first.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": job.generated,
            "output_tokens_details": {"reasoning_tokens": job.reasoning_tokens},
            "total_tokens": first.prompt_tokens + job.generated,
        }

    def _params(self, room: int) -> SamplingParams:
        body, limits = self.body, self.serving.limits
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "seed",
        )  # fmt: skip
        return sampling_params(
            openai.Sampling(**{name: getattr(body, name) for name in names}),
            self.serving.model.defaults,
            limits,
            chosen_max_tokens(body.max_output_tokens, "max_output_tokens", room),
            top_logprobs=check_top_logprobs(body.top_logprobs, "top_logprobs", limits),
            json_schema=_schema(body),
        )

    def _task(self) -> ChatTask:
        body, model = self.body, self.serving.model
        effort = body.reasoning.effort if body.reasoning else None
        choice = body.tool_choice or ("auto" if body.tools else "none")
        return ChatTask(
            messages=messages_of(body),
            params=self._params,
            adapter=model.adapter_of(body.model),
            tools=[
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in body.tools or ()
            ],
            tool_choice=choice if isinstance(choice, str) else _named(choice.name),
            parallel_calls=body.parallel_tool_calls is not False,
            variables={
                **effort_variables(model, effort, "reasoning.effort"),
                **(body.chat_template_kwargs or {}),
            },
            names={"messages": "input", "response_format": "text.format"},
        )

    def _echoed(self) -> dict[str, Any]:
        """Returns the settings that the answer was made with, which a response repeats."""
        body, params = self.body, self.params
        form: dict[str, Any] = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            form = body.text.format.model_dump(by_alias=True)
        if form["type"] == "json_schema":
            form["strict"] = True  # the grammar holds the answer to the schema, whatever was asked
        choice = body.tool_choice or "auto"
        return {
            "model": body.model or self.serving.model.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "top_logprobs": params.top_logprobs,
            "text": {"format": form, "verbosity": "medium"},
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "truncation": "disabled",
            "store": False,
            "background": False,
            "service_tier": "default",
            "previous_response_id": None,
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }


async def whole(reply: Reply) -> dict[str, Any]:
    """Returns the response as one object."""
    async with chat_job(reply.serving, reply.task) as job:
        status: Ending = "completed"
        async with contextlib.aclosing(job.events()) as batches:
            async for batch in batches:
                for event in batch:
                    reply.output.take(event)
                    if event.finish_reason == "length":
                        status = "incomplete"
        reply.output.end(status)
        return reply.resource(status, job)


async def stream(reply: Reply) -> AsyncGenerator[bytes]:
    """Yields the response as server-sent events, numbered from 0; a fault is an `error` and then `response.failed`."""
    numbers = itertools.count()

    def write(event: dict[str, Any]) -> bytes:
        kind = event["type"]
        return data({"type": kind, "sequence_number": next(numbers), **event}, kind)

    def write_state(name: str, response: dict[str, Any]) -> bytes:
        return write({"type": f"response.{name}", "response": response})

    async with chat_job(reply.serving, reply.task) as job:
        begun = reply.resource("in_progress")
        yield write_state("created", begun) + write_state("in_progress", begun)
        status: Ending = "completed"
        try:
            async with contextlib.aclosing(job.events()) as batches:
                async for batch in batches:
                    pieces = []
                    for event in batch:
                        pieces += [write(told) for told in reply.output.take(event)]
                        if event.finish_reason == "length":
                            status = "incomplete"
                    if pieces:
                        yield b"".join(pieces)
        except ApiError as error:
            fault = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
            yield write({**fault, **error.body()}) + write_state("failed", reply.resource("failed", job, error)) + DONE
            return
        told = b"".join(write(event) for event in reply.output.end(status))
        yield told + write_state(status, reply.resource(status, job)) + DONE


def _check(body: ResponsesRequest, serving: Serving) -> None:
    """Refuses what this server does not honour; `ApiError` that names the field."""
    refuse_fields(body, REFUSED)
    if body.store:
        raise unsupported("store", f"true asks for it, and {STATELESS}; set it to false")
    if body.background:
        raise unsupported("background", f"true asks for it, and {STATELESS}; use a stream")
    if body.truncation == "auto":
        raise unsupported("truncation", "auto asks for it, and this server never shortens a conversation")
    if other := next((name for name in body.include or () if name != LOGPROBS), None):
        raise unsupported("include", f"it has {other!r:.80}, and only {LOGPROBS} can be included")
    if body.top_logprobs and not body.include:
        raise bad_value("top_logprobs", f"top_logprobs needs include to have {LOGPROBS}")
    check_streaming(body)
    tools = body.tools or ()
    check_tools(tools, serving.limits)
    choice = body.tool_choice
    if isinstance(choice, ChosenFunction) and choice.name not in [tool.name for tool in tools]:
        raise bad_value("tool_choice", f"tool_choice names {choice.name!r:.80}, which tools does not have")
    if choice == "required" and not tools:
        raise bad_value("tool_choice", "tool_choice is required, and there are no tools to choose from")


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _schema(body: ResponsesRequest) -> str:
    """Returns the JSON schema that the answer is held to; empty for plain text."""
    form = body.text.format if body.text else None
    if isinstance(form, ObjectFormat):
        return schema_of(openai.JsonObjectFormat(type="json_object"))
    if isinstance(form, SchemaFormat):
        schema = openai.JsonSchema.model_validate({"name": form.name, "schema": form.schema_})
        return schema_of(openai.JsonSchemaFormat(type="json_schema", json_schema=schema))
    return ""

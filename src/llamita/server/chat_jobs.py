"""An answer to a conversation, whichever API asked for it: from a task to the parts of the answer as they come.

Chat completions, Responses and Messages are three ways of writing the same task down, and three ways of writing the
parts of its answer. Here is what they share.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.conversation import with_answer_format, with_end_of_turn
from llamita.inference.request import Request, Statistics, TokenEvent
from llamita.server import wording
from llamita.server.errors import ApiError, bad_value, unsupported
from llamita.server.model import ServedModel
from llamita.server.schemas.openai import FinishReason
from llamita.server.serving import Job, Serving
from llamita.text.answers import AnswerParser, call_grammar
from llamita.text.answers.grammar import Choice
from llamita.text.chat import ChatTokens

RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "bos_token",
    "eos_token",
    "chat_template",
    "learned_from",
    "self",
)
"""Variables of a template that a request sets by fields of its own, or not at all."""


@dataclass(frozen=True)
class ChatTask:
    """A conversation to be answered. `params` is called with the tokens that the context has left for an answer."""

    messages: Sequence[Mapping[str, Any]]
    params: Callable[[int], SamplingParams]
    adapter: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    """In OpenAI's form."""
    tool_choice: Choice | Mapping[str, Any] = "auto"
    """auto, none, required, or the function to call in OpenAI's form."""
    parallel_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    add_generation_prompt: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    """The names that fields of chat completions have in the API that was asked, where they differ; for errors."""

    def named(self, field_name: str) -> str:
        return self.names.get(field_name, field_name)

    @property
    def offered(self) -> list[Mapping[str, Any]]:
        """The tools that the model is told of: none where it may call none."""
        return [] if self.tool_choice == "none" else list(self.tools)

    @property
    def must_call(self) -> bool:
        """Whether the answer can only be a call of a tool."""
        return self.tool_choice not in ("auto", "none")


@dataclass(frozen=True)
class CallDelta:
    """What comes of a call of a tool: its id and name with the first part, then pieces of its arguments' JSON text.

    `index` counts the calls of an answer from 0.
    """

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class ChatEvent:
    """What one token adds to one continuation."""

    index: int
    token: TokenEvent
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: FinishReason | None = None


def encode_messages(model: ServedModel, task: ChatTask) -> ChatTokens:
    """Returns the conversation as token ids. `ApiError` for a model that cannot, ValueError for messages it refuses."""
    if model.chat is None:
        raise ApiError(400, "this model has no tokenizer, so it reads no messages", param=task.named("messages"))
    if reserved := next((name for name in task.variables if name in RESERVED or name.startswith("_")), None):
        raise bad_value("chat_template_kwargs", f"chat_template_kwargs sets {reserved!r}, which has its own field")
    return model.chat.encode(
        task.messages,
        add_generation_prompt=task.add_generation_prompt and not task.continue_final,
        continue_final_message=task.continue_final,
        tools=task.offered or None,
        **task.variables,
    )


def room_for(model: ServedModel, tokens: int, param: str = "messages") -> int:
    """Returns how many tokens an answer may have after a prompt; `ApiError` where there is no room for one."""
    context = model.config.max_position_embeddings
    if tokens >= context:
        raise ApiError(
            400,
            f"the prompt has {tokens} tokens, and the context of this model has {context}, of which the answer needs "
            f"at least one; shorten the prompt by at least {tokens - context + 1} tokens",
            param=param,
            code="context_length_exceeded",
        )
    return context - tokens


@contextlib.asynccontextmanager
async def chat_job(serving: Serving, task: ChatTask) -> AsyncGenerator["ChatJob"]:
    """Lays the conversation out, admits it, and gives its events; all in one context, which ends it."""
    model = serving.model
    answers: list[_Answer] = []

    def prepare() -> Sequence[Request]:
        form = model.answer_format
        if task.offered and form.calls is None:
            raise unsupported("tools", "this model's chat template does not say how a tool is called")
        encoded = encode_messages(model, task)
        params = task.params(room_for(model, len(encoded.tokens), task.named("messages")))
        prompt = encoded.text
        grammar = ""
        if task.offered:
            try:
                grammar = call_grammar(form, task.offered, task.tool_choice, prompt, task.parallel_calls)
            except ValueError as error:
                raise bad_value("tools", str(error)) from None
        if grammar and params.is_constrained:
            message = "calls of tools that are held to a form leave no other form to the text"
            raise bad_value(task.named("response_format"), message)
        if task.offered or (form.reasoning is not None and not params.is_constrained):
            params = with_answer_format(replace(params, grammar=grammar or params.grammar), form)
            for _ in range(params.n):
                parser = AnswerParser(form, task.offered, prompt, task.parallel_calls, streams_arguments=bool(grammar))
                short_ids = form.calls is not None and form.calls.short_ids
                answers.append(_Answer(parser, form.begins_in_reasoning(prompt), short_ids))
        assert model.chat is not None, "it has encoded the messages"
        params = with_end_of_turn(params, model.chat)
        return [model.require_llm().request(encoded.tokens, params, task.adapter)]

    async with serving.job(prepare) as job:
        yield ChatJob(job, answers)


class ChatJob:
    """A conversation's answer under way: its parts as they come, and its counts so far."""

    def __init__(self, job: Job, answers: Sequence["_Answer"]) -> None:
        self._job = job
        self.n = job.requests[0].params.n
        self.prompt_tokens = len(job.requests[0].prompt)
        self.statistics: dict[int, Statistics] = {}
        self.generated, self.reasoning_tokens = 0, 0
        self._answers = answers or [_Answer() for _ in range(self.n)]

    async def events(self) -> AsyncGenerator[Iterator[ChatEvent]]:
        """Yields what came at once: text, reasoning, calls of tools, the end.

        The counts follow what is taken of it, event by event, so that they are right in the middle of it too.
        """
        async with contextlib.aclosing(self._job.events()) as batches:
            async for batch in batches:
                yield self._taken([event for _, event in batch])
                if all(answer.has_ended for answer in self._answers):
                    return  # one call was allowed and has come: the engine need not go on

    def _taken(self, events: Sequence[TokenEvent]) -> Iterator[ChatEvent]:
        for event in events:
            self.statistics[event.index] = event.statistics
            self.generated += event.token_id is not None
            answer = self._answers[event.index]
            if not answer.has_ended:
                taken = answer.take(event)
                self.reasoning_tokens += answer.is_reasoning and event.token_id is not None
                yield taken


class _Answer:
    """One continuation, told apart into its parts."""

    def __init__(self, parser: AnswerParser | None = None, is_reasoning: bool = False, short_ids: bool = False) -> None:
        self._parser, self.is_reasoning, self._short_ids = parser, is_reasoning, short_ids
        self._calls = 0
        self.has_ended = False

    def take(self, event: TokenEvent) -> ChatEvent:
        reason: FinishReason | None = None
        if event.finish_reason is not None:
            reason = "length" if event.finish_reason == "length" else "stop"
        if self._parser is None:
            self.has_ended = reason is not None
            return ChatEvent(event.index, event, event.text, finish_reason=reason)
        parts = self._parser.feed(event.text)
        if reason is not None:
            parts += self._parser.finish()
        elif self._parser.is_complete:
            reason = "stop"
        text, reasoning, calls = "", "", []
        for part in parts:
            if part.kind == "text":
                text += part.text
            elif part.kind == "reasoning":
                reasoning += part.text
            elif part.kind == "call":
                self._calls += 1
                calls.append(CallDelta(part.index, id=wording.new_call_id(self._short_ids), name=part.text))
            else:
                calls.append(CallDelta(part.index, part.text))
        if reasoning or text or calls:
            self.is_reasoning = not (text or calls)
        if self._calls and reason == "stop":
            reason = "tool_calls"
        self.has_ended = reason is not None
        return ChatEvent(event.index, event, text, reasoning, tuple(calls), reason)


def check_continuation(body: Any) -> None:
    """Raises `ApiError` for a request that asks for the beginning of an answer and to go on in the last message."""
    if body.add_generation_prompt and body.continue_final_message:
        message = "add_generation_prompt begins an answer and continue_final_message goes on in one; give one of them"
        raise bad_value("continue_final_message", message)


def plain_messages(messages: Sequence[Any], param: str = "messages") -> list[dict[str, Any]]:
    """Returns the messages of a request (OpenAI's, as schemas/openai.py has them) as templates expect them.

    A developer's message is a system message; the arguments of a call are the object that their text holds, as most
    templates want them; parts that refuse are text.
    """
    return [_plain(message.model_dump(exclude_none=True), param) for message in messages]


def _plain(message: dict[str, Any], param: str) -> dict[str, Any]:
    if message["role"] == "developer":
        message["role"] = "system"
    refusal = message.pop("refusal", None)
    message.pop("annotations", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [{"type": "text", "text": part.get("text", part.get("refusal", ""))} for part in content]
    elif content is None and refusal:
        message["content"] = refusal
    calls = []
    for call in message.get("tool_calls", ()):
        call.pop("index", None)
        arguments = call["function"]["arguments"]
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            name = call["function"]["name"]
            raise bad_value(param, f"{param}: the arguments of a call of {name!r} are no JSON object")
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    if calls:
        message["tool_calls"] = calls
        message.setdefault("content", "")  # many templates end without any, and none takes another from an empty one
    else:
        message.pop("tool_calls", None)
    return message

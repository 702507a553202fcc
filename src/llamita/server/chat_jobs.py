"""An answer to a conversation, whichever API asked for it: from a task to the parts of the answer as they come.

Chat completions, Responses and Messages are three ways of writing the same task down, and three ways of writing the
parts of its answer. Here is what they share.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.conversation import with_end_of_turn
from llamita.inference.request import Request, Statistics, TokenEvent
from llamita.server.errors import ApiError, bad_value
from llamita.server.model import ServedModel
from llamita.server.serving import Job, Serving
from llamita.text.chat import Chat

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
    tool_choice: str = "auto"
    """auto, none, required, or the name of a function."""
    parallel_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    add_generation_prompt: bool = True


@dataclass(frozen=True)
class ChatEvent:
    """What one token adds to one continuation."""

    index: int
    token: TokenEvent
    text: str = ""
    finish_reason: str | None = None


def encode_messages(model: ServedModel, task: ChatTask) -> tuple[Chat, tuple[int, ...]]:
    """Returns the conversation as token ids. `ApiError` for a model that cannot, ValueError for messages it refuses."""
    if model.chat is None:
        raise ApiError(400, "this model has no tokenizer, so it reads no messages", param="messages")
    if reserved := next((name for name in task.variables if name in RESERVED or name.startswith("_")), None):
        raise bad_value("chat_template_kwargs", f"chat_template_kwargs sets {reserved!r}, which has its own field")
    tokens = model.chat.encode(
        task.messages,
        add_generation_prompt=task.add_generation_prompt and not task.continue_final,
        continue_final_message=task.continue_final,
        tools=list(task.tools) or None,
        **task.variables,
    ).tokens
    return model.chat, tokens


def room_for(model: ServedModel, tokens: int) -> int:
    """Returns how many tokens an answer may have after a prompt; `ApiError` where there is no room for one."""
    context = model.config.max_position_embeddings
    if tokens >= context:
        raise ApiError(
            400,
            f"the prompt has {tokens} tokens, and the context of this model has {context}, of which the answer needs "
            f"at least one; shorten the prompt by at least {tokens - context + 1} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    return context - tokens


@contextlib.asynccontextmanager
async def chat_job(serving: Serving, task: ChatTask) -> AsyncGenerator["ChatJob"]:
    """Lays the conversation out, admits it, and gives its events; all in one context, which ends it."""
    model = serving.model

    def prepare() -> Sequence[Request]:
        chat, tokens = encode_messages(model, task)
        params = with_end_of_turn(task.params(room_for(model, len(tokens))), chat)
        return [model.require_llm().request(tokens, params, task.adapter)]

    async with serving.job(prepare) as job:
        yield ChatJob(job)


class ChatJob:
    """A conversation's answer under way: its parts as they come, and its counts so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.n = job.requests[0].params.n
        self.prompt_tokens = len(job.requests[0].prompt)
        self.statistics: dict[int, Statistics] = {}

    @property
    def generated(self) -> int:
        return sum(statistics.generated_tokens for statistics in self.statistics.values())

    async def events(self) -> AsyncGenerator[list[ChatEvent]]:
        """Yields what came at once: text, reasoning, calls of tools, the end."""
        async with contextlib.aclosing(self._job.events()) as batches:
            async for batch in batches:
                events = []
                for _, event in batch:
                    self.statistics[event.index] = event.statistics
                    events.append(ChatEvent(event.index, event, event.text, event.finish_reason))
                yield events


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the messages of a request as templates expect them.

    A developer's message is a system message; the arguments of a call are the object that their text holds, as most
    templates want them; parts that refuse are text.
    """
    return [_plain(message.model_dump(exclude_none=True)) for message in messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
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
            raise bad_value("messages", f"the arguments of a call of {call['function']['name']!r} are no JSON object")
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    if calls:
        message["tool_calls"] = calls
    else:
        message.pop("tool_calls", None)
    return message

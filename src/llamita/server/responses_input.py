"""The input items of Responses as the messages of chat completions: what an assistant said, item by item, in turns."""

from collections.abc import Sequence
from typing import Any

from llamita.server.chat_jobs import plain_messages
from llamita.server.errors import bad_value
from llamita.server.schemas import openai
from llamita.server.schemas.responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
    RefusalContent,
    ResponsesRequest,
    TextContent,
)


def messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Returns a request's conversation as templates expect it: instructions, then the items of its input.

    Reasoning, a message and calls that follow one another are one turn of the assistant. `ApiError` for an output of a
    call that is not there, or arguments that are no JSON object.
    """
    messages: list[openai.Message] = []
    if body.instructions is not None:
        messages.append(openai.SystemMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return plain_messages([*messages, openai.UserMessage(role="user", content=body.input)])
    calls: set[str] = set()
    for number, item in enumerate(body.input):
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id not in calls:
                raise bad_value("input", f"input {number} is the output of {item.call_id!r:.80}, which no item calls")
            messages.append(openai.ToolMessage(role="tool", content=_text(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem) and item.role == "user":
            messages.append(openai.UserMessage(role="user", content=_text(item.content)))
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append(openai.SystemMessage(role="system", content=_text(item.content)))
        else:
            turn = messages[-1] if messages else None
            if not isinstance(turn, openai.AssistantMessage) or not _joins(turn, item):
                turn = openai.AssistantMessage(role="assistant")
                messages.append(turn)
            _add(turn, item)
            if isinstance(item, FunctionCallItem):
                calls.add(item.call_id)
    return plain_messages(messages, "input")


def _joins(turn: openai.AssistantMessage, item: MessageItem | FunctionCallItem | ReasoningItem) -> bool:
    """Whether an item goes on with a turn: reasoning comes before what is said, and that before calls."""
    if isinstance(item, FunctionCallItem):
        return True
    return turn.content is None and turn.tool_calls is None


def _add(turn: openai.AssistantMessage, item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, ReasoningItem):
        turn.reasoning_content = (turn.reasoning_content or "") + "".join(
            part.text for part in item.content or item.summary
        )
    elif isinstance(item, MessageItem):
        turn.content = _text(item.content)
    else:
        function = openai.FunctionCall(name=item.name, arguments=item.arguments)
        turn.tool_calls = [*(turn.tool_calls or ()), openai.ToolCall(id=item.call_id, function=function)]


def _text(content: str | Sequence[TextContent | RefusalContent]) -> Any:
    """Returns a message's content; that of one part is its text, which every template reads."""
    if isinstance(content, str):
        return content
    texts = [part.refusal if isinstance(part, RefusalContent) else part.text for part in content]
    return texts[0] if len(texts) == 1 else [openai.TextPart(type="text", text=text) for text in texts]

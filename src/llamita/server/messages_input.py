"""Anthropic's conversations as the messages of chat completions: blocks of content become texts, calls and results."""

import itertools
import json
from collections.abc import Collection, Sequence
from typing import Any

from llamita.server.chat_jobs import plain_messages
from llamita.server.errors import bad_value
from llamita.server.schemas import openai
from llamita.server.schemas.messages import (
    AssistantTurn,
    CountTokensRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

ERROR = "Error: "
"""What a result begins with that the request calls an error; chat templates have no other way to say so."""
Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


def messages_of(body: CountTokensRequest) -> list[dict[str, Any]]:
    """Returns a request's conversation as templates expect it.

    Turns of one speaker that follow one another are one turn, as in Anthropic's API. `ApiError` for a result of a call
    that is not there.
    """
    messages: list[openai.Message] = []
    if body.system is not None:
        messages.append(openai.SystemMessage(role="system", content=_content(_blocks(body.system))))
    calls: set[str] = set()
    for role, turns in itertools.groupby(body.messages, key=lambda turn: turn.role):
        blocks = [block for turn in turns for block in _blocks(turn.content)]
        if role == "system":
            messages.append(openai.SystemMessage(role="system", content=_content(blocks)))
        elif role == "assistant":
            messages.append(_assistant_message(blocks))
            calls |= {block.id for block in blocks if isinstance(block, ToolUseBlock)}
        else:
            messages += _user_messages(blocks, calls)
    return plain_messages(messages)


def goes_on(body: CountTokensRequest) -> bool:
    """Whether the answer goes on in the last message, the assistant's; `ApiError` where that does not end with text."""
    last = body.messages[-1]
    if not isinstance(last, AssistantTurn):
        return False
    blocks = _blocks(last.content)
    if not blocks or not isinstance(blocks[-1], TextBlock):
        raise bad_value("messages", "messages ends with an assistant message that does not end with text to go on from")
    return True


def _blocks(content: str | Sequence[Block]) -> list[Block]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)


def _content(blocks: Sequence[Block]) -> Any:
    """Returns the texts among blocks; a single one as it is, which every template reads."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    return "".join(texts) if len(texts) < 2 else [openai.TextPart(type="text", text=text) for text in texts]


def _assistant_message(blocks: Sequence[Block]) -> openai.AssistantMessage:
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        openai.ToolCall(
            id=block.id,
            function=openai.FunctionCall(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)),
        )
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return openai.AssistantMessage(
        role="assistant",
        content=_content(blocks) if any(isinstance(block, TextBlock) for block in blocks) else None,
        reasoning_content="".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _user_messages(blocks: Sequence[Block], calls: Collection[str]) -> list[openai.Message]:
    """Returns the results of calls as messages of their own, and the user's texts between them as the user's."""
    messages: list[openai.Message] = []
    for are_results, group in itertools.groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
        if not are_results:
            messages.append(openai.UserMessage(role="user", content=_content(list(group))))
            continue
        for block in group:
            assert isinstance(block, ToolResultBlock)
            if block.tool_use_id not in calls:
                raise bad_value("messages", f"there is a result of {block.tool_use_id!r:.80}, which no tool_use has")
            content = _content(_blocks(block.content or ""))
            if block.is_error:
                content = ERROR + (content if isinstance(content, str) else "\n".join(part.text for part in content))
            messages.append(openai.ToolMessage(role="tool", content=content, tool_call_id=block.tool_use_id))
    return messages or [openai.UserMessage(role="user", content="")]

"""Messages of a conversation: their form, and marks by which what they say is found again in a rendered text.

The marks are code points that no text has. They go around what a message says, inside of the spaces that templates
trim. Knows nothing of templates or tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.text.chat_sandbox import MAX_TEXT

Message = Mapping[str, Any]
MARKS = range(0xFDD0, 0xFDF0)  # code points that Unicode keeps out of text


@dataclass(frozen=True)
class Layout:
    """A rendered conversation, and where in it messages stand; None for both where that cannot be known."""

    text: str
    written: list[tuple[int, int]] | None
    by_assistant: list[tuple[int, int]] | None


def choose_marks(*values: Any) -> list[str]:
    """Five marks that none of the values has: two around what others wrote, two around the assistant's, one to end."""
    spoken = json.dumps(values, ensure_ascii=False, default=str)
    marks = [chr(code) for code in MARKS if chr(code) not in spoken][:5]
    if len(marks) < 5:
        raise ValueError("the messages hold nearly all of the code points U+FDD0 to U+FDEF, which are not for text")
    return marks


def normalised(messages: Sequence[Message], flat: bool) -> list[dict[str, Any]]:
    """The messages checked, without keys that are null; `flat`: text parts joined, for templates that expect texts."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list of at least one object with role and content")
    result, length = [], 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must be an object with a role and a content, got {message!r:.100}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                    raise ValueError(f"message {index} has a part of type {kind!r}; only text parts can be read")
            if flat:
                content = "\n".join(part["text"] for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"message {index} has the content {content!r:.100}; expected a text, text parts or null")
        length += sum(map(len, strings(content)))
        if content is None and not message.get("tool_calls"):
            content = ""  # what is not there would end many templates
        kept = {**message, "content": content}
        result.append({key: value for key, value in kept.items() if value is not None})
    if length > MAX_TEXT:
        raise ValueError(f"the messages have {length} characters; at most {MAX_TEXT} are allowed")
    return result


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def with_content(message: dict[str, Any], change: Any) -> dict[str, Any]:
    """The message with its text changed, or the last of its text parts."""
    content = message.get("content")
    if isinstance(content, list | tuple) and content:
        last = {**content[-1], "text": change(content[-1]["text"])}
        return {**message, "content": [*content[:-1], last]}
    if not isinstance(content, str):
        raise ValueError("the last message has no content to continue")
    return {**message, "content": change(content)}


def marked(message: dict[str, Any], marks: Sequence[str]) -> dict[str, Any]:
    """The message with marks around what its texts say, inside of the spaces that templates trim."""
    begin, end = marks[2:4] if message["role"] == "assistant" else marks[0:2]

    def mark(text: str) -> str:
        core = text.strip()
        before = len(text) - len(text.lstrip())
        return text[:before] + begin + core + end + text[before + len(core) :] if core else text

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    if isinstance(content, list | tuple):
        return {**message, "content": [{**part, "text": mark(part["text"])} for part in content]}
    return message


def without_marks(text: str, marks: Sequence[str]) -> Layout | None:
    """The text without marks, and what stood between them; None where they do not come in pairs."""
    pieces: list[str] = []
    spans: dict[str, list[tuple[int, int]]] = {marks[1]: [], marks[3]: []}
    position, start, expected = 0, 0, ""
    for piece in re.split(f"([{''.join(marks[:4])}])", text):
        if piece not in marks[:4] or not piece:
            pieces.append(piece)
            position += len(piece)
        elif expected:
            if piece != expected:
                return None
            spans[piece].append((start, position))
            expected = ""
        elif piece in (marks[0], marks[2]):
            start, expected = position, marks[marks.index(piece) + 1]
        else:
            return None
    return None if expected else Layout("".join(pieces), spans[marks[1]] + spans[marks[3]], spans[marks[3]])

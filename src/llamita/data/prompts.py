"""Prompts for a model to answer, with whatever else a record holds for whoever judges the answer.

A record has a `prompt`, a text or messages, or `messages`, of which an answer at the end becomes the field `answer`.
Knows nothing of tokens, models or rewards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamita.data.conversations import (
    BadRecords,
    ConversationSource,
    parsed,
    records,
    said_in,
    split_by,
    tools_of,
    variables_of,
    with_system,
)
from llamita.data.preferences import Messages, messages

FORMS = '{"prompt": a text or messages, ...} or {"messages": [...]}'


@dataclass(frozen=True)
class Prompt:
    """The messages so far, the whole record, and its place in the file."""

    said: Messages
    record: Mapping[str, Any]
    where: str
    tools: Any = None
    """What the template may be told of, as a conversation's."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, likewise."""


def prompts(source: ConversationSource, bad: BadRecords | None = None) -> Iterator[Prompt]:
    """The prompts of a source other than Meadow, in order; ValueError or OSError, in one line, that names the place."""
    bad = bad or BadRecords()
    return parsed(records(source, bad=bad), prompt, bad)


def prompt(record: Any, where: str) -> Prompt:
    """The prompt that a record holds; ValueError that says what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, not an object; expected {FORMS}")
    if "prompt" in record:
        return _prompt(messages(record["prompt"], "user", f"{where}: prompt"), record, where)
    if "messages" not in record:
        raise ValueError(f"{where} has the fields {sorted(record)}; expected {FORMS}")
    said = messages(record["messages"], "user", f"{where}: messages")
    if said[-1]["role"] == "assistant":
        said, record = said[:-1], {"answer": said[-1].get("content"), **record}
    if not said:
        raise ValueError(f"{where} has an answer alone and nothing that it answers")
    return _prompt(said, record, where)


def _prompt(said: Messages, record: Mapping[str, Any], where: str) -> Prompt:
    said = tuple(with_system(said, record, where))
    return Prompt(said, record, where, tools_of(record, where), variables_of(record, where))


def split(all_of: Iterator[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Those to train on, and a share to validate on, by a hash of what is said."""
    return split_by(lambda prompt: said_in(prompt.said), all_of, share, seed)


def digest(all_of: Sequence[Prompt]) -> str:
    """sha256 over the prompts and what their records hold."""
    total = hashlib.sha256()
    for prompt in all_of:
        total.update(json.dumps([prompt.said, prompt.record], sort_keys=True, default=str).encode() + b"\n")
    return total.hexdigest()

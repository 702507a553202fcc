"""Conversations to learn from, and where they come from: JSON lines, a Hugging Face dataset, or Meadow.

A record has `messages`, `conversations` in ShareGPT's form, or a `prompt` with a `response`; its place in its file goes
along, so that whatever is wrong with it can be told. Knows nothing of tokens or templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from llamita.data import meadow_tasks, sources

MEADOW = "meadow"
Item = TypeVar("Item")
MakeRecords = Callable[[int, int, meadow_tasks.Split], Iterable[Any]]
MOST_SHOWN = 3
FORMS = '{"messages": [...]} or {"prompt": ..., "response": ...}'
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"} | {
    role: role for role in ("user", "assistant", "system", "tool")
}
"""Whom a message in ShareGPT's form is `from`, and the role that is meant."""
SETTINGS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "learned_from", "self")
"""What no record may set as a variable of the template."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, with the tools it may be told of, and where they stand."""

    messages: tuple[Mapping[str, Any], ...]
    tools: Any
    where: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, as `enable_thinking`."""


@dataclass
class BadRecords:
    """What becomes of records that cannot be used: the first ends the reading or, where they are skipped, all are
    counted."""

    skip: bool = False
    count: int = 0
    shown: list[str] = field(default_factory=list)
    """What is wrong with the first of them, with their places."""

    def add(self, error: ValueError) -> None:
        """Counts a record; raises its error where none is to be skipped."""
        if not self.skip:
            raise error
        self.count += 1
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(str(error))

    def lines(self) -> list[str]:
        """What to report of them."""
        more = self.count - len(self.shown)
        return [f"skipped: {text}" for text in self.shown] + [f"skipped: {more:,} more"] * bool(more)


def recorded(counts: Any) -> dict[str, int]:
    """Returns counts (a dataclass) for a run's record; `bad` is left out where there are none, as in older ones."""
    return {name: value for name, value in asdict(counts).items() if name != "bad" or value}


@dataclass(frozen=True)
class ConversationSource:
    """A stream of conversations that can be read again from its start: one of files, dataset and Meadow."""

    files: tuple[Path, ...] = ()
    dataset: str = ""
    dataset_config: str | None = None
    dataset_split: str = "train"
    meadow: meadow_tasks.Split | None = None
    limit: int | None = None
    """At most this many; Meadow needs it."""
    turns: int = 1
    seed: int = 0
    """Both of Meadow."""

    def check(self) -> None:
        """Raise for what can be known to fail before anything is read."""
        for path in self.files:
            if not path.exists():
                raise FileNotFoundError(f"there is no file {path}")
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory; give the files in it")


def conversations(source: ConversationSource, bad: BadRecords | None = None) -> Iterator[Conversation]:
    """The conversations of a source, in order; ValueError or OSError, in one line, that names the place."""
    bad = bad or BadRecords()
    found = records(source, partial(meadow_tasks.conversations, turns=source.turns), bad)
    return parsed(found, conversation, bad)


def parsed(found: Iterable[tuple[Any, str]], parse: Callable[[Any, str], Item], bad: BadRecords) -> Iterator[Item]:
    """What `parse` makes of records and their places; those that it raises ValueError for are bad."""
    for record, where in found:
        try:
            item = parse(record, where)
        except ValueError as error:
            bad.add(error)
        else:
            yield item


def records(
    source: ConversationSource, from_meadow: MakeRecords | None = None, bad: BadRecords | None = None
) -> Iterator[tuple[Any, str]]:
    """The records of a source, in order, each with its place; of Meadow those that (seed, count, split) give."""
    source.check()
    on_fault = bad.add if bad is not None else None
    if source.meadow is not None:
        assert source.limit is not None
        assert from_meadow is not None
        made = from_meadow(source.seed, source.limit, source.meadow)
        found: Iterator[tuple[Any, str]] = ((record, f"{MEADOW}, number {i}") for i, record in enumerate(made))
    elif source.dataset:
        found = sources.hub_records(source.dataset, source.dataset_config, source.dataset_split)
    else:
        found = chain.from_iterable(sources.json_records(path, on_fault) for path in source.files)
    return islice(found, source.limit)


def conversation(record: Any, where: str) -> Conversation:
    """The conversation that a record holds; ValueError that says what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, not an object; expected {FORMS}")
    name = "messages" if "messages" in record or "conversations" not in record else "conversations"
    if name in record:
        said = record[name]
        if not isinstance(said, list) or not said:
            raise ValueError(f"{where}: {name} must be a list of at least one message")
        said = _read_messages(said, where)
    else:
        answer = "response" if "response" in record else "completion"
        if "prompt" not in record or answer not in record:
            raise ValueError(f"{where} has the fields {sorted(record)}; expected {FORMS}")
        before = _said(record["prompt"], "user", f"{where}: prompt")
        before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in before]
        said = [*before, *_said(record[answer], "assistant", f"{where}: {answer}")]
    messages = tuple(with_system(said, record, where))
    return Conversation(messages, tools_of(record, where), where, variables_of(record, where))


def _said(value: Any, role: str, where: str) -> list[Mapping[str, Any]]:
    """A text as a message of `role`, or messages; ValueError for anything else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {type(value).__name__}, not text or messages")
    return _read_messages(value, where)


def _read_messages(said: Sequence[Any], where: str) -> list[Mapping[str, Any]]:
    """Messages in either form, checked."""
    found = [read_message(message, f"{where}: message {number}") for number, message in enumerate(said)]
    for number, message in enumerate(found):
        _check_message(message, f"{where}: message {number}")
    return found


def read_message(message: Any, where: str) -> Any:
    """A message as it is, or what one in ShareGPT's form, with `from` and `value`, says; ValueError for others."""
    if not isinstance(message, dict) or "role" in message or not {"from", "value"} <= message.keys():
        return message
    if message["from"] not in SHAREGPT:
        known = ", ".join(SHAREGPT)
        raise ValueError(f"{where} is from {message['from']!r:.60}; expected one of {known}, or messages with roles")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT[message["from"]], "content": message["value"], **rest}


def with_system(
    messages: Sequence[Mapping[str, Any]], record: Mapping[str, Any], where: str
) -> Sequence[Mapping[str, Any]]:
    """The messages behind the system message that a record has in a field of its own, unless they begin with one."""
    system = record.get("system")
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"{where}: system is {type(system).__name__}, not text")
    return [{"role": "system", "content": system}, *messages]


def variables_of(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The variables of the template that a record sets in `chat_template_kwargs`; those that are null are not set."""
    variables = record.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict) or (wrong := [name for name in variables if name in SETTINGS]):
        what = repr(variables)[:60] if not isinstance(variables, dict) else f"{wrong[0]!r}, which is no variable"
        raise ValueError(f"{where}: chat_template_kwargs must be an object of the template's variables, got {what}")
    return {name: value for name, value in variables.items() if value is not None}


def tools_of(record: Mapping[str, Any], where: str = "") -> list[Any] | None:
    """The tools of a record, a list or the JSON of one, as datasets keep it; None where there are none."""
    tools = record.get("tools")
    place = f"{where}: " if where else ""
    if not tools and record.get("functions"):
        raise ValueError(f"{place}functions is the older form of tools; give a list of tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{place}tools is a text that is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}tools must be a list of objects, got {tools!r:.100}")
    return tools


def split(all_of: Iterable[Conversation], share: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and a share to validate on, by a hash of what is said."""
    return split_by(lambda conversation: said_in(conversation.messages), all_of, share, seed)


def split_by(
    said: Callable[[Item], bytes], all_of: Iterable[Item], share: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Two sides, the second a share of the whole: by a hash of what `said` gives, so equal ones lie on one side."""
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item in all_of:
        digest = hashlib.blake2b(said(item), digest_size=8, key=str(seed).encode()).digest()
        sides[int.from_bytes(digest, "little") < share * 2**64].append(item)
    return sides


def said_in(messages: Iterable[Mapping[str, Any]]) -> bytes:
    """Messages as bytes that are equal where they are."""
    return json.dumps(list(messages), sort_keys=True, default=str).encode()


def for_validation(source: ConversationSource, share: float) -> ConversationSource:
    """Meadow's held-out questions, `share` of as many as there are conversations to train on, but at least one."""
    assert source.meadow is not None and source.limit is not None  # noqa: PT018
    return replace(source, meadow="validation", turns=1, limit=max(1, round(source.limit * share)))


def _check_message(message: Any, where: str) -> None:
    """Raises ValueError, naming the place, for a message that a template would stumble over."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be an object with a role and a content, got {message!r:.100}")
    content = message.get("content")
    if not (content is None or isinstance(content, str | list)):
        raise ValueError(f"{where} has a content that is {type(content).__name__}; expected a text or text parts")

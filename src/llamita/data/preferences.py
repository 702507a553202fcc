"""Pairs of answers, one preferred to the other: where they come from, and how they become rows of one length.

A record has `prompt`, `chosen` and `rejected`, each a text or messages, or `chosen` and `rejected` as two conversations
that begin alike; a text beside such conversations is their question once more. Laid out by a chat template or as plain
text, the two answers of a pair are rows of their own, in which the answer alone is scored. Knows nothing of models, and
of what the reference thinks of an answer only the name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from llamita.data import meadow_tasks
from llamita.data.batches import Batch, collate
from llamita.data.conversations import (
    BadRecords,
    ConversationSource,
    parsed,
    read_message,
    records,
    split_by,
    tools_of,
    variables_of,
    with_system,
)
from llamita.data.packing import Row, RowsConfig
from llamita.text.chat import Chat
from llamita.text.chat_turns import REASONING
from llamita.text.tokenizer import Tokenizer

FORMS = '{"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages'

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Preference:
    """The messages so far, two ways to go on of which the first is preferred, and the place in the file."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    where: str
    tools: Any = None
    """What the template may be told of, as a conversation's."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, likewise."""


def preferences(source: ConversationSource, bad: BadRecords | None = None) -> Iterator[Preference]:
    """The pairs of a source, in order; ValueError or OSError, in one line, that names the place."""
    bad = bad or BadRecords()
    return parsed(records(source, meadow_tasks.preferences, bad), preference, bad)


def preference(record: Any, where: str) -> Preference:
    """The pair that a record holds; ValueError that says what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, not an object; expected {FORMS}")
    if "chosen" not in record or "rejected" not in record:
        raise ValueError(f"{where} has the fields {sorted(record)}; expected {FORMS}")
    chosen, rejected = (messages(record[name], "assistant", f"{where}: {name}") for name in ("chosen", "rejected"))
    are_whole = all(answer[0]["role"] != "assistant" for answer in (chosen, rejected))
    name = "prompt" if "prompt" in record or "conversations" not in record else "conversations"
    if name in record and not (are_whole and isinstance(record[name], str)):
        prompt = messages(record[name], "user", f"{where}: {name}")
        chosen, rejected = (
            answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in (chosen, rejected)
        )
    else:
        alike = [a == b for a, b in zip(chosen, rejected, strict=False)]
        shared = alike.index(False) if False in alike else len(alike)
        if shared == len(alike) and shared and chosen[shared - 1]["role"] == "assistant":
            shared -= 1  # one goes on from the other, or they are equal: what both end with is an answer
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise ValueError(f"{where} has no prompt, and chosen and rejected do not begin alike; expected {FORMS}")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise ValueError(f"{where}: {name} must go on from the prompt with a message of the assistant")
    prompt = tuple(with_system(prompt, record, where))
    return Preference(prompt, chosen, rejected, where, tools_of(record, where), variables_of(record, where))


def messages(value: Any, role: str, where: str) -> Messages:
    """A text as a message of `role`, or messages as they are; ValueError for anything else."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {type(value).__name__}; expected a text or a list of messages")
    value = [read_message(message, f"{where}: message {number}") for number, message in enumerate(value)]
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} holds {message!r:.100}; a message is an object with a role and a content")
        says_otherwise = message.get("tool_calls") or any(message.get(name) for name in REASONING)
        if not (isinstance(message.get("content"), str | list) or (message.get("content") is None and says_otherwise)):
            raise ValueError(
                f"{where} has a message whose content is {type(message.get('content')).__name__}, not text"
            )
    return tuple({name: entry for name, entry in message.items() if entry is not None} for message in value)


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The way from messages to tokens: a chat template or, where there is none, one text after the other."""

    tokenizer: Tokenizer
    chat: Chat | None

    def prompt(self, said: Messages, tools: Any = None, variables: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """The tokens that an answer goes on from."""
        if self.chat is not None:
            return self.chat.encode(said, tools=tools, **(variables or {})).tokens
        return tuple(self.tokenizer.encode(plain(said), bos=self.tokenizer.begins_texts))

    def answered(
        self, said: Messages, answer: Messages, tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a prompt and its answer, int32, and which of them the assistant wrote in the answer: bool."""
        if self.chat is None:
            before = self.prompt(said)
            ids = [*before, *self.tokenizer.encode(plain(answer), eos=self.tokenizer.eos_id is not None)]
            return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(before)
        whole = self.chat.encode(
            [*said, *answer],
            add_generation_prompt=False,
            tools=tools,
            learned_from=len(said),
            **(variables or {}),
        )
        if whole.assistant_mask is None:
            raise ValueError(whole.fault)
        return np.array(whole.tokens, dtype=np.int32), np.array(whole.assistant_mask, dtype=bool)


def plain(said: Messages) -> str:
    """Returns the texts of messages without their roles; ValueError for what is not text."""
    for number, message in enumerate(said):
        other = [name for name in ("tool_calls", *REASONING) if message.get(name)]
        if other or not isinstance(message["content"], str):
            what = other[0] if other else "parts"
            raise ValueError(
                f"message {number} of them has {what}; without a chat template there can be text alone: name one with "
                "--template"
            )
    return "".join(message["content"] for message in said)


@dataclass(frozen=True)
class Counts:
    """Counts of the pairs that were read: kept + too_long + without_preference + bad of them."""

    read: int
    kept: int
    too_long: int
    without_preference: int
    """Both answers the same tokens, or one of them none."""
    bad: int = 0
    """Skipped, since they could not be read or laid out."""

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.read:,} pairs"]
        parts += [f"{self.too_long:,} dropped for their length"] * bool(self.too_long)
        parts += [f"{self.without_preference:,} skipped, nothing to choose between"] * bool(self.without_preference)
        parts += [f"{self.bad:,} skipped, which cannot be laid out"] * bool(self.bad)
        return ", ".join(parts)


Side = tuple[np.ndarray, np.ndarray]
"""Token ids and which of them are scored."""


@dataclass
class Pairs:
    """Pairs as token ids, and what the reference thinks of them once that is known."""

    chosen: list[Side]
    rejected: list[Side]
    counts: Counts
    reference_N2: np.ndarray | None = field(default=None, repr=False)
    """The log-probabilities that the reference gives to the two answers of each pair, float32: sums, or means."""

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def longest(self) -> int:
        """Tokens of the longest of all rows."""
        return max((len(tokens) for tokens, _ in chain(self.chosen, self.rejected)), default=0)

    @property
    def lengths_N2(self) -> np.ndarray:
        """The number of scored tokens of the two answers of each pair, float32."""
        sides = [[scored[1:].sum() for _, scored in side] for side in (self.chosen, self.rejected)]
        return np.array(sides, dtype=np.float32).T

    def digest(self) -> str:
        """sha256 over all that a model will see of them."""
        total = hashlib.sha256()
        for tokens, scored in chain(self.chosen, self.rejected):
            total.update(np.int64(len(tokens)).tobytes() + tokens.tobytes() + scored.tobytes())
        return total.hexdigest()


def encode(layout: Layout, pairs: Iterable[Preference], longest: int, bad: BadRecords | None = None) -> Pairs:
    """Lay pairs out; those of which one row has more than `longest` tokens are dropped.

    ValueError, naming the place of the pair, where the template refuses it; `bad` may have those skipped, and has
    counted those that could not be read.
    """
    bad = bad or BadRecords()
    chosen: list[Side] = []
    rejected: list[Side] = []
    read = too_long = same = 0
    for pair in pairs:
        try:
            better, worse = (answered(layout, pair, name) for name in ("chosen", "rejected"))
        except ValueError as error:
            bad.add(error)
            continue
        read += 1
        if max(len(better[0]), len(worse[0])) > longest:
            too_long += 1
        elif not (better[1][1:].any() and worse[1][1:].any()) or better[0].tolist() == worse[0].tolist():
            same += 1
        else:
            chosen.append(better)
            rejected.append(worse)
    return Pairs(chosen, rejected, Counts(read + bad.count, len(chosen), too_long, same, bad.count))


def answered(layout: Layout, pair: Preference, name: str) -> Side:
    """One of a pair's answers laid out; ValueError names the place."""
    try:
        return layout.answered(pair.prompt, getattr(pair, name), pair.tools, pair.variables)
    except ValueError as error:
        raise ValueError(f"{pair.where}, {name}: {error}") from None


# --- batches ----------------------------------------------------------------------------------------------------------


class PairRows:
    """Pairs as rows of `sequence_length` + 1 tokens, each answer with its prompt and padding behind."""

    def __init__(self, pairs: Pairs, sequence_length: int, pad_id: int | None = None) -> None:
        assert pairs.longest <= sequence_length + 1, "a row is longer than sequence_length"
        self.pairs = pairs
        self.config = RowsConfig("pad", sequence_length)
        self._pad_id = pad_id or 0  # never scored, and behind all that is: any id will do

    def __len__(self) -> int:
        return len(self.pairs)

    def row(self, index: int) -> Row:
        """The chosen answer of a pair."""
        return self._padded(self.pairs.chosen[index])

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Pairs as `objectives.Preference` takes them; `reference_B2` is there once it is known."""
        chosen = collate([self.row(i) for i in row_ids.tolist()], row_ids)
        rejected = collate([self._padded(self.pairs.rejected[i]) for i in row_ids.tolist()], row_ids)
        extras = {"rejected_tokens_BT": rejected.tokens_BT, "rejected_labels_BT": rejected.labels_BT}
        if self.pairs.reference_N2 is not None:
            extras["reference_B2"] = self.pairs.reference_N2[row_ids]
        return Batch(chosen.tokens_BT, chosen.labels_BT, None, chosen.row_ids, extras, row_is_target=True)

    def _padded(self, side: Side) -> Row:
        tokens, scored = side
        room = self.config.sequence_length + 1 - len(tokens)
        label_mask = np.pad(scored, (0, room))
        label_mask[0] = False
        return Row(np.pad(tokens, (0, room), constant_values=self._pad_id), label_mask, None)


def split(pairs: Iterable[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Those to train on, and a share to validate on: by a hash of the prompt, so equal prompts lie on one side."""
    return split_by(lambda pair: repr([sorted(said.items()) for said in pair.prompt]).encode(), pairs, share, seed)

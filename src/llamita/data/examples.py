"""Conversations as rows: a chat template makes tokens of them, and only what the assistant wrote is scored.

A conversation lies in one row, whole or cut at its end; packed, a row holds several, which do not see each other.
Tokens are held in memory, five bytes each. Knows nothing of files, order or epochs.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamita.data.batches import Batch, collate
from llamita.data.conversations import BadRecords, Conversation
from llamita.data.packing import Row, RowsConfig
from llamita.text.chat import Chat

TooLong = Literal["drop", "truncate"]


@dataclass(frozen=True)
class Counts:
    """Counts of the conversations that were read: kept + dropped + nothing_to_learn + bad of them."""

    read: int
    kept: int
    truncated: int
    """Kept, but too long, so that they end early."""
    dropped: int
    """Too long."""
    nothing_to_learn: int
    """Without a token that the assistant wrote, or cut before the first."""
    tokens: int
    targets: int
    """Tokens, of those kept, that are scored."""
    bad: int = 0
    """Skipped, since they could not be read or laid out."""

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.read:,} conversations", f"{self.tokens:,} tokens", f"{self.targets:,} scored"]
        parts += [f"{self.truncated:,} cut for their length"] * bool(self.truncated)
        parts += [f"{self.dropped:,} dropped for their length"] * bool(self.dropped)
        parts += [f"{self.nothing_to_learn:,} skipped, nothing in them to learn"] * bool(self.nothing_to_learn)
        parts += [f"{self.bad:,} skipped, which cannot be laid out"] * bool(self.bad)
        return ", ".join(parts)


@dataclass(frozen=True)
class EncodedConversations:
    """Conversations end to end: token ids, int32; which are scored, bool; where each starts, int64 [n + 1]."""

    tokens: np.ndarray
    scored: np.ndarray
    starts: np.ndarray
    counts: Counts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def digest(self) -> str:
        """sha256 over all that a model will see of them."""
        total = hashlib.sha256()
        for array in (self.tokens, self.scored, self.starts):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


def encode(
    chat: Chat,
    conversations: Iterable[Conversation],
    longest: int,
    too_long: TooLong = "drop",
    bad: BadRecords | None = None,
) -> EncodedConversations:
    """Lay conversations out with a template; those of more than `longest` tokens are dropped, or lose their end.

    ValueError, naming the place of the conversation, where the template refuses it or hides what the assistant wrote;
    `bad` may have those skipped, and has counted those that could not be read.
    """
    bad = bad or BadRecords()
    tokens, scored = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=bool)]
    read = truncated = dropped = nothing = 0
    for conversation in conversations:
        try:
            ids, mask = _encode(chat, conversation)
        except ValueError as error:
            bad.add(error)
            continue
        read += 1
        is_long = len(ids) > longest
        if is_long and too_long == "drop":
            dropped += 1
        elif not mask[1:longest].any():
            nothing += 1
        else:
            truncated += is_long
            tokens.append(ids[:longest])
            scored.append(mask[:longest])
    starts = np.cumsum([len(ids) for ids in tokens]).astype(np.int64)
    all_scored = np.concatenate(scored)
    all_scored[starts[:-1]] = False  # nothing precedes a conversation's first token
    totals = int(starts[-1]), int(all_scored.sum())
    counts = Counts(read + bad.count, len(tokens) - 1, truncated, dropped, nothing, *totals, bad.count)
    return EncodedConversations(np.concatenate(tokens), all_scored, starts, counts)


def _encode(chat: Chat, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = chat.encode(
            conversation.messages, add_generation_prompt=False, tools=conversation.tools, **conversation.variables
        )
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from None
    if found.assistant_mask is None:
        raise ValueError(f"{conversation.where}: {found.fault}")
    return np.array(found.tokens, dtype=np.int32), np.array(found.assistant_mask, dtype=bool)


class ConversationRows:
    """Rows of T + 1 tokens over conversations of at most as many; what a row lacks is padding behind.

    pad: a conversation a row. pack: as many as fit, the longest laid first, each a segment of its own. Positions run on
    through a row; attention stays within a segment, and rotations depend on differences of positions alone, so a
    conversation is computed as if it stood alone.
    """

    def __init__(self, conversations: EncodedConversations, config: RowsConfig, pad_id: int | None = None) -> None:
        assert config.mode in ("pad", "pack"), config.mode
        self.conversations = conversations
        self.config = config
        self.block = config.sequence_length + 1
        self.pad_id = pad_id or 0  # masked everywhere, so any id will do
        lengths = conversations.lengths.tolist()
        assert max(lengths, default=0) <= self.block, "a conversation is longer than a row"
        self._members = best_fit(lengths, self.block) if config.mode == "pack" else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self._members)

    def members(self, index: int) -> Sequence[int]:
        """The numbers of the conversations in a row, as they lie there."""
        return self._members[index]

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Returns some rows as a batch."""
        return collate([self.row(int(i)) for i in row_ids], row_ids)

    def row(self, index: int) -> Row:
        """Row `index`, 0 <= index < len(rows)."""
        tokens = np.full(self.block, self.pad_id, dtype=np.int32)
        label_mask = np.zeros(self.block, dtype=bool)
        segments = np.zeros(self.block, dtype=np.int32)
        place = 0
        for number, member in enumerate(self._members[index], start=1):
            start, end = self.conversations.starts[member : member + 2].tolist()
            here = slice(place, place + end - start)
            tokens[here] = self.conversations.tokens[start:end]
            label_mask[here] = self.conversations.scored[start:end]
            segments[here] = number
            place = here.stop
        return Row(tokens, label_mask, segments)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items, grouped so that no group's lengths sum to more than `capacity`.

    The longest item first, each into the group with the least room that takes it (best-fit decreasing; Johnson 1974:
    at most 11/9 of the fewest groups, and 4 more). Equal lengths keep their order.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, group), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = bisect.bisect_left(rooms, (lengths[item], -1))
        if found == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room, group = rooms.pop(found)
        groups[group].append(item)
        bisect.insort(rooms, (room - lengths[item], group))
    return groups

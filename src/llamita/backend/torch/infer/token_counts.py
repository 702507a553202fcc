"""Counts of each token in the sequences under way, for penalties; kept on the device from step to step.

Whatever the engine does with a sequence (it preempts it, takes drafted tokens back, continues it in several ways), the
counts are those of the history that comes with a call: they are carried on only where that history continues the one
counted last, and made anew otherwise. Knows nothing of penalties.

Letters beyond the usual: R rows of a call, S rows of the table.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llamita.backend.interface import SampleSpec

IN_PROMPT, OUTPUT = 1, 2  # a count is twice the occurrences in the output, plus one for a token of the prompt


@dataclass
class _Counted:
    """The sequence that a row of the table has counted."""

    slot: int
    prompt_length: int = 0
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class CountedRow:
    """The counts of one history: those of a row of the table, and some tokens more."""

    slot: int
    extra: list[int]


class TokenCounts:
    """A table with a row of counts for each sequence of the last call."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._known: dict[Hashable, _Counted] = {}
        self._free: list[int] = []
        self._table_SV = self._zeros(0)

    def update(self, specs: Sequence[SampleSpec], sequence_ids: Sequence[int]) -> list[CountedRow]:
        """Counts the histories of these rows and forgets all other sequences.

        Rows of one sequence share its counts where they continue its shortest history, as those of drafted tokens do:
        what they have beyond it is not kept, since the next call may take it back.
        """
        if not specs and not self._known:
            return []
        histories = [list(spec.history) for spec in specs]
        keys: list[Hashable] = list(sequence_ids)
        first: dict[Hashable, int] = {}
        for row in sorted(range(len(specs)), key=lambda row: len(histories[row])):
            shortest = first.setdefault(keys[row], row)
            if not _continues(histories[row], histories[shortest]) or (
                specs[row].prompt_length != specs[shortest].prompt_length
            ):
                keys[row] = (sequence_ids[row], row)
                first[keys[row]] = row
        for key in self._known.keys() - first.keys():
            self._free.append(self._known.pop(key).slot)
        self._count({key: (histories[row], specs[row].prompt_length) for key, row in first.items()})
        return [
            CountedRow(self._known[key].slot, history[len(self._known[key].tokens) :])
            for key, history in zip(keys, histories, strict=True)
        ]

    def gather(self, rows: Sequence[CountedRow]) -> tuple[Tensor, Tensor]:
        """Returns whether a history holds each token (bool), and how often its output does (int32), both [R, V]."""
        counts_RV = self._table_SV.index_select(0, self._indices([row.slot for row in rows]))
        self._add(counts_RV, [(place, row.extra) for place, row in enumerate(rows)])
        return counts_RV > 0, counts_RV >> 1

    def _count(self, wanted: dict[Hashable, tuple[list[int], int]]) -> None:
        """Brings the known sequences to these histories: counts what is new, or all of it."""
        cleared, prompts, outputs = [], [], []
        self._make_room(len(wanted.keys() - self._known.keys()))
        for key, (tokens, prompt_length) in wanted.items():
            known = self._known.get(key) or _Counted(self._free.pop(), prompt_length=-1)
            start = len(known.tokens)
            if known.prompt_length != prompt_length or start < prompt_length or not _continues(tokens, known.tokens):
                cleared.append(known.slot)
                prompts.append((known.slot, tokens[:prompt_length]))
                start = prompt_length
            outputs.append((known.slot, tokens[start:]))
            self._known[key] = _Counted(known.slot, prompt_length, tokens)
        if cleared:
            self._table_SV.index_fill_(0, self._indices(cleared), 0)
            self._table_SV.view(-1).index_fill_(0, self._places(prompts), IN_PROMPT)
        self._add(self._table_SV, outputs)

    def _add(self, counts_RV: Tensor, tokens: list[tuple[int, list[int]]]) -> None:
        places = self._places(tokens)
        if len(places):
            counts_RV.view(-1).index_add_(0, places, torch.full_like(places, OUTPUT, dtype=torch.int32))

    def _places(self, tokens: list[tuple[int, list[int]]]) -> Tensor:
        """Returns the places, in a flattened table, of the tokens of each pair of a row and its tokens."""
        arrays = [np.array(ids, dtype=np.int64) for _, ids in tokens]
        for (row, _), ids in zip(tokens, arrays, strict=True):
            assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab_size), "a token outside the vocabulary"
            ids += row * self._vocab_size
        return to_device(np.concatenate(arrays) if arrays else np.zeros(0, np.int64), self._device)

    def _make_room(self, count: int) -> None:
        if not self._known:  # give the memory of a past crowd back
            self._table_SV, self._free = self._zeros(0), []
        size = len(self._table_SV)
        if count > len(self._free):
            grown = max(count - len(self._free), size)
            self._table_SV = torch.cat([self._table_SV, self._zeros(grown)])
            self._free.extend(range(size, size + grown))

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._vocab_size, dtype=torch.int32, device=self._device)

    def _indices(self, numbers: list[int]) -> Tensor:
        return to_device(np.array(numbers, dtype=np.int64), self._device)


def _continues(tokens: list[int], start: list[int]) -> bool:
    return tokens[: len(start)] == start


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Copies a host array to a device, without waiting for the work that it has under way."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

"""Counts of each token in the sequences under way, for penalties; carried on from step to step.

The counts are numpy's: where MLX is at home, host and device have one memory, so that handing a row over costs a copy
of it and no wait. Whatever the engine does with a sequence (it preempts it, takes drafted tokens back, continues it in
several ways), they are those of the history that comes with a call: they are carried on only where that history
continues the one counted last, and made anew otherwise. Knows nothing of penalties.

Letters beyond the usual: R rows of a call.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from llamita.backend.interface import SampleSpec

IN_PROMPT, OUTPUT = 1, 2  # a count is twice the occurrences in the output, plus one for a token of the prompt


@dataclass
class Counted:
    """A history and its counts."""

    prompt_length: int
    tokens: list[int]
    counts_V: np.ndarray


@dataclass(frozen=True)
class CountedRow:
    """The counts of one history: those of a sequence, and some tokens more."""

    known: Counted
    extra: list[int]


class TokenCounts:
    """Counts of each sequence of the last call."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known: dict[Hashable, Counted] = {}

    def update(self, specs: Sequence[SampleSpec], sequence_ids: Sequence[int]) -> list[CountedRow]:
        """Counts the histories of these rows and forgets all other sequences.

        Rows of one sequence share its counts where they continue its shortest history, as those of drafted tokens do:
        what they have beyond it is not kept, since the next call may take it back.
        """
        histories = [list(spec.history) for spec in specs]
        known: dict[Hashable, Counted] = {}
        rows: dict[int, CountedRow] = {}
        for row in sorted(range(len(specs)), key=lambda row: len(histories[row])):
            key: Hashable = sequence_ids[row]
            if key in known and not _carries_on(histories[row], specs[row].prompt_length, known[key]):
                key = (sequence_ids[row], row)  # another sequence of the same id
            if key not in known:
                known[key] = self._count(self._known.get(key), histories[row], specs[row].prompt_length)
            rows[row] = CountedRow(known[key], histories[row][len(known[key].tokens) :])
        self._known = known
        return [rows[row] for row in range(len(specs))]

    def gather(self, rows: Sequence[CountedRow]) -> tuple[mx.array, mx.array]:
        """Returns whether a history holds each token (bool), and how often its output does (int32), both [R, V]."""
        counts_RV = np.stack([row.known.counts_V for row in rows])
        for counts_V, row in zip(counts_RV, rows, strict=True):
            np.add.at(counts_V, self._ids(row.extra), OUTPUT)
        shared_RV = mx.array(counts_RV)
        return shared_RV > 0, shared_RV >> 1

    def _count(self, known: Counted | None, tokens: list[int], prompt_length: int) -> Counted:
        """Returns the counts of a history: what is new in it, or all of it."""
        if known is None or not _carries_on(tokens, prompt_length, known):
            known = Counted(prompt_length, tokens[:prompt_length], np.zeros(self._vocab_size, np.int32))
            known.counts_V[self._ids(known.tokens)] = IN_PROMPT
        np.add.at(known.counts_V, self._ids(tokens[len(known.tokens) :]), OUTPUT)
        known.tokens = tokens
        return known

    def _ids(self, tokens: list[int]) -> np.ndarray:
        ids = np.array(tokens, dtype=np.int64)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab_size), "a token outside the vocabulary"
        return ids


def _carries_on(tokens: list[int], prompt_length: int, known: Counted) -> bool:
    return known.prompt_length == prompt_length and tokens[: len(known.tokens)] == known.tokens

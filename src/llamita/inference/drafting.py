"""Guessing ahead: what speculative decoding has the model check (Leviathan et al. 2023, arXiv:2211.17192).

The engine runs a guess through the model together with the last token, and keeps it as far as the model gives the same
tokens. Since a draw is keyed by seed and position, what the model gives does not depend on the guess: the text is the
one that would have come without, sampled or greedy. A draft model draws with the same key, so that where both models
have similar distributions they mostly draw the same token. Knows no tensor.
"""

from collections import abc
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from llamita.backend.interface import BlockCopy, CacheLayout, Plan, Runner, SampleSpec, ScheduledChunk
from llamita.inference.sequence import Sequence
from llamita.model.config import ModelConfig

LONGEST_MATCH, SHORTEST_MATCH = 4, 2


class Drafter(Protocol):
    """Guesses what comes next, cheaply; a wrong guess costs time, never a token."""

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """Get ready for an engine over this model and memory; ValueError where it cannot draft for it."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens for each sequence."""

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """Be shown what is about to be copied and read of prompts, before `propose`."""


class PromptLookup:
    """Guesses that what followed the last few tokens earlier in the text follows them again (Saxena 2023)."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Sequence, _Places] = WeakKeyDictionary()

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """It goes with any model."""

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """It needs nothing but the tokens of those that it guesses for."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """What followed the latest earlier place of the longest match; nothing where there is none."""
        guesses = []
        for sequence, count in wanted:
            places = self._seen.setdefault(sequence, _Places())
            places.read(sequence.tokens)
            begin = places.find(sequence.tokens)
            guesses.append([] if begin is None else sequence.tokens[begin : begin + count])
        return guesses


class _Places:
    """Where each run of a few tokens was last followed by something."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def read(self, tokens: abc.Sequence[int]) -> None:
        """Take note of the runs that end before the last token, those known already left out."""
        for end in range(max(self._read, SHORTEST_MATCH), len(tokens)):
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._read = max(self._read, len(tokens))

    def find(self, tokens: abc.Sequence[int]) -> int | None:
        """Where the text went on after the longest earlier run that equals its end."""
        for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(tokens[-length:]))
            if place is not None:
                return place
        return None


class DraftModel:
    """Guesses with a smaller model of the same vocabulary.

    It keeps keys and values of its own under the tables of the engine's sequences, so that what they share, fork and
    give back holds for it too. It sees whatever the engine runs; where it has missed something its guesses get worse,
    and nothing else.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._memory: Any = None
        self._layout = CacheLayout(1, 0)
        self._held: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """Take memory beside the engine's. ValueError where the two models do not go together."""
        ours = self._runner.config
        for name in ("vocab_size", "attention_windows"):
            if getattr(ours, name) != getattr(config, name):
                raise ValueError(
                    f"the draft model has {name}={getattr(ours, name)} and the model {getattr(config, name)}; "
                    "a draft model needs the same"
                )
        if ours.max_position_embeddings < config.max_position_embeddings:
            raise ValueError(
                f"the draft model has {ours.max_position_embeddings} positions, fewer than the model's "
                f"{config.max_position_embeddings}; give one with as many"
            )
        self._memory, self._layout = self._runner.allocate(layout), layout

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """Copy what the engine copies, and read what it reads of prompts."""
        chunks = tuple(replace(chunk, samples=(), targets=(), adapter=None) for chunk in reading)
        if chunks or copies:
            self._runner.run(Plan(chunks, tuple(copies)), self._memory)

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """Draw the next tokens of all sequences together, one step of the draft model after the other."""
        guesses: list[list[int]] = [[] for _ in wanted]
        for number in range(max(count for _, count in wanted)):
            active = [place for place, (_, count) in enumerate(wanted) if count > number == len(guesses[place])]
            if not active:
                break
            chunks = []
            for place in active:
                sequence = wanted[place][0]
                start, known = len(sequence.tokens) + number - 1, guesses[place][-1:]
                if number == 0:
                    start = self._start(sequence)
                    known = sequence.tokens[start:]
                end = start + len(known)
                sample = SampleSpec(sequence.params, sequence.statistics.seed, end)
                tables = tuple(table.blocks for table in sequence.tables)
                chunks.append(ScheduledChunk(sequence.id, tuple(known), start, tables, (sample,)))
                self._held[sequence] = end
            result = self._runner.run(Plan(tuple(chunks)), self._memory)
            for place, (token,) in zip(active, result.sampled, strict=True):
                guesses[place] += [] if token.error else [token.token_id]
        return guesses

    def _start(self, sequence: Sequence) -> int:
        """From where to read: what it has missed, as far as all that the first of it sees has not been given back."""
        start = min(self._held.get(sequence, sequence.computed), sequence.computed)
        for window, table in zip(self._layout.windows, sequence.tables, strict=True):
            if table.released:
                start = max(start, table.released * self._layout.block_size + window - 1)
        return start

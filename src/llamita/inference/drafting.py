"""Guesses tokens ahead, which speculative decoding has the model check (Leviathan et al. 2023, arXiv:2211.17192).

The engine runs a guess through the model together with the last token, and keeps it as far as the model gives the same
tokens. A draw is keyed by seed and position, so the model's tokens do not depend on the guess: the text is the same as
without, sampled or greedy. A draft model draws with the same key, so that where both models have similar distributions
they mostly draw the same token. Knows no tensor.
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
        """Prepares for an engine over this model and memory; ValueError where it cannot draft for it."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """Returns guesses for each sequence, at most as many tokens as its number in `wanted`."""

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """Takes the blocks to be copied and the prompt tokens to be read in this step, before `propose`."""


class PromptLookup:
    """Guesses that the last few tokens go on as they did earlier in the text (Saxena 2023)."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Sequence, _Places] = WeakKeyDictionary()

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """Needs nothing: it drafts for any model."""

    def prepare(self, copies: abc.Sequence[BlockCopy], reading: abc.Sequence[ScheduledChunk]) -> None:
        """Needs nothing: `propose` is given the sequences' tokens."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """Returns the tokens after the latest earlier occurrence of the longest match; none where there is no match."""
        guesses = []
        for sequence, count in wanted:
            places = self._seen.setdefault(sequence, _Places())
            places.read(sequence.tokens)
            begin = places.find(sequence.tokens)
            guesses.append([] if begin is None else sequence.tokens[begin : begin + count])
        return guesses


class _Places:
    """The latest position after each run of a few tokens in a text."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def read(self, tokens: abc.Sequence[int]) -> None:
        """Records the runs that end before the last token; those that are known already are left out."""
        for end in range(max(self._read, SHORTEST_MATCH), len(tokens)):
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._read = max(self._read, len(tokens))

    def find(self, tokens: abc.Sequence[int]) -> int | None:
        """Returns the position after the longest earlier run that equals the text's end; None where there is none."""
        for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(tokens[-length:]))
            if place is not None:
                return place
        return None


class DraftModel:
    """Guesses with a smaller model of the same vocabulary.

    It keeps keys and values of its own under the block tables of the engine's sequences, so that it shares, forks and
    gives back the same blocks. It runs all that the engine runs; where it has missed something, only its guesses get
    worse.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._memory: Any = None
        self._layout = CacheLayout(1, 0)
        self._held: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """Takes memory beside the engine's. ValueError where the two models do not go together."""
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
        """Copies the blocks that the engine copies, and reads the prompt tokens that it reads."""
        chunks = tuple(replace(chunk, samples=(), targets=(), adapter=None) for chunk in reading)
        if chunks or copies:
            self._runner.run(Plan(chunks, tuple(copies)), self._memory)

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[list[int]]:
        """Draws the next tokens of all sequences together, one step of the draft model after the other."""
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
        """Returns the position to read from: the first that it has missed whose window is still held."""
        start = min(self._held.get(sequence, sequence.computed), sequence.computed)
        for window, table in zip(self._layout.windows, sequence.tables, strict=True):
            if table.released:
                start = max(start, table.released * self._layout.block_size + window - 1)
        return start

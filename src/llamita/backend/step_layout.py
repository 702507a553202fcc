"""The layout of a step: the order of its chunks in one row of tokens, the rows after which a token is drawn or scored,
and the positions that each chunk sees.

Shared by the backends, in plain Python and numpy. Knows no tensor and no model.

Letters beyond the usual: R rows of a step that logits are made of, M blocks of a table.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from llamita.backend.interface import Likeliest, SampledToken, SampleSpec, ScheduledChunk, StepResult

LEAST_ALIKE = 0.75
"""Shortest context in a batch of single queries, as a share of its longest: what is computed in vain stays small."""


SCORED_ROWS = 64
"""Logits of so many positions at a time, where those of a prompt are asked for: bounds the memory they take."""

Array = TypeVar("Array")


@dataclass(frozen=True)
class States(Generic[Array]):
    """The states after the final norm of those rows of a step that logits are made of, where each row is, and the
    adapter of every row of the step."""

    hidden_RD: Array
    place_of_row: Mapping[int, int]
    adapters: Sequence[str | None]

    def places(self, rows: Iterable[int]) -> list[int]:
        """Returns the places of some rows of the step in `hidden_RD`."""
        return [self.place_of_row[row] for row in rows]


@dataclass(frozen=True)
class StepLayout:
    """The chunks of a plan in their order in the row of tokens: single tokens first, those of like context together."""

    chunks: Sequence[ScheduledChunk]
    places: Sequence[int]
    """The place of each chunk of the plan among them."""

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk]) -> Self:
        order = sorted(range(len(chunks)), key=lambda number: (len(chunks[number].tokens) > 1, chunks[number].end))
        places = {number: place for place, number in enumerate(order)}
        return cls([chunks[number] for number in order], [places[number] for number in range(len(order))])

    @cached_property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    def adapters(self, default: str | None) -> list[str | None]:
        """Returns the adapter of each row; `default` is that of the chunks that name none."""
        names = [default if chunk.adapter is None else chunk.adapter for chunk in self.chunks]
        return [name for name, chunk in zip(names, self.chunks, strict=True) for _ in chunk.tokens]

    def result(self, sampled: Sequence[tuple[SampledToken, ...]], scores: Sequence["Scores"]) -> StepResult:
        """Returns the results of the chunks in the order of the plan; no scores where no chunk asked for them."""
        tokens = tuple([sampled[place] for place in self.places])
        if not scores:
            return StepResult(tokens)
        in_order = [scores[place] for place in self.places]
        return StepResult(
            tokens,
            tuple(found.logprobs for found in in_order),
            tuple(found.tops for found in in_order) if any(found.tops for found in in_order) else (),
        )


class Scores(NamedTuple):
    """What was found of a chunk's targets: their log-probabilities, and where asked for the likeliest beside each."""

    logprobs: tuple[float, ...] = ()
    tops: tuple[Likeliest, ...] = ()


def begins(chunks: Sequence[ScheduledChunk]) -> Iterator[tuple[ScheduledChunk, int]]:
    """Yields each chunk with the row of its first token."""
    begin = 0
    for chunk in chunks:
        yield chunk, begin
        begin += len(chunk.tokens)


def rows_wanted(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """Returns the rows after which a token is drawn or scored, in order."""
    wanted = set(_rows_drawn(chunks))
    for chunk, begin in begins(chunks):
        wanted |= {begin + target.offset for target in chunk.targets}
    return sorted(wanted)


def _rows_drawn(chunks: Sequence[ScheduledChunk]) -> list[int]:
    return [begin + sample.position - 1 - chunk.start for chunk, begin in begins(chunks) for sample in chunk.samples]


Draw = Callable[[list[int], list[SampleSpec], list[int]], Iterable[SampledToken]]
"""(rows, what is asked of each, ids of their sequences) -> a token after each row."""
Score = Callable[[list[int], list[int], list[int], int], tuple[list[float], list[Likeliest]]]
"""(rows, the place among them of the row before each target, its id, how many likeliest) -> the log-probability of each
target, the likeliest tokens after each row (none where none are asked for)."""


def sample_chunks(chunks: Sequence[ScheduledChunk], draw: Draw) -> list[tuple[SampledToken, ...]]:
    """Returns the tokens that each chunk asks for, all drawn at once."""
    specs = [spec for chunk in chunks for spec in chunk.samples]
    ids = [chunk.sequence_id for chunk in chunks for _ in chunk.samples]
    tokens = iter(draw(_rows_drawn(chunks), specs, ids) if specs else ())
    return [tuple(itertools.islice(tokens, len(chunk.samples))) for chunk in chunks]


def score_chunks(chunks: Sequence[ScheduledChunk], score: Score) -> list[Scores]:
    """Returns what each chunk asks of its targets, SCORED_ROWS rows at a time; empty where none has any."""
    if not any(chunk.targets for chunk in chunks):
        return []
    found = []
    for chunk, begin in begins(chunks):
        logprobs: list[float] = []
        tops: list[Likeliest] = []
        offsets = sorted({target.offset for target in chunk.targets})
        for first in range(0, len(offsets), SCORED_ROWS):
            places = {offset: place for place, offset in enumerate(offsets[first : first + SCORED_ROWS])}
            targets = [target for target in chunk.targets if target.offset in places]
            rows = [begin + offset for offset in places]
            at = [places[target.offset] for target in targets]
            some, likeliest = score(rows, at, [target.token_id for target in targets], chunk.target_top)
            logprobs += some
            tops += [likeliest[place] for place in at] if chunk.target_top else []
        found.append(Scores(tuple(logprobs), tuple(tops)))
    return found


def rows_of_adapters(names: Sequence[str | None]) -> dict[str, list[int]]:
    """Returns the rows of each adapter, by its name, for the adapter of every row; those without one are left out."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return rows


@dataclass(frozen=True)
class BlockSpan:
    """A chunk's queries and the blocks of all that they see: positions `first` .. stop - 1."""

    start: int
    stop: int
    blocks: np.ndarray
    first: int  # position at which blocks[0] begins
    block_size: int
    window: int

    @classmethod
    def of(cls, chunk: ScheduledChunk, table: np.ndarray, block_size: int, window: int) -> Self:
        skipped = max(0, chunk.start - window + 1) // block_size if window else 0
        blocks = table[skipped : -(-chunk.end // block_size)]
        return cls(chunk.start, chunk.end, blocks, skipped * block_size, block_size, window)

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.stop - self.first

    @cached_property
    def begin(self) -> int | None:
        """The slot of the first position where the blocks lie one after the other and can be read where they are."""
        return int(self.blocks[0]) * self.block_size if (np.diff(self.blocks) == 1).all() else None

    def seen(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns a boolean (queries, keys): whether each query sees each key; both are given as positions."""
        back = queries[:, None] - keys
        return (back >= 0) & (back < self.window) if self.window else back >= 0


AnySpan = TypeVar("AnySpan", bound=BlockSpan)


def alike(spans: Sequence[AnySpan]) -> Iterator[Sequence[AnySpan]]:
    """Cuts a run of single queries into batches of similar context, neighbours staying together."""
    begin = 0
    for end in range(1, len(spans) + 1):
        lengths = [len(span.blocks) for span in spans[begin : end + 1]]
        if end == len(spans) or min(lengths) < LEAST_ALIKE * max(lengths):
            yield spans[begin:end]
            begin = end


def blocks_side_by_side(spans: Sequence[BlockSpan]) -> np.ndarray:
    """Returns the blocks of several spans as one array (spans, M), shorter ones filled up with a sequence's own last
    block: it reads nobody else's."""
    longest = max(len(span.blocks) for span in spans)
    return np.stack([np.pad(span.blocks, (0, longest - len(span.blocks)), mode="edge") for span in spans])

"""The engine's tests can fail: bugs planted one at a time are found by a named test, and by the state machine."""

import dataclasses
from collections import abc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase

from llamita.backend.interface import SampledToken, ScheduledChunk
from llamita.inference.block_manager import BlockManager, BlockPool, BlockTable, Prefix, Prefixes, chained_key
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.sequence import Sequence
from tests.inference import test_engine, test_engine_machine, test_engine_pressure, test_engine_properties
from tests.inference.hash_model import shape

Planted = tuple[type, str, Callable]
BUGS: dict[str, Callable[[], Planted]] = {}
FOUND_BY: dict[str, Callable[[], None]] = {
    "a block freed twice": (
        lambda: test_engine.test_n_continuations_are_n_requests_with_seeds_in_a_row(
            EngineConfig(block_size=3, blocks=12)
        )
    ),
    "a prefix key over one block alone": test_engine_properties.test_prefix_key_covers_the_whole_prefix,
    "a chunk that starts one late": lambda: test_engine_properties.test_chunked_prefill_is_whole(shape()),
    "a chunk that ends one late": lambda: test_engine_properties.test_chunked_prefill_is_whole(shape()),
    "no copy on write": lambda: test_engine.test_n_continuations_are_n_requests_with_seeds_in_a_row(EngineConfig()),
    "a window released one block too early": lambda: test_engine_properties.test_chunked_prefill_is_whole(shape(5)),
    "drafts kept although the model disagrees": (
        lambda: test_engine_properties.test_speculation_keeps_what_was_guessed_right("oracle 0", 0, 0)
    ),
    "a hit that includes the last prompt token": (
        lambda: test_engine_properties.test_prefix_hit_is_cold_run(1, shape())
    ),
    "a block that keeps its prefix when it is reused": (
        lambda: test_engine_pressure.test_preemption_is_neutral_and_the_oldest_always_progresses(shape(), "none")
    ),
    "a hit that is counted a block too long": (
        lambda: test_engine_pressure.test_preemption_is_neutral_and_the_oldest_always_progresses(shape(), "none")
    ),
}


def planted(name: str) -> Callable[[Callable[[], Planted]], Callable[[], Planted]]:
    """Enters a bug: which method of which class, and what it is instead."""

    def enter(bug: Callable[[], Planted]) -> Callable[[], Planted]:
        BUGS[name] = bug
        return bug

    return enter


@planted("a block freed twice")
def _() -> Planted:
    right = BlockManager.close

    def close(self: BlockManager, tables: tuple[BlockTable, ...]) -> None:
        right(self, tables)
        for block in tables[0].blocks[tables[0].released :][:1].tolist():
            if self.pools[0].references[block]:
                self.pools[0].give_back(block)

    return BlockManager, "close", close


@planted("a prefix key over one block alone")
def _() -> Planted:
    def known(self: Prefixes, parent: Prefix | None, tokens: abc.Sequence[int]) -> Prefix | None:
        self._key = lambda before, tokens: chained_key(b"", tokens)
        return self._known.get(self._key(b"", tokens))

    return Prefixes, "known", known


def shifted(change: Callable[[Sequence, ScheduledChunk], ScheduledChunk]) -> Planted:
    right = Sequence.chunk

    def chunk(self: Sequence, *arguments: Any) -> ScheduledChunk:
        made = right(self, *arguments)
        return change(self, made) if made.start and len(made.tokens) > 1 else made

    return Sequence, "chunk", chunk


@planted("a chunk that starts one late")
def _() -> Planted:
    return shifted(
        lambda self, chunk: dataclasses.replace(
            chunk, tokens=chunk.tokens[1:], start=chunk.start + 1, targets=chunk.targets[1:]
        )
    )


@planted("a chunk that ends one late")
def _() -> Planted:
    return shifted(lambda self, chunk: dataclasses.replace(chunk, tokens=(*chunk.tokens[1:], chunk.tokens[-1])))


@planted("no copy on write")
def _() -> Planted:
    return BlockManager, "_is_shared", lambda self, pool, table, computed: False


@planted("a window released one block too early")
def _() -> Planted:
    right = BlockManager._first_seen

    def first_seen(self: BlockManager, group: int, position: int) -> int:
        first = right(self, group, position)
        return min(first + 1, position // self.block_size) if self.layout.windows[group] else first

    return BlockManager, "_first_seen", first_seen


@planted("drafts kept although the model disagrees")
def _() -> Planted:
    right = Engine._take

    def take(self: Engine, sequence: Sequence, chunk: ScheduledChunk, sampled: abc.Sequence) -> Any:
        drafts = chunk.tokens[len(sequence.tokens) - chunk.start :]
        kept = [SampledToken(token, one.logprob) for token, one in zip(drafts, sampled, strict=False)]
        return right(self, sequence, chunk, (*kept, *sampled[len(kept) :]))

    return Engine, "_take", take


@planted("a hit that includes the last prompt token")
def _() -> Planted:
    right = BlockManager.find
    return BlockManager, "find", lambda self, tokens, adapter: right(self, [*tokens, 0], adapter)


@planted("a block that keeps its prefix when it is reused")
def _() -> Planted:
    def forget(self: BlockPool, block: int) -> None:
        self.prefix_of[block] = None  # but it is still found

    return BlockPool, "_forget", forget


@planted("a hit that is counted a block too long")
def _() -> Planted:
    right = BlockManager.find

    def find(self: BlockManager, tokens: abc.Sequence[int], adapter: str | None) -> tuple[list[Prefix], int]:
        found, count = right(self, tokens, adapter)
        return found, count + (count > 0 and len(tokens) > (count + 1) * self.block_size)

    return BlockManager, "find", find


def test_every_bug_has_a_test_that_finds_it() -> None:
    assert BUGS.keys() == FOUND_BY.keys()


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FOUND_BY[name]()
    monkeypatch.setattr(*BUGS[name]())
    with pytest.raises((AssertionError, IndexError, ValueError, KeyError)):
        FOUND_BY[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_the_state_machine_finds_a_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[name]())
    with pytest.raises((AssertionError, IndexError, ValueError, KeyError, BaseExceptionGroup)):
        test_engine_machine.run(examples=400, steps=60, phases=[Phase.generate], database=None)

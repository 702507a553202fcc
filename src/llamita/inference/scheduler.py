"""The whole batching policy: decides the sequences of a step, and how many tokens of each are run.

Continuous batching: sequences join and leave between steps. Every decoding sequence advances at every step; the rest
of a step's budget of tokens goes to prompts, in chunks, so that a long prompt never stalls the others. Sequences are
served in a fixed order, that of arrival unless priorities change it. Where memory runs out, the last in that order
gives its blocks back and begins again later (preemption by recomputation), so the first always advances. Knows no
tensor.
"""

import bisect
import time
from dataclasses import dataclass

from llamita.backend.interface import LONGEST_CHUNK
from llamita.inference.block_manager import BlockManager
from llamita.inference.config import EngineConfig
from llamita.inference.sequence import Sequence


@dataclass
class Scheduled:
    """A sequence's part in a step: `count` of its known tokens, and room for `drafts` guessed ones after them."""

    sequence: Sequence
    count: int
    drafts: int = 0
    is_decoding: bool = False


class Scheduler:
    """Decides the next step. `running` and `waiting` are in the order in which they are served."""

    def __init__(self, manager: BlockManager, limits: EngineConfig, drafts: bool = False) -> None:
        self.manager, self.limits = manager, limits
        self.draft_tokens = limits.draft_tokens if drafts else 0
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._out_of_memory: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=serving_order)

    def next(self) -> list[Scheduled]:
        """Returns the next step's work and takes its memory: running sequences first, then new ones that fit."""
        scheduled: list[Scheduled] = []
        decoding = sum(sequence.is_decoding for sequence in self.running)
        budget = self.limits.prefill_tokens
        if decoding:
            budget = min(budget, max(self.limits.mixed_prefill_tokens, decoding))
        for sequence in list(self.running):
            if not sequence.tables:  # preempted meanwhile
                continue
            wanted = len(sequence.tokens) - sequence.computed
            count = 1 if sequence.is_decoding else min(wanted, budget, LONGEST_CHUNK)
            part = self._make_room(sequence, count) if count else None
            if part is None:
                continue
            if not sequence.is_decoding:
                budget -= part.count
            scheduled.append(part)
        while budget and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=serving_order)
            count = min(len(sequence.tokens) - sequence.computed, budget, LONGEST_CHUNK)
            part = self._make_room(sequence, count)
            if part is None:  # alone, and as long as the memory
                break
            budget -= part.count
            scheduled.append(part)
        return scheduled

    def start_forks(self, sequence: Sequence) -> None:
        """Starts the forks of a sequence that has just read the prompt that they share."""
        for fork in sequence.forks:
            fork.tables = self.manager.fork(sequence.tables)
            fork.computed, fork.prefixes = sequence.computed, list(sequence.prefixes)
            fork.scores, fork.tops = sequence.scores[:], sequence.tops[:]
            for name in ("cached_tokens", "queue_seconds", "prefill_seconds"):
                setattr(fork.statistics, name, getattr(sequence.statistics, name))
            bisect.insort(self.running, fork, key=serving_order)
        sequence.forks = []

    def remove(self, sequence: Sequence) -> None:
        """Removes a running or waiting sequence and gives its memory back."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.tables:
            self.manager.close(sequence.tables)
            sequence.tables = ()

    def select(self, request_id: int) -> list[Sequence]:
        """Returns the sequences of a request, running or waiting."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.request.id == request_id]

    def take_out_of_memory(self) -> list[Sequence]:
        """Returns the sequences removed since the last call because even the whole memory was too small for them."""
        found, self._out_of_memory = self._out_of_memory, []
        return found

    def _make_room(self, sequence: Sequence, count: int) -> Scheduled | None:
        """Takes memory for `count` tokens and perhaps drafts, or for as many as fit; None where not even one does."""
        drafts = 0
        if sequence.is_decoding and sequence.may_be_drafted:
            drafts = max(0, min(self.draft_tokens, sequence.limit - len(sequence.tokens) - 1))
        while not self.manager.grow(sequence.tables, sequence.computed, sequence.computed + count + drafts):
            if drafts:
                drafts = 0
                continue
            last = self.running[-1]
            if last is not sequence:
                self._preempt(last)
            elif len(self.running) > 1:
                self._preempt(sequence)
                return None
            else:
                count = self.manager.room(sequence.tables, sequence.computed)
                if count == 0:
                    self.remove(sequence)
                    self._out_of_memory.append(sequence)
                    return None
        return Scheduled(sequence, count, drafts, sequence.is_decoding)

    def _preempt(self, sequence: Sequence) -> None:
        """Gives a sequence's memory back; it waits to be read again, its output as a part of its prompt."""
        self.remove(sequence)
        sequence.computed, sequence.prefixes, sequence.scores, sequence.tops = 0, [], [], []
        sequence.statistics.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Starts a sequence where there is a place for it, and memory for all its tokens and a block more of each
        running one, lest it be preempted at once; returns whether it did."""
        places = self.limits.max_sequences - sum(other.width for other in self.running)
        if self.running and sequence.width > places:
            return False
        prefixes, shared = self.manager.find(sequence.tokens[: sequence.shareable], sequence.request.adapter)
        tables = self.manager.open(prefixes)
        needed = self.manager.blocks_to_read(tables, len(sequence.tokens), self.limits.prefill_tokens)
        if self.running and needed + len(self.running) > self.manager.available:
            self.manager.close(tables)
            return False
        sequence.tables, sequence.prefixes = tables, prefixes
        sequence.computed = shared * self.manager.block_size
        if sequence.statistics.preemptions == 0:
            sequence.statistics.cached_tokens = sequence.computed
            sequence.statistics.queue_seconds = time.perf_counter() - sequence.arrived
        return True


def serving_order(sequence: Sequence) -> tuple[int, ...]:
    """Returns a sequence's place among the others, smaller first; fixed, so that none is overtaken for ever."""
    priority = sequence.request.priority
    return (sequence.arrival + priority, priority, sequence.index)

"""A runner whose next token is a hash of all that it finds through the tables of blocks, and what it must say.

Each slot of its memory holds a token, its position and a mixture of what that position saw, as the second layer of a
model would. A block that is shared, freed, copied, found again or filled wrongly changes what is said next, or its
log-probability. `expected` says the same from the tokens alone. Knows nothing of how an engine decides.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamita.backend.interface import CacheLayout, Plan, SampledToken, SampleSpec, ScheduledChunk, StepResult
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request, TokenEvent
from llamita.inference.scheduler import serving_order
from llamita.model.config import ModelConfig

POSITIONS = 96
Memory = list[np.ndarray]  # a group each: (slots, 3) of token, position, mixture
Said = tuple[int, float]


def shape(window: int = 0, full_layers: int = 0, vocabulary: int = 50, positions: int = POSITIONS) -> ModelConfig:
    """A model's shape with these attention windows: (0,), (window,), or both where some layers see everything."""
    return ModelConfig(
        vocabulary, 8, 8, 2, 1, 1, positions, sliding_window=window, full_attention_layers=full_layers,
        query_key_value_bias=full_layers > 0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


@dataclass
class HashRunner:
    """The runner. `script` replaces the hash by the token to say at each position after the prompt.

    `fails_at` numbers the calls of `run` that raise `failure`, having spoilt what they were about. `salt` makes another
    model of it, and `agreement` is how often (of 100) that one says what the model without salt does.
    """

    config: ModelConfig = field(default_factory=shape)
    script: Sequence[int] = ()
    fails_at: Collection[int] = ()
    failure: BaseException = field(default_factory=lambda: RuntimeError("out of\nmemory"))
    salt: int = 0
    agreement: int = 0
    weight_bytes: int = 1000
    kv_bytes_per_token: int = 10
    cache_budget: int = 1 << 40
    calls: int = 0
    recorded: list[Plan] | None = field(default_factory=list)  # None: plans are not kept

    def weights(self) -> dict[str, Any]:
        return {}

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> Memory:
        assert layout.windows == self.config.attention_windows
        self.layout = layout
        return [np.full((layout.blocks * layout.block_size, 3), 10**9, dtype=np.uint64) for _ in layout.windows]

    def run(self, plan: Plan, memory: Memory) -> StepResult:
        self.calls += 1
        if self.recorded is not None:
            self.recorded.append(plan)
        fails = self.calls - 1 in self.fails_at
        size = self.layout.block_size
        for copy in plan.copies:
            group = memory[copy.group]
            group[copy.target * size : (copy.target + 1) * size] = group[copy.source * size : (copy.source + 1) * size]
        for chunk in plan.chunks:
            for group, table in zip(memory, chunk.tables, strict=True):
                slots = self._slots(table, np.arange(chunk.start, chunk.end))
                group[slots, 0] = np.array(chunk.tokens) + 77 * fails
                group[slots, 1] = np.arange(chunk.start, chunk.end)
        if fails:
            raise self.failure
        for chunk in plan.chunks:  # every query sees all that was written before any is mixed
            for group, window, table in zip(memory, self.layout.windows, chunk.tables, strict=True):
                first = max(0, chunk.start - window + 1) if window else 0
                seen = group[self._slots(table, np.arange(first, chunk.end))]
                group[self._slots(table, np.arange(chunk.start, chunk.end)), 2] = mix(seen, first, chunk.start, window)
        said = tuple(tuple(self._say(chunk, sample, memory) for sample in chunk.samples) for chunk in plan.chunks)
        scores: tuple[tuple[float, ...], ...] = ()
        if any(chunk.targets for chunk in plan.chunks):
            scores = tuple(
                tuple(
                    score(self._gather(chunk, chunk.start + target.offset, memory), target.token_id)
                    for target in chunk.targets
                )
                for chunk in plan.chunks
            )
        return StepResult(said, scores)

    def _slots(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        blocks = table[positions // self.layout.block_size]
        assert (blocks >= 0).all(), "a position lies in a block that was given back"
        return blocks.astype(np.int64) * self.layout.block_size + positions % self.layout.block_size

    def _gather(self, chunk: ScheduledChunk, query: int, memory: Memory) -> list[np.ndarray]:
        """What a query sees, group by group."""
        return [
            group[self._slots(table, np.arange(max(0, query - window + 1) if window else 0, query + 1))]
            for group, window, table in zip(memory, self.layout.windows, chunk.tables, strict=True)
        ]

    def _say(self, chunk: ScheduledChunk, sample: SampleSpec, memory: Memory) -> SampledToken:
        seen = self._gather(chunk, sample.position - 1, memory)
        said, logprob = say(seen, sample, self.config.vocab_size)
        if self.salt and hash((sample.seed, sample.position, self.salt)) % 100 >= self.agreement:
            said = (said + 1) % self.config.vocab_size
        if self.script:
            said = self.script[sample.position - sample.prompt_length]
        return SampledToken(said, logprob)


def mix(seen: np.ndarray, first: int, start: int, window: int) -> np.ndarray:
    """A number for each position from `start` on, made of all (token, position) it sees; `seen` begins at `first`."""
    values = (seen[:, 0] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ seen[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
    values ^= values >> np.uint64(29)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(values, dtype=np.uint64)])
    queries = np.arange(start - first, len(seen))
    lowest = np.maximum(0, queries - window + 1) if window else np.zeros_like(queries)
    return (sums[queries + 1] - sums[lowest]) * np.uint64(0x94D049BB133111EB)


def say(seen: Iterable[np.ndarray], sample: SampleSpec, vocabulary: int) -> Said:
    """The token, and a log-probability as a second witness, that this sight gives."""
    digest = hashlib.sha256(b"".join(group.tobytes() for group in seen))
    digest.update(repr((sample.position, sample.seed if sample.params.temperature else None)).encode())
    if sample.params.reads_history:
        digest.update(repr((list(sample.history), sample.prompt_length)).encode())
    value = int.from_bytes(digest.digest()[:8], "little")
    token = value % vocabulary
    while token in sample.banned:
        token = (token + 1) % vocabulary
    return token, -1e-6 * (value >> 32)


def score(seen: Iterable[np.ndarray], target: int) -> float:
    """The log-probability of a target."""
    digest = hashlib.sha256(b"".join(group.tobytes() for group in seen) + target.to_bytes(4, "little")).digest()
    return -1e-6 * int.from_bytes(digest[:4], "little")


def sights(tokens: Sequence[int], config: ModelConfig) -> list[np.ndarray]:
    """All slots of a text, group by group, as a contiguous memory would hold them."""
    rows = []
    for window in config.attention_windows:
        slots = np.zeros((len(tokens), 3), dtype=np.uint64)
        slots[:, 0], slots[:, 1] = tokens, np.arange(len(tokens))
        slots[:, 2] = mix(slots, 0, 0, window)
        rows.append(slots)
    return rows


def seen_by(query: int, rows: Sequence[np.ndarray], config: ModelConfig) -> list[np.ndarray]:
    """What a query sees of them."""
    return [
        slots[max(0, query - window + 1) if window else 0 : query + 1]
        for slots, window in zip(rows, config.attention_windows, strict=True)
    ]


def expected(
    prompt: Sequence[int], params: SamplingParams, config: ModelConfig, eos: Collection[int] = (), index: int = 0
) -> list[Said]:
    """The tokens of a continuation by definition: no memory, no engine."""
    assert params.seed is not None
    ends = set(() if params.ignore_eos else eos) | set(params.stop_token_ids)
    tokens, said = list(prompt), []
    while len(said) < params.max_tokens and len(tokens) < config.max_position_embeddings:
        banned = tuple(ends) if len(said) < params.min_tokens else ()
        spec = SampleSpec(params, params.seed + index, len(tokens), tokens, len(prompt), banned)
        said.append(say(seen_by(len(tokens) - 1, sights(tokens, config), config), spec, config.vocab_size))
        tokens.append(said[-1][0])
        if tokens[-1] in ends:
            break
    return said


def expected_scores(prompt: Sequence[int], config: ModelConfig) -> list[float]:
    """The log-probabilities of prompt tokens 1, 2, ... by definition."""
    rows = sights(prompt, config)
    return [score(seen_by(place, rows, config), target) for place, target in enumerate(prompt[1:])]


def expected_targets(request: Request, config: ModelConfig) -> list[float]:
    """The log-probabilities of a request's targets, or of its prompt where it asks for them, by definition."""
    if request.params.prompt_logprobs:
        return expected_scores(request.prompt, config)
    rows = sights(request.prompt, config)
    return [score(seen_by(target.position - 1, rows, config), target.token_id) for target in request.targets]


@dataclass
class Answer:
    """All events of one continuation, joined."""

    said: list[Said] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    error: str = ""
    events: list[TokenEvent] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        assert self.reason is None, "an event came after the last one"
        if event.token_id is not None:
            self.said.append((event.token_id, event.logprob))
        self.text += event.text
        self.reason, self.error = event.finish_reason, event.error
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [token for token, _ in self.said]


Answers = dict[tuple[int, int], Answer]


def serve(engine: Engine, requests: Iterable[Request] = (), checked: bool = True) -> Answers:
    """Add requests, step until nothing is left, and return what came, by request and continuation."""
    answers: Answers = {}
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        for event in engine.step():
            answers.setdefault((event.request_id, event.index), Answer()).take(event)
        if checked:
            check_invariants(engine)
        steps += 1
        assert steps < 100_000, "the engine does not come to an end"
    return answers


def alone(
    prompt: Sequence[int], runner: HashRunner | None = None, config: EngineConfig | None = None, **params: Any
) -> Answer:
    """One request in an engine of its own."""
    params = {"seed": 1, "max_tokens": 12, **params}
    answers = serve(
        Engine(runner or HashRunner(), config=config), [Request(0, tuple(prompt), SamplingParams(**params))]
    )
    return answers[0, 0]


def check_invariants(engine: Engine) -> None:
    """What holds between any two steps: of references, free blocks, prefixes, contents and queues."""
    manager, scheduler, runner = engine.manager, engine.scheduler, engine._runner
    running, waiting, size = scheduler.running, scheduler.waiting, manager.block_size
    for queue in (running, waiting):
        assert queue == sorted(queue, key=serving_order)
    assert not {one.id for one in running} & {one.id for one in waiting}
    assert sum(one.width for one in running) <= engine.config.max_sequences
    assert all(one.tables == () and one.computed == 0 for one in waiting)
    assert all(0 <= one.computed < len(one.tokens) <= one.limit for one in running)
    for group, (pool, window) in enumerate(zip(manager.pools, manager.layout.windows, strict=True)):
        slots = engine._memory[group] if isinstance(runner, HashRunner) else None
        held = np.zeros(pool.blocks, dtype=int)
        for one in running:
            table = one.tables[group]
            assert (table.blocks[: table.released] == -1).all()
            assert (table.blocks[table.released :] >= 0).all()
            np.add.at(held, table.blocks[table.released :], 1)
            assert table.length * size >= one.computed
            assert table.released == (max(0, one.computed - window + 1) // size if window else 0)
            if slots is not None:
                positions = np.arange(table.released * size, one.computed)
                found = slots[table.blocks[positions // size].astype(np.int64) * size + positions % size]
                assert found[:, 0].tolist() == one.tokens[table.released * size : one.computed]
                assert found[:, 1].tolist() == positions.tolist()
        assert pool.references == held.tolist()
        assert pool.free.keys() == set(np.flatnonzero(held == 0).tolist())
        assert len(pool.free) + np.count_nonzero(held) == pool.blocks
        assert all(pool.prefix_of[block] is prefix for prefix, block in pool.block_of.items())
        assert pool.blocks - pool.prefix_of.count(None) == len(pool.block_of)
        if slots is not None:
            contents = slots[:, 0].reshape(pool.blocks, size)[list(pool.block_of.values())]
            assert contents.tolist() == [list(prefix.tokens) for prefix in pool.block_of]
    if not running:
        assert manager.available == manager.layout.blocks

"""The inference engine: many requests in one batch over one memory.

In a step the scheduler decides, the runner computes, and the sampled tokens become text events. A step's failure or a
caller's cancellation ends the requests that it concerns; all others go on. One thread at a time may use an engine.
Deliberately knows no tensor and no framework: runner and drafter are passed in.
"""

import secrets
import time
import warnings
from collections import Counter, abc
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from llamita.backend.interface import BlockCopy, CacheLayout, Plan, Runner, SampledToken, ScheduledChunk
from llamita.inference.block_manager import BlockManager
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter
from llamita.inference.request import Request, TokenEvent
from llamita.inference.scheduler import Scheduled, Scheduler
from llamita.inference.sequence import Sequence
from llamita.inference.structured import Grammars, fill
from llamita.text.tokenizer import Tokenizer


class Engine:
    """Generates for many requests at once.

    `tokenizer` gives text for ids; without one, events carry ids alone, and stop strings and structured output are
    refused. `eos_token_ids` end a sequence; by default they are those of the model's config. `adapters` are the names
    of the runner's adapters. ValueError for a model with a classification head.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Collection[int] | None = None,
        config: EngineConfig | None = None,
        drafter: Drafter | None = None,
        adapters: Collection[str] = (),
    ) -> None:
        if runner.config.num_labels:
            raise ValueError("this model has a classification head and cannot generate text; give a language model")
        self.config = config or EngineConfig()
        self._runner, self._tokenizer, self._drafter = runner, tokenizer, drafter
        self.adapters = frozenset(adapters)
        self._eos = frozenset(runner.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        windows = Counter(map(runner.config.window, range(runner.config.num_hidden_layers)))
        self._shares = [(window, count / windows.total()) for window, count in windows.items()]
        """Each window, 0 for none, with the share of layers that have it."""
        layout = cache_layout(runner, self.config)
        begun = time.perf_counter()
        self._memory = runner.allocate(layout, self.config.max_sequences if self.config.warm_up else 0)
        self.warm_up_seconds = time.perf_counter() - begun
        """Seconds it took to allocate memory and prepare a GPU's steps."""
        if drafter is not None:
            drafter.start(runner.config, layout)
        self.manager = BlockManager(layout, self.config.prefix_caching)
        self.scheduler = Scheduler(self.manager, self.config, drafts=drafter is not None)
        self._grammars: Grammars | None = None
        self._arrivals = 0
        self._sequences = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def check(self, request: Request) -> None:
        """Raises ValueError where this model cannot serve the request."""
        vocabulary, positions = self._runner.config.vocab_size, self._runner.config.max_position_embeddings
        length, params = len(request.prompt), request.params
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise ValueError(f"there is no adapter {request.adapter!r}; loaded are: {known}")
        if not length:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= positions:
            raise ValueError(
                f"the prompt has {length} tokens, but this model has {positions} positions and the answer needs one; "
                f"shorten the prompt to at most {positions - 1} tokens"
            )
        if not self.manager.fits(length + 1):
            room = self.manager.layout.blocks * self.manager.block_size
            raise ValueError(f"the prompt has {length} tokens, and the memory holds {room}; give the engine more")
        if params.n > self.config.max_sequences:
            raise ValueError(f"n={params.n} is more than the {self.config.max_sequences} sequences that run at once")
        for name, ids in (
            ("the prompt", request.prompt), ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids), ("visible_token_ids", params.visible_token_ids),
        ):  # fmt: skip
            outside = [
                token_id
                for token_id in ids
                if not isinstance(token_id, int | np.integer) or not 0 <= token_id < vocabulary
            ]
            if outside:
                raise ValueError(f"{name} has token id {outside[0]!r}, but this model's ids are 0 to {vocabulary - 1}")
        if request.targets:
            self._check_targets(request)
        if self._tokenizer is None and (params.stop or params.is_constrained):
            what = "stop strings need" if params.stop else "structured output needs"
            raise ValueError(f"{what} a tokenizer, and this model has none; leave stop and the grammar empty")
        if params.is_constrained:
            self._grammars_of_tokenizer().matcher(params)  # refuses what is broken; what it compiled is kept

    def _check_targets(self, request: Request) -> None:
        """Raises ValueError for targets that are out of order, outside the prompt or the vocabulary."""
        vocabulary, length = self._runner.config.vocab_size, len(request.prompt)
        positions = [target.position for target in request.targets]
        if request.params.prompt_logprobs:
            raise ValueError("prompt_logprobs and targets ask for different tokens; give one of them")
        if positions != sorted(positions) or not 1 <= positions[0] <= positions[-1] <= length:
            raise ValueError(
                f"targets must be in the order of their positions, from 1 to the prompt's length of {length}"
            )
        outside = [target.token_id for target in request.targets if not 0 <= target.token_id < vocabulary]
        if outside:
            raise ValueError(f"a target has token id {outside[0]!r}, but this model's ids are 0 to {vocabulary - 1}")

    def add(self, request: Request) -> None:
        """Checks and queues a request. Generation that would pass the model's positions ends there, with "length"."""
        if self.scheduler.select(request.id):
            raise ValueError(f"a request with the id {request.id} is being served; give this one another")
        self.check(request)
        params = request.params
        grammars = self._grammars_of_tokenizer() if params.is_constrained else None
        limit = min(len(request.prompt) + params.max_tokens, self._runner.config.max_position_embeddings)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        self._arrivals += 1
        first, *forks = (
            Sequence(
                id=self._sequences + index,
                request=request,
                index=index,
                seed=seed,
                arrival=self._arrivals,
                limit=limit,
                end_tokens=self._eos,
                tokenizer=self._tokenizer,
                matcher=None if grammars is None else grammars.matcher(params),
            )
            for index in range(params.n)
        )
        self._sequences += params.n
        first.forks = forks
        self.scheduler.add(first)

    def abort(self, request_id: int) -> None:
        """Forgets a request, running or waiting; one that is done or unknown is no error."""
        for sequence in self.scheduler.select(request_id):
            self.scheduler.remove(sequence)

    def step(self) -> list[TokenEvent]:
        """Does one step of work and returns its events: none while only prompts are being read.

        The sequences of a failing step end with "error" events; those of an interrupted one (Ctrl-C) without any.
        """
        started = time.perf_counter()
        scheduled = self.scheduler.next()
        events = [sequence.end("length") for sequence in self.scheduler.take_out_of_memory()]
        allowed: Mapping[int, np.ndarray] = {}
        if any(part.sequence.matcher is not None for part in scheduled):
            scheduled, allowed, failed = self._masks(scheduled)
            events += failed
        if not scheduled:
            return events
        try:
            copies = self.manager.copies()
            drafts = self._drafts(scheduled, copies) if self._drafter is not None else {}
            chunks = [
                part.sequence.chunk(part.count, drafts.get(part.sequence.id, ()), allowed.get(part.sequence.id))
                for part in scheduled
            ]
            result = self._runner.run(Plan(tuple(chunks), copies), self._memory)
        except Exception as error:
            return events + [event for part in scheduled for event in self._fail(part.sequence, error)]
        except BaseException:
            for part in scheduled:
                self.scheduler.remove(part.sequence)
            raise
        seconds = time.perf_counter() - started
        for number, (part, chunk) in enumerate(zip(scheduled, chunks, strict=True)):
            self._count(part.sequence, chunk, seconds)
            if result.target_logprobs:
                part.sequence.score(
                    result.target_logprobs[number], result.target_tops[number] if result.target_tops else ()
                )
            events += self._take(part.sequence, chunk, result.sampled[number])
        return events

    def _masks(
        self, scheduled: abc.Sequence[Scheduled]
    ) -> tuple[list[Scheduled], dict[int, np.ndarray], list[TokenEvent]]:
        """Returns the sequences that go on, the masks of those with a grammar by id, and the events of failed ones.

        A sequence fails where its grammar can be followed no further.
        """
        constrained = [part.sequence for part in scheduled if part.sequence.matcher is not None]
        matchers = [sequence.matcher for sequence in constrained if sequence.matcher is not None]
        masks = fill(matchers)
        broken = {s.id: m.error for s, m in zip(constrained, matchers, strict=True) if m.error}
        failed = [
            event
            for sequence in constrained
            if sequence.id in broken
            for event in self._fail(sequence, ValueError(broken[sequence.id]))
        ]
        allowed = {sequence.id: mask for sequence, mask in zip(constrained, masks, strict=True)}
        return [part for part in scheduled if part.sequence.id not in broken], allowed, failed

    def _drafts(self, scheduled: abc.Sequence[Scheduled], copies: abc.Sequence[BlockCopy]) -> dict[int, list[int]]:
        """Returns the guessed tokens of each sequence that has room for them, by the sequence's id."""
        assert self._drafter is not None
        wanted = [(part.sequence, part.drafts) for part in scheduled if part.drafts]
        try:
            reading = [part.sequence.chunk(part.count) for part in scheduled if not part.is_decoding]
            self._drafter.prepare(copies, reading)
            proposed = self._drafter.propose(wanted) if wanted else []
            return {sequence.id: tokens for (sequence, _), tokens in zip(wanted, proposed, strict=True)}
        except Exception as error:  # guesses are for speed alone
            self._drafter = None
            self.scheduler.draft_tokens = 0
            warnings.warn(f"guessing ahead failed and is switched off: {_line(error)}", stacklevel=3)
            return {}

    def _take(
        self,
        sequence: Sequence,
        chunk: ScheduledChunk,
        sampled: abc.Sequence[SampledToken],
    ) -> Iterator[TokenEvent]:
        """Takes in the results of a chunk and yields its events; guesses are kept as long as the model agrees."""
        known = len(sequence.tokens)
        sequence.computed = min(chunk.end, known)
        self._advance(sequence)
        if not sampled:
            return
        if sequence.forks:
            forks = list(sequence.forks)
            self.scheduler.start_forks(sequence)
            for fork, token in zip(forks, sampled[1:], strict=True):
                yield self._take_one(fork, token)
            sampled = sampled[:1]
        drafts = chunk.tokens[known - chunk.start :]
        sequence.statistics.drafted_tokens += len(drafts)
        for number, token in enumerate(sampled):
            event = self._take_one(sequence, token)
            kept = number < len(drafts) and drafts[number] == event.token_id
            if kept:
                sequence.computed += 1
                sequence.statistics.accepted_tokens += 1
            yield event
            if not kept or event.finish_reason is not None:
                break
        if drafts and sequence.finish_reason is None:
            self._advance(sequence)

    def _take_one(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        """Takes in a token and returns its event; the sequence ends on an error of sampling or of its grammar."""
        try:
            if token.error:
                raise ValueError(token.error)
            event = sequence.take(token)
        except Exception as error:
            event = sequence.end("error", _line(error))
        if event.finish_reason is not None:
            self.scheduler.remove(sequence)
        return event

    def _fail(self, sequence: Sequence, error: Exception) -> Iterator[TokenEvent]:
        self.scheduler.remove(sequence)
        for member in (sequence, *sequence.forks):
            yield member.end("error", _line(error))

    def _advance(self, sequence: Sequence) -> None:
        self.manager.advance(
            sequence.tables, sequence.prefixes, sequence.tokens, sequence.computed, sequence.request.adapter
        )

    def _count(self, sequence: Sequence, chunk: ScheduledChunk, seconds: float) -> None:
        """Adds the time of a step to the statistics: to decoding once a token has been generated, else to prefill."""
        statistics = sequence.statistics
        if statistics.generated_tokens == 0:
            statistics.prefill_seconds += seconds
            return
        statistics.decode_seconds += seconds
        held = 0.0
        for window, share in self._shares:
            held += share * (min(chunk.end, window) if window else chunk.end)
        statistics.decode_bytes += self._runner.weight_bytes + round(self._runner.kv_bytes_per_token * held)

    def _grammars_of_tokenizer(self) -> Grammars:
        if self._grammars is None:
            assert self._tokenizer is not None, "checked before"
            self._grammars = Grammars(self._tokenizer, self._runner.config.vocab_size, self._eos)
        return self._grammars


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def cache_layout(runner: Runner, config: EngineConfig) -> CacheLayout:
    """Returns the layout of an engine's memory: room for one sequence's whole length at least, for `max_sequences` at
    most; `blocks` of the config takes precedence."""
    windows = runner.config.attention_windows
    longest = -(-runner.config.max_position_embeddings // config.block_size)
    block_bytes = runner.kv_bytes_per_token * config.block_size
    within_budget = (config.cache_bytes or runner.cache_budget) // max(block_bytes, 1)
    blocks = config.blocks or min(max(within_budget, longest), longest * config.max_sequences)
    return CacheLayout(config.block_size, blocks, windows)

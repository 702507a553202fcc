"""The inference engine: turns requests into plans for a runner, and sampled tokens into text events.

It serves one request at a time, in order of arrival, over a contiguous cache; `add`, `step` and `abort` are the face
that will stay when it serves many at once. A step decides a plan, has the runner do it, and takes in the result.
Deliberately knows no tensor and no framework: the runner is passed in.
"""

import secrets
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Protocol

from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.inference.detokenizer import IncrementalDetokenizer, StopMatcher, TokenBytes
from llamita.inference.request import FinishReason, Request, Statistics, TokenEvent
from llamita.plan import LONGEST_CHUNK, Plan, SampledToken, SampleSpec, ScheduledChunk, StepResult


class Runner(Protocol):
    """What the engine needs of a backend."""

    config: ModelConfig
    weight_bytes: int  # read to decode one token
    kv_bytes_per_token: int  # read for every earlier position to decode one token

    def weights(self) -> Mapping[str, HostArray]: ...

    def reserve(self, positions: int) -> None: ...

    def run(self, plan: Plan) -> StepResult: ...


class Engine:
    """Generates for one request after the other.

    `tokenizer` gives text for ids; without one, events carry ids alone and stop strings are refused. `eos_token_ids`
    end a request, by default those of the model's config.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenBytes | None = None,
        eos_token_ids: Collection[int] | None = None,
        prefill_chunk: int = LONGEST_CHUNK,
    ) -> None:
        if runner.config.num_labels:
            raise ValueError("this model has a classification head and cannot generate text; give a language model")
        assert 1 <= prefill_chunk <= LONGEST_CHUNK
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos = frozenset(runner.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[_Sequence] = deque()
        self._running: _Sequence | None = None

    @property
    def has_work(self) -> bool:
        return self._running is not None or bool(self._waiting)

    def check(self, request: Request) -> None:
        """Raise ValueError where this model cannot serve the request."""
        vocabulary, positions = self._runner.config.vocab_size, self._runner.config.max_position_embeddings
        length = len(request.prompt)
        if not length:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= positions:
            raise ValueError(
                f"the prompt has {length} tokens, but this model has {positions} positions and the answer needs one; "
                f"shorten the prompt to at most {positions - 1} tokens"
            )
        outside = [token_id for token_id in request.prompt if not 0 <= token_id < vocabulary]
        if outside:
            raise ValueError(f"the prompt has token id {outside[0]}, but this model's ids are 0 to {vocabulary - 1}")
        if request.params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none; leave stop empty")

    def add(self, request: Request) -> None:
        """Queue a request, once checked. Generation that would pass the model's positions ends there, with "length"."""
        self.check(request)
        positions = self._runner.config.max_position_embeddings
        self._waiting.append(_Sequence(request, positions, self._tokenizer))

    def abort(self, request_id: int) -> None:
        """Forget a request, wherever it stands; one that is done or unknown is no error."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.id != request_id)
        if self._running is not None and self._running.request.id == request_id:
            self._running = None

    def step(self) -> list[TokenEvent]:
        """Do one step of work and return what came of it: nothing while a prompt is still being read.

        A request whose step fails is forgotten, and the error goes on to the caller.
        """
        started = time.perf_counter()
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._waiting.popleft()
        sequence = self._running
        chunk = sequence.next_chunk(self._prefill_chunk)
        try:
            if chunk.start == 0:
                self._runner.reserve(sequence.limit)
            result = self._runner.run(Plan((chunk,)))
        except BaseException:
            self._running = None
            raise
        sequence.computed = chunk.end
        decoding = sequence.statistics.generated_tokens > 0
        events = [sequence.take(token, self._eos) for tokens in result.sampled for token in tokens]
        if sequence.finish_reason is not None:
            self._running = None
        sequence.count(time.perf_counter() - started, self._bytes_read(chunk) if decoding else None)
        return events

    def _bytes_read(self, chunk: ScheduledChunk) -> int:
        return self._runner.weight_bytes + self._runner.kv_bytes_per_token * chunk.end


class _Sequence:
    """A request under way: its tokens so far, how many of them the cache holds, and its text."""

    def __init__(self, request: Request, positions: int, tokenizer: TokenBytes | None) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.computed = 0
        self.limit = min(len(request.prompt) + request.params.max_tokens, positions)
        self.finish_reason: FinishReason | None = None
        seed = secrets.randbits(32) if request.params.seed is None else request.params.seed
        self.statistics = Statistics(seed=seed, prompt_tokens=len(request.prompt))
        self._detokenizer = tokenizer and IncrementalDetokenizer(tokenizer, context=request.prompt)
        self._stop_matcher = StopMatcher(request.params.stop)

    def next_chunk(self, most: int) -> ScheduledChunk:
        """The next tokens to run, at most `most`; a token is asked for after the last one known."""
        tokens = tuple(self.tokens[self.computed : self.computed + most])
        end = self.computed + len(tokens)
        samples: tuple[SampleSpec, ...] = ()
        if end == len(self.tokens):
            samples = (
                SampleSpec(self.request.params, self.statistics.seed, end, self.tokens, len(self.request.prompt)),
            )
        return ScheduledChunk(self.request.id, tokens, self.computed, samples=samples)

    def take(self, token: SampledToken, eos_token_ids: Collection[int]) -> TokenEvent:
        """Take in a sampled token: its text as far as it is certain, and whether it ends the request."""
        self.tokens.append(token.token_id)
        self.statistics.generated_tokens += 1
        if token.token_id in eos_token_ids and not self.request.params.ignore_eos:
            self.finish_reason = "stop"
            text = ""
        else:
            text = self._stop_matcher.feed(self._detokenizer.feed(token.token_id)) if self._detokenizer else ""
            if len(self.tokens) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer:
            text += self._stop_matcher.feed(self._detokenizer.finish())
        if self._stop_matcher.matched is not None:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stop_matcher.finish()
        return TokenEvent(self.request.id, token.token_id, token.logprob, text, self.statistics, self.finish_reason)

    def count(self, seconds: float, decode_bytes: int | None) -> None:
        """Book the time of a step: as decoding where its bytes are given, else as prefill."""
        if decode_bytes is None:
            self.statistics.prefill_seconds += seconds
        else:
            self.statistics.decode_seconds += seconds
            self.statistics.decode_tokens += 1
            self.statistics.decode_bytes += decode_bytes

"""The requests of the engine's callers, and their results: events as they happen, and whole generations.

    Request     a prompt as token ids, with its sampling parameters, and tokens to judge
    TokenEvent  one generated token of it
    Generation  all that was written; a `Collector` makes it of the events

The engine's own requests of a runner (plans, chunks, results) are in `llamita.backend.interface`. Nothing here knows
how a request is scheduled or how its events are waited for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from llamita.backend.interface import Likeliest
from llamita.backend.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]
"""`stop`: an end-of-sequence token, a stop token or a stop string came, or the structured output is complete; `length`:
max_tokens, the model's positions or the memory ran out; `error`: a step failed, a token could not be sampled, or the
grammar became too expensive."""


class PromptTarget(NamedTuple):
    """Asks for the log-probability of a token at a position, from 1 (after the prompt's first token) to its length."""

    position: int
    token_id: int


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, with its sampling parameters.

    Requests are served in the order of their arrival; each unit of `priority` moves a request back as if it had come
    one request later (and a negative one forward), so that none waits for ever.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    adapter: str | None = None
    """The name of the adapter to serve it with; None: the model as it was loaded."""
    targets: tuple[PromptTarget, ...] = ()
    """Tokens to judge, in the order of their positions: their log-probabilities come as the `prompt_logprobs`. What
    lies before the first of them may come from the prefix cache."""


@dataclass
class Statistics:
    """Counts and times of one continuation; seconds are wall-clock time of the engine's steps that it took part in.

    Prefill gives the first generated token, so `decode_tokens` is one less than `generated_tokens`.
    """

    seed: int
    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    preemptions: int = 0  # times it gave its memory to others and began again
    queue_seconds: float = 0.0  # from its arrival to its first step
    generated_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0  # weights and its own cached keys and values that the decode steps had to read
    drafted_tokens: int = 0  # proposed by speculative decoding
    accepted_tokens: int = 0  # of those, the tokens that the model gave as well

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed in a second of prefill, those found in the prefix cache not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens decoded in a second, the first (which prefill gives) not counted."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def decode_bytes_per_second(self) -> float:
        """Memory bandwidth of decoding: bytes of weights and of cached keys and values read in a second."""
        return self.decode_bytes / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One generated token of one continuation, with the text that it makes certain.

    `text` may be empty (half a character, the start of a stop string) or begin before this token. The last event of a
    continuation has a `finish_reason`; the texts of all its events together are its output. The last event has no token
    (None) after an "error", which `error` describes, and where "length" means that the memory ran out.
    """

    request_id: int
    token_id: int | None
    logprob: float  # natural, under the model's own distribution
    text: str
    statistics: Statistics
    finish_reason: FinishReason | None = None
    index: int = 0  # of the continuation among the request's `n`
    top_logprobs: Likeliest = ()
    prompt_logprobs: tuple[float, ...] = ()  # with the first event: of prompt tokens 1, 2, ..., or of the targets
    prompt_top_logprobs: tuple[Likeliest, ...] = ()  # the `top_logprobs` likeliest at each of those of the prompt
    error: str = ""
    stop_string: str | None = None  # with the last event: the one of `SamplingParams.stop` that ended it


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt. `text` ends before a stop string; `token_ids` and `logprobs` hold all tokens.

    Of several (`n`), this is the first, and `continuations` are all of them, in the order of their seeds.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    statistics: Statistics
    top_logprobs: tuple[Likeliest, ...] = ()  # a row a token, where asked for
    prompt_logprobs: tuple[float, ...] = ()  # of prompt tokens 1, 2, ..., or of the targets, where asked for
    prompt_top_logprobs: tuple[Likeliest, ...] = ()  # the likeliest at each of those of the prompt, where asked for
    index: int = 0
    others: tuple["Generation", ...] = field(default=(), repr=False)

    @property
    def continuations(self) -> tuple["Generation", ...]:
        """All `n` continuations of the prompt, for the first of them; for another, itself alone."""
        return (self, *self.others)


class Collector:
    """Takes the events of one request, its continuations interleaved, and makes a `Generation` of them."""

    def __init__(self, n: int) -> None:
        self._events: list[list[TokenEvent]] = [[] for _ in range(n)]
        self._open = n

    def feed(self, outcomes: Iterable[TokenEvent | Exception]) -> Generation | Exception | None:
        """Takes in events; returns the generation once all continuations have ended, the error of one, or None."""
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                return outcome
            if outcome.finish_reason == "error":
                return RuntimeError(outcome.error)
            self._events[outcome.index].append(outcome)
            self._open -= outcome.finish_reason is not None
        if self._open:
            return None
        scored = next((event for row in self._events for event in row if event.prompt_logprobs), None)
        first, *others = (_generation(events, scored) for events in self._events)
        return replace(first, others=tuple(others))


def _generation(events: list[TokenEvent], scored: TokenEvent | None) -> Generation:
    last = events[-1]
    assert last.finish_reason is not None
    sampled = [event for event in events if event.token_id is not None]
    return Generation(
        text="".join(event.text for event in events),
        token_ids=tuple(event.token_id for event in sampled if event.token_id is not None),
        logprobs=tuple(event.logprob for event in sampled),
        finish_reason=last.finish_reason,
        statistics=last.statistics,
        top_logprobs=tuple(event.top_logprobs for event in sampled) if any(e.top_logprobs for e in sampled) else (),
        prompt_logprobs=() if scored is None else scored.prompt_logprobs,
        prompt_top_logprobs=() if scored is None else scored.prompt_top_logprobs,
        index=last.index,
    )

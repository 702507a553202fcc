"""What an engine asks a backend's runner to do in one step, and what comes back.

These types are the seam between policy and tensors: the engine (inference/) decides a `Plan`, a backend's
`runner.run(plan) -> StepResult` does it. They lie below both, so that neither imports the other. Nothing here knows a
tensor, a tokenizer, or why a token was scheduled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SEED = 2**64 - 1
LONGEST_CHUNK = 512
"""Most tokens of a sequence in a step: bounds the memory of a step, and how long it keeps others waiting."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks its tokens and when it ends.

    The defaults are plain sampling from the model's own distribution, `softmax(logits)`, with nothing else switched
    on, for at most 256 tokens. Raises ValueError naming the field, its value and what is allowed.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with at least this mass; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 drops none."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in prompt or output are divided by it (multiplied where negative); 1 changes nothing."""
    seed: int | None = None
    """The same seed gives the same text; without one it is drawn, and reported with the statistics."""
    max_tokens: int = 256
    """Most tokens to generate."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts."""
    ignore_eos: bool = False
    """Go on past an end-of-sequence token."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, float, lambda t: t == 0 or t >= 1e-6, "0 (greedy) or a number >= 1e-6")
        _check("top_k", self.top_k, int, lambda k: k >= 0, "a whole number >= 0 (0 keeps every token)")
        _check("top_p", self.top_p, float, lambda p: 0 < p <= 1, "a number above 0 and at most 1 (1 keeps every token)")
        _check("min_p", self.min_p, float, lambda p: 0 <= p <= 1, "a number from 0 (drops no token) to 1")
        allowed = "a number from 0.001 to 1000 (1 changes nothing, above 1 discourages repetition)"
        _check("repetition_penalty", self.repetition_penalty, float, lambda r: 0.001 <= r <= 1000, allowed)
        if self.seed is not None:
            _check("seed", self.seed, int, lambda seed: 0 <= seed <= MAX_SEED, "a whole number from 0 to 2^64 - 1")
        _check("max_tokens", self.max_tokens, int, lambda n: n >= 1, "a whole number >= 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r} is not allowed; give a tuple of non-empty strings")


@dataclass(frozen=True)
class SampleSpec:
    """Asks for one token after a chunk. `position` is the sampled token's own absolute position in its sequence."""

    params: SamplingParams
    seed: int
    position: int
    history: Sequence[int] = ()  # prompt and output so far; read only where repetition_penalty is not 1


@dataclass(frozen=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence, to be run on top of the `start` tokens of it that the cache already holds."""

    request_id: int
    tokens: tuple[int, ...]
    start: int  # absolute position of tokens[0]
    sample: SampleSpec | None = None  # None: fill the cache only

    def __post_init__(self) -> None:
        assert self.tokens, "a chunk holds at least one token"
        assert self.start >= 0
        assert self.sample is None or self.sample.position == self.end

    @property
    def end(self) -> int:
        """One past the absolute position of the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Plan:
    """The work of one step."""

    chunks: tuple[ScheduledChunk, ...]


@dataclass(frozen=True)
class SampledToken:
    """A token and its natural log-probability under the model itself, before temperature, penalty and truncation."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class StepResult:
    """One entry a chunk of the plan, in its order: the sampled token, or None where none was asked for."""

    sampled: tuple[SampledToken | None, ...]


def _check(name: str, value: Any, kind: type, in_range: Callable[[Any], bool], allowed: str) -> None:
    """Raise ValueError unless `value` is of `kind` (whole numbers pass for floats, a bool for neither) and in range."""
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or abs(value) == math.inf or not in_range(value):
        raise ValueError(f"{name}={value!r} is not allowed; give {allowed}")

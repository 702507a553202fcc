"""What a caller asks of the engine and what the engine reports back.

What the engine asks of a runner in turn (plans, chunks, results) is in `llamita.plan`; `SamplingParams`, which both
sides read, is importable from here too. Nothing here knows how a request is scheduled.
"""

from dataclasses import dataclass, field
from typing import Literal

from llamita.plan import MAX_SEED, SamplingParams

__all__ = ["MAX_SEED", "FinishReason", "Request", "SamplingParams", "Statistics", "TokenEvent"]

FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-sequence token or a stop string came; `length`: max_tokens or the model's positions ran out."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how to go on from it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Statistics:
    """Counts and times of one request; seconds are wall-clock time inside the runner and the engine's own steps.

    The first generated token comes out of prefill, so decode accounts for one token less than were generated.
    """

    seed: int
    prompt_tokens: int
    generated_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0  # weights and cached keys and values that the decode steps had to read

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed in a second of prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens decoded in a second, the first (which prefill gives) not counted."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def decode_bytes_per_second(self) -> float:
        """Memory bandwidth that decoding reached: bytes of weights and of cached keys and values read in a second."""
        return self.decode_bytes / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, with the text that became certain through it.

    `text` may be empty (half a character, the start of a stop string) or reach back further than this token. The last
    event of a request has a `finish_reason`; the texts of all its events together are its output.
    """

    request_id: int
    token_id: int
    logprob: float  # natural, under the model's own distribution
    text: str
    statistics: Statistics
    finish_reason: FinishReason | None = None

"""What a choice of tokens has of steps, and what its figures mean: the part of sampling that no backend differs in.

Knows no tensor; the steps themselves are in each backend's sampling.py.
"""

import math
from dataclasses import dataclass

from llamita.backend.interface import SampledToken, SampleSpec

DROPPED = -math.inf
"""The score of a token that may not come."""
NONE_LEFT = "no token may come next: the banned tokens and the grammar leave none"
NOT_FINITE = "the model's logits are not finite; its weights hold NaN or infinity, or overflow this dtype"


@dataclass(frozen=True)
class Steps:
    """Which steps some rows have in common. `changed`: logits are biased or ids excluded."""

    greedy: bool
    penalized: bool
    changed: bool
    truncated: bool

    @classmethod
    def of(cls, spec: SampleSpec) -> "Steps":
        params = spec.params
        greedy = params.temperature == 0
        truncated = not greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        changed = bool(params.logit_bias or spec.banned) or spec.allowed is not None
        return cls(greedy, params.reads_history, changed, truncated)

    @property
    def plain_greedy(self) -> bool:
        return self.greedy and not self.penalized and not self.changed


def sampled_token(values: list[float], top_logprobs: int) -> SampledToken:
    """A row's figures as a token: id, its log-probability, its score, then ids and log-probabilities of the likeliest.

    Where a row has no token, that is said in its place.
    """
    token_id, logprob, score, *likeliest = values
    if score == DROPPED and not math.isnan(logprob):
        return SampledToken(0, logprob, error=NONE_LEFT)
    if not math.isfinite(logprob):
        return SampledToken(0, logprob, error=NOT_FINITE)
    pairs = zip(map(int, likeliest[::2]), likeliest[1::2], strict=True)
    return SampledToken(int(token_id), logprob, tuple(pairs)[:top_logprobs])

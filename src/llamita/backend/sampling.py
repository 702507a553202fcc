"""The part of sampling that both backends share: the steps that each row takes, and the meaning of a row's results.

Knows no tensor; the steps themselves are in each backend's sampling.py.

Letters beyond the usual: R rows, E entries (a row and an id), W words of 32 bits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamita.backend.interface import SampledToken, SampleSpec

DROPPED = -math.inf
"""The score of a token that may not come."""
NONE_LEFT = "no token may come next: the banned tokens and the grammar leave none"
NOT_FINITE = "the model's logits are not finite; its weights hold NaN or infinity, or overflow this dtype"


class Steps(NamedTuple):
    """The steps of sampling that some rows have in common. `changed`: logits are biased or ids excluded."""

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
    def scored_anew(self) -> bool:
        """Whether scores are other than the logits."""
        return self.penalized or self.changed

    @property
    def plain_greedy(self) -> bool:
        return self.greedy and not self.scored_anew


def rows_by_steps(specs: Sequence[SampleSpec]) -> dict[Steps, list[int]]:
    """Returns the rows that have their steps in common."""
    rows: dict[Steps, list[int]] = {}
    for row, spec in enumerate(specs):
        rows.setdefault(Steps.of(spec), []).append(row)
    return rows


def biases(specs: Sequence[SampleSpec], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Returns rows, ids and what their logits gain; None where no row has a bias. ValueError for an unknown id."""
    found = [(row, i, bias) for row, spec in enumerate(specs) for i, bias in spec.params.logit_bias.items()]
    if not found:
        return None
    row_E, id_E, bias_E = map(np.array, zip(*found, strict=True))
    if id_E.max() >= vocab_size:
        raise ValueError(f"logit_bias has token id {id_E.max()}, but this model's ids are 0 to {vocab_size - 1}")
    return row_E, id_E, bias_E


def banned(specs: Sequence[SampleSpec], vocab_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns rows, and ids that may not come there; None where none is banned."""
    found = [(row, i) for row, spec in enumerate(specs) for i in spec.banned if i < vocab_size]
    if not found:
        return None
    row_E, id_E = np.array(found, dtype=np.int64).T
    return row_E, id_E


def allowed_words(specs: Sequence[SampleSpec], vocab_size: int) -> np.ndarray | None:
    """Returns the masks of allowed ids, int32 (R, W), all bits set where a row has none; None where no row has one."""
    if all(spec.allowed is None for spec in specs):
        return None
    every = np.full((vocab_size + 31) // 32, -1, dtype=np.int32)
    return np.stack([every if spec.allowed is None else spec.allowed for spec in specs])


def sampled_token(values: list[float], top_logprobs: int) -> SampledToken:
    """Returns the token of a row's results: id, log-probability, score, then ids and log-probabilities of the top ones.

    Where a row has no token, that is said in its place.
    """
    token_id, logprob, score, *likeliest = values
    if score == DROPPED and not math.isnan(logprob):
        return SampledToken(0, logprob, error=NONE_LEFT)
    if not math.isfinite(logprob):
        return SampledToken(0, logprob, error=NOT_FINITE)
    pairs = zip(map(int, likeliest[::2]), likeliest[1::2], strict=True)
    return SampledToken(int(token_id), logprob, tuple(pairs)[:top_logprobs])

"""Picks tokens from logits: repetition penalty, temperature, top-k, top-p, min-p, and a random draw.

They apply in that order, which is transformers' too. Each is switched off by its neutral value, so that a temperature
alone samples exactly from `softmax(logits / temperature)`. What is kept is decided in float64, so that it does not
hang on rounding. Knows nothing of models or caches.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from llamita.plan import SampledToken, SampleSpec, SamplingParams

DROPPED = -math.inf


def sample(logits_BV: torch.Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken]:
    """Pick a token for each row as its spec says, with its natural log-probability under `softmax(logits)`.

    Raises ValueError where a row holds NaN or infinity, as the logits of broken weights do.
    """
    assert logits_BV.shape[:-1] == (len(specs),)
    ids = [_pick(logits_BV[row : row + 1], spec) for row, spec in enumerate(specs)]
    ids_B1 = torch.tensor(ids, device=logits_BV.device).unsqueeze(1)
    logits_BV = logits_BV.float()
    logprobs = (logits_BV.gather(1, ids_B1).squeeze(1) - logits_BV.logsumexp(dim=-1)).tolist()
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise ValueError("the model's logits are not finite; its weights hold NaN or infinity, or overflow this dtype")
    return [SampledToken(token_id, logprob) for token_id, logprob in zip(ids, logprobs, strict=True)]


def _pick(logits_1V: torch.Tensor, spec: SampleSpec) -> int:
    if spec.params.temperature == 0:
        return int(penalize_repetition(logits_1V, spec.history, spec.params.repetition_penalty).argmax())
    scores_1V = filter_logits(logits_1V, spec.params, spec.history)
    noise_V = gumbel_noise(spec.seed, spec.position, scores_1V.shape[-1])
    return int((scores_1V[0] + torch.from_numpy(noise_V).to(scores_1V.device)).argmax())


def filter_logits(logits_BV: torch.Tensor, params: SamplingParams, history: Sequence[int] = ()) -> torch.Tensor:
    """The logits whose softmax a token is drawn from, at a temperature above 0; dropped tokens have -inf."""
    logits_BV = penalize_repetition(logits_BV.double(), history, params.repetition_penalty)
    # Subtracting the largest changes no probability and keeps tiny temperatures from overflowing.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / params.temperature
    if params.top_k:
        logits_BV = keep_top_k(logits_BV, params.top_k)
    if params.top_p < 1:
        logits_BV = keep_top_p(logits_BV, params.top_p)
    if params.min_p > 0:
        logits_BV = drop_below_min_p(logits_BV, params.min_p)
    return logits_BV


def penalize_repetition(logits_BV: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    """Make tokens that occur in `history` (prompt and output) less likely, for a penalty above 1.

    Positive logits are divided by it; negative ones are multiplied, so that these fall as well (Keskar et al. 2019,
    CTRL, arXiv:1909.05858, section 4.1; the multiplication follows transformers).
    """
    if penalty == 1 or not history:
        return logits_BV
    seen_R = torch.tensor(sorted(set(history)), device=logits_BV.device)
    seen_logits_BR = logits_BV[:, seen_R]
    penalized_BR = torch.where(seen_logits_BR > 0, seen_logits_BR / penalty, seen_logits_BR * penalty)
    return logits_BV.index_copy(1, seen_R, penalized_BR)


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits, and any equal to the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    smallest_kept_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_kept_B1, DROPPED)


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the nucleus: the smallest set of most probable tokens whose mass is at least p, never none.

    Of equally probable tokens at the border, those with the smaller ids stay (Holtzman et al. 2019, arXiv:1904.09751).
    """
    probabilities_BV = logits_BV.softmax(dim=-1)
    # All tokens rarer than (1 - p) / 2V together weigh less than 1 - p: the nucleus is among the others, the C
    # candidates, and only those are sorted.
    common_BV = probabilities_BV >= (1 - p) / (2 * logits_BV.shape[-1])
    candidates_C = common_BV.any(dim=0).nonzero().squeeze(1)
    sorted_BC, order_BC = probabilities_BV[:, candidates_C].sort(dim=-1, descending=True, stable=True)
    kept_BC = torch.ones_like(sorted_BC, dtype=torch.bool)
    kept_BC[:, 1:] = sorted_BC.cumsum(dim=-1)[:, :-1] < p  # the tokens before it do not suffice
    kept_BV = torch.zeros_like(common_BV).index_copy(1, candidates_C, kept_BC.scatter(1, order_BC, kept_BC))
    return logits_BV.masked_fill(~kept_BV, DROPPED)


def drop_below_min_p(logits_BV: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drop tokens less probable than `min_p` times the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    threshold_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits_BV.masked_fill(logits_BV < threshold_B1, DROPPED)


def gumbel_noise(seed: int, position: int, size: int) -> np.ndarray:
    """Float64 noise [size] that makes an argmax a draw: argmax(logits + noise) is distributed as softmax(logits).

    It depends on `seed` and `position` alone, not on batch, chunking or how much was drawn before: they are the key of
    a counter-based generator (Philox: Salmon et al. 2011; the Gumbel-max trick: Gumbel 1954, Maddison et al. 2014).
    """
    stream = np.random.Generator(np.random.Philox(key=np.array([seed, position], dtype=np.uint64)))
    exponential = np.maximum(stream.standard_exponential(size), np.finfo(np.float64).tiny)
    return -np.log(exponential)

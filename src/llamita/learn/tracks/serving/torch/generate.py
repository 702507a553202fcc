"""Writing with a cache: the prompt is read in chunks, then each new token is one small step."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from sampler import Sampler
from torch import Tensor

Forward = Callable[[Tensor, Sequence[Any]], Tensor]
"""A model: takes tokens (N, L) and a cache for each layer, and returns logits (N, L, V)."""


def simple_generate(
    model: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """Returns the tokens that follow a prompt, without any cache: every step runs the whole text again."""
    text = list(prompt)
    for _ in range(max_tokens):
        token = int(sampler(model(torch.tensor([text]))[:, -1])[0])
        if token in eos_ids:
            break
        text.append(token)
    return text[len(prompt) :]


def prefill(model: Forward, tokens: Sequence[int], caches: Sequence[Any], chunk: int) -> Tensor:
    """Runs tokens through the model, at most `chunk` of them in a call, and returns the logits after the last: (1, V).

    tokens: at least one. They come right after what is in the caches, which the model fills.
    """
    # to do: a loop over chunks in order; only the last call's last position matters.
    for start in range(0, len(tokens), chunk):
        logits = model(torch.tensor([tokens[start : start + chunk]]), caches)
    return logits[:, -1]
    # done


def generate(
    model: Forward,
    prompt: Sequence[int],
    caches: Sequence[Any],
    sampler: Sampler,
    max_tokens: int,
    eos_ids: Collection[int] = (),
    chunk: int = 128,
) -> list[int]:
    """Returns the tokens that follow a prompt: max_tokens, or those before the first that is in eos_ids.

    caches: one for each layer, empty or with what stands before the prompt. The prompt is read by `prefill`; then each
    new token alone is run, and never twice. The last token of all need not be run.
    """
    # to do: `prefill` for the prompt and for each new token; `sampler` takes the logits that it gives, (1, V).
    tokens: list[int] = []
    logits = prefill(model, prompt, caches, chunk)
    while len(tokens) < max_tokens:
        token = int(sampler(logits)[0])
        if token in eos_ids:
            break
        tokens.append(token)
        if len(tokens) < max_tokens:
            logits = prefill(model, [token], caches, chunk)
    return tokens
    # done

"""Speculative decoding: a small model guesses some tokens ahead, the large one checks them all in one step.

Source: Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192), section 2 and algorithm 1.
Letters: K guessed tokens, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from generate import Forward, prefill
from sampler import draw
from torch import Tensor


def accept_greedy(draft: Sequence[int], target: Sequence[int]) -> list[int]:
    """Returns the tokens that a step of the large model settles, at temperature 0: 1 to K + 1 of them.

    draft: K guessed tokens. target: K + 1 tokens of the large model's own: target[i] is its choice where it has seen
    draft[0] to draft[i - 1]. A guess is accepted while it and all before it are the large model's own. After the
    accepted ones comes the large model's own next token, which it has computed in any case.
    """
    # to do: find the first guess that differs.
    accepted = 0
    while accepted < len(draft) and draft[accepted] == target[accepted]:
        accepted += 1
    return [*draft[:accepted], target[accepted]]
    # done


def accept_sampled(
    draft: Sequence[int], draft_probabilities: Tensor, target_probabilities: Tensor, uniform: Tensor
) -> list[int]:
    """Returns the tokens that a step settles where tokens are drawn: they are distributed as the large model's own.

    draft: K guessed tokens, drawn from draft_probabilities, (K, V), which are nowhere 0 for them.
    target_probabilities: (K + 1, V), the large model's at the same places, and at the one after the last guess.
    uniform: (K + 1), numbers between 0 and 1. Guess i, with probability q in the small model and p in the large one, is
    accepted where uniform[i] < p / q. At the first that is not, a token comes in its place that is drawn
    from max(0, p - q) over the whole vocabulary, divided by its sum; where all are accepted, one more is drawn from the
    last row of target_probabilities. That draw takes uniform[K], by `draw`.
    """
    # to do: a loop over the guesses; `draw` takes probabilities (1, V) and a number (1), and gives a token (1).
    K = len(draft)
    for i in range(K):
        p, q = target_probabilities[i], draft_probabilities[i]
        if uniform[i] * q[draft[i]] >= p[draft[i]]:
            rest = (p - q).clamp(min=0)
            return [*draft[:i], int(draw((rest / rest.sum())[None], uniform[K:])[0])]
    return [*draft, int(draw(target_probabilities[K:], uniform[K:])[0])]
    # done


def speculative_generate(
    model: Forward,
    draft_model: Forward,
    prompt: Sequence[int],
    caches: Sequence[Any],
    draft_caches: Sequence[Any],
    max_tokens: int,
    count: int = 4,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """Returns the tokens that follow a prompt at temperature 0: exactly those of `generate`, in fewer steps.

    caches, draft_caches: one for each layer of each model, empty. In each round, those near max_tokens too, the small
    model guesses `count` tokens, one after the other, and the large model runs once, over what of the text its caches
    do not hold yet, followed by the guesses. (In the first round that is the whole prompt and the guesses.)
    Both models choose the token of the greatest logit; `accept_greedy` says what is settled. Then all caches forget
    what is not part of the text, and its last token, so that there is something to run next.
    The result ends at max_tokens, or before the first token that is in eos_ids.
    """
    # to do: rounds. `prefill` runs the small model over what its caches do not hold yet, in one chunk.
    text, tokens = list(prompt), list[int]()
    while True:
        draft: list[int] = []
        for _ in range(count):
            unread = (text + draft)[draft_caches[0].offset :]
            draft.append(int(prefill(draft_model, unread, draft_caches, len(unread)).argmax()))
        logits = model(torch.tensor([(text + draft)[caches[0].offset :]]), caches)
        target = [int(token) for token in logits[0, -count - 1 :].argmax(-1)]
        for token in accept_greedy(draft, target):
            if token in eos_ids:
                return tokens
            text.append(token)
            tokens.append(token)
            if len(tokens) == max_tokens:
                return tokens
        for cache in [*caches, *draft_caches]:
            cache.rewind(max(0, cache.offset - (len(text) - 1)))
    # done

"""The log-probability of texts as continuations of contexts, on which multiple choice and tasks of lm_eval rest.

Context and continuation are tokenised as one text and divided where the context ends, since alone they may give other
tokens. Asks a runner for logits; knows nothing of frameworks or of where the texts come from.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llamita.backend.interface import Forward
from llamita.evaluation.perplexity import score_sequences

Encode = Callable[[str], Sequence[int]]


class Pair(NamedTuple):
    """A context and its continuation, as token ids; neither may be empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether each of its tokens is the likeliest at its place."""

    nats: float
    greedy: bool


def encode_pair(encode: Encode, context: str, continuation: str) -> Pair:
    """Returns a pair's tokens; blanks at the end of the context go to the continuation, as they do inside a text."""
    kept = context.rstrip()
    whole = encode(context + continuation)
    size = len(encode(kept))
    return Pair(whole[:size], whole[size:])


def score(runner: Forward, pairs: Sequence[Pair], vocab_size: int, positions: int) -> list[Likelihood]:
    """Returns the likelihood of each continuation given its context, in the order of the pairs.

    A context loses its beginning where context and continuation, less their last token, exceed `positions`. Pairs of
    like length run together, so that little is computed for padding. ValueError for an empty part, and for a
    continuation longer than `positions`.
    """
    for pair in pairs:
        if not pair.context or not pair.continuation:
            raise ValueError("a context and what follows it must have at least one token each")
        if len(pair.continuation) > positions:
            raise ValueError(
                f"a continuation of {len(pair.continuation)} tokens does not fit into the model's {positions} positions"
            )
    sequences = [np.asarray([*pair.context, *pair.continuation][-(positions + 1) :]) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -len(sequences[index]))
    found: dict[int, Likelihood] = {}
    scored = score_sequences(runner, (sequences[index] for index in order), vocab_size)
    for index, scores in zip(order, scored, strict=True):
        size = len(pairs[index].continuation)
        right = scores.likeliest_T[-size:] == sequences[index][-size:]
        found[index] = Likelihood(float(scores.log_probabilities_T[-size:].sum()), bool(right.all()))
    return [found[index] for index in range(len(pairs))]

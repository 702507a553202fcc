"""Choosing the next token: the probabilities that logits stand for, the tail cut off, and a draw.

Letters: N rows, V vocabulary.
"""

import random
from collections.abc import Callable

import mlx.core as mx
from basics import softmax

Sampler = Callable[[mx.array], mx.array]
"""Takes logits (N, V) and returns a token for each row, (N)."""


def distribution(logits: mx.array, temp: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> mx.array:
    """Returns the probabilities with which tokens are drawn. logits: (N, V). The result: (N, V), float32.

    In this order, and what is left of a row is divided by its sum after each step:
    1. the softmax of logits / temp, in float32; at temp 0 the greatest logit has 1 and the others 0, and no other step
       is taken;
    2. top_k: the top_k most likely tokens stay; 0 keeps all;
    3. top_p: taken from the most likely down, a token stays where those before it have less than top_p together
       (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, section 3.1); 1 keeps all, and 0 is not allowed;
    4. min_p: a token stays where it has at least min_p times the probability of the most likely one
       (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, section 3); 0 keeps all.
    No two logits of a row are equal.
    """
    V = logits.shape[-1]
    if temp == 0:
        return (mx.arange(V) == logits.argmax(axis=-1, keepdims=True)).astype(mx.float32)
    # to do: the four steps. The place of each token in the order of probabilities is the argsort of an argsort;
    #        an argsort puts the least number first.
    p = softmax(logits.astype(mx.float32) / temp, -1)
    order = mx.argsort(-p, axis=-1)
    places = mx.argsort(order, axis=-1)
    if top_k > 0:
        p = mx.where(places < top_k, p, 0.0)
        p = p / p.sum(axis=-1, keepdims=True)
    ordered = mx.take_along_axis(p, order, axis=-1)
    before = mx.take_along_axis(ordered.cumsum(axis=-1) - ordered, places, axis=-1)
    if top_p < 1:
        p = mx.where(before < top_p, p, 0.0)
        p = p / p.sum(axis=-1, keepdims=True)
    p = mx.where(p >= min_p * p.max(axis=-1, keepdims=True), p, 0.0)
    return p / p.sum(axis=-1, keepdims=True)
    # done


def draw(probabilities: mx.array, uniform: mx.array) -> mx.array:
    """Returns a token for each row, drawn by a number between 0 and 1. probabilities: (N, V). The result: (N).

    The probabilities lie end to end on a line, token 0 first. uniform: (N), 0 <= uniform < 1, says how far along the
    line a row's token is: it is the first whose end lies beyond uniform times the length of the line. (The length is
    1 but for rounding, and a token of probability 0 is never drawn.)
    """
    # to do: the ends, by a cumulative sum; how many of them do not lie beyond.
    ends = probabilities.cumsum(axis=-1)
    return (ends <= uniform[:, None] * ends[:, -1:]).sum(axis=-1)
    # done


def make_sampler(temp: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0) -> Sampler:
    """Returns a sampler that draws by `distribution`; the same seed gives the same draws."""
    generator = random.Random(seed)

    # 24 bits, since float32 has no more: a number that is nearer to 1 would become 1, beyond the last token's end.
    def sample(logits: mx.array) -> mx.array:
        uniform = mx.array([generator.getrandbits(24) / 2**24 for _ in range(logits.shape[0])])
        return draw(distribution(logits, temp, top_k, top_p, min_p), uniform)

    return sample

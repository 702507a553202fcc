"""Scaled dot-product attention with grouped heads, and the masks it takes.

Knows nothing of projections, positions or caches: queries, keys and values come ready.
"""

import math

import mlx.core as mx

from llamita.model.config import AttentionSpec

PLAIN = AttentionSpec()


class Dropout:
    """Zeroes each number with this probability, divides the others by 1 - probability (Srivastava et al. 2014).

    What is drawn is a function of the key and of how often it was called before; no generator is shared with others.
    """

    def __init__(self, probability: float, key: mx.array, calls: int = 0) -> None:
        self.probability, self._key, self.calls = probability, key, calls

    def __call__(self, x: mx.array) -> mx.array:
        self._key, key = mx.random.split(self._key)
        self.calls += 1
        kept = mx.random.bernoulli(1 - self.probability, x.shape, key)
        return mx.where(kept, x * (1 / (1 - self.probability)), mx.zeros((), x.dtype))

    def copy(self) -> "Dropout":
        """Returns one that draws what this one would draw next."""
        return Dropout(self.probability, self._key, self.calls)

    def advance(self, calls: int) -> None:
        """Leaves out what so many calls would draw."""
        for _ in range(calls):
            self._key, _ = mx.random.split(self._key)
        self.calls += calls


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: mx.array | None = None,
    causal: bool = False,
    dropout: Dropout | None = None,
    spec: AttentionSpec = PLAIN,
) -> mx.array:
    """Computes softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017), each group of query heads sharing a key/value head.

    query (..., N, T, H), key and value (..., K, S, H) with N a multiple of K: multi-head for K = N, multi-query for
    K = 1, grouped-query between (Ainslie et al. 2023, arXiv:2305.13245). Any number of leading dimensions. mask is
    boolean, True where a query may look, and broadcasts to (..., N, T, S); `causal` lets query t see keys 0..t + S - T.
    `spec` has another scale than 1 / sqrt(H), and a soft cap on scores (Gemma 2, arXiv:2408.00118); its window is the
    mask's business. The softmax is taken in float32. Returns (..., N, T, H).
    """
    *leading, N, T, H = query.shape
    K, S = key.shape[-3:-1]
    weights = attention_weights(query, key, mask, causal, spec).astype(value.dtype)
    if dropout:
        weights = dropout(weights)
    mixed = weights.reshape(*leading, K, N // K, T, S) @ mx.expand_dims(value, -3)
    return mixed.reshape(*leading, N, T, H)


def attention_weights(
    query: mx.array, key: mx.array, mask: mx.array | None = None, causal: bool = False, spec: AttentionSpec = PLAIN
) -> mx.array:
    """Returns the probabilities (..., N, T, S), float32, with which each query of `attention` looks at each key.

    A row sums to one, and is zero where the query may not look.
    """
    *leading, N, T, H = query.shape
    K, S = key.shape[-3:-1]
    grouped = query.reshape(*leading, K, N // K, T, H)
    products = grouped @ mx.expand_dims(key, -3).swapaxes(-1, -2)  # (..., K, N/K, T, S)
    scores = products / math.sqrt(H) if spec.scale is None else products * spec.scale
    scores = scores.reshape(*leading, N, T, S).astype(mx.float32)
    if spec.soft_cap:
        scores = spec.soft_cap * mx.tanh(scores / spec.soft_cap)
    if causal:
        scores = mx.where(causal_mask(T, S), scores, -math.inf)
    if mask is not None:
        scores = mx.where(mask, scores, -math.inf)
    return softmax(scores)


def attention_fused(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: mx.array | None = None,
    causal: bool = False,
    dropout: Dropout | None = None,
    spec: AttentionSpec = PLAIN,
) -> mx.array:
    """Computes `attention` by MLX's kernel, which takes one mask; with dropout or a soft cap, by the plain form."""
    if dropout or spec.soft_cap:
        return attention(query, key, value, mask, causal, dropout, spec)
    *leading, N, T, H = query.shape
    K, S = key.shape[-3:-1]
    if causal and mask is not None:
        mask = mask & causal_mask(T, S)
    if mask is not None and len(leading) > 1:  # the kernel has one leading dimension, and no more in a mask
        mask = mx.broadcast_to(mask, (*leading, N, T, S)).reshape(-1, N, T, S)
    mixed = mx.fast.scaled_dot_product_attention(
        query.reshape(-1, N, T, H),
        key.reshape(-1, K, S, H),
        value.reshape(-1, K, S, H),
        scale=1 / math.sqrt(H) if spec.scale is None else spec.scale,
        mask="causal" if causal and mask is None else mask,
    )
    return mixed.reshape(query.shape)


def softmax(x: mx.array) -> mx.array:
    """Returns exponentials that sum to one over the last dimension; as the maximum goes first, none overflows."""
    exponentials = mx.exp(x - mx.max(x, axis=-1, keepdims=True))
    return exponentials / mx.sum(exponentials, axis=-1, keepdims=True)


def causal_mask(T: int, S: int) -> mx.array:
    """Returns a boolean (T, S): query t is the position S - T + t, and sees the keys up to its own."""
    return mx.arange(S)[None] <= mx.arange(S - T, S)[:, None]


def segment_mask(segments_BT: mx.array) -> mx.array:
    """Returns a boolean (B, 1, T, T): causal, and only within a segment (a document of a packed row).

    Segment 0 is padding: it sees only itself, so that no softmax is empty, and no real token sees it.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & causal_mask(segments_BT.shape[1], segments_BT.shape[1]))[:, None]


def window_mask(T: int, window: int) -> mx.array:
    """Returns a boolean (T, T): query t sees the `window` keys up to its own."""
    return causal_mask(T, T) & (mx.arange(T)[None] > mx.arange(T)[:, None] - window)

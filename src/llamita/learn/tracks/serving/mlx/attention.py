"""Attention: over given heads, with projections of its own, and with heads of keys that several query heads share.

Letters: N.. any number of batch axes, H heads, L query positions, S key positions, E size of a head, D width.
"""

import mlx.core as mx
from basics import linear, softmax


def scaled_dot_product_attention_simple(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    scale: float | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """Returns, for each query, the mean of the values weighted by how well their keys match it.

    query: (N.., H, L, E). key, value: (N.., H, S, E). The result: (N.., H, L, E).
    scale: what the products of queries and keys are multiplied by; 1 / sqrt(E) where it is None.
    mask: is added to the scaled products, and broadcasts to (N.., H, L, S); minus infinity hides a key from a query.

    Source: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), equation 1.
    """
    # to do: the scores, (N.., H, L, S); the mask; `softmax` over the keys; the mean of the values.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.swapaxes(-2, -1) * scale
    if mask is not None:
        scores = scores + mask
    return softmax(scores, -1) @ value
    # done


class SimpleMultiHeadAttention:
    """Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2)."""

    def __init__(
        self, hidden_size: int, num_heads: int, wq: mx.array, wk: mx.array, wv: mx.array, wo: mx.array
    ) -> None:
        """wq, wk, wv: (H * E, D), where rows 0 to E - 1 are the first head's. wo: (D, H * E). D is hidden_size."""
        assert hidden_size % num_heads == 0
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.wq, self.wk, self.wv, self.wo = wq, wk, wv, wo

    def __call__(self, query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None = None) -> mx.array:
        """Returns what the queries gather. query, key, value and the result: (N, L, D).

        mask: as `scaled_dot_product_attention_simple` takes it; it broadcasts to (N, H, L, L).
        """
        # to do: `linear` with wq, wk and wv; (N, H, L, E) of each, H heads of the width's E numbers side by side;
        #        `scaled_dot_product_attention_simple`; the heads side by side again; `linear` with wo.
        N, L, _ = query.shape
        q = linear(query, self.wq).reshape(N, L, self.num_heads, self.head_dim).swapaxes(1, 2)
        k = linear(key, self.wk).reshape(N, L, self.num_heads, self.head_dim).swapaxes(1, 2)
        v = linear(value, self.wv).reshape(N, L, self.num_heads, self.head_dim).swapaxes(1, 2)
        gathered = scaled_dot_product_attention_simple(q, k, v, mask=mask)
        return linear(gathered.swapaxes(1, 2).reshape(N, L, -1), self.wo)
        # done


def causal_mask(L: int, S: int, dtype: mx.Dtype) -> mx.array:
    """Returns the mask that hides later positions: (L, S), 0 where a query sees a key and minus infinity elsewhere.

    The L queries are the last of S positions (those before them are in a cache): query i stands at position
    S - L + i, and sees the keys at positions 0 to S - L + i, itself included. L is at most S.
    """
    # to do: compare the positions of queries with those of keys.
    positions = mx.arange(S - L, S)[:, None]
    hidden = mx.arange(S)[None, :] > positions
    return mx.where(hidden, -mx.inf, 0.0).astype(dtype)
    # done


def scaled_dot_product_attention_grouped(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    scale: float | None = None,
    mask: mx.array | str | None = None,
) -> mx.array:
    """Returns attention in which several query heads share one head of keys and values.

    query: (N.., G * H, L, E). key, value: (N.., H, S, E). The result: (N.., G * H, L, E). Query heads 0 to G - 1
    share key and value head 0, the next G share head 1, and so on.
    scale: as in `scaled_dot_product_attention_simple`.
    mask: "causal" for `causal_mask`, None, or what is added to the scaled products; it broadcasts to
    (N.., G * H, L, S), so its axis of heads, if it has one, has G * H entries or 1.

    Source: Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245), section 2.2.
    """
    # to do: give the queries a shape in which a head of keys meets its G query heads by broadcasting, nothing copied;
    #        `scaled_dot_product_attention_simple`; back to the queries' shape. A mask with heads takes the same way.
    *batch, heads, L, E = query.shape
    H, S = key.shape[-3:-1]
    grouped = query.reshape(*batch, H, heads // H, L, E)
    if isinstance(mask, str):
        mask = causal_mask(L, S, query.dtype)
    elif mask is not None:
        mask = mx.broadcast_to(mask, (*batch, heads, L, S)).reshape(*batch, H, heads // H, L, S)
    key, value = mx.expand_dims(key, -3), mx.expand_dims(value, -3)
    gathered = scaled_dot_product_attention_simple(grouped, key, value, scale, mask)
    return gathered.reshape(query.shape)
    # done

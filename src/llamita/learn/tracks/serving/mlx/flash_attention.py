"""Attention block by block: the softmax is summed up on the way, so that the whole table of scores never exists.

Source: Dao et al. 2022, FlashAttention (https://arxiv.org/abs/2205.14135), section 3.1 and algorithm 1.
Letters: N.. any number of batch axes, heads among them, L query positions, S key positions, B positions of a block,
E size of a head.
"""

import mlx.core as mx


def merge_block(
    maximum: mx.array, total: mx.array, output: mx.array, scores: mx.array, value: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns maximum, total and output after one more block of keys, given those before it.

    maximum: (N.., L, 1), the greatest score so far; minus infinity before the first block.
    total: (N.., L, 1), the sum of exp(score - maximum) over all keys so far.
    output: (N.., L, E), the sum of exp(score - maximum) * value over all keys so far, not yet divided by the total.
    scores: (N.., L, B), of this block, scaled and masked; some may be minus infinity. value: (N.., B, E).

    All are float32. In each row of the first block, one score at least is not minus infinity.
    """
    # to do: the new maximum; what total and output so far are multiplied by, since their maximum was another;
    #        the exponentials of this block; the three results.
    greatest = mx.maximum(maximum, scores.max(axis=-1, keepdims=True))
    correction = mx.exp(maximum - greatest)
    weights = mx.exp(scores - greatest)
    total = total * correction + weights.sum(axis=-1, keepdims=True)
    output = output * correction + weights @ value
    return greatest, total, output
    # done


def flash_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    scale: float | None = None,
    causal: bool = False,
    block_size: int = 32,
) -> mx.array:
    """Returns what `scaled_dot_product_attention_simple` does, looking at block_size keys at a time.

    query: (N.., L, E). key, value: (N.., S, E). The result: (N.., L, E); the dtype stays, the sums are float32.
    scale: 1 / sqrt(E) where it is None. causal: query i, which stands at position S - L + i, sees the keys at positions
    0 to S - L + i. The last block may have fewer keys than block_size.
    """
    L, S, E = query.shape[-2], key.shape[-2], query.shape[-1]
    scale = E**-0.5 if scale is None else scale
    # to do: maximum, total and output before the first block, float32; for each block its scores and mask, then
    #        `merge_block`; at the end output / total.
    maximum = mx.full((*query.shape[:-1], 1), -mx.inf)
    total, output = mx.zeros(maximum.shape), mx.zeros(query.shape)
    positions = mx.arange(S - L, S)[:, None]
    for start in range(0, S, block_size):
        end = min(start + block_size, S)
        scores = query.astype(mx.float32) @ key[..., start:end, :].astype(mx.float32).swapaxes(-2, -1) * scale
        if causal:
            scores = mx.where(mx.arange(start, end) <= positions, scores, -mx.inf)
        block = value[..., start:end, :].astype(mx.float32)
        maximum, total, output = merge_block(maximum, total, output, scores, block)
    return (output / total).astype(query.dtype)
    # done

"""Attention block by block: the softmax is summed up on the way, so that the whole table of scores never exists.

Source: Dao et al. 2022, FlashAttention (https://arxiv.org/abs/2205.14135), section 3.1 and algorithm 1.
Letters: N.. any number of batch axes, heads among them, L query positions, S key positions, B positions of a block,
E size of a head.
"""

import torch
from torch import Tensor


def merge_block(
    maximum: Tensor, total: Tensor, output: Tensor, scores: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns maximum, total and output after one more block of keys, given those before it.

    maximum: (N.., L, 1), the greatest score so far; minus infinity before the first block.
    total: (N.., L, 1), the sum of exp(score - maximum) over all keys so far.
    output: (N.., L, E), the sum of exp(score - maximum) * value over all keys so far, not yet divided by the total.
    scores: (N.., L, B), of this block, scaled and masked; some may be minus infinity. value: (N.., B, E).

    All are float32. In each row of the first block, one score at least is not minus infinity.
    """
    # to do: the new maximum; what total and output so far are multiplied by, since their maximum was another;
    #        the exponentials of this block; the three results.
    greatest = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
    correction = torch.exp(maximum - greatest)
    weights = torch.exp(scores - greatest)
    total = total * correction + weights.sum(dim=-1, keepdim=True)
    output = output * correction + weights @ value
    return greatest, total, output
    # done


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    causal: bool = False,
    block_size: int = 32,
) -> Tensor:
    """Returns what `scaled_dot_product_attention_simple` does, looking at block_size keys at a time.

    query: (N.., L, E). key, value: (N.., S, E). The result: (N.., L, E); the dtype stays, the sums are float32.
    scale: 1 / sqrt(E) where it is None. causal: query i, which stands at position S - L + i, sees the keys at positions
    0 to S - L + i. The last block may have fewer keys than block_size.
    """
    L, S, E = query.shape[-2], key.shape[-2], query.shape[-1]
    scale = E**-0.5 if scale is None else scale
    # to do: maximum, total and output before the first block, float32; for each block its scores and mask, then
    #        `merge_block`; at the end output / total.
    maximum = torch.full((*query.shape[:-1], 1), float("-inf"))
    total, output = torch.zeros(maximum.shape), torch.zeros(query.shape)
    positions = torch.arange(S - L, S)[:, None]
    for start in range(0, S, block_size):
        end = min(start + block_size, S)
        scores = query.float() @ key[..., start:end, :].float().transpose(-2, -1) * scale
        if causal:
            scores = torch.where(torch.arange(start, end) <= positions, scores, float("-inf"))
        block = value[..., start:end, :].float()
        maximum, total, output = merge_block(maximum, total, output, scores, block)
    return (output / total).to(query.dtype)
    # done

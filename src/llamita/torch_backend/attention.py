"""Scaled dot-product attention with grouped heads, and the masks it takes.

Knows nothing of projections, positions or caches: queries, keys and values come ready.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017), each group of query heads sharing a key/value head.

    query (..., N, T, H), key and value (..., K, S, H) with N a multiple of K: multi-head for K = N, multi-query for
    K = 1, grouped-query between (Ainslie et al. 2023, arXiv:2305.13245). Any number of leading dimensions. mask is
    boolean, True where a query may look, and broadcasts to (..., N, T, S); `causal` lets query t see keys 0..t + S - T.
    The softmax is taken in float32. Returns (..., N, T, H).
    """
    N, T, H = query.shape[-3:]
    K, S = key.shape[-3:-1]
    grouped = query.unflatten(-3, (K, N // K))  # (..., K, N/K, T, H)
    scores = grouped @ key.unsqueeze(-3).mT / math.sqrt(H)  # (..., K, N/K, T, S)
    scores = scores.flatten(-4, -3).float()  # (..., N, T, S)
    if causal:
        scores = scores.masked_fill(~causal_mask(T, S, query.device), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores).to(value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed = weights.unflatten(-3, (K, N // K)) @ value.unsqueeze(-3)
    return mixed.flatten(-4, -3)


def attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`attention` by PyTorch's fused kernels, which never hold all scores at once."""
    N, T = query.shape[-3:-1]
    K, S = key.shape[-3:-1]
    if causal and (
        T != S or mask is not None
    ):  # PyTorch takes one of the two, and aligns its triangle to the first key
        triangle = causal_mask(T, S, query.device)
        causal, mask = False, triangle if mask is None else mask & triangle
    if K != N and query.device.type == "cpu":  # the CPU kernel falls back to a slow path for grouped heads
        key, value = (x.repeat_interleave(N // K, dim=-3) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=key.shape[-3] != N
    )


def softmax(x: Tensor) -> Tensor:
    """Exponentials that sum to one over the last dimension; the maximum is subtracted first so that none overflows."""
    exponentials = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def causal_mask(T: int, S: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (T, S): query t is the position S - T + t, and sees the keys up to its own."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Boolean (B, 1, T, T): causal, and only within a segment (a document of a packed row).

    Segment 0 is padding: it sees only itself, so that no softmax is empty, and no real token sees it.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & causal_mask(segments_BT.shape[1], segments_BT.shape[1], segments_BT.device))[:, None]


def position_mask(positions_BT: Tensor, S: int) -> Tensor:
    """Boolean (B, 1, T, S) over cache slots, where a slot's index is its position: a query sees slots up to its own."""
    slots_S = torch.arange(S, device=positions_BT.device)
    return (slots_S <= positions_BT[:, :, None])[:, None]

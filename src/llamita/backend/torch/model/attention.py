"""Scaled dot-product attention with grouped heads, and the masks it takes.

Knows nothing of projections, positions or caches: queries, keys and values come ready.

Letters beyond the usual: M leading dimensions and key heads, G query heads of a key head, R all queries of a key head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.torch.model.dropout import drop
from llamita.model.config import AttentionSpec

PLAIN = AttentionSpec()
MAX_SCORES = 2**26
"""Scores that `attention_by_products` may hold: 128 MB in bfloat16."""
QUERY_TILE = 128
"""Queries that `attention_by_query_tiles` takes at a time; with half as many it is about as fast as one kernel."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    spec: AttentionSpec = PLAIN,
) -> Tensor:
    """Computes softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017), each group of query heads sharing a key/value head.

    query (..., N, T, H), key and value (..., K, S, H) with N a multiple of K: multi-head for K = N, multi-query for
    K = 1, grouped-query between (Ainslie et al. 2023, arXiv:2305.13245). Any number of leading dimensions. mask is
    boolean, True where a query may look, and broadcasts to (..., N, T, S); `causal` lets query t see keys 0..t + S - T.
    `spec` has another scale than 1 / sqrt(H), and a soft cap on scores; its window is the mask's business. The softmax
    is taken in float32. Returns (..., N, T, H).
    """
    N, K = query.shape[-3], key.shape[-3]
    weights = attention_weights(query, key, mask, causal, spec).to(value.dtype)
    if dropout:
        weights = drop(weights, dropout)
    mixed = weights.unflatten(-3, (K, N // K)) @ value.unsqueeze(-3)
    return mixed.flatten(-4, -3)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False, spec: AttentionSpec = PLAIN
) -> Tensor:
    """Returns the probabilities (..., N, T, S), float32, with which each query of `attention` looks at each key.

    A row sums to one, and is zero where the query may not look.
    """
    N, T, H = query.shape[-3:]
    K, S = key.shape[-3:-1]
    grouped = query.unflatten(-3, (K, N // K))  # (..., K, N/K, T, H)
    scores = scaled(grouped @ key.unsqueeze(-3).mT, H, spec)  # (..., K, N/K, T, S)
    scores = scores.flatten(-4, -3).float()  # (..., N, T, S)
    if causal:
        scores = scores.masked_fill(~causal_mask(T, S, query.device), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return softmax(scores)


def attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    spec: AttentionSpec = PLAIN,
) -> Tensor:
    """Computes `attention` by whichever of PyTorch's kernels is fastest for it; none of them has a soft cap."""
    N, T = query.shape[-3:-1]
    K, S = key.shape[-3:-1]
    if causal and mask is not None:
        causal, mask = False, mask & causal_mask(T, S, query.device)
    if query.device.type == "cpu":
        trains_in_bf16 = query.requires_grad and query.dtype == torch.bfloat16
        if trains_in_bf16 and query.shape[:-1].numel() * S <= MAX_SCORES:
            return attention_by_products(query, key, value, causal_mask(T, S) if causal else mask, dropout, spec)
        infers = not query.requires_grad and not dropout and (spec.soft_cap or query.dtype == torch.bfloat16)
        if infers and T >= QUERY_TILE // 2 and (causal or (mask is not None and mask.shape == (T, S))):
            return attention_by_query_tiles(query, key, value, mask, spec)
    if spec.soft_cap:
        return attention(query, key, value, mask, causal, dropout, spec)
    if query.device.type == "cpu" and K != N:  # the flash kernel of CPUs takes a slow path for grouped heads
        key, value = (x.repeat_interleave(N // K, dim=-3) for x in (key, value))
    if causal and T != S:  # PyTorch aligns its triangle to the first key
        causal, mask = False, causal_mask(T, S, query.device)
    grouped = key.shape[-3] != N
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=causal, scale=spec.scale, enable_gqa=grouped
    )


def attention_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    spec: AttentionSpec = PLAIN,
) -> Tensor:
    """Computes `attention` as two batched products around one softmax, all scores held at once.

    On a CPU in bfloat16 forward and backward together take a half to a fifth of the flash kernel's time at a few
    hundred positions. The softmax is computed in float32 from scores rounded to the type of the query.
    """
    N, T, H = query.shape[-3:]
    K, S = key.shape[-3:-1]
    leading, group = query.shape[:-3], N // K
    rows_MRH = query.reshape(-1, group * T, H)
    key_MSH, value_MSH = key.reshape(-1, S, H), value.reshape(-1, S, H)
    bias = torch.zeros((), dtype=query.dtype, device=query.device)
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)
        bias = bias.repeat(group, 1) if mask.ndim == 2 else bias.expand(*leading, N, T, S).reshape(-1, group * T, S)
    if spec.soft_cap:  # before what is masked is taken away
        scores_MRS = capped(torch.bmm(rows_MRH, key_MSH.mT) * factor(H, spec), spec) + bias
    else:
        scores_MRS = torch.baddbmm(bias, rows_MRH, key_MSH.mT, alpha=factor(H, spec))
    weights_MRS = torch.softmax(scores_MRS, dim=-1)
    if dropout:
        weights_MRS = drop(weights_MRS, dropout)
    return (weights_MRS @ value_MSH).view(*leading, N, T, H)


def attention_by_query_tiles(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, spec: AttentionSpec = PLAIN
) -> Tensor:
    """Computes `attention`, causal or under a mask (T, S), as two products around a softmax for each tile of queries.

    Without a mask a tile meets the keys up to its last query's own. On a CPU in bfloat16 this takes 0.4 to 0.8 of the
    flash kernel's time from 128 positions on; scores are rounded to the type of the query, as in
    `attention_by_products`. At most `MAX_SCORES` of them are held, or those of one query. No gradient.
    """
    N, T, H = query.shape[-3:]
    K, S = key.shape[-3:-1]
    query_MGTH = query.reshape(-1, N // K, T, H)
    key_MSH, value_MSH = key.reshape(-1, S, H), value.reshape(-1, S, H)
    unused_bias = torch.zeros((), dtype=query.dtype)
    tile = max(1, min(QUERY_TILE, MAX_SCORES // (query.shape[:-2].numel() * S)))
    triangle = causal_mask(tile, tile)
    tiles = []
    for start in range(0, T, tile):
        stop = min(start + tile, T)
        if mask is None:  # the tile's queries are the positions S - T + start and on
            end_key, first_masked, allowed = S - T + stop, S - T + start, triangle[: stop - start, : stop - start]
        else:
            end_key, first_masked, allowed = S, 0, mask[start:stop]
        rows_MRH = query_MGTH[:, :, start:stop].flatten(1, 2)
        keys_MHS = key_MSH[:, :end_key].mT
        scores_MRS = torch.baddbmm(unused_bias, rows_MRH, keys_MHS, beta=0, alpha=factor(H, spec))
        scores_MRS = capped(scores_MRS, spec)
        scores_MRS.unflatten(1, (N // K, -1))[..., first_masked:].masked_fill_(~allowed, -math.inf)
        mixed_MRH = torch.softmax(scores_MRS, dim=-1) @ value_MSH[:, :end_key]
        tiles.append(mixed_MRH.unflatten(1, (N // K, -1)))
    return torch.cat(tiles, dim=-2).view(query.shape)


def factor(head_dim: int, spec: AttentionSpec) -> float:
    """Returns the factor that products of queries and keys are multiplied by."""
    return 1 / math.sqrt(head_dim) if spec.scale is None else spec.scale


def scaled(products: Tensor, head_dim: int, spec: AttentionSpec) -> Tensor:
    """Turns products of queries and keys into scores: scaled, and softly capped where the model does so."""
    scores = products / math.sqrt(head_dim) if spec.scale is None else products * spec.scale
    return capped(scores, spec)


def capped(scores: Tensor, spec: AttentionSpec) -> Tensor:
    """Returns cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118), or the scores as they are."""
    return spec.soft_cap * torch.tanh(scores / spec.soft_cap) if spec.soft_cap else scores


def softmax(x: Tensor) -> Tensor:
    """Returns exponentials that sum to one over the last dimension; as the maximum goes first, none overflows."""
    exponentials = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def causal_mask(T: int, S: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns a boolean (T, S): query t is the position S - T + t, and sees the keys up to its own."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Returns a boolean (B, 1, T, T): causal, and only within a segment (a document of a packed row).

    Segment 0 is padding: it sees only itself, so that no softmax is empty, and no real token sees it.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & causal_mask(segments_BT.shape[1], segments_BT.shape[1], segments_BT.device))[:, None]


def window_mask(T: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns a boolean (T, T): query t sees the `window` keys up to its own."""
    return causal_mask(T, T, device).triu(1 - window)

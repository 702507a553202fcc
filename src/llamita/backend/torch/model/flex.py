"""Attention by FlexAttention (Dong et al. 2024, arXiv:2412.05496), for masks of documents and windows on a GPU.

What a query sees is a function of positions, compiled into the kernel. Blocks of 128 queries and 128 keys of which no
pair may meet are skipped, and no matrix of all pairs is held, as `attention.segment_mask` is one. On a CPU PyTorch
computes the same by its definition, without a backward pass; tests compare that with attention.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as BlockMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llamita.model.config import AttentionSpec, ModelConfig

LEAST_HEAD = 16
"""The smallest head that the kernels take."""


def attention(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, spec: AttentionSpec) -> Tensor:
    """Computes `attention.attention` under a block mask: query (B, N, T, H), key and value (B, K, T, H)."""
    compute = _function(flex_attention, query.device)
    mixed_BNTH: Tensor = compute(
        query.to(value.dtype),  # norms of heads leave queries and keys in float32
        key.to(value.dtype),
        value,
        score_mod=score_function(spec, query.device),
        block_mask=blocks,
        scale=spec.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed_BNTH


def block_mask(segments_BT: Tensor | None, T: int, window: int = 0, device: torch.device | str = "cpu") -> BlockMask:
    """Returns the blocks in which some query sees some key, by the rule of `mask_function`."""
    create = _function(create_block_mask, torch.device(device))
    B = None if segments_BT is None else len(segments_BT)
    blocks: BlockMask = create(mask_function(segments_BT, window), B, None, T, T, device=device)
    return blocks


def mask_function(segments_BT: Tensor | None, window: int = 0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Returns whether the query at a position sees a key at another: none after it, none of another segment (document).

    With a window, only the `window` keys up to its own. Padding, segment 0, sees padding alone.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        return seen if segments_BT is None else seen & (segments_BT[row, query] == segments_BT[row, key])

    def sees_within_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(row, head, query, key) & (query - key < window)

    # Two functions, as a number that differed between layers would be compiled as a variable.
    return sees_within_window if window else sees


def score_function(spec: AttentionSpec, device: torch.device) -> Callable[..., Tensor] | None:
    """Returns what bends scores to the soft cap, None where there is none."""
    if not spec.soft_cap:
        return None
    cap = torch.full((), spec.soft_cap, device=device)  # a tensor, since the kernel takes no variable of Python's

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def check(config: ModelConfig, device: str) -> None:
    """ValueError, in one line, where a model cannot be trained with FlexAttention on a device."""
    if device != "cuda":
        raise ValueError(f"--attention flex has a backward pass on a CUDA device alone, not on {device}; leave it out")
    if config.dropout:
        raise ValueError(f"FlexAttention draws no dropout; use --attention masked, or dropout=0 for {config.dropout:g}")
    if config.head_dim < LEAST_HEAD:
        raise ValueError(f"head_dim={config.head_dim} must be at least {LEAST_HEAD} for --attention flex")


def _function(function: Any, device: torch.device) -> Callable[..., Any]:
    """Returns a function of FlexAttention as a device runs it: compiled on a GPU, unless a compiler is at work."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        plain: Callable[..., Any] = function
        return plain
    return _compiled(function)


@functools.cache
def _compiled(function: Any) -> Callable[..., Any]:
    return torch.compile(function)

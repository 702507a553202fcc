"""Losses of a language model, as sums in nats; the caller divides by what it counts.

Knows nothing of optimisers, batches or files.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a position that is not scored


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The sum over scored positions of -log softmax(logits)[label], in nats; a float32 scalar."""
    scored_BT = labels_BT != IGNORED
    logits_MV, labels_M = logits_BTV[scored_BT].float(), labels_BT[scored_BT].long()
    largest_M1 = logits_MV.amax(dim=-1, keepdim=True)
    normalizer_M = (logits_MV - largest_M1).exp().sum(dim=-1).log() + largest_M1[:, 0]
    return (normalizer_M - logits_MV.gather(-1, labels_M[:, None])[:, 0]).sum()


def chunked_cross_entropy(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, chunk_size: int = 512) -> Tensor:
    """`cross_entropy` of hidden states through an output head, without ever holding all logits.

    The logits of `chunk_size` positions exist at a time, and the gradients with respect to hidden states and head are
    taken at once, while they do: memory is chunk_size x V instead of B x T x V, and nothing is computed twice.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BTD.dtype
    if hidden_BTD.device.type != "cpu" and torch.is_autocast_enabled(hidden_BTD.device.type):
        dtype = torch.get_autocast_dtype(hidden_BTD.device.type)
    labels_M = labels_BT.reshape(-1).long()
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, labels_M, chunk_size, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk_size: int, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return _ChunkedCrossEntropy._forward(ctx, hidden_MD, weight_VD, labels_M, chunk_size, dtype)

    @staticmethod
    def _forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk_size: int, dtype: torch.dtype
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        low_weight_VD = weight_VD.to(dtype)
        grad_hidden_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for start in range(0, hidden_MD.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            low_hidden_MD = hidden_MD[rows].to(dtype)
            labels_M1 = labels_M[rows, None]
            scored_M1 = labels_M1 != IGNORED
            targets_M1 = labels_M1.clamp(min=0)
            log_probs_MV = F.log_softmax((low_hidden_MD @ low_weight_VD.mT).float(), dim=-1)
            total -= (log_probs_MV.gather(-1, targets_M1) * scored_M1).sum()
            if grad_hidden_MD is None and grad_weight_VD is None:
                continue
            grad_logits_MV = log_probs_MV.exp_()  # d loss / d logits = softmax - one-hot, and 0 where not scored
            grad_logits_MV.scatter_add_(-1, targets_M1, torch.full_like(targets_M1, -1, dtype=torch.float32))
            low_grad_MV = (grad_logits_MV.mul_(scored_M1)).to(dtype)
            if grad_hidden_MD is not None:
                grad_hidden_MD[rows] = low_grad_MV @ low_weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += low_grad_MV.mT @ low_hidden_MD
        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_MD is None else grad_hidden_MD * grad_output,
            None if grad_weight_VD is None else (grad_weight_VD * grad_output).to(ctx.weight_dtype),
            None,
            None,
            None,
        )

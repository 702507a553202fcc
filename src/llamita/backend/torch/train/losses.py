"""Losses of a language model, as sums in nats; the caller divides by what it counts.

Knows nothing of optimisers, batches or files.

Letters beyond the usual: M positions of a batch laid end to end, or the scored ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.torch.model.head import LogitTransform, OutputHead
from llamita.data.batches import IGNORE_INDEX


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Returns the sum over scored positions of -log softmax(logits)[label], in nats; a float32 scalar."""
    scored_BT = labels_BT != IGNORE_INDEX
    logits_MV, labels_M = logits_BTV[scored_BT].float(), labels_BT[scored_BT].long()
    largest_M1 = logits_MV.amax(dim=-1, keepdim=True)
    normalizer_M = (logits_MV - largest_M1).exp().sum(dim=-1).log() + largest_M1[:, 0]
    return (normalizer_M - logits_MV.gather(-1, labels_M[:, None])[:, 0]).sum()


def chunked_cross_entropy(hidden_BTD: Tensor, head: OutputHead, labels_BT: Tensor, chunk_size: int = 1024) -> Tensor:
    """Returns the `cross_entropy` of hidden states through an output head, without ever holding all logits.

    The logits of `chunk_size` positions exist at a time, and the gradients with respect to hidden states and head are
    taken at once, while they do: memory is chunk_size x V instead of B x T x V, and nothing is computed twice.
    """
    labels_M = labels_BT.reshape(-1).long()
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    dtype = _product_dtype(hidden_BTD)
    return _ChunkedCrossEntropy.apply(hidden_MD, head.weight_VD, labels_M, chunk_size, dtype, head.transform)


def chunked_log_probs(hidden_BTD: Tensor, head: OutputHead, labels_BT: Tensor, chunk_size: int = 1024) -> Tensor:
    """Returns log softmax(logits)[label] of each scored position, float32 (B, T), 0 elsewhere; holds few logits.

    Unlike those of a sum, the gradients of each depend on what is done with it, so the logits of a chunk are computed a
    second time on the way back. Positions that are not scored cost nothing.
    """
    scored_BT = labels_BT != IGNORE_INDEX
    hidden_MD, labels_M = hidden_BTD[scored_BT], labels_BT[scored_BT].long()
    dtype = _product_dtype(hidden_BTD)
    found_M = _ChunkedLogProbs.apply(hidden_MD, head.weight_VD, labels_M, chunk_size, dtype, head.transform)
    return torch.zeros(labels_BT.shape, dtype=torch.float32, device=found_M.device).masked_scatter(scored_BT, found_M)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the type in which autocast, where it is on, has matrix products computed."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        transform: LogitTransform,
    ) -> Tensor:
        with torch.autocast(hidden_MD.device.type, enabled=False):
            wants_hidden, wants_weight = ctx.needs_input_grad[:2]  # a frozen head has no gradient, nor its memory
            wants_gradients = wants_hidden or wants_weight
            low_hidden_MD, low_weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
            grad_hidden_MD = torch.empty_like(hidden_MD) if wants_hidden else None
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
            total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
            for start in range(0, hidden_MD.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                logits_MV = low_hidden_MD[rows] @ low_weight_VD.mT
                if transform.changes_nothing:
                    total += _loss_and_gradient_(logits_MV, labels_M[rows, None], wants_gradients)
                else:
                    logits_MV = transform(logits_MV.float())
                    slope_MV = transform.slope(logits_MV)
                    total += _loss_and_gradient_(logits_MV, labels_M[rows, None], wants_gradients)
                    logits_MV = (logits_MV * slope_MV).to(dtype)
                if grad_hidden_MD is not None:
                    grad_hidden_MD[rows] = logits_MV @ low_weight_VD
                if grad_weight_VD is not None:
                    grad_weight_VD += logits_MV.mT @ low_hidden_MD[rows]
                del logits_MV  # before the next chunk's are made: two would be held at a time
        ctx.gradients = (grad_hidden_MD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients, multiplied in their own memory: this can be done once."""
        (grad_output,) = grad_outputs
        grad_hidden_MD, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        return (
            None if grad_hidden_MD is None else grad_hidden_MD.mul_(grad_output),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_output).to(ctx.weight_dtype),
            *(None, None, None, None),
        )


def _loss_and_gradient_(logits_MV: Tensor, labels_M1: Tensor, wants_gradients: bool) -> Tensor:
    """Returns the summed loss of a chunk; overwrites its logits by their gradient, softmax - one-hot (0 if not scored).

    On a CPU a few rows are worked on at a time, 2 MB in float32, so that they stay in its cache.
    """
    rows_at_once = logits_MV.shape[0]
    if logits_MV.device.type == "cpu":
        rows_at_once = max(1, 2**19 // logits_MV.shape[1])
    total = torch.zeros((), dtype=torch.float32, device=logits_MV.device)
    for logits, labels in zip(logits_MV.split(rows_at_once), labels_M1.split(rows_at_once), strict=True):
        scored, targets = labels != IGNORE_INDEX, labels.clamp(min=0)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        total -= torch.where(scored, log_probs.gather(-1, targets), 0.0).sum()
        if wants_gradients:
            gradient = log_probs.exp_()
            gradient.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=torch.float32))
            logits.copy_(gradient.mul_(scored))
    return total


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        transform: LogitTransform,
    ) -> Tensor:
        found_M = torch.empty(len(labels_M), dtype=torch.float32, device=hidden_MD.device)
        normalizers_M = torch.empty_like(found_M)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            low_weight_VD = weight_VD.to(dtype)
            for start in range(0, len(labels_M), chunk_size):
                rows = slice(start, start + chunk_size)
                logits_MV = transform((hidden_MD[rows].to(dtype) @ low_weight_VD.mT).float())
                normalizers_M[rows] = logits_MV.logsumexp(-1)
                found_M[rows] = logits_MV.gather(-1, labels_M[rows, None])[:, 0] - normalizers_M[rows]
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M, normalizers_M)
        ctx.chunk_size, ctx.dtype, ctx.transform = chunk_size, dtype, transform
        return found_M

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients; that of a position's logits is grad_output * (one-hot - softmax)."""
        (grad_M,) = grad_outputs
        hidden_MD, weight_VD, labels_M, normalizers_M = ctx.saved_tensors
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        low_weight_VD = weight_VD.to(ctx.dtype)
        for start in range(0, len(labels_M), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            low_hidden_MD = hidden_MD[rows].to(ctx.dtype)
            logits_MV = ctx.transform((low_hidden_MD @ low_weight_VD.mT).float())
            slope_MV = None if ctx.transform.changes_nothing else ctx.transform.slope(logits_MV)
            gradient_MV = logits_MV.sub_(normalizers_M[rows, None]).exp_().neg_()
            gradient_MV.scatter_add_(-1, labels_M[rows, None], torch.ones_like(grad_M[rows, None]))
            gradient_MV = gradient_MV.mul_(grad_M[rows, None])
            low_gradient_MV = (gradient_MV if slope_MV is None else gradient_MV * slope_MV).to(ctx.dtype)
            grad_hidden_MD[rows] = (low_gradient_MV @ low_weight_VD).to(grad_hidden_MD.dtype)
            grad_weight_VD += low_gradient_MV.mT @ low_hidden_MD
        return grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None

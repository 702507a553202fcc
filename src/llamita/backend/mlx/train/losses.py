"""Losses of a language model, as sums in nats; the caller divides by what it counts.

Knows nothing of optimisers, batches or files.

Letters beyond the usual: M positions of a batch, R positions of a chunk.
"""

from typing import Any

import mlx.core as mx

from llamita.backend.mlx.model.head import LogitTransform, OutputHead
from llamita.data.batches import IGNORE_INDEX


def cross_entropy(logits_BTV: mx.array, labels_BT: mx.array) -> mx.array:
    """Returns the sum over scored positions of -log softmax(logits)[label], in nats; a float32 scalar."""
    scored_BT, targets_BT = labels_BT != IGNORE_INDEX, mx.maximum(labels_BT, 0)
    logits_BTV = logits_BTV.astype(mx.float32)
    largest_BT1 = mx.stop_gradient(mx.max(logits_BTV, axis=-1, keepdims=True))
    normalizer_BT = mx.log(mx.sum(mx.exp(logits_BTV - largest_BT1), axis=-1)) + largest_BT1[..., 0]
    chosen_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return mx.sum(mx.where(scored_BT, normalizer_BT - chosen_BT, 0.0))


def chunked_cross_entropy(
    hidden_BTD: mx.array, head: OutputHead, labels_BT: mx.array, chunk_size: int = 1024
) -> mx.array:
    """Returns the `cross_entropy` of hidden states through an output head, without ever holding all logits."""
    return -mx.sum(chunked_log_probs(hidden_BTD, head, labels_BT, chunk_size))


def chunked_log_probs(hidden_BTD: mx.array, head: OutputHead, labels_BT: mx.array, chunk_size: int = 1024) -> mx.array:
    """Returns the log-probability of every label that is scored, float32 (B, T); 0 elsewhere.

    The logits of `chunk_size` positions exist at a time: memory is chunk_size x V instead of B x T x V. Each chunk's
    are computed again for its gradient, since going forward nobody knows whether one will be asked for. Products have
    the type of the weight, sums are float32.
    """
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    log_probs_M = _head_log_probs(chunk_size, head.transform)(hidden_MD, head.weight_VD, labels_BT.reshape(-1))
    return log_probs_M.reshape(labels_BT.shape)


def _head_log_probs(chunk_size: int, transform: LogitTransform) -> Any:
    @mx.custom_function
    def log_probs(hidden_MD: mx.array, weight_VD: mx.array, labels_M: mx.array) -> mx.array:
        pieces_R: list[mx.array] = []
        for start in range(0, hidden_MD.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            # MLX orders a graph as it likes: made to wait for the chunk before, no two chunks' logits exist at once.
            (hidden_RD,) = mx.depends([hidden_MD[rows]], pieces_R[-1:]) if pieces_R else (hidden_MD[rows],)
            logits_RV = transform((hidden_RD.astype(weight_VD.dtype) @ weight_VD.T).astype(mx.float32))
            scored_R, targets_R1 = labels_M[rows] != IGNORE_INDEX, mx.maximum(labels_M[rows], 0)[:, None]
            chosen_R = mx.take_along_axis(logits_RV, targets_R1, axis=-1)[:, 0]
            pieces_R.append(mx.where(scored_R, chosen_R - mx.logsumexp(logits_RV, axis=-1), 0.0))
        return mx.concatenate(pieces_R)

    @log_probs.vjp
    def gradients(
        primals: tuple[mx.array, ...], cotangent_M: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Returns the gradients of a chunk; that of its logits is one-hot - softmax, and 0 where nothing is scored."""
        hidden_MD, weight_VD, labels_M = primals
        pieces_RD, grad_VD = [], mx.zeros(weight_VD.shape)
        before = [cotangent_M]  # also keeps a compiler from taking these logits for those of the forward pass
        for start in range(0, hidden_MD.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            (hidden_RD,) = mx.depends([hidden_MD[rows].astype(weight_VD.dtype)], before)
            labels_R1 = labels_M[rows, None]
            logits_RV = transform((hidden_RD @ weight_VD.T).astype(mx.float32))
            softmax_RV = mx.softmax(logits_RV, axis=-1)
            one_hot_RV = labels_R1 == mx.arange(weight_VD.shape[0])
            slopes_RV = mx.where(labels_R1 == IGNORE_INDEX, 0.0, (one_hot_RV - softmax_RV) * cotangent_M[rows, None])
            slopes_RV = (slopes_RV * transform.slope(logits_RV)).astype(weight_VD.dtype)
            pieces_RD.append((slopes_RV @ weight_VD).astype(hidden_MD.dtype))
            grad_VD = grad_VD + slopes_RV.T @ hidden_RD
            before = [pieces_RD[-1], grad_VD]
        return mx.concatenate(pieces_RD), grad_VD.astype(weight_VD.dtype), mx.zeros_like(labels_M)

    return log_probs

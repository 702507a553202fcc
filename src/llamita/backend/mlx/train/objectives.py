"""The objectives of training as functions of a model's hidden states: each a loss summed over the targets of a batch.

The meaning of each, and the contents that its batch must have, stand in backend/objectives.py. Knows no optimiser.

Letters beyond the usual: M scored positions; for distillation S the scored positions of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.model.head import OutputHead
from llamita.backend.mlx.train.losses import chunked_cross_entropy, chunked_log_probs
from llamita.backend.objectives import Classification, Distillation, NextToken, Objective, PolicyGradient, Preference
from llamita.data.batches import IGNORE_INDEX

Hidden = Callable[..., mx.array]


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` in arrays of MLX."""

    tokens_BT: mx.array
    labels_BT: mx.array
    segments_BT: mx.array | None
    extras: Mapping[str, mx.array] = field(default_factory=dict)


class LossOutput(NamedTuple):
    """A loss summed over targets, a float32 scalar in nats, and sums over targets of the other metrics."""

    nats: mx.array
    measures: Mapping[str, mx.array]


LossFunction = Callable[[Hidden, OutputHead, TensorBatch], LossOutput]
"""(hidden, head, batch) -> sums. `hidden` is `Llama.hidden`, with dropout where the model has it. Loss and
gradient may be compiled as one, so a loss depends on these alone, and asks for no values while it is computed."""


def loss_function(objective: Objective, key: mx.array | None) -> LossFunction:
    """Returns the function that computes an objective; its own dropout is drawn from `key` (None: no training)."""
    if isinstance(objective, NextToken):
        return next_token_loss
    if isinstance(objective, Classification):
        return partial(classification_loss, objective, key)
    if isinstance(objective, Preference):
        return partial(preference_loss, objective)
    if isinstance(objective, Distillation):
        return partial(distillation_loss, objective, key is not None)
    return partial(policy_loss, objective)


def next_token_loss(hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns -log p of every label that is scored, in nats."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return LossOutput(chunked_cross_entropy(hidden_BTD, head, batch.labels_BT), {})


def classification_loss(
    objective: Classification,
    key: mx.array | None,
    hidden: Hidden,
    head: OutputHead,
    batch: TensorBatch,
) -> LossOutput:
    """Returns -log p of each text's label, V being the number of labels, and counts the labels that are likeliest.

    Labels are few, so logits are computed at every position, scored or not: shapes do not depend on values.
    """
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT).astype(head.weight_VD.dtype)
    if key is not None and objective.dropout:
        hidden_BTD = Dropout(objective.dropout, key)(hidden_BTD)
    logits_BTV = head.logits(hidden_BTD)
    scored_BT, labels_BT = batch.labels_BT != IGNORE_INDEX, mx.maximum(batch.labels_BT, 0)
    chosen_BT = mx.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    nats_BT = mx.logsumexp(logits_BTV, axis=-1) - chosen_BT
    if objective.class_weights:
        nats_BT = nats_BT * mx.array(objective.class_weights)[labels_BT]
    right_BT = scored_BT & (mx.argmax(logits_BTV, axis=-1) == labels_BT)
    return LossOutput(mx.sum(mx.where(scored_BT, nats_BT, 0.0)), {"accuracy": mx.sum(right_BT.astype(mx.float32))})


def log_probs(hidden: Hidden, head: OutputHead, batch: TensorBatch) -> mx.array:
    """Returns the log-probability of every label that is scored, float32 (B, T); 0 elsewhere."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return chunked_log_probs(hidden_BTD, head, batch.labels_BT)


def distributions(hidden: Hidden, head: OutputHead, batch: TensorBatch, temperature: float) -> mx.array:
    """Returns the log-probability of every token at each position whose label is scored, float32 (M, V)."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    rows_M = mx.array(np.flatnonzero(np.array(batch.labels_BT) != IGNORE_INDEX))
    states_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[rows_M]
    logits_MV = head.logits(states_MD) / temperature
    return logits_MV - mx.logsumexp(logits_MV, axis=-1, keepdims=True)


def distillation_loss(
    objective: Distillation, training: bool, hidden: Hidden, head: OutputHead, batch: TensorBatch
) -> LossOutput:
    """Returns -log p of every label that is scored, mixed in `training` with the divergence from the teacher."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    teacher_BSV, length = batch.extras["teacher_log_probs_BSV"], batch.labels_BT.shape[1]
    # Scored places first, each in its order; as many of them as the teacher has, whichever they are.
    order_BT = mx.argsort(mx.arange(length) + length * (batch.labels_BT == IGNORE_INDEX), axis=-1)
    order_BS = order_BT[:, : teacher_BSV.shape[1]]
    labels_BS = mx.take_along_axis(batch.labels_BT, order_BS, axis=1)
    states_BSD = mx.take_along_axis(hidden_BTD, order_BS[..., None], axis=1)
    logits_BSV = head.logits(states_BSD)
    log_probs_BSV = logits_BSV - mx.logsumexp(logits_BSV, axis=-1, keepdims=True)
    chosen_BS = mx.take_along_axis(log_probs_BSV, mx.maximum(labels_BS, 0)[..., None], axis=-1)[..., 0]
    weight, temperature = objective.teacher_weight, objective.teacher_temperature
    softened_BSV = logits_BSV / temperature
    softened_BSV = softened_BSV - mx.logsumexp(softened_BSV, axis=-1, keepdims=True)
    divergence_BS = mx.sum(mx.exp(teacher_BSV) * (teacher_BSV - softened_BSV), axis=-1)
    scored_BS = labels_BS != IGNORE_INDEX
    cross_entropy = -mx.sum(mx.where(scored_BS, chosen_BS, 0.0))
    divergence = mx.sum(mx.where(scored_BS, divergence_BS, 0.0))
    mixed = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
    measures = {"cross_entropy": cross_entropy, "teacher_kl": divergence}
    return LossOutput(mixed if training else cross_entropy, measures)


def preference_loss(objective: Preference, hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns a loss that falls as chosen answers gain on rejected ones since the reference; both are in one pass."""
    labels_BT = mx.concatenate([batch.labels_BT, batch.extras["rejected_labels_BT"]])
    tokens_BT = mx.concatenate([batch.tokens_BT, batch.extras["rejected_tokens_BT"]])
    log_probs_B = mx.sum(log_probs(hidden, head, TensorBatch(tokens_BT, labels_BT, None)), axis=-1)
    if objective.normalize_lengths:
        log_probs_B = log_probs_B / mx.sum(labels_BT != IGNORE_INDEX, axis=-1)
    chosen_B, rejected_B = log_probs_B.reshape(2, -1) - batch.extras["reference_B2"].T
    margin_B, beta = chosen_B - rejected_B, objective.beta
    if objective.form == "ipo":
        nats_B = mx.square(margin_B - 1 / (2 * beta))
    else:  # -log sigmoid(x) = log(1 + exp(-x))
        share = objective.label_smoothing
        nats_B = (1 - share) * mx.logaddexp(0.0, -beta * margin_B) + share * mx.logaddexp(0.0, beta * margin_B)
    measures = {
        "accuracy": mx.sum((margin_B > 0).astype(mx.float32)),
        "margin": beta * mx.sum(margin_B),
        "chosen_reward": beta * mx.sum(chosen_B),
        "rejected_reward": beta * mx.sum(rejected_B),
    }
    return LossOutput(mx.sum(nats_B), measures)


def policy_loss(objective: PolicyGradient, hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns minus the clipped advantage of each token, plus the weighted divergence from the reference, if any.

    Its estimate for a token is r - 1 - log r, r being reference / model (k3 of Schulman 2020, "Approximating KL
    divergence"): never negative, and right in the mean over what the model samples.
    """
    log_probs_BT = log_probs(hidden, head, batch)
    scored_BT, advantages_B1 = batch.labels_BT != IGNORE_INDEX, batch.extras["advantages_B"][:, None]
    ratio_BT = mx.exp(log_probs_BT - batch.extras["old_log_probs_BT"])
    limited_BT = mx.clip(ratio_BT, 1 - objective.clip, 1 + objective.clip)
    gain_BT, limited_gain_BT = ratio_BT * advantages_B1, limited_BT * advantages_B1
    nats_BT = -mx.minimum(gain_BT, limited_gain_BT)
    measures_BT = {"clipped": (limited_gain_BT < gain_BT).astype(mx.float32), "ratio": ratio_BT}
    if objective.kl_weight:
        log_r_BT = batch.extras["reference_log_probs_BT"] - log_probs_BT
        kl_BT = mx.exp(log_r_BT) - 1 - log_r_BT
        nats_BT = nats_BT + objective.kl_weight * kl_BT
        measures_BT["kl"] = kl_BT
    weights_BT = scored_BT.astype(mx.float32)
    if objective.normalization == "answer":
        weights_BT = weights_BT / mx.maximum(mx.sum(weights_BT, axis=-1, keepdims=True), 1)
    measures = {name: mx.sum(value_BT * weights_BT) for name, value_BT in measures_BT.items()}
    return LossOutput(mx.sum(nats_BT * weights_BT), measures)

"""The objectives of training as functions of a model's hidden states: each a loss summed over the targets of a batch.

The meaning of each, and the contents that its batch must have, stand in backend/objectives.py. Knows no optimiser.

Letters beyond the usual: M scored positions; for distillation S the scored positions of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.objectives import Classification, Distillation, NextToken, Objective, PolicyGradient, Preference
from llamita.backend.torch.model.dropout import drop
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.train.losses import chunked_cross_entropy, chunked_log_probs
from llamita.data.batches import IGNORE_INDEX

Hidden = Callable[..., Tensor]


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` on the device of the model."""

    tokens_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class LossOutput(NamedTuple):
    """A loss summed over targets, a float32 scalar in nats, and sums over targets of the other metrics."""

    nats: Tensor
    measures: Mapping[str, Tensor]


LossFunction = Callable[[Hidden, OutputHead, TensorBatch], LossOutput]
"""(hidden, head, batch) -> sums. `hidden` is `Llama.hidden`, compiled where that was asked for."""


def loss_function(objective: Objective, training: bool) -> LossFunction:
    """Returns the function that computes an objective; dropout of its own is drawn only while `training`."""
    if isinstance(objective, NextToken):
        return next_token_loss
    if isinstance(objective, Classification):
        return partial(classification_loss, objective, training)
    if isinstance(objective, Preference):
        return partial(preference_loss, objective)
    if isinstance(objective, Distillation):
        return partial(distillation_loss, objective, training)
    return partial(policy_loss, objective)


def next_token_loss(hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns -log p of every label that is scored, in nats."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return LossOutput(chunked_cross_entropy(hidden_BTD, head, batch.labels_BT), {})


def classification_loss(
    objective: Classification, training: bool, hidden: Hidden, head: OutputHead, batch: TensorBatch
) -> LossOutput:
    """Returns -log p of each text's label, V being the number of labels, and counts the labels that are likeliest."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    scored_BT = batch.labels_BT != IGNORE_INDEX
    labels_M = batch.labels_BT[scored_BT]
    states_MD = hidden_BTD[scored_BT]
    states_MD = drop(states_MD, objective.dropout) if objective.dropout and training else states_MD
    logits_MV = head.logits(states_MD).float()
    nats_M = -logits_MV.log_softmax(-1).gather(-1, labels_M[:, None])[:, 0]
    if objective.class_weights:
        nats_M = nats_M * torch.tensor(objective.class_weights, device=nats_M.device)[labels_M]
    return LossOutput(nats_M.sum(), {"accuracy": (logits_MV.argmax(-1) == labels_M).float().sum()})


def log_probs(hidden: Hidden, head: OutputHead, batch: TensorBatch) -> Tensor:
    """Returns the log-probability of every label that is scored, float32 (B, T); 0 elsewhere."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return chunked_log_probs(hidden_BTD, head, batch.labels_BT)


def distributions(hidden: Hidden, head: OutputHead, batch: TensorBatch, temperature: float) -> Tensor:
    """Returns the log-probability of every token at each position whose label is scored, float32 (M, V)."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    states_MD = hidden_BTD[batch.labels_BT != IGNORE_INDEX]
    return (head.logits(states_MD).float() / temperature).log_softmax(-1)


def distillation_loss(
    objective: Distillation, training: bool, hidden: Hidden, head: OutputHead, batch: TensorBatch
) -> LossOutput:
    """Returns -log p of every label that is scored, mixed in `training` with the divergence from the teacher."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    scored_BT, teacher_BSV = batch.labels_BT != IGNORE_INDEX, batch.extras["teacher_log_probs_BSV"]
    places_S = torch.arange(teacher_BSV.shape[1], device=scored_BT.device)
    teacher_MV = teacher_BSV[places_S < scored_BT.sum(-1, keepdim=True)]
    logits_MV = head.logits(hidden_BTD[scored_BT]).float()
    log_probs_MV = logits_MV.log_softmax(-1)
    cross_entropy = -log_probs_MV.gather(-1, batch.labels_BT[scored_BT][:, None]).sum()
    weight, temperature = objective.teacher_weight, objective.teacher_temperature
    softened_MV = log_probs_MV if temperature == 1 else (logits_MV / temperature).log_softmax(-1)
    divergence = (teacher_MV.exp() * (teacher_MV - softened_MV)).sum()
    mixed = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
    measures = {"cross_entropy": cross_entropy.detach(), "teacher_kl": divergence.detach()}
    return LossOutput(mixed if training else cross_entropy, measures)


def preference_loss(objective: Preference, hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns a loss that falls as chosen answers gain on rejected ones since the reference; both are in one pass."""
    labels_BT = torch.cat([batch.labels_BT, batch.extras["rejected_labels_BT"]])
    tokens_BT = torch.cat([batch.tokens_BT, batch.extras["rejected_tokens_BT"]])
    log_probs_B = log_probs(hidden, head, TensorBatch(tokens_BT, labels_BT, None)).sum(-1)
    if objective.normalize_lengths:
        log_probs_B = log_probs_B / (labels_BT != IGNORE_INDEX).sum(-1)
    chosen_B, rejected_B = log_probs_B.view(2, -1) - batch.extras["reference_B2"].T
    margin_B, beta = chosen_B - rejected_B, objective.beta
    if objective.form == "ipo":
        nats_B = (margin_B - 1 / (2 * beta)).square()
    else:
        share = objective.label_smoothing
        nats_B = -(1 - share) * F.logsigmoid(beta * margin_B) - share * F.logsigmoid(-beta * margin_B)
    measures = {
        "accuracy": (margin_B > 0).float().sum(),
        "margin": beta * margin_B.detach().sum(),
        "chosen_reward": beta * chosen_B.detach().sum(),
        "rejected_reward": beta * rejected_B.detach().sum(),
    }
    return LossOutput(nats_B.sum(), measures)


def policy_loss(objective: PolicyGradient, hidden: Hidden, head: OutputHead, batch: TensorBatch) -> LossOutput:
    """Returns minus the clipped advantage of each token, plus the weighted divergence from the reference, if any.

    Its estimate for a token is r - 1 - log r, r being reference / model (k3 of Schulman 2020, "Approximating KL
    divergence"): never negative, and right in the mean over what the model samples.
    """
    log_probs_BT = log_probs(hidden, head, batch)
    scored_BT, advantages_B1 = batch.labels_BT != IGNORE_INDEX, batch.extras["advantages_B"][:, None]
    ratio_BT = (log_probs_BT - batch.extras["old_log_probs_BT"]).exp()
    limited_BT = ratio_BT.clamp(1 - objective.clip, 1 + objective.clip)
    gain_BT, limited_gain_BT = ratio_BT * advantages_B1, limited_BT * advantages_B1
    nats_BT = -torch.minimum(gain_BT, limited_gain_BT)
    measures_BT = {"clipped": (limited_gain_BT < gain_BT).float(), "ratio": ratio_BT.detach()}
    if objective.kl_weight:
        log_r_BT = batch.extras["reference_log_probs_BT"] - log_probs_BT
        kl_BT = log_r_BT.exp() - 1 - log_r_BT
        nats_BT = nats_BT + objective.kl_weight * kl_BT
        measures_BT["kl"] = kl_BT.detach()
    weights_BT = scored_BT.float()
    if objective.normalization == "answer":
        weights_BT = weights_BT / weights_BT.sum(-1, keepdim=True).clamp(min=1)
    measures = {name: (value_BT * weights_BT).sum() for name, value_BT in measures_BT.items()}
    return LossOutput((nats_BT * weights_BT).sum(), measures)

"""The objectives of training as functions of a model's hidden states: each a loss summed over the targets of a batch.

What an objective means, and what a batch must hold for it, stands in llamita/objective.py. Knows nothing of optimisers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.objective import Classification, NextToken, Objective
from llamita.torch_backend.losses import IGNORED, chunked_cross_entropy

Hidden = Callable[..., Tensor]


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` on the device of the model."""

    tokens_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class LossOutput(NamedTuple):
    """A loss summed over targets, a float32 scalar in nats, and sums over targets of what else was measured."""

    nats: Tensor
    measures: Mapping[str, Tensor]


LossFunction = Callable[[Hidden, Tensor, TensorBatch], LossOutput]
"""(hidden, output_weight_VD, batch) -> sums. `hidden` is `Llama.hidden`, compiled where that was asked for."""


def loss_function(objective: Objective, training: bool) -> LossFunction:
    """How an objective is computed; dropout of its own is drawn only while `training`."""
    if isinstance(objective, NextToken):
        return next_token_loss
    if isinstance(objective, Classification):
        return partial(classification_loss, objective, training)
    raise NotImplementedError(f"{type(objective).__name__} has no loss here")


def next_token_loss(hidden: Hidden, output_weight_VD: Tensor, batch: TensorBatch) -> LossOutput:
    """-log p of every label that is scored, in nats."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return LossOutput(chunked_cross_entropy(hidden_BTD, output_weight_VD, batch.labels_BT), {})


def classification_loss(
    objective: Classification, training: bool, hidden: Hidden, output_weight_VD: Tensor, batch: TensorBatch
) -> LossOutput:
    """-log p of each text's label, V being the number of labels; and how many labels are the likeliest."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    scored_BT = batch.labels_BT != IGNORED
    labels_M = batch.labels_BT[scored_BT]
    states_MD = F.dropout(hidden_BTD[scored_BT], objective.dropout, training)
    logits_MV = F.linear(states_MD, output_weight_VD).float()
    nats_M = -logits_MV.log_softmax(-1).gather(-1, labels_M[:, None])[:, 0]
    if objective.class_weights:
        nats_M = nats_M * torch.tensor(objective.class_weights, device=nats_M.device)[labels_M]
    return LossOutput(nats_M.sum(), {"accuracy": (logits_MV.argmax(-1) == labels_M).float().sum()})

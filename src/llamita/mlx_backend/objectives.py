"""The objectives of training as functions of a model's hidden states: each a loss summed over the targets of a batch.

What an objective means, and what a batch must hold for it, stands in llamita/objective.py. Knows nothing of optimisers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from llamita.mlx_backend.attention import Dropout
from llamita.mlx_backend.losses import IGNORED, chunked_cross_entropy
from llamita.objective import Classification, NextToken, Objective

Hidden = Callable[..., mx.array]


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` in arrays of MLX."""

    tokens_BT: mx.array
    labels_BT: mx.array
    segments_BT: mx.array | None
    extras: Mapping[str, mx.array] = field(default_factory=dict)


class LossOutput(NamedTuple):
    """A loss summed over targets, a float32 scalar in nats, and sums over targets of what else was measured."""

    nats: mx.array
    measures: Mapping[str, mx.array]


LossFunction = Callable[[Hidden, mx.array, TensorBatch], LossOutput]
"""(hidden, output_weight_VD, batch) -> sums. `hidden` is `Llama.hidden`, with dropout where the model has it. Loss and
gradient may be compiled as one, so a loss depends on these alone, and asks for no values while it is computed."""


def loss_function(objective: Objective, key: mx.array | None) -> LossFunction:
    """How an objective is computed; dropout of its own is drawn from `key`, None where nothing is trained."""
    if isinstance(objective, NextToken):
        return next_token_loss
    if isinstance(objective, Classification):
        return partial(classification_loss, objective, key)
    raise NotImplementedError(f"{type(objective).__name__} has no loss here")


def next_token_loss(hidden: Hidden, output_weight_VD: mx.array, batch: TensorBatch) -> LossOutput:
    """-log p of every label that is scored, in nats."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return LossOutput(chunked_cross_entropy(hidden_BTD, output_weight_VD, batch.labels_BT), {})


def classification_loss(
    objective: Classification,
    key: mx.array | None,
    hidden: Hidden,
    output_weight_VD: mx.array,
    batch: TensorBatch,
) -> LossOutput:
    """-log p of each text's label, V being the number of labels; and how many labels are the likeliest.

    Labels are few, so logits are computed at every position, scored or not: shapes do not depend on values.
    """
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT).astype(output_weight_VD.dtype)
    if key is not None and objective.dropout:
        hidden_BTD = Dropout(objective.dropout, key)(hidden_BTD)
    logits_BTV = (hidden_BTD @ output_weight_VD.T).astype(mx.float32)
    scored_BT, labels_BT = batch.labels_BT != IGNORED, mx.maximum(batch.labels_BT, 0)
    chosen_BT = mx.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    nats_BT = mx.logsumexp(logits_BTV, axis=-1) - chosen_BT
    if objective.class_weights:
        nats_BT = nats_BT * mx.array(objective.class_weights)[labels_BT]
    right_BT = scored_BT & (mx.argmax(logits_BTV, axis=-1) == labels_BT)
    return LossOutput(mx.sum(mx.where(scored_BT, nats_BT, 0.0)), {"accuracy": mx.sum(right_BT.astype(mx.float32))})

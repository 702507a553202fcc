"""One step of training, from several batches whose gradients are added up.

A batch may be more than fits into memory at once. So it comes in parts; the step is to be the same as with the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from adamw import AdamW
from clipping import clipped
from framework import value_and_gradients
from loss import IGNORE_INDEX
from schedule import learning_rate

Parameters = dict[str, mx.array]
SummedLoss = Callable[[Parameters, Any], mx.array]
"""Of parameters and a batch: the sum of the losses of the batch's scored positions, a scalar."""


@dataclass(frozen=True)
class Settings:
    """How a run is trained."""

    steps: int
    peak: float
    """The greatest learning rate."""
    minimum: float
    """The last learning rate."""
    warmup_steps: int
    clip: float = 1.0
    """The greatest global norm of the gradients."""


def mean_gradients(
    summed_loss: SummedLoss, parameters: Parameters, batches: Sequence[Any]
) -> tuple[mx.array, Parameters]:
    """Returns (loss, gradients) of the mean over all scored positions of all batches.

    Each batch has `batch.labels`, integers of any shape, IGNORE_INDEX where nothing is scored. Batches may have
    different numbers of scored labels: each label counts the same, whichever batch it is in. At least one is scored.
    `value_and_gradients(function, parameters)` gives the value of function(parameters) and its gradients by name.
    """
    # to do: add up the losses, the gradients and the numbers of scored labels; divide once, at the end.
    total, count, sums = 0.0, 0, dict.fromkeys(parameters, 0.0)
    for batch in batches:
        value, gradients = value_and_gradients(lambda given, batch=batch: summed_loss(given, batch), parameters)
        total = total + value
        count = count + (batch.labels != IGNORE_INDEX).sum()
        sums = {name: sums[name] + gradients[name] for name in parameters}
    return total / count, {name: gradient / count for name, gradient in sums.items()}
    # done


def train_step(
    summed_loss: SummedLoss,
    parameters: Parameters,
    optimizer: AdamW,
    batches: Sequence[Any],
    step: int,
    settings: Settings,
) -> tuple[Parameters, mx.array, mx.array]:
    """Returns (parameters, loss, norm) after update number `step`, which is 0 for the first.

    loss: the mean that `mean_gradients` gives. The gradients are clipped to settings.clip; norm is their global norm
    before. The learning rate is that of this step; optimizer.update(parameters, gradients, learning_rate) gives the
    new parameters.
    """
    # to do: gradients, clipping, learning rate, update.
    loss, gradients = mean_gradients(summed_loss, parameters, batches)
    gradients, norm = clipped(gradients, settings.clip)
    rate = learning_rate(step, settings.peak, settings.minimum, settings.warmup_steps, settings.steps)
    return optimizer.update(parameters, gradients, rate), loss, norm
    # done

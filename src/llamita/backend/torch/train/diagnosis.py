"""A look at an update in PyTorch that is not made: gradients by parameter, activations by layer, each row alone.

The backward passes are those of a step, without its compilation. What to make of the numbers is not known here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamita.backend.interface import Diagnosis, RowDiagnosis
from llamita.backend.objectives import Objective, without_dropout
from llamita.backend.torch.train.objectives import Hidden, LossOutput
from llamita.backend.torch.train.scorer import to_device
from llamita.backend.train_step import Activations, count_targets, rows_of
from llamita.data.batches import Batch

if TYPE_CHECKING:  # step.py gives its steps the method
    from llamita.backend.torch.train.step import TorchTrainStep


def diagnose(step: TorchTrainStep, micro_batches: Sequence[Batch]) -> Diagnosis:
    """Returns `TrainStep.diagnose` of a step, whose weights, moments and random numbers stay as they are."""
    targets = count_targets(micro_batches)
    activations = Activations()

    def trace(name: str, x_BTD: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(x_BTD.detach(), dtype=torch.float32))
        activations.add(name, norm * norm, x_BTD.numel())

    step.forget_gradients()
    with step.random_numbers_of_step():
        hidden = functools.partial(step.model.hidden, trace=trace)
        nats = [_backward(step, hidden, step.objective, batch, targets, training=True) for batch in micro_batches]
    norms = step.gradient_norms()
    rows = tuple(_row(step, row) for row in rows_of(micro_batches))
    return Diagnosis(sum(nats) / targets, _together(norms), norms, activations.root_mean_squares(), rows)


def _row(step: TorchTrainStep, row: Batch) -> RowDiagnosis:
    targets, row_id = row.num_targets, int(row.row_ids[0])
    if targets == 0:
        return RowDiagnosis(row_id, 0, None, None)
    step.forget_gradients()
    nats = _backward(step, step.model.hidden, without_dropout(step.objective), row, targets, training=False)
    norm = _together(step.gradient_norms())
    step.forget_gradients()
    return RowDiagnosis(row_id, targets, nats / targets, norm)


def _backward(
    step: TorchTrainStep, hidden: Hidden, objective: Objective, batch: Batch, targets: int, training: bool
) -> float:
    """Adds the gradients of a batch's part of the mean loss over `targets`, and returns its nats.

    The loss is that of training; dropout of the model and the adapter is drawn where `training` is true.
    """
    loss_function = step.loss_function(objective, training=True)

    def loss() -> LossOutput:
        with step.autocast():
            return loss_function(*step.output(hidden, training=training), to_device(batch, step.device))

    output = step.run(loss)
    (output.nats / targets).backward()
    return float(output.nats.detach())


def _together(norms: Mapping[str, float]) -> float:
    """Returns the norm of gradients laid end to end, from that of each."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))

"""A look at an update in MLX that is not made: gradients by parameter, activations by layer, each row alone.

The gradients are those of a step, without its compilation. What to make of the numbers is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from llamita.backend.interface import Diagnosis, RowDiagnosis
from llamita.backend.mlx.train.adamw import global_norm
from llamita.backend.mlx.train.scorer import arrays_of
from llamita.backend.train_step import Activations, count_targets, rows_of
from llamita.data.batches import Batch

if TYPE_CHECKING:  # step.py gives its steps the method
    from llamita.backend.mlx.train.step import MlxTrainStep


def diagnose(step: MlxTrainStep, micro_batches: Sequence[Batch]) -> Diagnosis:
    """Returns `TrainStep.diagnose` of a step, whose weights, moments and random numbers stay as they are."""
    targets = count_targets(micro_batches)
    activations, nats, total = Activations(), 0.0, list[mx.array]()
    with mx.stream(step.device):
        key = step.key_of_step()
        for batch in micro_batches:
            key, drawn = mx.random.split(key)
            loss, squares, gradients = _gradients(step, batch, targets, drawn)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
            nats += float(np.array(loss))
            for name, (square, size) in squares.items():
                activations.add(name, float(np.array(square)), size)
        norms = {
            name: float(np.array(global_norm([part])))
            for item, gradient in zip(step.optimizer.parameters, total, strict=True)
            for name, part in zip(item.parts, item.split(gradient), strict=True)
        }
        rows = tuple(_row(step, row) for row in rows_of(micro_batches))
    return Diagnosis(
        nats / targets, math.sqrt(sum(n * n for n in norms.values())), norms, activations.root_mean_squares(), rows
    )


def _row(step: MlxTrainStep, row: Batch) -> RowDiagnosis:
    targets, row_id = row.num_targets, int(row.row_ids[0])
    if targets == 0:
        return RowDiagnosis(row_id, 0, None, None)
    nats, _, gradients = _gradients(step, row, targets, None)
    return RowDiagnosis(row_id, targets, float(np.array(nats)) / targets, float(np.array(global_norm(gradients))))


def _gradients(
    step: MlxTrainStep, batch: Batch, targets: int, key: mx.array | None
) -> tuple[mx.array, Mapping[str, tuple[mx.array, int]], list[mx.array]]:
    """Returns a batch's nats, the summed squares and sizes of its activations, and the gradients of nats / targets.

    Dropout is drawn from `key`; without one, none is.
    """
    trained = step.optimizer.parameters
    sizes: dict[str, int] = {}

    def weighted(values: list[mx.array], arrays: Mapping[str, Any]) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        squares: dict[str, mx.array] = {}

        def trace(name: str, x_BTD: mx.array) -> None:
            squares[name], sizes[name] = mx.sum(mx.square(x_BTD.astype(mx.float32))), x_BTD.size

        for item, value in zip(trained, values, strict=True):
            item.replace(value)
        output = step.training_loss(arrays, key, trace)
        return output.nats / targets, output.nats, squares

    values = [item.parameter for item in trained]
    try:
        (_, nats, squares), gradients = mx.value_and_grad(weighted)(values, arrays_of(batch))
        mx.eval(nats, squares, gradients)
    finally:
        for item, value in zip(trained, values, strict=True):
            item.replace(value)
    return nats, {name: (square, sizes[name]) for name, square in squares.items()}, gradients

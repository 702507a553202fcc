"""A model in MLX that judges texts: the log-probabilities of labels, and of every token at a label's place.

A frozen one is a reference or a teacher; a training step is one too, over the weights as they are. Knows nothing of
optimisers.

Letters beyond the usual: M scored positions.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from llamita.backend.interface import Precision
from llamita.backend.mlx.devices import choose_device
from llamita.backend.mlx.model import lora, weights
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.head import OutputHead
from llamita.backend.mlx.model.llama import Linear, Llama
from llamita.backend.mlx.model.quantized import QuantizedLinear
from llamita.backend.mlx.train.objectives import Hidden, TensorBatch, distributions, log_probs
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray


class MlxScorer:
    """Scores with `model`; `precision` bf16 computes products in bfloat16, but over int8 and int4 weights."""

    def __init__(
        self, model: Llama, precision: Literal["bf16", "fp32"] = "fp32", device: mx.DeviceType = mx.cpu
    ) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.trained: list[FusedParameter] = []
        self.adapter: lora.ModelAdapter | None = None
        # A quantised weight is read where its twin keeps it, which an input of a compiled function may not be.
        self.frozen = [fused for fused in model.fused_parameters() if not isinstance(fused.owner, QuantizedLinear)]

    def log_probs(self, batch: Batch) -> np.ndarray:
        """Returns the log-probability of every label that is scored, float32 (B, T), 0 elsewhere; without dropout."""
        with mx.stream(self.device), self.parameters_kept() as parameters:
            hidden, head = self.output(self.model.hidden, self.take(*parameters), self.adapter)
            return np.array(log_probs(hidden, head, TensorBatch(**arrays_of(batch))))

    def distributions(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """Returns the log-probability of every token where a label is scored, float32 (M, V); without dropout."""
        with mx.stream(self.device), self.parameters_kept() as parameters:
            hidden, head = self.output(self.model.hidden, self.take(*parameters), self.adapter)
            return np.array(distributions(hidden, head, TensorBatch(**arrays_of(batch)), temperature))

    def output(self, hidden: Hidden, head: OutputHead, adapter: lora.ModelAdapter | None) -> tuple[Hidden, OutputHead]:
        """Returns hidden states and the output head, as losses take them."""
        if adapter is None:
            return hidden, head
        return adapter.output(functools.partial(hidden, adapters=adapter), head)

    def take(self, trained: Sequence[mx.array], frozen: Sequence[mx.array]) -> OutputHead:
        """Puts parameters into the model, in bf16 those of linear maps rounded; returns its output head, as rounded.

        The model holds what it was given last; `parameters_kept` gives it its own again.
        """
        for item, values in zip([*self.trained, *self.frozen], [*trained, *frozen], strict=True):
            low = self.precision == "bf16" and isinstance(item.owner, Linear | lora.Part)
            item.replace(values.astype(mx.bfloat16) if low else values)
        head = self.model.head
        return replace(head, weight_VD=head.weight_VD.astype(mx.bfloat16)) if self.precision == "bf16" else head

    @contextlib.contextmanager
    def parameters_kept(self) -> Iterator[tuple[list[mx.array], list[mx.array]]]:
        """Lends the model's parameters, trained and frozen; afterwards the model has them again."""
        items = [*self.trained, *self.frozen]
        parameters = [item.parameter for item in items]
        try:
            yield parameters[: len(self.trained)], parameters[len(self.trained) :]
        finally:
            for item, values in zip(items, parameters, strict=True):
                item.replace(values)


def build_scorer(
    config: ModelConfig,
    arrays: Mapping[str, HostArray],
    *,
    precision: Precision = "auto",
    device: str = "auto",
    threads: int = 0,
) -> MlxScorer:
    """Returns a frozen model of the values in `arrays`; the options are those of `build_train_step`."""
    where, chosen = choose(device, precision, threads)
    with mx.stream(where):
        return MlxScorer(weights.build_model(config, arrays), chosen, where)


def choose(device: str, precision: Precision, threads: int) -> tuple[mx.DeviceType, Literal["bf16", "fp32"]]:
    """Returns the device and the precision that are meant; "auto" is bf16 on a GPU and fp32 on a CPU."""
    where = choose_device(device)
    if threads:
        raise ValueError(f"threads={threads} cannot be set: MLX chooses its threads itself; leave it at 0")
    if precision == "auto":
        precision = "bf16" if where == mx.gpu else "fp32"
    return where, precision


def arrays_of(batch: Batch) -> dict[str, Any]:
    """Returns the fields of a `TensorBatch`, in types that `mx.compile` takes."""
    segments_BT = None if batch.segments_BT is None else mx.array(batch.segments_BT)
    extras = {name: mx.array(values) for name, values in batch.extras.items()}
    tokens_BT, labels_BT = mx.array(batch.tokens_BT), mx.array(batch.labels_BT)
    return {"tokens_BT": tokens_BT, "labels_BT": labels_BT, "segments_BT": segments_BT, "extras": extras}

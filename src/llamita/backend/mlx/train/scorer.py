"""A model in MLX that judges texts: the log-probabilities of labels, and of every token at a label's place.

A frozen one is a reference or a teacher; a training step is one too, over the weights as they are. Knows nothing of
optimisers.

Letters beyond the usual: M scored positions.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from llamita.backend.interface import Precision
from llamita.backend.mlx.devices import choose_device
from llamita.backend.mlx.model import lora, weights
from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.model.head import OutputHead
from llamita.backend.mlx.model.llama import Llama
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
        self.adapter: lora.ModelAdapter | None = None

    def log_probs(self, batch: Batch) -> np.ndarray:
        """Returns the log-probability of every label that is scored, float32 (B, T), 0 elsewhere; without dropout."""
        with mx.stream(self.device):
            return np.array(log_probs(*self.output(self.adapter), TensorBatch(**arrays_of(batch))))

    def distributions(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """Returns the log-probability of every token where a label is scored, float32 (M, V); without dropout."""
        with mx.stream(self.device):
            return np.array(distributions(*self.output(self.adapter), TensorBatch(**arrays_of(batch)), temperature))

    def output(
        self, adapter: lora.ModelAdapter | None, dropout: Dropout | None = None, **more: Any
    ) -> tuple[Hidden, OutputHead]:
        """Returns hidden states and the output head as losses take them; in bf16, weights are rounded where read.

        `more` goes to `Llama.hidden`.
        """
        head, dtype = self.model.head, None
        if self.precision == "bf16":
            dtype = mx.bfloat16
            head = replace(head, weight_VD=head.weight_VD.astype(dtype))
            adapter = adapter.astype(dtype) if adapter else None
        hidden = functools.partial(self.model.hidden, dropout=dropout, adapters=adapter, dtype=dtype, **more)
        return adapter.output(hidden, head) if adapter else (hidden, head)


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
    if precision == "fp8":
        raise ValueError("MLX has no fp8 products to train with; use --precision bf16, or --backend torch")
    if precision == "auto":
        precision = "bf16" if where == mx.gpu else "fp32"
    return where, precision


def arrays_of(batch: Batch) -> dict[str, Any]:
    """Returns the fields of a `TensorBatch`, in types that `mx.compile` takes."""
    segments_BT = None if batch.segments_BT is None else mx.array(batch.segments_BT)
    extras = {name: mx.array(values) for name, values in batch.extras.items()}
    tokens_BT, labels_BT = mx.array(batch.tokens_BT), mx.array(batch.labels_BT)
    return {"tokens_BT": tokens_BT, "labels_BT": labels_BT, "segments_BT": segments_BT, "extras": extras}

"""One update of a model in MLX: gradients over micro-batches, clipping, AdamW; and the loss of a batch.

The loop, the schedule, the data's order and all files are the trainer's. Nothing random outlives a step: the numbers
that dropout draws are a function of (seed, number of the step), so a resumed run draws what the whole run drew.
"""

import contextlib
import functools
import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from llamita.architecture import InitializationName
from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.data.batches import Batch
from llamita.mlx_backend import weights
from llamita.mlx_backend.adamw import AdamW, AdamWSettings, clipping_scale, global_norm
from llamita.mlx_backend.attention import Dropout
from llamita.mlx_backend.losses import chunked_cross_entropy
from llamita.mlx_backend.model import Linear, Llama
from llamita.mlx_backend.runner import MlxRunner, choose_device
from llamita.optimization import StepMetrics as StepMetrics

Precision = Literal["auto", "bf16", "fp32"]
Hidden = Callable[..., mx.array]


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` in arrays of MLX."""

    tokens_BT: mx.array
    labels_BT: mx.array
    segments_BT: mx.array | None


LossFunction = Callable[[Hidden, mx.array, TensorBatch], mx.array]
"""(hidden, output_weight_VD, batch) -> the loss summed over the batch's targets, a float32 scalar in nats. `hidden` is
`Llama.hidden`, with dropout where the model has it. Loss and gradient are compiled as one, so a loss is a function of
these alone, and asks for no values while it is computed."""


def next_token_loss(hidden: Hidden, output_weight_VD: mx.array, batch: TensorBatch) -> mx.array:
    """-log p of every label that is scored, in nats: pre-training and instruction tuning."""
    hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    return chunked_cross_entropy(hidden_BTD, output_weight_VD, batch.labels_BT)


class MlxTrainStep:
    """A model with its optimiser. `precision` bf16 computes products in bfloat16 from float32 weights."""

    def __init__(
        self,
        model: Llama,
        settings: AdamWSettings | None = None,
        *,
        loss: LossFunction = next_token_loss,
        max_grad_norm: float = 0.0,
        precision: Literal["bf16", "fp32"] = "fp32",
        seed: int = 0,
        compile: bool = False,
        device: mx.DeviceType = mx.cpu,
    ) -> None:
        if model.config.quantization:
            raise ValueError(
                f"the model is quantised ({model.config.quantization}) and cannot be trained; train the model that it "
                "was made from, then quantise that"
            )
        self.model = model
        self.optimizer = AdamW(model.packed_parameters(), settings)
        self.loss = loss
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        self.seed = seed
        self.compiled = compile
        self.device = device
        self._differentiated = self._loss_and_gradients()

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepMetrics:
        """One update from the mean loss over all targets of `micro_batches`, however these divide them."""
        targets = sum(batch.num_targets for batch in micro_batches)
        if targets == 0:
            rows = [int(row) for batch in micro_batches for row in batch.row_ids]
            raise ValueError(f"rows {rows} have no target to learn from; use longer documents or mode=pack")
        with mx.stream(self.device):
            losses, gradients = self._accumulated(micro_batches, targets)
            *sums, grad_norm = np.array(mx.stack([*losses, global_norm(gradients)])).tolist()  # here it waits
        faulty = tuple(i for i, nats in enumerate(sums) if not math.isfinite(nats))
        if not faulty and math.isfinite(grad_norm):
            with mx.stream(self.device):
                self.optimizer.step(gradients, learning_rate, clipping_scale(grad_norm, self.max_grad_norm))
        return StepMetrics(sum(sums) / targets, grad_norm, targets, faulty)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The loss summed over the batch's targets, in nats, and their number; without dropout."""
        with mx.stream(self.device), self._parameters_kept() as parameters:
            nats = self._loss(parameters, _arrays(batch))
            return float(np.array(nats)), batch.num_targets

    def weights(self) -> dict[str, HostArray]:
        """The float32 weights under canonical names."""
        return weights.to_host_arrays(self.model)

    def state(self) -> dict[str, HostArray]:
        """What the next update depends on besides the weights: AdamW's moments and the number of updates made."""
        return self.optimizer.state()

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        """Go on from what weights() and state() gave; ValueError lists what is missing or misshapen."""
        weights.load_host_arrays(self.model, arrays)
        self.optimizer.load_state(state)

    def runner(self) -> MlxRunner:
        """Generates with the weights as they are now."""
        return MlxRunner(self.model, self.device)

    def conditions(self) -> dict[str, Any]:
        """What the last bits of the result depend on besides the configuration and the data."""
        return {
            "mlx": version("mlx"),
            "device": self.device.name,
            "precision": self.precision,
            "compile": self.compiled,
        }

    def memory_bytes(self) -> int:
        """The most memory held so far: by arrays of MLX on a GPU, by this process where that is the CPU."""
        if self.device == mx.gpu:
            return mx.get_peak_memory()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def peak_flops(self, seconds: float = 0.3) -> float:
        """Floating-point operations per second of a large product in this precision: the best of at least 5, and of as
        many more as `seconds` allow."""
        size = 4096 if self.device == mx.gpu else 512
        dtype = mx.bfloat16 if self.precision == "bf16" else mx.float32
        with mx.stream(self.device):
            a, b = (mx.random.normal((size, size), key=mx.random.key(i)).astype(dtype) for i in range(2))
            mx.eval(a, b)
            best, products, end = math.inf, 0, time.perf_counter() + seconds
            while products < 5 or time.perf_counter() < end:  # one alone may meet a pause of the machine
                started = time.perf_counter()
                mx.eval(a @ b)
                best = min(best, time.perf_counter() - started)
                products += 1
        return 2 * size**3 / best

    def _accumulated(self, micro_batches: Sequence[Batch], targets: int) -> tuple[list[mx.array], list[mx.array]]:
        """Each micro-batch's summed loss, and the gradients of the mean over all targets; begun, not waited for."""
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        with self._parameters_kept() as parameters:
            share, key, drawn = mx.array(1 / targets, dtype=mx.float32), self._key_of_step(), None
            for batch in micro_batches:
                if key is not None:
                    key, drawn = mx.random.split(key)
                (_, nats), found = self._differentiated(parameters, _arrays(batch), share, drawn)
                gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
                losses.append(nats)
                mx.async_eval(nats, gradients)  # begun now, so that what a micro-batch holds is soon let go
        return losses, gradients

    def _loss(
        self, parameters: Sequence[mx.array], arrays: Mapping[str, mx.array], key: mx.array | None = None
    ) -> mx.array:
        """The loss as a function of the parameters, in the order of `optimizer.packed`, and of the batch's arrays.

        The model holds the parameters it was called with last; `_parameters_kept` gives it its own again.
        """
        for item, values in zip(self.optimizer.packed, parameters, strict=True):
            low = self.precision == "bf16" and isinstance(item.owner, Linear)
            item.replace(values.astype(mx.bfloat16) if low else values)
        output_weight_VD = self.model.output_weight_VD
        if self.precision == "bf16":
            output_weight_VD = output_weight_VD.astype(mx.bfloat16)
        hidden: Hidden = self.model.hidden
        if key is not None:
            hidden = functools.partial(hidden, dropout=Dropout(self.model.config.dropout, key))
        batch = TensorBatch(arrays["tokens_BT"], arrays["labels_BT"], arrays.get("segments_BT"))
        return self.loss(hidden, output_weight_VD, batch)

    def _loss_and_gradients(self) -> Callable[..., Any]:
        """(parameters, arrays, share, key) -> ((loss x share, loss), gradients of loss x share); perhaps compiled."""

        def weighted(
            parameters: list[mx.array], arrays: Mapping[str, mx.array], share: mx.array, key: mx.array | None
        ) -> tuple[mx.array, mx.array]:
            nats = self._loss(parameters, arrays, key)
            return nats * share, nats

        function = mx.value_and_grad(weighted)
        return mx.compile(function) if self.compiled else function

    @contextlib.contextmanager
    def _parameters_kept(self) -> Iterator[list[mx.array]]:
        """The model's parameters, in the order of `optimizer.packed`; afterwards it has them again."""
        parameters = [item.parameter for item in self.optimizer.packed]
        try:
            yield parameters
        finally:
            for item, values in zip(self.optimizer.packed, parameters, strict=True):
                item.replace(values)

    def _key_of_step(self) -> mx.array | None:
        """What dropout draws from: a function of (seed, step)."""
        if not self.model.config.dropout:
            return None
        digest = hashlib.sha256(f"{self.seed}/{self.optimizer.t}".encode()).digest()
        return mx.random.key(int.from_bytes(digest[:4], "little"))


def _arrays(batch: Batch) -> dict[str, mx.array]:
    """The fields of a `TensorBatch` that the batch has."""
    fields = {"tokens_BT": batch.tokens_BT, "labels_BT": batch.labels_BT, "segments_BT": batch.segments_BT}
    return {name: mx.array(values) for name, values in fields.items() if values is not None}


def build_train_step(
    config: ModelConfig,
    *,
    seed: int = 0,
    initialization: InitializationName = "fan-in",
    loss: LossFunction = next_token_loss,
    max_grad_norm: float = 0.0,
    precision: Precision = "auto",
    device: str = "auto",
    threads: int = 0,
    compile: bool | None = None,
    **settings: Any,
) -> MlxTrainStep:
    """A freshly initialised model and its optimiser; `settings` are the fields of AdamWSettings.

    device "auto" is the GPU where there is one, Metal's on a Mac; precision "auto" is bf16 there and fp32 on a CPU.
    `compile` None is true there too: a CPU's kernels take a C++ compiler half a minute at their first use, and updates
    were no faster then.
    """
    optimizer = AdamWSettings(**settings)
    where = choose_device(device)
    if threads > 0:
        raise ValueError(f"threads={threads} cannot be set: MLX chooses its threads itself; leave it at 0")
    if precision == "auto":
        precision = "bf16" if where == mx.gpu else "fp32"
    with mx.stream(where):
        model = weights.build_model(config, seed=seed, initialization=initialization)
        return MlxTrainStep(
            model,
            optimizer,
            loss=loss,
            max_grad_norm=max_grad_norm,
            precision=precision,
            seed=seed,
            compile=where == mx.gpu if compile is None else compile,
            device=where,
        )

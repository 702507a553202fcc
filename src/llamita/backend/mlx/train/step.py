"""One update of a model in MLX: gradients over micro-batches, clipping, the optimiser; and the loss of a batch.

The loop, the schedule, the data's order and all files are the trainer's. Nothing random outlives a step: the numbers
that dropout draws are a function of (seed, number of the step), so a resumed run draws what the whole run drew.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from llamita.backend.group import ALONE, Group, ParallelSettings
from llamita.backend.interface import AttentionName, Diagnosis, LossSums, Precision, Recompute, Saving, StepMetrics
from llamita.backend.mlx.infer.runner import MlxRunner
from llamita.backend.mlx.model import lora, weights
from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.model.llama import Llama, Trace
from llamita.backend.mlx.model.quantized import QuantizedLinear
from llamita.backend.mlx.train.adamw import AdamWSettings, clipping_scale, global_norm
from llamita.backend.mlx.train.diagnosis import diagnose
from llamita.backend.mlx.train.objectives import LossOutput, TensorBatch, loss_function
from llamita.backend.mlx.train.optimizer import make_optimizer
from llamita.backend.mlx.train.recomputation import run_again
from llamita.backend.mlx.train.scorer import MlxScorer, arrays_of, choose
from llamita.backend.muon import MuonSettings
from llamita.backend.objectives import NextToken, Objective, without_dropout
from llamita.backend.opening import OWN
from llamita.backend.train_step import (
    best_seconds,
    count_targets,
    process_memory_bytes,
    quantized_refusal,
    recomputed_layers,
    step_metrics,
    step_seed,
)
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from llamita.model.parameters import CLASSIFIER, InitializationName


class MlxTrainStep(MlxScorer):
    """A model with its optimiser. `precision` bf16 computes products in bfloat16, but over int8 and int4 weights."""

    group: Group = ALONE
    is_divided = False

    def __init__(
        self,
        model: Llama,
        settings: AdamWSettings | None = None,
        *,
        objective: Objective = NextToken(),  # noqa: B008 - it is frozen
        trainable: Callable[[str], bool] | None = None,
        adapter: LoraSettings | None = None,
        muon: MuonSettings | None = None,
        max_grad_norm: float = 0.0,
        precision: Literal["bf16", "fp32"] = "fp32",
        seed: int = 0,
        compile: bool = False,
        recompute: Recompute = "none",
        device: mx.DeviceType = mx.cpu,
    ) -> None:
        """Trains the parameters whose canonical name is `trainable`: left out, all, or with a fresh `adapter` over them
        a classifier's head alone. What is not trained has neither gradients nor moments."""
        super().__init__(model, precision, device)
        trainable = trainable or (lambda name: adapter is None or name == CLASSIFIER)
        trained = [fused for fused in model.fused_parameters() if all(map(trainable, fused.parts))]
        if any(not mx.issubdtype(fused.parameter.dtype, mx.floating) for fused in trained):
            raise quantized_refusal(model.config)
        self.adapter = lora.fresh_adapter(model, adapter, seed) if adapter else None
        self._adapter_dropout = adapter.dropout if adapter else 0.0
        trained += self.adapter.fused_parameters() if self.adapter else []
        if not trained:
            raise ValueError("no parameter of the model is to be trained")
        self.optimizer = make_optimizer(trained, settings, muon, precision, device)
        self.objective = objective
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.compiled = compile
        layers = recomputed_layers(model.config.num_hidden_layers, recompute)
        self._recomputation = {"run_block": dict.fromkeys(layers, run_again)} if layers else {}
        self._differentiated = self._loss_and_gradients()

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, loss_limit: float = math.inf) -> StepMetrics:
        """Makes one update from the mean loss over all targets of `micro_batches`, however these divide them.

        A loss above `loss_limit` makes none.
        """
        targets = count_targets(micro_batches)
        with mx.stream(self.device):
            outputs, gradients = self._accumulated(micro_batches, targets)
            flat = [value for output in outputs for value in (output.nats, *output.measures.values())]
            values = np.array(mx.stack([*flat, global_norm(gradients)])).tolist()  # the one place that waits
            metrics = step_metrics(values, list(outputs[0].measures), targets, loss_limit)
            if metrics.is_update:
                self.optimizer.step(gradients, learning_rate, clipping_scale(metrics.grad_norm, self.max_grad_norm))
        return metrics

    def diagnose(self, micro_batches: Sequence[Batch]) -> Diagnosis:
        """Returns a look at the update that `step` would make now, and at each row alone; changes nothing."""
        return diagnose(self, micro_batches)

    def evaluate(self, batch: Batch) -> LossSums:
        """Returns the loss and the metrics summed over the batch's targets; without dropout."""
        with mx.stream(self.device):
            output = self._loss(arrays_of(batch))
            mx.eval(output.nats, list(output.measures.values()))
            measures = {name: float(np.array(value)) for name, value in output.measures.items()}
            return LossSums(float(np.array(output.nats)), batch.num_targets, measures)

    def weights(self) -> dict[str, HostArray]:
        """Returns the float32 weights under canonical names; with an adapter, only what is trained."""
        if self.adapter is None:
            return weights.to_host_arrays(self.model)
        pieces = [zip(fused.parts, fused.split(fused.parameter), strict=True) for fused in self.optimizer.parameters]
        return {name: weights.host_from_array(piece) for pairs in pieces for name, piece in pairs}

    def state(self) -> dict[str, HostArray]:
        """Returns all that the next update depends on besides the weights: moments, and the number of updates made."""
        return self.optimizer.state()

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        """Goes on from what `weights()` and `state()` gave; ValueError lists what is missing or misshapen."""
        if self.adapter is None and not self.model.config.quantization:
            weights.load_host_arrays(self.model, arrays)
        else:
            weights.copy_host_arrays(self.optimizer.parameters, arrays)
        self.optimizer.load_state(state)

    def save_shards(self, directory: Path) -> Saving:
        raise AssertionError("one process writes whole arrays")

    def load_shards(self, directory: Path) -> None:
        self.load_state(*self.read_shards(directory))

    def read_shards(self, directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
        return read_shards(directory)

    def runner(self) -> MlxRunner:
        """Returns a runner over the weights as they are now."""
        if self.adapter is None:
            return MlxRunner(self.model, self.device)
        return MlxRunner(self.model, self.device, {OWN: self.adapter}, OWN)

    def conditions(self) -> dict[str, Any]:
        """Returns all that the last bits of a result depend on besides the configuration and the data."""
        return {
            "mlx": version("mlx"),
            "device": self.device.name,
            "precision": self.precision,
            "compile": self.compiled,
        }

    def memory_bytes(self) -> int:
        """Returns the most memory held so far: by arrays of MLX on a GPU, by this process where that is the CPU."""
        if self.device == mx.gpu:
            return mx.get_peak_memory()
        return process_memory_bytes()

    def peak_flops(self, seconds: float = 0.3) -> float:
        """Returns the operations a second of large products in this precision: the best of 5, or more in `seconds`."""
        size = 4096 if self.device == mx.gpu else 512
        dtype = mx.bfloat16 if self.precision == "bf16" else mx.float32
        with mx.stream(self.device):
            a, b = (mx.random.normal((size, size), key=mx.random.key(i)).astype(dtype) for i in range(2))
            mx.eval(a, b)
            return 2 * size**3 / best_seconds(lambda: mx.eval(a @ b), seconds)

    def _accumulated(self, micro_batches: Sequence[Batch], targets: int) -> tuple[list[LossOutput], list[mx.array]]:
        """Returns each micro-batch's loss, and the gradients of the mean over all targets; begun, not waited for."""
        outputs: list[LossOutput] = []
        gradients: list[mx.array] = []
        share, key = mx.array(1 / targets, dtype=mx.float32), self.key_of_step()
        for batch in micro_batches:
            key, drawn = mx.random.split(key)
            (_, nats, measures), found = self._differentiated(arrays_of(batch), share, drawn)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
            outputs.append(LossOutput(nats, measures))
            # Begun now, so that what a micro-batch holds is soon let go.
            mx.async_eval(nats, gradients, [item.parameter for item in self.optimizer.parameters])
        return outputs, gradients

    def _loss(self, arrays: Mapping[str, Any], key: mx.array | None = None, trace: Trace | None = None) -> LossOutput:
        """Returns the loss of a batch's arrays; with a key for dropout, in training."""
        adapter, dropout, own_key, more = self.adapter, None, None, {}
        if key is not None:
            key, own_key = mx.random.split(key)
            if adapter:
                key, drawn = mx.random.split(key)
                adapter = adapter.dropping(self._adapter_dropout, drawn)
            probability = self.model.config.dropout
            dropout = Dropout(probability, key) if probability else None
            more = self._recomputation
        hidden, head = self.output(adapter, dropout, **more)
        hidden = functools.partial(hidden, trace=trace) if trace else hidden
        return loss_function(self.objective, own_key)(hidden, head, TensorBatch(**arrays))

    def training_loss(self, arrays: Mapping[str, Any], key: mx.array | None, trace: Trace) -> LossOutput:
        """Returns the loss of a batch's arrays as in training, its residual stream shown to `trace`.

        Dropout is drawn from `key`; without one, none is.
        """
        if key is not None:
            return self._loss(arrays, key, trace)
        objective = without_dropout(self.objective)
        hidden, head = self.output(self.adapter)
        traced = functools.partial(hidden, trace=trace)
        return loss_function(objective, mx.random.key(0))(traced, head, TensorBatch(**arrays))

    def _loss_and_gradients(self) -> Callable[..., Any]:
        """Returns (arrays, share, key) -> ((loss x share, loss, measures), gradients of loss x share by the trained
        parameters); perhaps compiled."""
        trained = self.optimizer.parameters

        def weighted(
            values: list[mx.array], arrays: Mapping[str, Any], share: mx.array, key: mx.array
        ) -> tuple[mx.array, mx.array, Mapping[str, mx.array]]:
            for item, value in zip(trained, values, strict=True):
                item.replace(value)  # the same numbers, in the arrays that gradients are taken by
            output = self._loss(arrays, key)
            return output.nats * share, output.nats, output.measures

        differentiated = mx.value_and_grad(weighted)

        def loss_and_gradients(arrays: Mapping[str, Any], share: mx.array, key: mx.array) -> Any:
            return differentiated([item.parameter for item in trained], arrays, share, key)

        if not self.compiled:
            return loss_and_gradients
        # Quantised weights are constants: they never change, and are read from a form outside the tree of arrays.
        leaves = [module for module in self.model.modules() if not module.children()]
        state = [module for module in leaves if not isinstance(module, QuantizedLinear)]
        state += self.adapter.parts() if self.adapter else []
        return mx.compile(loss_and_gradients, inputs=state, outputs=state)

    def key_of_step(self) -> mx.array:
        """Returns the key that dropout draws from: a function of (seed, step)."""
        return mx.random.key(step_seed(self.seed, self.optimizer.t))


def build_train_step(
    config: ModelConfig,
    arrays: Mapping[str, HostArray] | None = None,
    *,
    seed: int = 0,
    initialization: InitializationName = "fan-in",
    objective: Objective = NextToken(),  # noqa: B008 - it is frozen
    trainable: Callable[[str], bool] | None = None,
    adapter: LoraSettings | None = None,
    optimizer: AdamWSettings | None = None,
    muon: MuonSettings | None = None,
    max_grad_norm: float = 0.0,
    precision: Precision = "auto",
    device: str = "auto",
    threads: int = 0,
    compile: bool | None = None,
    recompute: Recompute = "none",
    attention: AttentionName = "masked",
    parallel: ParallelSettings | None = None,
) -> MlxTrainStep:
    """Returns a model of the values in `arrays`, or a freshly initialised one, with its optimiser.

    device "auto" is the GPU where there is one, Metal's on a Mac; precision "auto" is bf16 there and fp32 on a CPU.
    `compile` None is true there too: a CPU's kernels take a C++ compiler half a minute at their first use, and updates
    were no faster then.
    """
    if parallel is not None:
        raise ValueError("MLX trains in one process here; use --backend torch to train in several")
    if attention != "masked":
        raise ValueError(f"--attention {attention} is PyTorch's; leave it out, or use --backend torch on a GPU")
    where, chosen = choose(device, precision, threads)
    with mx.stream(where):
        model = weights.build_model(config, arrays, seed=seed, initialization=initialization)
        return MlxTrainStep(
            model,
            optimizer,
            objective=objective,
            trainable=trainable,
            adapter=adapter,
            muon=muon,
            max_grad_norm=max_grad_norm,
            precision=chosen,
            seed=seed,
            compile=where == mx.gpu if compile is None else compile,
            recompute=recompute,
            device=where,
        )


def read_shards(directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
    """Raises ValueError: MLX has no reader for a checkpoint in parts."""
    raise ValueError(
        f"{directory.parent} was written in parts by several processes of PyTorch; make a model directory of it with: "
        f"llamita convert {directory.parent} DIR"
    )

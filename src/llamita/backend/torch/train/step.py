"""One update of a model in PyTorch: gradients over micro-batches, clipping, the optimiser; and the loss of a batch.

The loop, the schedule, the data's order and all files are the trainer's. Nothing random outlives a step: the numbers
that dropout draws are a function of (seed, number of the step), so a resumed run draws what the whole run drew.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamita.backend.group import ALONE, Group, ParallelSettings
from llamita.backend.interface import AttentionName, Diagnosis, LossSums, Precision, Recompute, Saving, StepMetrics
from llamita.backend.muon import MuonSettings
from llamita.backend.objectives import NextToken, Objective
from llamita.backend.opening import OWN
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import flex, lora, weights
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.train import fp8, objectives
from llamita.backend.torch.train.adamw import AdamWSettings, clipping_scale, global_norm
from llamita.backend.torch.train.diagnosis import diagnose
from llamita.backend.torch.train.objectives import Hidden, LossFunction, LossOutput, TensorBatch
from llamita.backend.torch.train.optimizer import Optimizer, make_optimizer
from llamita.backend.torch.train.scorer import ChosenPrecision, TorchScorer, choose, to_device
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

Result = TypeVar("Result")


class TorchTrainStep(TorchScorer):
    """A model with its optimiser, in one process.

    `precision` bf16 computes products in bfloat16 from float32 weights (autocast), and fp8 those with the blocks'
    matrices in 8-bit numbers (fp8.py).
    """

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
        precision: ChosenPrecision = "fp32",
        seed: int = 0,
        compile: bool = False,
        recompute: Recompute = "none",
        attention: AttentionName = "masked",
        make_optimizer: Callable[..., Optimizer] = make_optimizer,
    ) -> None:
        """Trains the parameters whose canonical name is `trainable`: left out, all, or with a fresh `adapter` over them
        a classifier's head alone. What is not trained has neither gradients nor moments."""
        super().__init__(model, precision)
        trainable = trainable or (lambda name: adapter is None or name == CLASSIFIER)
        trained = [fused for fused in model.fused_parameters() if all(map(trainable, fused.parts))]
        if any(not fused.parameter.is_floating_point() for fused in trained):
            raise quantized_refusal(model.config)
        if compile and model.config.quantization:
            raise ValueError("products with quantised weights are not compiled; leave --compile out")
        self.adapter = lora.fresh_adapter(model, adapter, seed) if adapter else None
        self._dropping = replace(self.adapter, dropout=adapter.dropout) if self.adapter and adapter else None
        trained += self.adapter.fused_parameters() if self.adapter else []
        if not trained:
            raise ValueError("no parameter of the model is to be trained")
        for fused in trained:
            fused.parameter.requires_grad_(True)
        self.optimizer = make_optimizer(trained, settings, muon, precision)
        self.objective = objective
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.compiled = compile
        self.attention = attention
        self.recomputed = recomputed_layers(model.config.num_hidden_layers, recompute)
        self.parameters = [fused.parameter for fused in trained]
        self._hidden: Hidden = torch.compile(model.hidden, dynamic=False) if compile else model.hidden

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, loss_limit: float = math.inf) -> StepMetrics:
        """Makes one update from the mean loss over all targets of `micro_batches`, however these divide them.

        A loss above `loss_limit` makes none.
        """
        targets = self._count_targets(micro_batches)
        self.forget_gradients()
        last = len(micro_batches) - 1
        with self.random_numbers_of_step():
            outputs = [self._add_gradients(batch, targets, i == last) for i, batch in enumerate(micro_batches)]
        sums = [value for output in outputs for value in (output.nats, *output.measures.values())]
        metrics = step_metrics(self._sums_and_norm(sums), list(outputs[0].measures), targets, loss_limit)
        if metrics.is_update:
            self.optimizer.step(learning_rate, clipping_scale(metrics.grad_norm, self.max_grad_norm))
        self.forget_gradients()
        return metrics

    def _count_targets(self, micro_batches: Sequence[Batch]) -> int:
        """Returns the targets of the whole update; ValueError where there is none."""
        return count_targets(micro_batches)

    def _add_gradients(self, batch: Batch, targets: int, last: bool) -> LossOutput:
        """Adds the gradients of a part of the update, of which it may be the `last`, and returns its sums."""
        output = self.loss(to_device(batch, self.device), training=True)
        (output.nats / targets).backward()
        return LossOutput(output.nats.detach(), output.measures)

    def _sums_and_norm(self, sums: Sequence[Tensor]) -> list[float]:
        """Returns the numbers that the device holds, and the norm of the gradient: the one wait for it."""
        norm = global_norm([p.grad for p in self.parameters if p.grad is not None])
        return torch.stack([*sums, norm]).tolist()

    def diagnose(self, micro_batches: Sequence[Batch]) -> Diagnosis:
        """Returns a look at the update that `step` would make now, and at each row alone; changes nothing."""
        return diagnose(self, micro_batches)

    def run(self, compute: Callable[[], Result]) -> Result:
        """Returns what a computation with the model gives; a model in parts is put together for it."""
        return compute()

    def gradient_norms(self) -> dict[str, float]:
        """Returns the norm of each canonical parameter's gradient."""
        return {
            name: float(torch.linalg.vector_norm(part, dtype=torch.float32))
            for item in self.optimizer.parameters
            if item.parameter.grad is not None
            for name, part in zip(item.parts, item.split(item.parameter.grad), strict=True)
        }

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSums:
        """Returns the loss and the metrics summed over the batch's targets; without dropout."""
        output = self.loss(to_device(batch, self.device), training=False)
        measures = {name: float(value) for name, value in output.measures.items()}
        return LossSums(float(output.nats), batch.num_targets, measures)

    def loss(self, batch: TensorBatch, training: bool) -> LossOutput:
        """Returns the objective's sums over a batch, with gradients; with dropout while `training`."""
        loss_function = self.loss_function(self.objective, training)
        # Evaluation runs uncompiled: its batches have other shapes, and each would be compiled anew.
        hidden = self._hidden if training else self.model.hidden
        with self.autocast():
            return loss_function(*self.output(hidden, training), batch)

    def loss_function(self, objective: Objective, training: bool) -> LossFunction:
        """Returns the function that computes an objective; dropout of its own is drawn only while `training`."""
        return objectives.loss_function(objective, training)

    def weights(self) -> dict[str, HostArray]:
        """Returns the float32 weights under canonical names; with an adapter, only what is trained."""
        if self.adapter is None:
            return weights.to_host_arrays(self.model)
        return {name: weights.host_from_tensor(value) for name, value in self._trained().items()}

    def state(self) -> dict[str, HostArray]:
        """Returns all that the next update depends on besides the weights: moments, and the number of updates made."""
        return self.optimizer.state()

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        """Goes on from what `weights()` and `state()` gave; ValueError lists what is missing or misshapen."""
        if self.adapter is None and not self.model.config.quantization:
            weights.load_host_arrays(self.model, arrays)
        else:
            weights.copy_host_arrays(self._trained(), arrays)
        self.optimizer.load_state(state)

    def save_shards(self, directory: Path) -> Saving:
        raise AssertionError("one process writes whole arrays")

    def load_shards(self, directory: Path) -> None:
        """Goes on from what several processes wrote with `save_shards`."""
        self.load_state(*read_shards(directory))

    def read_shards(self, directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
        """Returns `weights()` and `state()` as several processes saved them in parts."""
        return read_shards(directory)

    def runner(self) -> TorchRunner:
        """Returns a runner over the weights as they are now."""
        if self.adapter is None:
            return TorchRunner(self.model)
        return TorchRunner(self.model, adapters={OWN: self.adapter}, default=OWN)

    def conditions(self) -> dict[str, Any]:
        """Returns all that the last bits of a result depend on besides the configuration and the data."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
            "compile": self.compiled,
            # Uncompiled it changes nothing; a compiler fuses other operations, which rounds otherwise.
            **({"recompute": len(self.recomputed)} if self.compiled and self.recomputed else {}),
            **({"attention": self.attention} if self.attention != "masked" else {}),
        }

    def memory_bytes(self) -> int:
        """Returns the most memory held so far: of the device, or of this process where that is the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_memory_bytes()

    def peak_flops(self, seconds: float = 0.3) -> float:
        """Returns the floating-point operations a second of a large product in this precision: the best of at least 5,
        and of as many more as `seconds` allow."""
        size = 8192 if self.device.type == "cuda" else 1024
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        generator = torch.Generator(self.device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator, device=self.device).to(dtype) for _ in range(2))
        multiply: Callable[[], Tensor] = functools.partial(torch.matmul, a, b)
        if self.precision == "fp8":
            a8, b8 = fp8.scaled(a, fp8.E4M3), fp8.scaled(b, fp8.E4M3)
            multiply = functools.partial(fp8.product, a8, b8, dtype, fast=True)

        def run() -> None:
            multiply()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return 2 * size**3 / best_seconds(run, seconds)

    def _trained(self) -> dict[str, Tensor]:
        """Returns the trained parameters under canonical names."""
        return {
            part: view
            for fused in self.optimizer.parameters
            for part, view in zip(fused.parts, fused.split(fused.parameter.detach()), strict=True)
        }

    def output(self, hidden: Hidden, training: bool = False) -> tuple[Hidden, OutputHead]:
        """Returns hidden states and the output matrix, as losses take them; with dropout while `training`."""
        adapter = self._dropping if training else self.adapter
        more: dict[str, Any] = {"recompute": self.recomputed} if training and self.recomputed else {}
        if self.attention != "masked":
            more["attention"] = self.attention
        hidden, head = super().output(hidden)
        hidden = functools.partial(hidden, training=training, adapters=adapter, **more)
        return adapter.output(hidden, head) if adapter else (hidden, head)

    @contextlib.contextmanager
    def random_numbers_of_step(self) -> Any:
        """Seeds PyTorch's generators from (seed, step); afterwards they are as they were before."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._seed_of_step())
            yield

    def _seed_of_step(self) -> int:
        return step_seed(self.seed, self.optimizer.t)

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


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
) -> TorchTrainStep:
    """Returns a model of the values in `arrays`, or a freshly initialised one, with its optimiser.

    `threads` 0 leaves PyTorch's own choice; precision "auto" is bf16 where the processor multiplies it; `compile` None
    is false. With `parallel`, this is one of several processes, and the result its part.
    """
    device, chosen = choose(device, precision, threads)
    if attention == "flex":
        flex.check(config, device)
    options: dict[str, Any] = {
        "settings": optimizer,
        "objective": objective,
        "trainable": trainable,
        "adapter": adapter,
        "muon": muon,
        "max_grad_norm": max_grad_norm,
        "precision": chosen,
        "seed": seed,
        "compile": bool(compile),
        "recompute": recompute,
        "attention": attention,
    }
    if parallel is not None:
        from llamita.backend.torch.train.distributed import build_distributed_train_step

        return build_distributed_train_step(config, arrays, parallel, device, initialization, **options)
    model = weights.build_model(config, arrays, seed=seed, initialization=initialization, device=device)
    return TorchTrainStep(model, **options)


def read_shards(directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
    """Returns the whole weights and the optimiser's whole state of a checkpoint that several processes wrote."""
    from llamita.backend.torch.train import shards

    return dict(shards.read(directory, shards.WEIGHTS)), dict(shards.read(directory, shards.OPTIMIZER))

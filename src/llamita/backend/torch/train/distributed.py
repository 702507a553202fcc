"""One update of a model by several processes: each takes some rows of the batch, and all make the same update.

The numbers are those of one process but for the order in which floats are summed: losses and gradients are sums over
all rows divided by the targets of all of them. DDP (Li et al. 2020, arXiv:2006.15704) keeps the whole model in each
process; FSDP2 and tensor parallelism divide it (divided_model.py). Knows nothing of files but the parts of checkpoints.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llamita.backend.group import ParallelSettings, share
from llamita.backend.interface import LossSums, Saving
from llamita.backend.objectives import NextToken
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import weights
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.llama import Attention, Llama
from llamita.backend.torch.train import divided_model, shards
from llamita.backend.torch.train import group as groups
from llamita.backend.torch.train.group import TENSOR, TorchGroup, others_present
from llamita.backend.torch.train.losses import chunked_cross_entropy
from llamita.backend.torch.train.objectives import Hidden, LossOutput, TensorBatch
from llamita.backend.torch.train.scorer import to_device
from llamita.backend.torch.train.sharded import local, whole
from llamita.backend.torch.train.step import TorchTrainStep
from llamita.backend.train_step import step_seed
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import InitializationName, check_arrays, initialize_parameters


class DistributedTrainStep(TorchTrainStep):
    """A model with its optimiser in one of several processes, which all call the same methods in the same order."""

    def __init__(
        self, model: Llama, hooked: divided_model.Hooked | None, group: TorchGroup, compile: bool, **options: Any
    ) -> None:
        """`hooked` is what is called with a divided model; None: each process holds the whole model (DDP)."""
        super().__init__(model, compile=compile and hooked is None, **options)
        self.group = self._processes = group
        self.compiled = compile
        self.is_divided = hooked is not None
        self._team = group.settings.tensor_parallel
        self._copies = [group.size // divided_model.number_of_parts(p) for p in self.parameters]
        self._team_norms = [
            parameter
            for module in model.modules()
            if isinstance(module, Attention) and self._team > 1
            for norm in (module.q_norm, module.k_norm)
            if norm is not None
            for parameter in norm.parameters()
        ]
        self._hooked: nn.Module = hooked or self._replicated()

    def _replicated(self) -> nn.Module:
        """Returns the model and its adapter, where there is one, as DDP calls them."""
        hooked = divided_model.Hooked(self.model)
        hooked.adapter = nn.ParameterList(self.parameters if self.adapter else [])  # those of the model are known
        with others_present():
            return DistributedDataParallel(hooked, gradient_as_bucket_view=True)

    def _count_targets(self, micro_batches: Sequence[Batch]) -> int:
        own = sum(batch.num_targets for batch in micro_batches)
        return round(self.group.sums([own])[0]) // self._team or super()._count_targets(micro_batches)

    def _add_gradients(self, batch: Batch, targets: int, last: bool) -> LossOutput:
        with others_present(), self._gradients_summed(last):
            output = self._hooked(lambda: self.loss(to_device(batch, self.device), training=True))
            # The processes' gradients are averaged, and are to be added.
            (output.nats * (self.group.data_size / targets)).backward()
        return LossOutput(output.nats.detach(), output.measures)

    def _sums_and_norm(self, sums: Sequence[Tensor]) -> list[float]:
        with others_present():
            self._finish_gradients()
        *totals, square = self.group.sums(torch.stack([*sums, self._squared_norm()]).tolist())
        return [*(total / self._repeats for total in totals), math.sqrt(square)]

    @property
    def _shares_loss(self) -> bool:
        """Whether each process of a team takes some positions of the loss; else each computes all of it."""
        return self._team > 1 and isinstance(self.objective, NextToken)

    @property
    def _repeats(self) -> int:
        """How often a sum over all processes counts each row's loss."""
        return 1 if self._shares_loss else self._team

    def loss(self, batch: TensorBatch, training: bool) -> LossOutput:
        if not self._shares_loss:
            return super().loss(batch, training)
        mesh = self._processes.mesh[TENSOR]
        hidden = self._hidden if training else self.model.hidden
        with self.autocast():
            hidden, head = super().output(hidden, training)
            head = divided_model.whole_head(head, partial=True)
            hidden_BTD = hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
            hidden_BTD = divided_model.summed_on_the_way_back(hidden_BTD, mesh)
            own = slice(mesh.get_local_rank(), None, self._team)
            return LossOutput(chunked_cross_entropy(hidden_BTD[:, own], head, batch.labels_BT[:, own]), {})

    def output(self, hidden: Hidden, training: bool = False) -> tuple[Hidden, OutputHead]:
        hidden, head = super().output(hidden, training)
        return hidden, divided_model.whole_head(head, partial=False)

    @contextlib.contextmanager
    def _gradients_summed(self, last: bool) -> Any:
        """Holds the exchange of gradients back until the last micro-batch, where each process holds all of them."""
        if isinstance(self._hooked, DistributedDataParallel) and not last:
            with self._hooked.no_sync():
                yield
        else:
            yield

    def _finish_gradients(self) -> None:
        """Divides each gradient as its parameter is, and adds what a team's heads say of the norm that they share."""
        for parameter in self.parameters:
            gradient, held = parameter.grad, parameter.data
            if isinstance(gradient, DTensor) and isinstance(held, DTensor) and gradient.placements != held.placements:
                parameter.grad = gradient.redistribute(placements=held.placements)
        for parameter in self._team_norms:
            if parameter.grad is not None:
                dist.all_reduce(local(parameter.grad), group=self._processes.mesh[TENSOR].get_group())

    def _squared_norm(self) -> Tensor:
        """Returns this process's part of the squared norm of the gradient: of a number that several hold, a share."""
        squares = torch.zeros((), dtype=torch.float32, device=self.device)
        for parameter, copies in zip(self.parameters, self._copies, strict=True):
            if parameter.grad is not None:
                squares += torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32).square() / copies
        return squares

    def _seed_of_step(self) -> int:
        """Draws other numbers for other rows; a team, which shares rows, draws the same."""
        seed = super()._seed_of_step()
        return seed if self.group.data_rank == 0 else step_seed(seed, self.group.data_rank)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSums:
        """Returns the sums over all rows of the batch, which the processes divide between them."""
        rows = share(batch, self.group)
        is_empty = not len(rows.row_ids)
        if is_empty:  # a divided model is run by all or by none
            first = batch.rows(slice(0, 1))
            rows = replace(first, labels_BT=np.full_like(first.labels_BT, IGNORE_INDEX))
        with others_present():
            output = self._hooked(lambda: self.loss(to_device(rows, self.device), training=False))
        own = [float(output.nats), *(float(value) for value in output.measures.values())]
        nats, *sums = (value / self._repeats for value in self.group.sums([0.0] * len(own) if is_empty else own))
        return LossSums(nats, batch.num_targets, dict(zip(output.measures, sums, strict=True)))

    def log_probs(self, batch: Batch) -> np.ndarray:
        compute = super().log_probs
        with torch.no_grad():
            return self.run(lambda: compute(batch))

    def distributions(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        compute = super().distributions
        with torch.no_grad():
            return self.run(lambda: compute(batch, temperature))

    def run(self, compute: Callable[[], Any]) -> Any:
        """Calls a function with the whole of each parameter at hand, where the processes hold parts.

        All of them compute the same, so that gradients, which FSDP2 averages, are those of one.
        """
        with others_present():
            return self._hooked(compute) if self.is_divided else compute()

    def gradient_norms(self) -> dict[str, float]:
        if not self.is_divided:
            return super().gradient_norms()
        self._finish_gradients()
        names: list[str] = []
        squares = []
        for item, copies in zip(self.optimizer.parameters, self._copies, strict=True):
            if item.parameter.grad is not None:
                names += item.parts
                held = local(item.parameter.grad)
                squares.append(float(torch.linalg.vector_norm(held, dtype=torch.float32).square()) / copies)
        return {name: math.sqrt(square) for name, square in zip(names, self.group.sums(squares), strict=True)}

    # --- weights and state -----------------------------------------------------------------------------------------

    def weights(self) -> dict[str, HostArray]:
        if not self.is_divided:
            return super().weights()
        with others_present():
            return {name: weights.host_from_tensor(whole(held)) for name, held in self._divided_state().items()}

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        if not self.is_divided:
            return super().load_state(arrays, state)
        check_arrays(self.model.config, arrays)
        divided_model.fill(self._divided_state(), arrays.items())
        self.optimizer.load_state(state)

    def runner(self) -> TorchRunner:
        """Returns a runner over the weights as they are now, a whole model in each process."""
        if not self.is_divided:
            return super().runner()
        return TorchRunner(weights.build_model(self.model.config, self.weights(), device=self.device))

    def save_shards(self, directory: Path) -> Saving:
        """Begins to write this process's part of weights and state into a directory that all processes see."""
        return shards.save(self._saved(), directory, self._processes)

    def load_shards(self, directory: Path) -> None:
        """Goes on from what any number of processes wrote with `save_shards`."""
        self.optimizer.t = shards.load(self._saved(), directory, self._processes)

    def conditions(self) -> dict[str, Any]:
        settings = self._processes.settings
        form = settings.mode + (f", tensor parallel {self._team}" if self._team > 1 else "")
        return super().conditions() | {"processes": self.group.size, "parallel": form}

    def peak_flops(self, seconds: float = 0.3) -> float:
        return super().peak_flops(seconds) * self.group.size

    def _saved(self) -> dict[str, Tensor]:
        return shards.named(self._trained_or_all(), self.optimizer.moments(), self.optimizer.t)

    def _trained_or_all(self) -> dict[str, Tensor]:
        if self.is_divided:
            return self._divided_state()
        return self._trained() if self.adapter else self.model.canonical_state()

    def _divided_state(self) -> dict[str, Tensor]:
        """Returns the parts that this process holds; after a pass without gradients FSDP2 has some still gathered."""
        if isinstance(self._hooked, FSDPModule):
            self._hooked.reshard()
        return divided_model.divided_state(self.model)


def build_distributed_train_step(
    config: ModelConfig,
    arrays: Mapping[str, HostArray] | None,
    parallel: ParallelSettings,
    device: str,
    initialization: InitializationName,
    **options: Any,
) -> DistributedTrainStep:
    """Joins the processes that were started with this one, and returns its part of a model with its optimiser.

    `options` are those of `TorchTrainStep`. The values of the model do not depend on the processes.
    """
    group = groups.join(parallel, device)
    seed, hooked = options["seed"], None
    if options["precision"] == "fp8" and parallel.tensor_parallel > 1:
        raise ValueError("fp8 products are not divided between processes; use --tensor-parallel 1 or --precision bf16")
    if parallel.mode == "ddp" and parallel.tensor_parallel == 1:
        model = weights.build_model(config, arrays, seed=seed, initialization=initialization, device=device)
    else:
        if options["adapter"] is not None:
            raise ValueError("an adapter is trained over a whole model in each process; use --parallel ddp for lora")
        if arrays is not None:
            check_arrays(config, arrays)
        model, hooked = divided_model.divided_model(config, group, options["compile"])
        hooked.to_empty(device=device)
        fresh = initialize_parameters(config, seed, initialization)
        made = ((name, HostArray.from_numpy(array)) for name, array in fresh)
        divided_model.fill(divided_model.divided_state(model), made if arrays is None else arrays.items())
    return DistributedTrainStep(model, hooked, group, **options)

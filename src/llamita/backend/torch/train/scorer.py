"""A model in PyTorch that judges texts: the log-probabilities of labels, and of every token at a label's place.

A frozen one is a reference or a teacher; a training step is one too, over the weights as they are. Knows nothing of
optimisers.

Letters beyond the usual: M scored positions.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llamita.backend import processor
from llamita.backend.interface import Precision
from llamita.backend.torch.model import weights
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.train import fp8, objectives
from llamita.backend.torch.train.objectives import Hidden, TensorBatch
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray

ChosenPrecision = Literal["bf16", "fp32", "fp8"]


class TorchScorer:
    """Scores with `model`; `precision` bf16 computes products in bfloat16 from float32 weights (autocast).

    fp8 is that too, but for the products of the blocks' matrices (fp8.py).
    """

    def __init__(self, model: Llama, precision: ChosenPrecision = "fp32") -> None:
        self.model = model
        self.precision = precision
        self.device = model.model.norm.weight.device
        if precision == "fp8":
            fp8.check(model.config, self.device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> np.ndarray:
        """Returns the log-probability of every label that is scored, float32 (B, T), 0 elsewhere; without dropout."""
        with self.autocast():
            found_BT = objectives.log_probs(*self.output(self.model.hidden), to_device(batch, self.device))
        return found_BT.cpu().numpy()

    @torch.no_grad()
    def distributions(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """Returns the log-probability of every token where a label is scored, float32 (M, V); without dropout."""
        with self.autocast():
            tensors = to_device(batch, self.device)
            found_MV = objectives.distributions(*self.output(self.model.hidden), tensors, temperature)
        return found_MV.cpu().numpy()

    def output(self, hidden: Hidden) -> tuple[Hidden, OutputHead]:
        """Returns hidden states and the output head, as losses take them."""
        return self.computed(hidden), self.model.head

    def computed(self, hidden: Hidden) -> Hidden:
        """Returns what gives hidden states, with the products of this precision."""
        return functools.partial(hidden, product=fp8.linear) if self.precision == "fp8" else hidden

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision != "fp32")


def build_scorer(
    config: ModelConfig,
    arrays: Mapping[str, HostArray],
    *,
    precision: Precision = "auto",
    device: str = "auto",
    threads: int = 0,
) -> TorchScorer:
    """Returns a frozen model of the values in `arrays`; the options are those of `build_train_step`."""
    device, chosen = choose(device, precision, threads)
    return TorchScorer(weights.build_model(config, arrays, device=device), chosen)


def choose(device: str, precision: Precision, threads: int) -> tuple[str, ChosenPrecision]:
    """Returns the device and the precision that are meant; "auto" is bf16 where the processor multiplies it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r} is not here; use {'cuda or cpu' if torch.cuda.is_available() else 'cpu'}")
    if threads > 0:
        torch.set_num_threads(threads)
    if precision == "auto":
        precision = "bf16" if device == "cuda" or processor.multiplies("bfloat16") else "fp32"
    return device, precision


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """Returns the batch as tensors on a device, whole numbers as int64."""

    def move(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, dtype=torch.int64, non_blocking=True)

    segments_BT = None if batch.segments_BT is None else move(batch.segments_BT)
    extras = {
        name: move(array) if array.dtype.kind in "iu" else torch.from_numpy(array).to(device)
        for name, array in batch.extras.items()
    }
    return TensorBatch(move(batch.tokens_BT), move(batch.labels_BT), segments_BT, extras)

"""The part of a training step that both backends share besides AdamW's: counts, results, and what the machine does.

Numbers alone; knows nothing of frameworks or models' layers.
"""

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from llamita.backend.interface import Recompute, StepMetrics
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig


def count_targets(micro_batches: Sequence[Batch]) -> int:
    """Returns the targets that an update learns from; ValueError, naming the rows, where there are none."""
    targets = sum(batch.num_targets for batch in micro_batches)
    if targets == 0:
        rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        raise ValueError(f"rows {rows} have no target to learn from; use longer documents or mode=pack")
    return targets


def step_metrics(
    values: Sequence[float], names: Sequence[str], targets: int, loss_limit: float = math.inf
) -> StepMetrics:
    """Returns the result of an update from the numbers that its device gave.

    `values` are, for each micro-batch in order, its summed loss and the sums of the objective's other metrics, whose
    `names` these are; and at the end the norm of the mean gradient.
    """
    *flat, grad_norm = values
    width = 1 + len(names)
    sums = flat[::width]
    measures = {name: sum(flat[i::width]) / targets for i, name in enumerate(names, 1)}
    faulty = tuple(i for i, nats in enumerate(sums) if not math.isfinite(nats))
    return StepMetrics(sum(sums) / targets, grad_norm, targets, faulty, measures, loss_limit)


class Activations:
    """Root mean squares of activations at named places, from sums of squares over parts of a batch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, squares: float, size: int) -> None:
        """Add the sum of the squares of `size` numbers."""
        before, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = before + squares, count + size

    def root_mean_squares(self) -> dict[str, float]:
        return {name: math.sqrt(squares / size) for name, (squares, size) in self._sums.items()}


def rows_of(micro_batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yields each row of an update as a batch of its own."""
    for batch in micro_batches:
        for i in range(len(batch.row_ids)):
            yield batch.rows(slice(i, i + 1))


def step_seed(seed: int, updates: int) -> int:
    """Returns what the random numbers of an update are drawn from, 32 bits: a function of (seed, updates before it)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{updates}".encode()).digest()[:4], "little")


def recomputed_layers(layers: int, recompute: Recompute) -> tuple[int, ...]:
    """Returns the blocks of a model whose activations are computed a second time, evenly chosen from all.

    They lie evenly so that what is held grows evenly over the forward pass (Chen et al. 2016, arXiv:1604.06174).
    ValueError for more blocks than there are.
    """
    count = {"none": 0, "all": layers}.get(recompute, 0) if isinstance(recompute, str) else recompute
    if not 0 <= count <= layers:
        raise ValueError(f"recompute={recompute} must lie between 0 and the model's {layers} blocks; all takes each")
    return tuple(i * layers // count for i in range(count))


def quantized_refusal(config: ModelConfig) -> ValueError:
    """Returns the error for quantised weights that are to be trained."""
    return ValueError(
        f"the model is quantised ({config.quantization}) and cannot be trained; train an adapter over it "
        "(lora), or train the model that it was made from, then quantise that"
    )


def process_memory_bytes() -> int:
    """Returns the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def best_seconds(run: Callable[[], object], seconds: float) -> float:
    """Returns the least time that `run` took: of 5 runs, and of as many more as `seconds` allow."""
    best, runs, end = math.inf, 0, time.perf_counter() + seconds
    while runs < 5 or time.perf_counter() < end:  # one alone may meet a pause of the machine
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        runs += 1
    return best

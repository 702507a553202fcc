"""What the training loop is given and what it gives back: the backend's step, the examples, evaluations, the result.

Only types; knows nothing of how any of it is done.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamita.backend.interface import LossSums
from llamita.data.batches import Batch
from llamita.model.host_array import HostArray


class StepMetrics(Protocol):
    """What an update did; see the backend's."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def targets(self) -> int: ...
    @property
    def measures(self) -> Mapping[str, float]: ...
    @property
    def faulty_micro_batches(self) -> tuple[int, ...]: ...


class TrainStep(Protocol):
    """What the trainer needs of a backend: a model and its optimiser, whose weights an update leaves alone where loss
    or gradient is not finite."""

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepMetrics: ...
    def evaluate(self, batch: Batch) -> LossSums: ...
    def weights(self) -> dict[str, HostArray]: ...
    def state(self) -> dict[str, HostArray]: ...
    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None: ...
    def conditions(self) -> dict[str, Any]: ...
    def memory_bytes(self) -> int: ...
    def peak_flops(self) -> float: ...


class Batches(Protocol):
    """An endless, resumable order of training batches, such as data.batches.BatchIterator."""

    def next(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TokenText:
    """How much text each token id stands for: int64 arrays over the vocabulary; 0 for special tokens."""

    characters_V: np.ndarray
    bytes_V: np.ndarray


@dataclass(frozen=True)
class Examples:
    """What a model learns from and is judged by. `validation` starts anew at each call and may yield nothing.

    `target` is what the loss is a mean over; only of tokens is there a perplexity.
    """

    batches: Batches
    validation: Callable[[], Iterable[Batch]] = tuple
    text: TokenText | None = None
    target: str = "token"


@dataclass(frozen=True)
class Evaluation:
    """A pass over the validation rows after `step` updates: nats per target, and per character where that is known.

    `perplexity` is None where a target is no token. `measures` are means over the targets.
    """

    step: int
    loss: float
    perplexity: float | None
    nats_per_character: float | None
    bits_per_byte: float | None
    targets: int
    best: bool
    target: str = "token"
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: after how many updates, and at which smoothed loss; `interrupted` by Ctrl-C.

    `checkpoint` is None only where it was interrupted before the first update.
    """

    step: int
    loss: float
    evaluation: Evaluation | None
    best: Evaluation | None
    checkpoint: Path | None
    interrupted: bool


OnEvaluation = Callable[[Evaluation], str | None]
"""Called after each evaluation; the text it returns (samples, scores) is shown and added to RUN/samples.txt."""

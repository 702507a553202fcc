"""The processes that train one model together: who they are, which rows are whose, what all of them must agree on.

A run of one process has a group of one, `ALONE`. Numbers and objects alone; knows nothing of frameworks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from llamita.data.batches import Batch
from llamita.model.config import ModelConfig

Result = TypeVar("Result")
ParallelName = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ParallelSettings:
    """How processes divide a model between them.

    `tensor_parallel` processes share each matrix product; these teams share the rows of a batch, and hold either the
    whole model each (`ddp`) or a part of every parameter each (`fsdp`).
    """

    mode: ParallelName = "ddp"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("ddp", "fsdp"):
            raise ValueError(f"parallel={self.mode!r} must be 'ddp' or 'fsdp'")
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel={self.tensor_parallel} must be at least 1")


class Group(Protocol):
    """The processes of a run, seen from one of them.

    Every method is called by all of them in the same order. ConnectionError, in one line, where another one is lost.
    """

    rank: int
    """The number of this process; number 0 writes and speaks."""
    size: int
    """How many processes there are."""
    data_rank: int
    """The number of this process among those that share the rows of a batch."""
    data_size: int
    """How many parts the rows of a batch are divided into."""

    def any(self, flag: bool) -> bool:
        """Returns whether any process says so."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of numbers over all processes."""

    def gather(self, value: Any) -> list[Any]:
        """Returns what each process gives, by rank."""

    def first(self, make: Callable[[], Result]) -> Result:
        """Returns what `make` gives in the first process, the only one to call it; its error is raised in all."""


class Alone:
    """The group of a run that one process makes."""

    rank, size, data_rank, data_size = 0, 1, 0, 1

    def any(self, flag: bool) -> bool:
        return flag

    def sums(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, make: Callable[[], Result]) -> Result:
        return make()


ALONE: Group = Alone()


def share(batch: Batch, group: Group) -> Batch:
    """Returns this process's rows of a batch: every `data_size`-th one, so that all get rows of every length."""
    return batch if group.data_size == 1 else batch.rows(slice(group.data_rank, None, group.data_size))


def check_tensor_parallel(config: ModelConfig, processes: int) -> None:
    """ValueError, in one line, where that many processes cannot share each matrix of a model.

    Attention heads and the feed-forward width are cut evenly; of the vocabulary one process may hold fewer rows.
    """
    if processes == 1:
        return
    if config.norm_all_heads:
        raise ValueError("a norm over all heads at once is not divided between processes; use --tensor-parallel 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % processes:
            raise ValueError(f"tensor_parallel={processes} must divide {name}={getattr(config, name)}")


def check_batch_size(batch_size: int, group: Group) -> None:
    """ValueError where the rows of a batch cannot be divided evenly."""
    parts = group.data_size
    if batch_size % parts:
        fitting = [size for size in (batch_size // parts * parts, -(-batch_size // parts) * parts) if size]
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {parts} parts that the processes divide it into; "
            f"try {' or '.join(map(str, fitting))}"
        )

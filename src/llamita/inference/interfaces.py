"""What the engine is given: the runner of a backend, and what guesses ahead. Only types."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llamita.backend.interface import BlockCopy, CacheLayout, Plan, ScheduledChunk, StepResult
from llamita.inference.sequence import Continuation
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray


class Runner(Protocol):
    """What the engine needs of a backend."""

    config: ModelConfig
    weight_bytes: int  # read to decode one token
    kv_bytes_per_token: int  # read for every earlier position to decode one token

    @property
    def cache_budget(self) -> int:
        """Bytes that keys and values may take where nothing else is said."""

    def weights(self) -> Mapping[str, HostArray]: ...

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> Any:
        """Memory for the sequences of one engine, to be given with each of its plans.

        At most so many decode at once; 0: not known.
        """

    def run(self, plan: Plan, memory: Any) -> StepResult: ...


class Drafter(Protocol):
    """Guesses what comes next, cheaply; a wrong guess costs time, never a token."""

    def start(self, config: ModelConfig, layout: CacheLayout) -> None:
        """Get ready for an engine over this model and memory; ValueError where it cannot draft for it."""

    def propose(self, wanted: Sequence[tuple[Continuation, int]]) -> list[list[int]]:
        """At most so many tokens for each sequence."""

    def prepare(self, copies: Sequence[BlockCopy], reading: Sequence[ScheduledChunk]) -> None:
        """Be shown what is about to be copied and read of prompts, before `propose`."""

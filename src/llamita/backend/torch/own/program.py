"""The two sides of a reader's code: the program that a track's folder is, and the model that is made of it.

    Program    the modules of one of the course's tracks, as they were written
    OwnModel   what the runner asks of a model whose modules they are; each track has its own (min_llama.py, serving.py)
    Memory     what an OwnModel keeps of an engine's sequences from step to step, under the engine's tables of blocks

Knows nothing of where the files are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llamita.backend.interface import BlockCopy, CacheLayout, ScheduledChunk
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.storage.formats.foreign import refuse_switches

Trace = Callable[[str, Tensor], None]
Wanted = tuple[ScheduledChunk, list[int]]
"""A chunk, and the offsets in it after which a token is drawn or scored; there may be none."""


class Program(Protocol):
    """Somebody's modules, those of one of the course's tracks."""

    @property
    def track(self) -> str:
        """The name of the track: it says what the modules are, and so which model is made of them."""

    def modules(self, more: Mapping[str, str]) -> SimpleNamespace:
        """Returns the modules by name, executed anew, with the lines that `more` has for some behind their texts."""

    def guard(self) -> AbstractContextManager[None]:
        """Inside, an error of their code becomes a ValueError of one line that names their file."""


@dataclass
class Memory:
    """What is kept of an engine's sequences: arrays, each with a row for every position of every block."""

    block_size: int
    arrays: Sequence[Any]

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copies whole blocks."""
        for copy in copies:
            source, target = (slice(n * self.block_size, (n + 1) * self.block_size) for n in (copy.source, copy.target))
            for array in self.arrays:
                array[target] = array[source]

    def rows(self, chunk: ScheduledChunk, start: int, end: int) -> np.ndarray:
        """Returns the rows of positions start to end - 1 of a chunk's sequence."""
        positions = np.arange(start, end)
        blocks = chunk.tables[0][positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size


def refuse(config: ModelConfig, form: str, held: Sequence[str] = ()) -> None:
    """ValueError, naming it, for what a model needs and the course's, which messages call `form`, has no part for.

    `held` are the switches of a config that it has a part for.
    """
    if config.quantization:
        raise ValueError(f"{form} cannot hold {config.quantization} weights; give the model that they were made from")
    refuse_switches(config, form, held=held)


class OwnModel(Protocol):
    """A model of somebody's modules, in float32."""

    program: Program
    config: ModelConfig
    device: torch.device
    form: str
    """What messages call it."""
    kernels: str
    """How it computes, in a few words."""
    kept_bytes_per_token: int
    """Bytes that it keeps of an earlier position."""

    @property
    def cache_budget(self) -> int:
        """Bytes that what it keeps may take where nothing else is said."""

    def sizes(self) -> Iterable[tuple[str, int]]:
        """Returns the bytes of each parameter by its canonical name."""

    def host_arrays(self) -> dict[str, HostArray]:
        """Returns the parameters under canonical names, in the table's order."""

    def allocate(self, layout: CacheLayout) -> Memory:
        """Returns memory for the sequences of one engine."""

    def read(self, wanted: Sequence[Wanted], memory: Memory) -> list[Tensor]:
        """Reads chunks, each after what the memory holds of its sequence, and keeps what later ones need of them.

        Returns the logits (R, V) at the wanted offsets of each chunk.
        """

    def hidden(self, tokens_BT: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm; the trace is shown the residual stream."""

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through the last norm."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""

"""Models of the course that have a cache of keys and values: what the adapters of their tracks share.

The memory holds keys and values of each position, in the engine's blocks. For a step, each sequence gets caches of
theirs, one for each layer, which are given what the blocks hold of it; their model runs over the new tokens, and what
it gives its caches is written to the blocks too. So their cache never holds what the engine has taken back, has found
in another text, or has put off, and nothing is left of a text that has ended but blocks that are free again.

Letters beyond the usual: X positions of all blocks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.backend.torch.model.weights import copy_values, host_from_tensor
from llamita.backend.torch.own.program import Memory, Program, Trace, Wanted, refuse
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import check_arrays, stored_arrays
from llamita.model.sizes import kv_bytes_per_token

FORM = "the course's model"
CACHE_SHARE = 0.25
"""Of the memory that is free once the weights are loaded, what keys and values may take."""
MOST_TOGETHER = 1 << 14
"""Most positions of sequences that run together, all as long as the longest: it bounds the memory of their copies."""


@dataclass(frozen=True)
class Kept:
    """One layer of a sequence in the blocks: its earlier positions, and the places of its new ones."""

    keys_XKH: Tensor
    values_XKH: Tensor
    earlier: Tensor
    new: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the earlier positions, (1, K, S, H)."""
        key, value = (array[self.earlier].transpose(0, 1)[None] for array in (self.keys_XKH, self.values_XKH))
        return key, value

    def write(self, key: Tensor, value: Tensor) -> None:
        """Takes the keys and values of the new positions, (1, K, T, H)."""
        self.keys_XKH[self.new] = key[0].transpose(0, 1)
        self.values_XKH[self.new] = value[0].transpose(0, 1)


class Written(ABC):
    """The modules of a track around the parameters of a model, in tensors; every method runs their code."""

    held: ClassVar[tuple[str, ...]]
    """The switches of a config that their model has a part for."""
    how: str
    """How several sequences run, in a few words."""
    together: Callable[[Sequence[Any]], Any] | None = None
    """Makes one of the caches of a layer of several sequences; None where each sequence runs in a call of its own."""

    @abstractmethod
    def __init__(self, modules: SimpleNamespace, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        """Makes their model of parameters by canonical names."""

    @abstractmethod
    def cache(self, kept: Kept) -> Any:
        """Returns a cache of theirs of one layer that holds what is kept; what it is given next is kept too."""

    @abstractmethod
    def run(self, tokens_BT: Tensor, caches: Sequence[Any]) -> Tensor:
        """Returns the logits (B, T, V) of new tokens, with a cache for each layer."""

    @abstractmethod
    def hidden(self, tokens_BT: Tensor, trace: Trace) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm, part by part, and shows the trace each."""

    @abstractmethod
    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""

    @abstractmethod
    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""


class CachedModel:
    """A model of theirs with the values of `arrays` (canonical names), on the CPU, where their code makes its masks.

    ValueError where the model has what the course's has no part for.
    """

    form = FORM
    device = torch.device("cpu")

    def __init__(
        self, program: Program, track: type[Written], config: ModelConfig, arrays: Mapping[str, HostArray]
    ) -> None:
        refuse(config, FORM, track.held)
        check_arrays(config, arrays)
        self.config, self.program = config, program
        self.kept_bytes_per_token = kv_bytes_per_token(config, torch.float32.itemsize)
        self.parameters = {row.name: torch.empty(row.shape) for row in stored_arrays(config)}
        copy_values(self.parameters, ((name, arrays[name]) for name in self.parameters))
        with program.guard():
            self.written = track(program.modules({}), config, self.parameters)
        self.kernels = f"the course's code with its cache, {self.written.how}"

    @property
    def cache_budget(self) -> int:
        """Bytes that keys and values may take where nothing else is said."""
        return int(psutil.virtual_memory().available * CACHE_SHARE)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yields the bytes of each parameter by its canonical name."""
        return ((name, tensor.nbytes) for name, tensor in self.parameters.items())

    def host_arrays(self) -> dict[str, HostArray]:
        """Returns the parameters under canonical names, in the table's order."""
        return {name: host_from_tensor(tensor) for name, tensor in self.parameters.items()}

    def allocate(self, layout: CacheLayout) -> Memory:
        """Returns memory for the keys of all layers of an engine's sequences, and then for their values."""
        config = self.config
        shape = (layout.blocks * layout.block_size, config.num_key_value_heads, config.head_dim)
        return Memory(layout.block_size, [torch.empty(shape) for _ in range(2 * config.num_hidden_layers)])

    def read(self, wanted: Sequence[Wanted], memory: Memory) -> list[Tensor]:
        """Runs their model over chunks, and returns the logits (R, V) at the wanted offsets of each."""
        found = [torch.empty(0)] * len(wanted)
        for places in self._calls([chunk for chunk, _ in wanted]):
            chunks = [wanted[place][0] for place in places]
            with self.program.guard():
                caches = [self._caches(chunk, memory) for chunk in chunks]
                together = self.written.together if len(chunks) > 1 else None
                of_layers = [together(layer) for layer in zip(*caches, strict=True)] if together else caches[0]
                logits_BTV = self.written.run(torch.tensor([chunk.tokens for chunk in chunks]), of_layers)
            for place, logits_TV in zip(places, logits_BTV, strict=True):
                found[place] = logits_TV[wanted[place][1]]
        return found

    def hidden(self, tokens_BT: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm; the trace is shown the residual stream."""
        with self.program.guard():
            return self.written.hidden(tokens_BT, trace or (lambda name, x: None))

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""
        with self.program.guard():
            return self.written.norm(stream_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""
        with self.program.guard():
            return self.written.logits(hidden_BTD)

    def _calls(self, chunks: Sequence[ScheduledChunk]) -> Iterator[list[int]]:
        """Yields the places of chunks that run in one call: of equally many tokens, shorter texts first."""
        group: list[int] = []
        for place in sorted(range(len(chunks)), key=lambda place: (len(chunks[place].tokens), chunks[place].end)):
            is_alike = group and len(chunks[group[0]].tokens) == len(chunks[place].tokens)
            fits = (len(group) + 1) * chunks[place].end <= MOST_TOGETHER
            if group and not (self.written.together and is_alike and fits):
                yield group
                group = []
            group.append(place)
        if group:
            yield group

    def _caches(self, chunk: ScheduledChunk, memory: Memory) -> list[Any]:
        """Returns their caches for a chunk, one for each layer, with what the blocks hold of its sequence."""
        earlier = torch.from_numpy(memory.rows(chunk, 0, chunk.start))
        new = torch.from_numpy(memory.rows(chunk, chunk.start, chunk.end))
        layers = self.config.num_hidden_layers
        pairs = zip(memory.arrays[:layers], memory.arrays[layers:], strict=True)
        return [self.written.cache(Kept(keys, values, earlier, new)) for keys, values in pairs]


def same_sizes(their_config: type, config: ModelConfig) -> Any:
    """Returns a config of the course's own, whose fields have the same names as here."""
    names = [field.name for field in fields(their_config) if hasattr(config, field.name)]
    return their_config(**{name: getattr(config, name) for name in names})

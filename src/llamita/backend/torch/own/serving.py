"""The track `serving`: a Llama, a Qwen2 or a Qwen3 that somebody has written, with a cache of keys and values.

The memory holds keys and values of each position, in the engine's blocks. For a step, each sequence gets caches of
theirs, one for each layer, which are given what the blocks hold of it; their model runs over the new tokens, and what
it gives its caches is written to the blocks too. So their cache never holds what the engine has taken back, has found
in another text, or has put off, and nothing is left of a text that has ended but blocks that are free again.

Sequences with equally many new tokens run together where their `BatchKvCache` is written, one after the other where
it is not.

Letters beyond the usual: X positions of all blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.backend.torch.model.weights import copy_values, host_from_tensor
from llamita.backend.torch.own.program import Memory, Program, Trace, Wanted
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import check_arrays, stored_arrays
from llamita.model.sizes import kv_bytes_per_token
from llamita.storage.formats.foreign import refuse_switches

FORM = "the course's model"
HELD = ("attention_bias", "query_key_value_bias", "query_key_norm", "head_dim")
"""What a model may have beyond a plain Llama."""
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "tie_word_embeddings",
)
"""The fields of the course's own config, which have the same names here."""
CACHE_SHARE = 0.25
"""Of the memory that is free once the weights are loaded, what keys and values may take."""
MOST_TOGETHER = 1 << 14
"""Most positions of sequences that run together, all as long as the longest: it bounds the memory of their copies."""


class ServingModel:
    """Their model with the values of `arrays` (canonical names), on the CPU, where their code makes its masks.

    ValueError where the model has what the course's has no part for.
    """

    form = FORM
    device = torch.device("cpu")

    def __init__(self, program: Program, config: ModelConfig, arrays: Mapping[str, HostArray]) -> None:
        refuse(config)
        check_arrays(config, arrays)
        self.config, self.program = config, program
        self.kept_bytes_per_token = kv_bytes_per_token(config, torch.float32.itemsize)
        self.parameters = {row.name: torch.empty(row.shape) for row in stored_arrays(config)}
        copy_values(self.parameters, ((name, arrays[name]) for name in self.parameters))
        with program.guard():
            self._modules = modules = program.modules({})
            sizes = modules.config.ModelConfig(**{name: getattr(config, name) for name in SIZES})
            self._model = modules.model.Model(sizes, self.parameters)
        self._runs_together = hasattr(modules, "batch")
        how = "together" if self._runs_together else "one after the other (the lesson batching is not written)"
        self.kernels = f"the course's code with its cache, sequences {how}"

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
        """Returns memory for the keys and values of an engine's sequences: those of all layers, then the values."""
        config = self.config
        shape = (layout.blocks * layout.block_size, config.num_key_value_heads, config.head_dim)
        return Memory(layout.block_size, [torch.empty(shape) for _ in range(2 * config.num_hidden_layers)])

    def read(self, wanted: Sequence[Wanted], memory: Memory) -> list[Tensor]:
        """Runs their model over chunks, and returns the logits (R, V) at the wanted offsets of each."""
        found = [torch.empty(0)] * len(wanted)
        for places in self._together([chunk for chunk, _ in wanted]):
            chunks = [wanted[place][0] for place in places]
            with self.program.guard():
                caches = [self._caches(chunk, memory) for chunk in chunks]
                of_layers = caches[0] if len(chunks) == 1 else self._batched(caches)
                logits_BTV = self._model(torch.tensor([chunk.tokens for chunk in chunks]), of_layers)
            for place, logits_TV in zip(places, logits_BTV, strict=True):
                found[place] = logits_TV[wanted[place][1]]
        return found

    def hidden(self, tokens_BT: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm, as their `Model` computes them, part by part."""
        show = trace or (lambda name, x: None)
        with self.program.guard():
            h = self._model.embedding(tokens_BT)
            show("embedding", h)
            for number, block in enumerate(self._model.blocks):
                h = block(h, self._modules.model.NoCache())
                show(f"layers.{number}", h)
        h = self.norm(h)
        show("norm", h)
        return h

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""
        with self.program.guard():
            found: Tensor = self._model.norm(stream_BTD)
        return found

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""
        model = self._model
        with self.program.guard():
            found: Tensor = (
                model.embedding.as_linear(hidden_BTD)
                if model.lm_head is None
                else self._modules.projection.project(hidden_BTD, model.lm_head)
            )
        return found

    def _together(self, chunks: Sequence[ScheduledChunk]) -> Iterator[list[int]]:
        """Yields the places of chunks that run in one call: of equally many tokens, shorter texts first."""
        group: list[int] = []
        for place in sorted(range(len(chunks)), key=lambda place: (len(chunks[place].tokens), chunks[place].end)):
            is_alike = group and len(chunks[group[0]].tokens) == len(chunks[place].tokens)
            fits = (len(group) + 1) * chunks[place].end <= MOST_TOGETHER
            if group and not (self._runs_together and is_alike and fits):
                yield group
                group = []
            group.append(place)
        if group:
            yield group

    def _caches(self, chunk: ScheduledChunk, memory: Memory) -> list["BlockCache"]:
        """Returns their caches for a chunk, one for each layer, with what the blocks hold of its sequence."""
        earlier = torch.from_numpy(memory.rows(chunk, 0, chunk.start))
        new = torch.from_numpy(memory.rows(chunk, chunk.start, chunk.end))
        layers = self.config.num_hidden_layers
        found = []
        for keys_XKH, values_XKH in zip(memory.arrays[:layers], memory.arrays[layers:], strict=True):
            cache = self._modules.kv_cache.KvCache()
            if chunk.start:
                cache.update_and_fetch(*(array[earlier].transpose(0, 1)[None] for array in (keys_XKH, values_XKH)))
            found.append(BlockCache(cache, keys_XKH, values_XKH, new))
        return found

    def _batched(self, caches: Sequence[Sequence["BlockCache"]]) -> list[Any]:
        """Returns their caches of several sequences as one for each layer."""
        return [self._modules.batch.BatchKvCache(layer) for layer in zip(*caches, strict=True)]


@dataclass
class BlockCache:
    """A cache of theirs during a step: what it is given goes to the engine's blocks too."""

    cache: Any
    keys_XKH: Tensor
    values_XKH: Tensor
    new: Tensor
    """The rows of the new positions."""

    @property
    def offset(self) -> int:
        """How many positions it holds."""
        found: int = self.cache.offset
        return found

    def update_and_fetch(self, key: Tensor, value: Tensor) -> Any:
        """Does as theirs: takes new positions, (1, K, T, H), and returns all, with a mask."""
        self.keys_XKH[self.new] = key[0].transpose(0, 1)
        self.values_XKH[self.new] = value[0].transpose(0, 1)
        return self.cache.update_and_fetch(key, value)


def refuse(config: ModelConfig) -> None:
    """ValueError, naming it, for what a model needs and the course's has no part for."""
    if config.quantization:
        raise ValueError(f"{FORM} cannot hold {config.quantization} weights; give the model that they were made from")
    refuse_switches(config, FORM, held=HELD)

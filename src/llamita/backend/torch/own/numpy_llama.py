"""The track `numpy`: a Llama that somebody has written in numpy, whose arrays are the tensors' own memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.backend.torch.own.cached import Kept, Written, same_sizes
from llamita.backend.torch.own.program import Trace
from llamita.model.config import ModelConfig
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD


class NumpyLlama(Written):
    """Their `forward`, over caches that are their `KeyValueCache`."""

    held = ("head_dim",)
    how = "sequences one after the other"

    def __init__(self, modules: SimpleNamespace, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        self.modules = modules
        self.config = same_sizes(modules.config.LlamaConfig, config)
        self.weights = {name: tensor.numpy() for name, tensor in parameters.items()}

    def cache(self, kept: Kept) -> "BlockCache":
        """Returns a cache of theirs of one layer that holds what is kept; what it is given next is kept too."""
        capacity = len(kept.earlier) + len(kept.new)
        cache = self.modules.cache.KeyValueCache(1, self.config.num_key_value_heads, capacity, self.config.head_dim)
        if len(kept.earlier):
            cache.extend(*(array.numpy() for array in kept.read()))
        return BlockCache(cache, kept)

    def run(self, tokens_BT: Tensor, caches: Sequence[Any]) -> Tensor:
        """Returns the logits (B, T, V) of new tokens, with a cache for each layer."""
        return tensor(self.modules.llama.forward(self.config, self.weights, tokens_BT.numpy(), list(caches)))

    def hidden(self, tokens_BT: Tensor, trace: Trace) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm, as their `forward` computes them, part by part."""
        x = self.modules.functions.embedding(tokens_BT.numpy(), self.weights[EMBEDDING])
        trace("embedding", tensor(x))
        for layer in range(self.config.num_hidden_layers):
            x = self.modules.llama.one_layer(self.config, self.weights, layer, x)
            trace(f"layers.{layer}", tensor(x))
        hidden_BTD = self.norm(tensor(x))
        trace("norm", hidden_BTD)
        return hidden_BTD

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""
        weight = self.weights["model.norm.weight"]
        return tensor(self.modules.functions.rms_norm(stream_BTD.numpy(), weight, self.config.rms_norm_eps))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""
        matrix = self.weights[EMBEDDING if self.config.tie_word_embeddings else OUTPUT_HEAD]
        return tensor(self.modules.functions.linear(hidden_BTD.numpy(), matrix))


@dataclass
class BlockCache:
    """A cache of theirs during a step: what it is given is kept too."""

    cache: Any
    kept: Kept

    @property
    def length(self) -> int:
        """How many positions it holds."""
        found: int = self.cache.length
        return found

    def extend(self, key: np.ndarray, value: np.ndarray) -> Any:
        """Does as theirs: takes new positions, (1, K, T, H), and returns all."""
        self.kept.write(tensor(key), tensor(value))
        return self.cache.extend(key, value)


def tensor(array: np.ndarray) -> Tensor:
    """Returns an array as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

"""The track `serving`: a Llama, a Qwen2 or a Qwen3 that somebody has written in PyTorch.

Sequences with equally many new tokens run together where their `BatchKvCache` is written, one after the other where
it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llamita.backend.torch.own.cached import Kept, Written, same_sizes
from llamita.backend.torch.own.program import Trace
from llamita.model.config import ModelConfig


class Serving(Written):
    """Their `Model`, over caches that are their `KvCache`."""

    held = ("attention_bias", "query_key_value_bias", "query_key_norm", "head_dim")

    def __init__(self, modules: SimpleNamespace, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        self.modules = modules
        sizes = same_sizes(modules.config.ModelConfig, config)
        self.model = modules.model.Model(sizes, parameters)
        self.together = modules.batch.BatchKvCache if hasattr(modules, "batch") else None
        how = "together" if self.together else "one after the other (the lesson batching is not written)"
        self.how = f"sequences {how}"

    def cache(self, kept: Kept) -> "BlockCache":
        """Returns a cache of theirs of one layer that holds what is kept; what it is given next is kept too."""
        cache = self.modules.kv_cache.KvCache()
        if len(kept.earlier):
            cache.update_and_fetch(*kept.read())
        return BlockCache(cache, kept)

    def run(self, tokens_BT: Tensor, caches: Sequence[Any]) -> Tensor:
        """Returns the logits (B, T, V) of new tokens, with a cache for each layer."""
        found: Tensor = self.model(tokens_BT, caches)
        return found

    def hidden(self, tokens_BT: Tensor, trace: Trace) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm, as their `Model` computes them, part by part."""
        h = self.model.embedding(tokens_BT)
        trace("embedding", h)
        for number, block in enumerate(self.model.blocks):
            h = block(h, self.modules.model.NoCache())
            trace(f"layers.{number}", h)
        h = self.norm(h)
        trace("norm", h)
        return h

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""
        found: Tensor = self.model.norm(stream_BTD)
        return found

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of hidden states (..., D)."""
        head = self.model.lm_head
        found: Tensor = (
            self.model.embedding.as_linear(hidden_BTD)
            if head is None
            else self.modules.projection.project(hidden_BTD, head)
        )
        return found


@dataclass
class BlockCache:
    """A cache of theirs during a step: what it is given is kept too."""

    cache: Any
    kept: Kept

    @property
    def offset(self) -> int:
        """How many positions it holds."""
        found: int = self.cache.offset
        return found

    def update_and_fetch(self, key: Tensor, value: Tensor) -> Any:
        """Does as theirs: takes new positions, (1, K, T, H), and returns all, with a mask."""
        self.kept.write(key, value)
        return self.cache.update_and_fetch(key, value)

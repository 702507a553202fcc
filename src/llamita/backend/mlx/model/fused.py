"""A parameter of the module: its place there, and the parameters of a checkpoint that it holds one below the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class FusedParameter:
    """A parameter of the module and the canonical parameters whose rows it stacks (one, where nothing is fused).

    Arrays of MLX do not change: an update puts a new one into its place, the `key` of the module `owner`.
    """

    name: str
    owner: nn.Module
    key: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    weight_decay: bool

    @property
    def parameter(self) -> mx.array:
        return self.owner[self.key]

    def replace(self, values: mx.array) -> None:
        self.owner[self.key] = values

    def split(self, tensor: mx.array) -> Sequence[mx.array]:
        """Returns the rows of `tensor`, shaped like the parameter, that belong to each part."""
        ends = list(accumulate(self.sizes))
        return [tensor[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

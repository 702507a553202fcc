"""Blocks of a model in MLX whose activations are computed a second time for the backward pass, instead of kept.

`mx.checkpoint` takes gradients by the arguments of a function alone, and calls that function twice. So the arrays that
a block reads are handed to it as arguments, and every dropout in it begins each time from the same key. Method: Chen et
al. 2016, arXiv:1604.06174.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.model.llama import Block, Context
from llamita.backend.mlx.model.lora import ModelAdapter
from llamita.backend.mlx.model.quantized import QuantizedLinear

Place = tuple[nn.Module, str]
"""A module, and the name of an array in it."""


def run_again(block: Block, x_BTD: mx.array, context: Context) -> mx.array:
    """Returns the block's output (B, T, D); its backward pass runs it again, with the same random numbers."""
    adapters = context.adapters
    assert adapters is None or isinstance(adapters, ModelAdapter)
    places = [*_places(block), *_places_of_adapter(block, adapters)]
    drawing = _Drawing(context)

    def run(values: Sequence[mx.array], x_BTD: mx.array) -> mx.array:
        before = [module[name] for module, name in places]
        _put(places, values)
        try:
            return block(x_BTD, drawing.begin())
        finally:
            _put(places, before)  # what stands in the model outlives neither call

    output_BTD: mx.array = mx.checkpoint(run)([module[name] for module, name in places], x_BTD)
    drawing.finish()
    return output_BTD


def _places(block: Block) -> list[Place]:
    """Returns where the block's arrays stand; quantised weights are constants, by which there is no gradient."""
    modules = [module for module in block.modules() if not isinstance(module, QuantizedLinear)]
    return [
        (module, name)
        for module in modules
        for name, value in module.items()
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    ]


def _places_of_adapter(block: Block, adapter: ModelAdapter | None) -> list[Place]:
    """Returns where the arrays of an adapter stand that the block goes through."""
    matrices = {module.name for module in block.modules() if hasattr(module, "product")}
    changes = {} if adapter is None else adapter.changes
    parts = [part for name, change in changes.items() if name in matrices for part in change.parts]
    return [(part, name) for part in parts for name in ("down_RD", "up_CR")]


def _put(places: Sequence[Place], values: Sequence[mx.array]) -> None:
    for (module, name), value in zip(places, values, strict=True):
        module[name] = value


class _Drawing:
    """The dropouts of one block: each call begins from the keys at which they stand now."""

    def __init__(self, context: Context) -> None:
        self.context = context
        adapters = context.adapters
        draws: dict[str, Dropout] = dict(adapters.draws) if isinstance(adapters, ModelAdapter) else {}
        self._originals = draws | ({"": context.dropout} if context.dropout else {})
        self._beginnings = {name: draw.copy() for name, draw in self._originals.items()}
        self._drawn: dict[str, Dropout] = {}

    def begin(self) -> Context:
        """Returns the context with fresh copies of its dropouts."""
        copies = {name: draw.copy() for name, draw in self._beginnings.items()}
        self._drawn = self._drawn or dict(copies)
        adapters, dropout = self.context.adapters, copies.pop("", None)
        if isinstance(adapters, ModelAdapter):
            adapters = replace(adapters, draws=copies)
        return replace(self.context, dropout=dropout, adapters=adapters)

    def finish(self) -> None:
        """Moves the model's own dropouts on by as much as the first call drew."""
        for name, original in self._originals.items():
            original.advance(self._drawn[name].calls - original.calls)

"""The part that the runners of both backends share besides the layout of a step. Knows no framework."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from llamita.backend.interface import WantedLogits
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter

MergedArrays = Callable[[Mapping[str, HostArray], Adapter], Iterable[tuple[str, HostArray]]]


def bytes_read_per_token(config: ModelConfig, sizes: Iterable[tuple[str, int]]) -> int:
    """Returns the bytes of weights that decoding one token reads; `sizes` are the bytes of each array by its name.

    Of an embedding that is not the output head too, a token reads one row, which is not counted.
    """
    is_output_head = config.tie_word_embeddings and not config.num_labels
    return sum(size for name, size in sizes if is_output_head or "embed_tokens" not in name)


def layers_of_attention(capture: Sequence[str], config: ModelConfig) -> frozenset[int]:
    """Returns the layers whose attention is among the places to capture; ValueError for a place that is none."""
    layers = range(config.num_hidden_layers)
    streams = {"embedding", *(f"layers.{layer}" for layer in layers), "norm"}
    attention = {f"layers.{layer}.attention": layer for layer in layers}
    unknown = [name for name in capture if name not in streams | attention.keys()]
    if unknown:
        last = layers[-1]
        raise ValueError(
            f"capture={unknown[0]!r} is unknown; there are embedding, layers.0 to layers.{last}, norm, and "
            f"layers.0.attention to layers.{last}.attention"
        )
    return frozenset(attention[name] for name in capture if name in attention)


def positions_of_logits(wanted: WantedLogits) -> slice | None:
    """Returns the positions whose logits are wanted, None for none at all; ValueError for another word."""
    positions = {"all": slice(None), "last": slice(-1, None), "none": None}
    if wanted not in positions:
        raise ValueError(f"logits={wanted!r} must be all, last or none")
    return positions[wanted]


Loaded = TypeVar("Loaded")


def adapter_named(adapters: Mapping[str, Loaded], name: str | None) -> Loaded | None:
    """Returns the adapter of this name, None for no name; ValueError where it is not loaded."""
    if name is not None and name not in adapters:
        known = ", ".join(sorted(adapters)) or "none"
        raise ValueError(f"there is no adapter {name!r}; loaded are: {known}")
    return None if name is None else adapters[name]


def with_adapter(
    config: ModelConfig, arrays: dict[str, HostArray], adapter: object, merged_arrays: MergedArrays
) -> dict[str, HostArray]:
    """Returns the arrays of a runner's model with its default adapter merged in, where it has one.

    ValueError over quantised weights, which take no sums.
    """
    if adapter is None:
        return arrays
    if config.quantization:
        raise ValueError(f"an adapter over {config.quantization} weights is no one model; use llamita merge")
    assert isinstance(adapter, Adapter), "the weights of an adapter in training are its step's to give"
    return dict(merged_arrays(arrays, adapter))

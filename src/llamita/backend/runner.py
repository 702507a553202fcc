"""The part that the runners of both backends share besides the layout of a step. Knows no framework."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

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


def check_captured(capture: Sequence[str], captured: Collection[str]) -> None:
    """Raises ValueError for a place that was asked for and that a model does not have."""
    unknown = [name for name in capture if name not in captured]
    if unknown:
        raise ValueError(f"capture={unknown[0]!r} is unknown; there are embedding, layers.0, layers.1, ... and norm")


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

"""Weights in int8 or int4: what a checkpoint calls them, and the shapes that they are stored in."""

from collections.abc import Mapping
from typing import Any, Literal

Quantization = Literal["", "int8", "int4"]
SCALE = "_scale"  # at the end of the name of a quantised weight's scales
QUANTIZATION_GROUP = 32  # numbers along the input that share a scale in int4
# What `config.json` says of a quantised model; -1 is a whole row.
QUANTIZATION_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"quant_method": "llamita", "bits": 8, "group_size": -1},
    "int4": {"quant_method": "llamita", "bits": 4, "group_size": 32},
}


def quantized_shapes(n_out: int, n_in: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a quantised matrix's values, in int4 two to a byte, and of its scales."""
    if bits == 8:
        return (n_out, n_in), (n_out,)
    return (n_out, -(-n_in // 2)), (n_out, -(-n_in // QUANTIZATION_GROUP))

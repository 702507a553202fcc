"""A linear layer over weights of either kind: plain ones, or the quantised ones of a later lesson."""

import mlx.core as mx
from basics import linear
from quantize import QuantizedWeights, quantized_linear


def project(x: mx.array, w: mx.array | QuantizedWeights, bias: mx.array | None = None) -> mx.array:
    """Returns `linear(x, w, bias)`, or `quantized_linear(x, w, bias)` where w is quantised."""
    return quantized_linear(x, w, bias) if isinstance(w, QuantizedWeights) else linear(x, w, bias)

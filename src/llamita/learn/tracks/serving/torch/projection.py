"""A linear layer over weights of either kind: plain ones, or the quantised ones of a later lesson."""

from basics import linear
from quantize import QuantizedWeights, quantized_linear
from torch import Tensor


def project(x: Tensor, w: Tensor | QuantizedWeights, bias: Tensor | None = None) -> Tensor:
    """Returns `linear(x, w, bias)`, or `quantized_linear(x, w, bias)` where w is quantised."""
    return quantized_linear(x, w, bias) if isinstance(w, QuantizedWeights) else linear(x, w, bias)

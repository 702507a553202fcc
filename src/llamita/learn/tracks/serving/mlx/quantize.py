"""Weights of 4 or 8 bits: each group of neighbouring weights shares a scale and a bias.

Letters: O outputs, I inputs, G groups of a row (I / group_size).
"""

from dataclasses import dataclass

import mlx.core as mx
from basics import linear


@dataclass(frozen=True)
class QuantizedWeights:
    """A matrix of weights (O, I), each a whole number q of 4 or 8 bits that stands for q * scale + bias.

    At 8 bits a byte is a number. At 4 bits a byte has two: the number at 2i in its lower four bits, the one at 2i + 1
    in its upper four.
    """

    weight: mx.array
    """(O, I * bits / 8), uint8."""
    scales: mx.array
    """(O, G), float32."""
    biases: mx.array
    """(O, G), float32."""
    group_size: int
    bits: int


def quantize_weights(w: mx.array, group_size: int = 64, bits: int = 4) -> QuantizedWeights:
    """Returns weights rounded to 4 or 8 bits. w: (O, I); I is a multiple of group_size.

    Weights 0 to group_size - 1 of a row are its first group, and so on. In each group the least weight becomes 0 and
    the greatest 2**bits - 1: the bias is the least weight, the scale the difference of the two over 2**bits - 1, and
    q = round((w - bias) / scale), where a half goes to the even neighbour. Where all weights of a group are equal, the
    scale is 1.
    """
    outputs, inputs = w.shape
    # to do: the groups, (O, G, group_size), in float32; biases and scales; the whole numbers; the bytes.
    groups = w.astype(mx.float32).reshape(outputs, inputs // group_size, group_size)
    biases = groups.min(axis=-1, keepdims=True)
    scales = (groups.max(axis=-1, keepdims=True) - biases) / (2**bits - 1)
    scales = mx.where(scales == 0, 1.0, scales)
    q = ((groups - biases) / scales).round().astype(mx.uint8).reshape(w.shape)
    if bits == 4:
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    return QuantizedWeights(q, scales[..., 0], biases[..., 0], group_size, bits)
    # done


def dequantize_weights(w: QuantizedWeights) -> mx.array:
    """Returns the weights that quantised ones stand for: (O, I), float32."""
    # to do: the numbers out of the bytes, in groups; q * scale + bias.
    q = w.weight
    if w.bits == 4:
        q = mx.stack((q & 15, q >> 4), axis=-1).flatten(-2)
    groups = q.astype(mx.float32).reshape(q.shape[0], -1, w.group_size)
    return (groups * w.scales[..., None] + w.biases[..., None]).reshape(q.shape)
    # done


def quantized_linear(x: mx.array, w: QuantizedWeights, bias: mx.array | None = None) -> mx.array:
    """Returns `linear` over what the weights stand for, in x's dtype. x: (N.., I). bias: (O). The result: (N.., O)."""
    # to do: one line.
    return linear(x, dequantize_weights(w).astype(x.dtype), bias)
    # done

"""Weights in int8 or int4: how they are rounded, stored, and laid out for MLX's product of packed weights.

The stored form is every backend's. int8: a scale a row, weight = scale * value, values from -127 to 127. int4: a scale
for 32 numbers along the input, values from -8 to 7, stored as value + 8, two to a byte, the earlier input in the low
half. Scales are bfloat16; values are rounded with the scale as it is stored. MLX's form is scale * q + bias with q from
0, packed into words of 32 bits from the lowest; `pack` gets from one to the other without rounding anything, since the
bias is -8 or -128 times the scale. Knows nothing of models, names or files.

Letters beyond the usual: G groups that share a scale, X numbers of a group, or bytes of a row.
"""

from dataclasses import dataclass

import mlx.core as mx

from llamita.model.quantization import QUANTIZATION_GROUP as GROUP

KERNEL_GROUPS = (128, 64, 32)
"""Numbers along the input that may share a scale in MLX's form."""
OFFSETS = {8: 128, 4: 8}


@dataclass(frozen=True)
class Packed:
    """A weight in MLX's form: words (C, D * bits / 32), scales and biases (C, D / group)."""

    words: mx.array
    scales: mx.array
    biases: mx.array
    group: int
    bits: int


def quantize(weight_CD: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Returns the nearest values, as stored, and their scales: int8 (C, D) and (C,), or uint8 (C, D/2) and (C, D/32).

    `mx.quantize` would choose biases of its own, which the stored form does not have. ValueError where a weight is NaN
    or infinite.
    """
    values, scale = (_quantize_int8 if bits == 8 else _quantize_int4)(weight_CD.astype(mx.float32))
    if not mx.all(mx.isfinite(scale)).item():
        raise ValueError("holds NaN or infinite values; the weights are damaged")
    return values, scale


def _quantize_int8(weight_CD: mx.array) -> tuple[mx.array, mx.array]:
    scale_C = (mx.abs(weight_CD).max(axis=1) / 127).astype(mx.bfloat16)
    values_CD = mx.clip(mx.round(weight_CD / _divisor(scale_C)[:, None]), -127, 127)
    return values_CD.astype(mx.int8), scale_C


def _quantize_int4(weight_CD: mx.array) -> tuple[mx.array, mx.array]:
    """Rounds so that the number of largest magnitude in a group becomes -8, its scale having the sign for it."""
    C, D = weight_CD.shape
    groups_CGX = mx.pad(weight_CD, [(0, 0), (0, -D % GROUP)]).reshape(C, -1, GROUP)
    largest_CG1 = mx.take_along_axis(groups_CGX, mx.argmax(mx.abs(groups_CGX), axis=-1, keepdims=True), axis=-1)
    scale_CG = (largest_CG1.squeeze(-1) / -8).astype(mx.bfloat16)
    values_CGX = mx.clip(mx.round(groups_CGX / _divisor(scale_CG)[..., None]), -8, 7) + 8
    values_CD = values_CGX.astype(mx.uint8).flatten(1)[:, : D + D % 2]
    return values_CD[:, 0::2] | (values_CD[:, 1::2] << 4), scale_CG


def _divisor(scale: mx.array) -> mx.array:
    """Returns the scale as it is stored, 1 where it is zero."""
    return mx.where(scale == 0, 1.0, scale.astype(mx.float32))


def dequantize(values: mx.array, scale: mx.array, D: int, dtype: mx.Dtype) -> mx.array:
    """Returns the weights (C, D) that stored values and scales stand for."""
    if values.dtype == mx.int8:
        return values.astype(dtype) * scale.astype(dtype)[:, None]
    unpacked_CD = mx.stack([values & 15, values >> 4], axis=-1).flatten(1)[:, :D]
    scale_CD = mx.repeat(scale, GROUP, axis=1)[:, :D]
    return (unpacked_CD.astype(mx.int8) - 8).astype(dtype) * scale_CD.astype(dtype)


# --- MLX's form ------------------------------------------------------------------------------------------------------


def packs(D: int) -> bool:
    """Returns whether MLX's form can hold a weight with D inputs: whole groups of numbers share a scale there."""
    return D % GROUP == 0


def pack(values: mx.array, scale: mx.array, dtype: mx.Dtype) -> Packed:
    """Returns stored values and scales in MLX's form, scales in the type of the activations that they will meet."""
    if values.dtype == mx.int8:
        bits, group = 8, next(group for group in KERNEL_GROUPS if values.shape[1] % group == 0)
        words = (values.view(mx.uint8) ^ 128).view(mx.uint32)
        scales = mx.repeat(scale.astype(dtype)[:, None], values.shape[1] // group, axis=1)
    else:
        bits, group = 4, GROUP
        words, scales = values.view(mx.uint32), scale.astype(dtype)
    packed = Packed(words, scales, scales * -OFFSETS[bits], group, bits)
    mx.eval(packed.words, packed.scales, packed.biases)
    return packed


def unpack(packed: Packed) -> mx.array:
    """Returns the stored values of a packed weight, as `pack` took them; the scales are stored beside."""
    bytes_CX = packed.words.view(mx.uint8)
    return bytes_CX if packed.bits == 4 else (bytes_CX ^ 128).view(mx.int8)


def product(x: mx.array, packed: Packed) -> mx.array:
    """Multiplies (..., D) by the weight to (..., C), in the type of the scales."""
    return mx.quantized_matmul(
        x.astype(packed.scales.dtype), packed.words, packed.scales, packed.biases, True, packed.group, packed.bits
    )


def rows(packed: Packed, ids: mx.array) -> mx.array:
    """Returns some rows of a packed weight in float32: ids (...) to (..., D).

    In bfloat16, scale * q + bias would be rounded between its two steps, by half a step of the values.
    """
    scales, biases = (array[ids].astype(mx.float32) for array in (packed.scales, packed.biases))
    return mx.dequantize(packed.words[ids], scales, biases, packed.group, packed.bits)

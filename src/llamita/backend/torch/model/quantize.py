"""Weights in int8 or int4, to be read beside the activations' own type: how they are rounded, stored and multiplied.

A plain form of each operation comes first; then the kernels of PyTorch's that a CPU decodes with, and the order in
which one of them wants its weights. Knows nothing of models, names or files.

int8: a scale a row, weight = scale * value, values from -127 to 127. int4: a scale for 32 numbers along the input,
values from -8 to 7, stored as value + 8, two to a byte, the earlier input in the low half. Scales are bfloat16, as the
kernels take them; values are rounded with the scale as it is stored, so that it costs no further error.

Letters beyond the usual: M rows of activations, G groups that share a scale, X numbers of a group, P pairs of rows in a
block, B blocks there.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.model.quantization import QUANTIZATION_GROUP as GROUP

KERNEL_ROWS = 24
"""Up to so many rows of activations the kernels are used; beyond, a matrix-matrix product of dequantised weights."""
QUANTIZED_AT_ONCE = 2**20  # numbers


def quantize(weight_CD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the nearest values, as stored, and their scales: int8 (C, D) and (C,), or uint8 (C, D/2) and (C, D/32).

    ValueError where a weight is NaN or infinite. Rows are done a few megabytes at a time.
    """
    rows = max(1, QUANTIZED_AT_ONCE // max(1, weight_CD.shape[1]))
    quantize_piece = _quantize_int8 if bits == 8 else _quantize_int4
    pieces = [quantize_piece(piece_CD.float()) for piece_CD in weight_CD.split(rows)]
    if not all(torch.isfinite(scale).all() for _, scale in pieces):
        raise ValueError("holds NaN or infinite values; the weights are damaged")
    return torch.cat([values for values, _ in pieces]), torch.cat([scale for _, scale in pieces])


def _quantize_int8(weight_CD: Tensor) -> tuple[Tensor, Tensor]:
    scale_C = (weight_CD.abs().amax(dim=1) / 127).bfloat16()
    values_CD = (weight_CD / _divisor(scale_C)[:, None]).round().clamp(-127, 127)
    return values_CD.to(torch.int8), scale_C


def _quantize_int4(weight_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds so that the number of largest magnitude in a group becomes -8, its scale having the sign for it.

    Over weights from a normal distribution the error is 8.6% of their size; with values of -7 to 7 only it is 9.7%.
    """
    D = weight_CD.shape[1]
    groups_CGX = F.pad(weight_CD, (0, -D % GROUP)).unflatten(1, (-1, GROUP))
    largest_CG1 = groups_CGX.gather(-1, groups_CGX.abs().argmax(dim=-1, keepdim=True))
    scale_CG = (largest_CG1.squeeze(-1) / -8).bfloat16()
    values_CGX = (groups_CGX / _divisor(scale_CG)[..., None]).round().clamp(-8, 7) + 8
    values_CD = values_CGX.to(torch.uint8).flatten(1)[:, : D + D % 2]
    return packed(values_CD), scale_CG


def _divisor(scale: Tensor) -> Tensor:
    """Returns the scale as it is stored, 1 where it is zero."""
    return torch.where(scale == 0, 1.0, scale.float())


def dequantize(values: Tensor, scale: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """Returns the weights (C, D) that stored values and scales stand for."""
    if values.dtype == torch.int8:
        return values.to(dtype).mul_(scale[:, None])
    return _scaled(unpacked(values)[:, :D].to(torch.int8), scale, dtype)


def unpacked(values: Tensor) -> Tensor:
    """Returns stored int4 values (C, D/2) one to a byte, 0 to 15: (C, D)."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(1)


def packed(unpacked_CD: Tensor) -> Tensor:
    """Inverts `unpacked`."""
    return unpacked_CD[:, 0::2] | unpacked_CD[:, 1::2] << 4


def _scaled(unpacked_CD: Tensor, scale_CG: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns unpacked int4 values, 0 to 15, into weights."""
    C, D = unpacked_CD.shape
    if D % GROUP:
        return (unpacked_CD - 8).to(dtype) * scale_CG.to(dtype).repeat_interleave(GROUP, dim=1)[:, :D]
    groups_CGX = (unpacked_CD - 8).view(C, D // GROUP, GROUP).to(dtype)
    return groups_CGX.mul_(scale_CG[..., None]).view(C, D)


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernel_fits(values: Tensor, C: int, D: int, dtype: torch.dtype) -> bool:
    """Returns whether PyTorch has a fast product of few rows for a weight of this shape, device and type.

    With activations in float32 the kernels run at a tenth of their speed, and for an input that is no multiple of 16
    the one for int8 reads past its weights (torch 2.13).
    """
    if values.device.type != "cpu" or dtype != torch.bfloat16 or D % GROUP:
        return False
    return values.dtype == torch.int8 or (C % 16 == 0 and bool(_rows_of_block()))


def int8_product(x_MD: Tensor, values_CD: Tensor, scale_C: Tensor) -> Tensor:
    """Multiplies a few rows by int8 weights, the plain order being the kernel's: (M, D) to (M, C)."""
    return torch._weight_int8pack_mm(x_MD, values_CD, scale_C)


def int4_product(x_MD: Tensor, blocked: Tensor, scales_and_zeros_GC2: Tensor) -> Tensor:
    """Multiplies a few rows by int4 weights in the kernel's order: (M, D) to (M, C)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MD, blocked, GROUP, scales_and_zeros_GC2)


def scales_and_zeros(scale_CG: Tensor) -> Tensor:
    """Returns scales as the int4 kernel takes them, (G, C, 2): it computes scale * value + zero, value -8 to 7."""
    return torch.stack((scale_CG, torch.zeros_like(scale_CG)), dim=-1).transpose(0, 1).contiguous()


def to_blocks(values: Tensor) -> Tensor:
    """Puts stored int4 values (C, D/2) into the order of the CPU's kernel; the number of bytes stays."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked(values).int(), 1)


def from_blocks(blocked: Tensor) -> Tensor:
    """Inverts `to_blocks`."""
    return packed(_unblocked(blocked, _rows_of_block()))


def dequantize_blocks(blocked: Tensor, scale_CG: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantises values in the kernel's order."""
    return _scaled(_unblocked(blocked, _rows_of_block()).view(torch.int8), scale_CG, dtype)


def _unblocked(blocked: Tensor, rows: int) -> Tensor:
    """Returns values 0 to 15 in plain rows, (C, D) of uint8.

    The kernel reads `rows` rows side by side: for each input a byte holds a row of the block's first half below, and
    its partner of the second half above. In the rest that fills no block, neighbours are partners.
    """
    C, D = blocked.shape[0], blocked.shape[1] * 2
    unpacked_CD = torch.empty(C, D, dtype=torch.uint8)
    whole = C // rows * rows
    for start, stop, pairs, neighbours in ((0, whole, rows // 2, False), (whole, C, (C - whole) // 2, True)):
        if start == stop:
            continue
        bytes_BPD = blocked[start:stop].reshape(-1, D, pairs).transpose(1, 2).contiguous()
        halves_B2PD = unpacked_CD[start:stop].view(-1, 2, pairs, D)
        if neighbours:
            halves_B2PD = unpacked_CD[start:stop].view(-1, pairs, 2, D).transpose(1, 2)
        torch.bitwise_and(bytes_BPD, 15, out=halves_B2PD[:, 0])
        torch.bitwise_right_shift(bytes_BPD, 4, out=halves_B2PD[:, 1])
    return unpacked_CD


@functools.cache
def _rows_of_block() -> int:
    """Returns the rows that this CPU's int4 kernel reads side by side; 0 where its order is unknown or it is not
    there."""
    known = torch.randint(0, 256, (112, GROUP // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain_CD = torch.stack((known & 15, known >> 4), dim=-1).flatten(1)
    try:
        blocked = to_blocks(known)
    except (RuntimeError, AttributeError):
        return 0
    return next((rows for rows in (64, 32) if torch.equal(_unblocked(blocked, rows), plain_CD)), 0)

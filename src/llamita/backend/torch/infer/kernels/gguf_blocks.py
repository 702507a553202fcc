"""The blocks of GGUF files that the kernels multiply as they are, taken apart into their numbers and scales
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).

Letters beyond the usual: O outputs, I inputs, G groups of 32 or 16 inputs, S parts of 256 inputs, B bytes, X numbers of
a group.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SharedScales(NamedTuple):
    """Scales, or minimums, of groups: whole numbers times a factor that 256 inputs share."""

    factors_OS: Tensor
    """float16."""
    wholes_OG: Tensor
    """int8."""


class Unpacked(NamedTuple):
    """The numbers of some blocks, as `blocked_bytes` takes them."""

    values: Tensor
    bits: int
    scales: Tensor | SharedScales
    minimums: Tensor | SharedScales | None = None


def in_halves(values_OI: Tensor) -> Tensor:
    """Returns numbers of four bits in bytes (O, G, 16): of each 32 the lower halves have the first sixteen."""
    values_OG2X = values_OI.unflatten(1, (-1, 2, 16))
    return values_OG2X[:, :, 0] | values_OG2X[:, :, 1] << 4


def unpacked(parts: Sequence[tuple[str, np.ndarray]]) -> Unpacked:
    """Returns the numbers of the rows of several parts, one after the other. A part is the kind of its blocks and the
    bytes of its rows, uint8 (O, bytes of a row)."""
    kinds = {kind for kind, _ in parts}
    assert can_hold(kinds), f"{kinds} are in no form together"
    if len(kinds) == 1:
        (_, first), *others = parts
        return PACKED[kinds.pop()](np.concatenate([first, *(rows for _, rows in others)]) if others else first)
    return _joined([_of_six_bits(PACKED[kind](rows)) for kind, rows in parts])


def can_hold(kinds: set[str]) -> bool:
    """Returns whether there is a form for rows in blocks of some kinds. Those of different kinds are together in a file
    of llama.cpp's type Q4_K_M, where values may have more bits than queries and keys."""
    return kinds <= PACKED.keys() and (len(kinds) == 1 or kinds == {"Q4_K", "Q6_K"})


def _unpack_32(kind: str, rows: np.ndarray) -> Unpacked:
    """A block of 32 numbers has its scale first, in Q4_1 then the minimum, both float16; then the numbers: bytes, or
    half bytes, of which the lower halves hold the first sixteen."""
    ahead = 4 if kind == "Q4_1" else 2
    blocks_OGB = torch.from_numpy(rows).view(len(rows), -1, ahead + (32 if kind == "Q8_0" else 16))
    floats_OGH, values_OGX = blocks_OGB.view(torch.float16), blocks_OGB[..., ahead:]
    if kind == "Q8_0":
        return Unpacked(values_OGX.flatten(1), 8, floats_OGH[..., 0])
    return Unpacked(values_OGX, 4, floats_OGH[..., 0], floats_OGH[..., 1] if ahead == 4 else None)


def _unpack_q4_k(rows: np.ndarray) -> Unpacked:
    """A block of 256 numbers has two float16, of its scales and of its minimums, which are subtracted; 12 bytes with
    six bits for each of eight scales and eight minimums; and half bytes, 32 numbers in the lower halves of 32 bytes and
    the next 32 in the upper ones.

    The lower six bits of the 12 bytes are scales 0 to 3, minimums 0 to 3; the last four bytes have the lower halves of
    scales 4 to 7 and, in their own upper halves, of minimums 4 to 7; the upper two bits of these are those of the
    first eight.
    """
    blocks_OSB = torch.from_numpy(rows).view(len(rows), -1, 144)
    factors_OS2 = blocks_OSB[..., :4].contiguous().view(torch.float16)
    scales, minimums, both = blocks_OSB[..., 4:16].split(4, dim=-1)
    scales_OSG = torch.cat((scales & 63, both & 15 | scales >> 6 << 4), dim=-1)
    minimums_OSG = torch.cat((minimums & 63, both >> 4 | minimums >> 6 << 4), dim=-1)
    pairs = blocks_OSB[..., 16:].unflatten(-1, (4, 1, 32))
    return Unpacked(
        in_halves(torch.cat((pairs & 15, pairs >> 4), dim=-2).flatten(1)),
        4,
        SharedScales(factors_OS2[..., 0], scales_OSG.flatten(1).view(torch.int8)),
        SharedScales(-factors_OS2[..., 1], minimums_OSG.flatten(1).view(torch.int8)),
    )


def _unpack_q6_k(rows: np.ndarray) -> Unpacked:
    """A block of 256 numbers has their lower four bits, their upper two, 16 scales of a byte and the float16 of these.

    Of each 128 numbers the lower bits are in 64 bytes, the first 64 in their lower halves; the upper bits are in 32
    bytes, of the first 32 numbers in the lowest bits.
    """
    blocks_OSB = torch.from_numpy(rows).view(len(rows), -1, 210)
    halves, quarters, scales_OSG, factor = blocks_OSB.split((128, 64, 16, 2), dim=-1)
    halves, quarters = halves.unflatten(-1, (2, 1, 64)), quarters.unflatten(-1, (2, 1, 32))
    lower = torch.cat((halves & 15, halves >> 4), dim=-2).flatten(1)
    upper = torch.cat([quarters >> bits & 3 for bits in (0, 2, 4, 6)], dim=-2).flatten(1)
    factors_OS = factor.contiguous().view(torch.float16)[..., 0]
    return Unpacked(lower | upper << 4, 6, SharedScales(factors_OS, scales_OSG.flatten(1).view(torch.int8)))


PACKED: dict[str, Callable[[np.ndarray], Unpacked]] = {
    **{kind: partial(_unpack_32, kind) for kind in ("Q8_0", "Q4_0", "Q4_1")},
    "Q4_K": _unpack_q4_k,
    "Q6_K": _unpack_q6_k,
}
"""The blocks of GGUF files that are kept as they are."""


def _of_six_bits(part: Unpacked) -> Unpacked:
    """Returns numbers of Q4_K or Q6_K in a form that holds both: of six bits, each 16 with a scale and a minimum."""
    assert isinstance(part.scales, SharedScales)
    factors_OS, wholes_OG = part.scales
    if part.bits == 6:
        nothing = SharedScales(torch.zeros_like(factors_OS), torch.zeros_like(wholes_OG))
        return part._replace(minimums=nothing)
    assert isinstance(part.minimums, SharedScales)
    twice = [SharedScales(each[0], each[1].repeat_interleave(2, 1)) for each in (part.scales, part.minimums)]
    values_OI = torch.cat((part.values & 15, part.values >> 4), dim=-1).flatten(1)
    return Unpacked(values_OI + 32, 6, *twice)


def _joined(parts: Sequence[Unpacked]) -> Unpacked:
    """Returns the rows of several parts, one after the other."""
    values, _, scales, minimums = zip(*parts, strict=True)
    shared = [SharedScales(*map(torch.cat, zip(*each, strict=True))) for each in (scales, minimums)]
    return Unpacked(torch.cat(values), parts[0].bits, *shared)

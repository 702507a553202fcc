"""Weights in blocks of 16 outputs, as the kernels read them: made from plain ones when a model is loaded.

A block holds 16 rows of a weight side by side. The numbers of one input lie next to each other, one for each lane of a
vector; of small numbers those of two inputs (bfloat16) or of four (bytes) lie together, which one instruction
multiplies.

Letters beyond the usual: O outputs, I inputs, J blocks of 16 outputs, G groups of 32 or 16 inputs, S parts of 256
inputs, R rows of activations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llamita.backend.torch.infer.kernels.compiled import Kernel
from llamita.backend.torch.infer.kernels.gguf_blocks import SharedScales, unpacked
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.infer.kernels.products import linear, rows_of
from llamita.backend.torch.infer.kernels.simd import LANES, Static, target
from llamita.backend.torch.infer.kernels.tiles import GROUP, SHARED, Form, bias
from llamita.backend.torch.memory import laid_out

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _nothing() -> np.ndarray:
    return np.empty(0, np.float32)


@dataclass(frozen=True)
class BlockedWeight:
    """A weight (n_out, n_in) in blocks; flat arrays, outputs filled up with zeros to whole blocks."""

    form: Form
    instructions: Instructions
    n_out: int
    n_in: int
    numbers: np.ndarray
    scales: np.ndarray = field(default_factory=_nothing)
    minimums: np.ndarray = field(default_factory=_nothing)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_out, self.n_in

    @property
    def dtype(self) -> torch.dtype:
        return FLOATS.get(self.form.numbers, torch.uint8)

    @property
    def width(self) -> int:
        """Outputs of all blocks."""
        return -(-self.n_out // LANES) * LANES

    @cached_property
    def of_kernel(self) -> tuple[Static, tuple[np.ndarray, np.ndarray, np.ndarray], int]:
        """The weight as `products.linear` takes it."""
        return Static(self.form), (self.numbers, self.scales, self.minimums), self.width

    @cached_property
    def _code(self) -> Static:
        return target(self.instructions)

    @cached_property
    def _linear(self) -> Kernel:
        return Kernel(linear)

    @cached_property
    def _rows_of(self) -> Kernel:
        return Kernel(rows_of)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, without what fills its last block up."""
        return (self.numbers.nbytes + self.scales.nbytes + self.minimums.nbytes) * self.n_out // self.width

    @property
    def is_finite(self) -> bool:
        """Whether the scales and minimums of all groups are numbers."""
        given = [each for each in (self.scales, self.minimums) if each.size]
        both = [self._records(each)[0] if self.form.scale == "int8" else self._floats(each) for each in given]
        return all(bool(torch.isfinite(each.sum(dtype=torch.float32))) for each in both)

    def _floats(self, numbers: np.ndarray) -> Tensor:
        """Returns scales or minimums, which are held as bits, as numbers."""
        return torch.from_numpy(numbers).view(FLOATS[self.form.scale])

    def product(self, x: Tensor, weight: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Computes `layers.linear`, in the type of x (..., I). `weight` is not read: this has its numbers."""
        y_RO = self.multiply(x.reshape(-1, self.n_in))
        y = y_RO.to(x.dtype).view(*x.shape[:-1], self.n_out)
        return y if bias_O is None else y + bias_O

    def multiply(self, x_RI: Tensor) -> Tensor:
        """Returns x W^T as float32, (R, n_in) to (R, n_out)."""
        x = x_RI.float().contiguous().numpy().reshape(-1)
        y = self._linear(torch.get_num_threads(), self._code, x, len(x_RI), self.of_kernel)
        return torch.from_numpy(y).view(len(x_RI), self.width)[:, : self.n_out]

    def plain(self) -> Tensor:
        """Returns the weight (O, I) in floating-point numbers: its own, or float32."""
        values_OI = self.values()
        if not self.form.in_bytes:
            return values_OI
        if self.form.by_row:
            return values_OI * self._floats(self.scales)[: self.n_out, None].float()
        scales_OG, *lowest = (self._of_groups(each) for each in (self.scales, self.minimums) if each.size)
        weight_OGX = (values_OI.unflatten(1, (-1, self.form.group)).float() - self.form.middle) * scales_OG[..., None]
        return (weight_OGX + lowest[0][..., None] if lowest else weight_OGX).flatten(1)

    def _of_groups(self, numbers: np.ndarray) -> Tensor:
        groups = self.n_in // self.form.group
        if self.form.scale == "int8":
            factors_JSL, wholes_JSGL = self._records(numbers)
            blocks = wholes_JSGL.float() * factors_JSL.float()[:, :, None]
        else:
            blocks = self._floats(numbers)
        return blocks.view(-1, groups, LANES).transpose(1, 2).reshape(-1, groups)[: self.n_out].float()

    def _records(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the float16 of each 256 inputs (J, S, 16), and the bytes that they multiply (J, S, G, 16)."""
        records_JSB = torch.from_numpy(numbers).view(-1, self.n_in // SHARED, self.form.record)
        factors_JSL = records_JSB[..., : 2 * LANES].contiguous().view(torch.float16)
        return factors_JSL, records_JSB[..., 2 * LANES :].view(torch.int8).unflatten(-1, (-1, LANES))

    def values(self) -> Tensor:
        """Returns the numbers as they were before, (O, I): floating-point ones, or bytes without their scales."""
        numbers = torch.from_numpy(self.numbers)
        if not self.form.in_bytes:
            numbers = numbers.view(FLOATS[self.form.numbers])
        elif self.form.numbers == "int4":
            halves = numbers.view(-1, GROUP // 8, LANES, 4)
            numbers = torch.cat((halves & 15, halves >> 4), dim=1)
        elif self.form.numbers == "int6":
            planes = numbers.view(-1, 3, LANES, 4)
            lower, upper = planes[:, :2, None], planes[:, 2:]
            of_four = torch.cat([upper >> bits & 3 for bits in (0, 2, 4, 6)], dim=1)
            numbers = torch.cat((lower & 15, lower >> 4), dim=2).flatten(1, 2) | of_four << 4
        together = self.form.together
        values_JLI = numbers.view(-1, self.n_in // together, LANES, together).transpose(1, 2)
        values_OI = values_JLI.reshape(-1, self.n_in)[: self.n_out]
        if self.form.numbers == "int8":
            return (values_OI ^ bias(self.form, self.instructions)).view(torch.int8)
        return values_OI

    def rows(self, wanted: Tensor) -> Tensor:
        """Returns some rows (..., I) of `plain()`, as float32."""
        rows_R = wanted.numpy().reshape(-1)
        if rows_R.size and not 0 <= rows_R.min() <= rows_R.max() < self.n_out:
            raise IndexError(f"rows {wanted.tolist()} of {self.n_out}")
        found = self.look_up(np.ascontiguousarray(rows_R, dtype=np.int64))
        return torch.from_numpy(found).view(*wanted.shape, self.n_in)

    def look_up(self, rows_R: np.ndarray) -> np.ndarray:
        """Returns the rows of some int64 numbers, float32 (R, I), flat. Whether a row is there is not looked at."""
        return self._rows_of(torch.get_num_threads(), self._code, rows_R, self.n_in, self.of_kernel)


def blocked_floats(weight_OI: Tensor, instructions: Instructions, rounded: bool = False) -> BlockedWeight:
    """Returns a weight of float32, float16 or bfloat16 in blocks; `rounded` as in `Form`."""
    n_out, n_in = weight_OI.shape
    name: Literal["float32", "float16", "bfloat16"] = str(weight_OI.dtype).removeprefix("torch.")  # type: ignore[assignment]
    form = Form(name, rounded=rounded)
    together = form.together
    assert n_in % together == 0, f"{n_in} inputs are not in pairs"
    weight_JLI = _padded(weight_OI).reshape(-1, LANES, n_in // together, together)
    blocks = laid_out(weight_JLI.transpose(1, 2))
    numbers = blocks.view(torch.float32 if name == "float32" else torch.uint16).numpy().reshape(-1)
    return BlockedWeight(form, instructions, n_out, n_in, numbers)


def blocked_bytes(
    values: Tensor,
    scales: Tensor | SharedScales,
    bits: int,
    instructions: Instructions,
    minimums: Tensor | SharedScales | None = None,
) -> BlockedWeight:
    """Returns a weight in bytes in blocks: int8 (O, I) with a scale for each row (O,) or group (O, G); of six bits
    (O, I), 0 to 63, standing for -32 to 31; or of four bits with a scale for each group, in bytes as `in_halves` gives
    them, standing for -8 to 7 where there are no `minimums` (O, G)."""
    n_out, n_in = len(values), math.prod(values.shape[1:]) * (2 if bits == 4 else 1)
    assert n_in % GROUP == 0, f"{n_in} inputs are not in groups of {GROUP}"
    by_row, group = False, GROUP
    if isinstance(scales, SharedScales):
        assert n_in % SHARED == 0, f"{n_in} inputs are not in groups of {SHARED}"
        kind, group = "int8", n_in // scales.wholes_OG.shape[1]
    else:
        kind, by_row = str(scales.dtype).removeprefix("torch."), scales.ndim == 1
    form = Form(f"int{bits}", kind, by_row, minimum=minimums is not None, group=group)  # type: ignore[arg-type]
    if bits == 6:
        chunks_JCL4 = _padded(values).reshape(-1, LANES, n_in // 4, 4).transpose(1, 2)
        lower = (chunks_JCL4[:, 0::2] & 15 | chunks_JCL4[:, 1::2] << 4).unflatten(1, (-1, 2))
        four = [chunks_JCL4[:, which::4] >> 4 << 2 * which for which in range(4)]
        upper = four[0] | four[1] | four[2] | four[3]
        laid = laid_out(torch.cat((lower, upper[:, :, None]), dim=2))
    else:  # four bytes at a time
        laid = laid_out(_padded(_words(values)).unflatten(0, (-1, LANES)).movedim(1, -1)).view(torch.uint8)
    numbers = laid.numpy().reshape(-1)
    if bits == 8:
        numbers ^= np.uint8(bias(form, instructions))
    if isinstance(scales, Tensor) and by_row:
        of_rows = _padded(scales).contiguous().view(torch.uint16).numpy()
        return BlockedWeight(form, instructions, n_out, n_in, numbers, of_rows)
    of_groups = [_blocked_groups(each) for each in (scales, minimums) if each is not None]
    return BlockedWeight(form, instructions, n_out, n_in, numbers, *of_groups)


def blocked_rows(parts: Sequence[tuple[str, np.ndarray]], instructions: Instructions) -> BlockedWeight:
    """Returns a weight whose rows are blocks of a GGUF file with their own numbers; parts as in `unpacked`."""
    values, bits, scales, minimums = unpacked(parts)
    return blocked_bytes(values, scales, bits, instructions, minimums)


def _words(x: Tensor) -> Tensor:
    """Returns bytes (..., 4 X) as words (..., X), where they lie if they lie as words do."""
    if any(step % 4 for step in (x.storage_offset(), *x.stride()[:-1])):
        x = x.contiguous()
    return x.view(torch.int32)


def _blocked_groups(numbers: Tensor | SharedScales) -> np.ndarray:
    if isinstance(numbers, Tensor):
        return laid_out(_lanes(numbers)).view(torch.uint16).numpy().reshape(-1)
    factors_JSL, wholes_JGL = (_lanes(each).contiguous() for each in numbers)
    wholes_JSB = wholes_JGL.view(torch.uint8).view(*factors_JSL.shape[:2], -1)
    return laid_out(torch.cat((factors_JSL.view(torch.uint8), wholes_JSB), dim=-1)).numpy().reshape(-1)


def _lanes(numbers_OG: Tensor) -> Tensor:
    """Returns numbers of each output (O, G) as (J, G, 16)."""
    return _padded(numbers_OG).unflatten(0, (-1, LANES)).transpose(1, 2)


def _padded(x_O: Tensor) -> Tensor:
    """Returns the numbers with zeros for outputs up to a whole block."""
    missing = -len(x_O) % LANES
    return torch.cat([x_O, x_O.new_zeros(missing, *x_O.shape[1:])]) if missing else x_O

"""Weights in blocks of 16 outputs, as the kernels read them: made from plain ones when a model is loaded.

A block holds 16 rows of a weight side by side. The numbers of one input lie next to each other, one for each lane of a
vector; of small numbers those of two inputs (bfloat16) or of four (bytes) lie together, which one instruction
multiplies.

Letters beyond the usual: O outputs, I inputs, J blocks of 16 outputs, G groups of 32 inputs, R rows of activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.infer.kernels.products import compiled_for, linear, tiles_of
from llamita.backend.torch.infer.kernels.simd import LANES, Static, target
from llamita.backend.torch.infer.kernels.tiles import GROUP, Form, bias
from llamita.backend.torch.memory import laid_out

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_COMPILED: dict[tuple[Form, Instructions], Callable[..., np.ndarray]] = {}


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

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes + self.minimums.nbytes

    @property
    def is_finite(self) -> bool:
        """Whether the scales and minimums of all groups are numbers."""
        both = (self._floats(each) for each in (self.scales, self.minimums) if each.size)
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
        code, tiles = target(self.instructions), tiles_of(self.instructions)
        arguments = (torch.get_num_threads(), code, tiles, x, len(x_RI), self.of_kernel)
        key = (self.form, self.instructions)
        if key not in _COMPILED:
            _COMPILED[key] = compiled_for(linear, arguments)
        y = _COMPILED[key](*arguments)
        return torch.from_numpy(y).view(len(x_RI), self.width)[:, : self.n_out]

    def plain(self) -> Tensor:
        """Returns the weight (O, I) in floating-point numbers: its own, or float32."""
        values_OI = self.values()
        if not self.form.in_bytes:
            return values_OI
        if self.form.by_row:
            return values_OI * self._floats(self.scales)[: self.n_out, None].float()
        scales_OG, *lowest = (self._of_groups(each) for each in (self.scales, self.minimums) if each.size)
        weight_OGX = (values_OI.unflatten(1, (-1, GROUP)).float() - self.form.middle) * scales_OG[..., None]
        return (weight_OGX + lowest[0][..., None] if lowest else weight_OGX).flatten(1)

    def _of_groups(self, numbers: np.ndarray) -> Tensor:
        blocks_JGL = self._floats(numbers).view(-1, self.n_in // GROUP, LANES)
        return blocks_JGL.transpose(1, 2).reshape(-1, self.n_in // GROUP)[: self.n_out].float()

    def values(self) -> Tensor:
        """Returns the numbers as they were before, (O, I): floating-point ones, or bytes without their scales."""
        numbers = torch.from_numpy(self.numbers)
        if not self.form.in_bytes:
            numbers = numbers.view(FLOATS[self.form.numbers])
        elif self.form.numbers == "int4":
            pairs_JPL4 = numbers.view(-1, self.n_in // 8, 1, LANES, 4)
            numbers = torch.cat((pairs_JPL4 & 15, pairs_JPL4 >> 4), dim=2)
        together = self.form.together
        values_JLI = numbers.view(-1, self.n_in // together, LANES, together).transpose(1, 2)
        values_OI = values_JLI.reshape(-1, self.n_in)[: self.n_out]
        if self.form.numbers == "int8":
            return (values_OI ^ bias(self.form, self.instructions)).view(torch.int8)
        return values_OI

    def rows(self, wanted: Tensor) -> Tensor:
        """Returns some rows (..., I) of a weight of floating-point numbers, or of int8 with a scale for each."""
        assert not self.form.in_bytes or self.form.by_row, "rows of groups are not taken apart"
        rows_R = wanted.numpy().reshape(-1)
        if rows_R.size and not 0 <= rows_R.min() <= rows_R.max() < self.n_out:
            raise IndexError(f"rows {wanted.tolist()} of {self.n_out}")
        together = self.form.together
        in_blocks = self.numbers.reshape(-1, self.n_in // together, LANES, together)
        found = torch.from_numpy(in_blocks[rows_R // LANES, :, rows_R % LANES]).view(*wanted.shape, self.n_in)
        if not self.form.in_bytes:
            return found.view(FLOATS[self.form.numbers])
        values = (found ^ bias(self.form, self.instructions)).view(torch.int8)
        return values * self._floats(self.scales)[wanted][..., None].float()


def blocked_floats(weight_OI: Tensor, instructions: Instructions, rounded: bool = False) -> BlockedWeight:
    """Returns a weight of float32, float16 or bfloat16 in blocks; `rounded` as in `Form`."""
    n_out, n_in = weight_OI.shape
    name: Literal["float32", "float16", "bfloat16"] = str(weight_OI.dtype).removeprefix("torch.")  # type: ignore[assignment]
    form = Form(name, rounded=rounded)
    together = form.together
    assert n_in % together == 0, f"{n_in} inputs are not in pairs"
    weight_JLI = _padded(weight_OI).view(-1, LANES, n_in // together, together)
    blocks = laid_out(weight_JLI.transpose(1, 2))
    numbers = blocks.view(torch.float32 if name == "float32" else torch.uint16).numpy().reshape(-1)
    return BlockedWeight(form, instructions, n_out, n_in, numbers)


def blocked_bytes(
    values_OI: Tensor, scales: Tensor, bits: int, instructions: Instructions, minimums: Tensor | None = None
) -> BlockedWeight:
    """Returns a weight in bytes in blocks: int8 `values_OI` with a scale for each row (O,) or group (O, G); of four
    bits 0 to 15 with a scale for each group, standing for -8 to 7 where there are no `minimums` (O, G)."""
    n_out, n_in = values_OI.shape
    assert n_in % GROUP == 0, f"{n_in} inputs are not in groups of {GROUP}"
    kind = cast(Literal["bfloat16", "float16"], str(scales.dtype).removeprefix("torch."))
    form = Form("int8" if bits == 8 else "int4", kind, by_row=scales.ndim == 1, minimum=minimums is not None)
    unsigned = values_OI.view(torch.uint8)
    if bits == 8 and bias(form, instructions):
        unsigned = unsigned ^ bias(form, instructions)
    chunks_JCL4 = _padded(unsigned).view(-1, LANES, n_in // 4, 4).transpose(1, 2)
    if bits == 4:
        chunks_JCL4 = chunks_JCL4[:, 0::2] | chunks_JCL4[:, 1::2] << 4
    numbers = laid_out(chunks_JCL4).numpy().reshape(-1)
    if form.by_row:
        return BlockedWeight(form, instructions, n_out, n_in, numbers, _padded(scales).view(torch.uint16).numpy())
    of_groups = [_blocked_groups(each) for each in (scales, minimums) if each is not None]
    return BlockedWeight(form, instructions, n_out, n_in, numbers, *of_groups)


PACKED = ("Q8_0", "Q4_0", "Q4_1")
"""The blocks of GGUF files that are kept as they are."""


def blocked_rows(kind: str, rows: np.ndarray, instructions: Instructions) -> BlockedWeight:
    """Returns a weight whose rows are blocks of a GGUF file, uint8 (O, bytes of a row), with their own numbers.

    A block of 32 numbers has its scale first, in Q4_1 then the minimum, both float16; then the numbers: bytes, or half
    bytes, of which the lower halves hold the first sixteen.
    """
    ahead = 4 if kind == "Q4_1" else 2
    blocks_OGB = torch.from_numpy(rows).view(len(rows), -1, ahead + (32 if kind == "Q8_0" else 16))
    ahead_OG = blocks_OGB[..., :ahead].contiguous().view(torch.float16)
    values_OGX = blocks_OGB[..., ahead:]
    if kind == "Q8_0":
        return blocked_bytes(values_OGX.flatten(1).view(torch.int8), ahead_OG[..., 0], 8, instructions)
    values_OI = torch.cat((values_OGX & 15, values_OGX >> 4), dim=-1).flatten(1)
    return blocked_bytes(values_OI, ahead_OG[..., 0], 4, instructions, ahead_OG[..., 1] if ahead == 4 else None)


def _blocked_groups(numbers_OG: Tensor) -> np.ndarray:
    blocks_JGL = laid_out(_padded(numbers_OG).view(-1, LANES, numbers_OG.shape[1]).transpose(1, 2))
    return blocks_JGL.view(torch.uint16).numpy().reshape(-1)


def _padded(x_O: Tensor) -> Tensor:
    """Returns the numbers with zeros for outputs up to a whole block."""
    missing = -len(x_O) % LANES
    return torch.cat([x_O, x_O.new_zeros(missing, *x_O.shape[1:])]) if missing else x_O.contiguous()

"""The inner loops of products: a few rows of activations times a few blocks of weights, all sums held in registers.

A block is 16 rows of a weight side by side, one in each lane of a vector: a number of an activation, put into all
lanes, meets the 16 weights of its column, and nothing is ever summed across lanes. Weights of one byte or less have a
scale for 32 or 16 numbers along the input, and perhaps a minimum; activations are then rounded to bytes, 32 with a
scale of theirs, and the products are whole numbers.

    y = scale_x (scale_w sum(w x) + minimum_w sum(x))    for each group of the weight

Letters beyond the usual: R rows of activations, O outputs of a weight, I its inputs, G groups of 32 inputs.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llamita.backend.torch.infer.kernels.simd import (
    BYTE,
    BYTES,
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    WORD,
    WORDS,
    ByteDots,
    Code,
    Variable,
    pointers,
)

GROUP = 32
"""Activations that share a scale; so do as many weights, unless their form says fewer."""
SUMMED = 16
"""Activations that a sum is kept of: the smallest group of a weight."""
SHARED = 256
"""Inputs that share the float16 which their groups' scales are multiplied by, where these are bytes."""
SMALLEST = 1e-30
"""Groups of smaller numbers are rounded to zeros."""
BYTES_A_CHUNK = 4 * LANES
AHEAD = 8192
"""Bytes from the weights that are multiplied to those that are fetched meanwhile: with several rows of activations
arithmetic takes so long that the processor does not read ahead by itself."""


class Form(NamedTuple):
    """How the numbers of a blocked weight are stored."""

    numbers: Literal["float32", "float16", "bfloat16", "int8", "int6", "int4"]
    scale: Literal["", "bfloat16", "float16", "int8"] = ""
    """The type of scales; int8: times a float16 that 256 inputs share."""
    by_row: bool = False
    """Whether an output has one scale for all of its groups."""
    minimum: bool = False
    """Whether a group has a minimum, in the type of its scale; int4 is then 0 to 15, and otherwise -8 to 7."""
    rounded: bool = False
    """Whether activations are bfloat16 too, where the processor multiplies that."""
    group: int = GROUP
    """Inputs that share a scale: 32 or 16."""

    @property
    def in_bytes(self) -> bool:
        return self.bits > 0

    @property
    def bits(self) -> int:
        """Bits of a number; 0 for floating-point ones."""
        return {"int8": 8, "int6": 6, "int4": 4}.get(self.numbers, 0)

    @property
    def stored_as(self) -> tuple[type, type, type]:
        """The types of the arrays of numbers, scales and minimums; those of two bytes are bits."""
        numbers = np.uint8 if self.in_bytes else np.float32 if self.numbers == "float32" else np.uint16
        scales = {"": np.float32, "int8": np.uint8}.get(self.scale, np.uint16)
        return numbers, scales, scales if self.minimum else np.float32

    @property
    def middle(self) -> int:
        """What 0 is stored as: six bits stand for -32 to 31, four bits without a minimum for -8 to 7."""
        return {"int6": 32, "int4": 0 if self.minimum else 8}.get(self.numbers, 0)

    @property
    def together(self) -> int:
        """Inputs whose numbers lie together, those of less than a byte once the parts of a byte are taken apart."""
        return {"bfloat16": 2, "int8": 4, "int6": 4, "int4": 4}.get(self.numbers, 1)

    @property
    def apart(self) -> int:
        """Fours of inputs from one to the other that is taken together with it: half a group where these are the halves
        of bytes."""
        return GROUP // 8 if self.numbers == "int4" else 1

    @property
    def record(self) -> int:
        """Bytes of the scales of 256 inputs that share a float16: this one first, then a byte for each group."""
        return LANES * (2 + SHARED // self.group)


def bias(form: Form, instructions: str) -> int:
    """Returns what is added to the numbers of a form so that they are stored without a sign."""
    return 128 if form.numbers == "int8" and instructions == "avx512" else form.middle


def rounds_activations(form: Form, instructions: str) -> bool:
    """Returns whether activations are bfloat16 for the product with a form; otherwise float32, or bytes."""
    return form.rounded and instructions == "avx512"


@intrinsic
def multiply_tile(
    typing_context: Any,
    target: Any,
    form: Any,
    rows: Any,
    blocks: Any,
    y: Any,
    width: Any,
    weights: Any,
    scales: Any,
    minimums: Any,
    block: Any,
    x: Any,
    x_scales: Any,
    x_sums: Any,
    row: Any,
    n_in: Any,
    of_rows: Any,
) -> Any:
    """Multiplies rows `row`, `row` + 1, ... of x, of `of_rows` that go past these blocks, by blocks `block`, `block` +
    1, ... and stores the sums in y.

    y is float32 (R, width), width being 16 times the number of blocks. x is float32 or bfloat16 (R, I); or int8 with
    `x_scales` float32 (R, G) and `x_sums` int32 (R, 2 G), of 16 numbers each. All arrays are flat.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        code = Code(builder, target.value)
        y_at, weights_at, scales_at, minimums_at, x_at, x_scales_at, x_sums_at = pointers(
            context, builder, signature, values, 4, 6, 7, 8, 10, 11, 12
        )
        width_value, first_block, first_row, inputs = (values[place] for place in (5, 9, 13, 14))
        tile = Tile(code, form.value, rows.value, blocks.value, inputs)
        tile.begin(weights_at, scales_at, minimums_at, first_block)
        tile.take(x_at, x_scales_at, x_sums_at, first_row)
        sums = tile.sums_of_bytes() if form.value.in_bytes else tile.sums_of_floats(first_row, values[15])
        for number, of_row in enumerate(sums):
            before = builder.mul(builder.add(first_row, LONG(number)), width_value)
            place = builder.add(before, builder.mul(first_block, LONG(LANES)))
            for which, total in enumerate(of_row):
                code.store(total, code.after(y_at, builder.add(place, LONG(which * LANES))))
        return context.get_dummy_value()

    arguments = (target, form, rows, blocks, y, types.intp, weights, scales, minimums, types.intp)
    return types.void(*arguments, x, x_scales, x_sums, types.intp, types.intp, types.intp), generate


@intrinsic
def unpack_block(
    typing_context: Any,
    target: Any,
    form: Any,
    weights: Any,
    scales: Any,
    minimums: Any,
    block: Any,
    n_in: Any,
    found: Any,
) -> Any:
    """Puts the weights of a block into `found`, float32 (I, 16): of bytes, numbers times scales, plus minimums.

    All arrays are flat.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        code = Code(builder, target.value)
        weights_at, scales_at, minimums_at, found_at = pointers(context, builder, signature, values, 2, 3, 4, 7)
        tile = Tile(code, form.value, 0, 1, values[6])
        tile.begin(weights_at, scales_at, minimums_at, values[5])
        tile.unpack(found_at)
        return context.get_dummy_value()

    return types.void(target, form, weights, scales, minimums, types.intp, types.intp, found), generate


class Tile:
    """The sums of one tile: `rows` rows of activations by `blocks` blocks of weights."""

    def __init__(self, code: Code, form: Form, rows: int, blocks: int, inputs: ir.Value) -> None:
        self.code, self.form, self.rows, self.blocks, self.inputs = code, form, rows, blocks, inputs
        self.builder = code.builder
        self.groups = self.builder.lshr(inputs, LONG(5))

    def begin(self, weights: ir.Value, scales: ir.Value, minimums: ir.Value, first_block: ir.Value) -> None:
        """Finds where the numbers of each block begin."""
        form, builder = self.form, self.builder
        items = builder.mul(self.inputs, LONG(LANES * form.bits // 8 if form.in_bytes else LANES))
        scale_items = LONG(LANES) if form.by_row else builder.mul(self.groups, LONG(LANES))
        if form.scale == "int8":
            scale_items = builder.mul(builder.udiv(self.inputs, LONG(SHARED)), LONG(form.record))
        self.weights = self._starts(weights, first_block, self.blocks, items)
        self.scales, self.minimums = (
            self._starts(pointer, first_block, self.blocks, scale_items) for pointer in (scales, minimums)
        )

    def take(self, x: ir.Value, x_scales: ir.Value, x_sums: ir.Value, first_row: ir.Value) -> None:
        """Finds where the numbers of each row begin."""
        self.x = self._starts(x, first_row, self.rows, self.inputs)
        self.x_scales = self._starts(x_scales, first_row, self.rows, self.groups)
        self.x_sums = self._starts(x_sums, first_row, self.rows, self.builder.mul(self.groups, LONG(GROUP // SUMMED)))

    def _starts(self, pointer: ir.Value, first: ir.Value, count: int, size: ir.Value) -> list[ir.Value]:
        """Returns where `count` items of a size begin, from the one of number `first` on."""
        numbers = [self.builder.add(first, LONG(which)) for which in range(count)]
        return [self.code.after(pointer, self.builder.mul(number, size)) for number in numbers]

    def sums_of_floats(self, first_row: ir.Value, of_rows: ir.Value) -> list[list[ir.Value]]:
        """Returns the sums of each row and block, over weights that are floating-point numbers. Meanwhile several rows
        fetch their share of the next blocks: memory would rest while all rows but the first few go past these."""
        code, zero = self.code, self.code.filled(FLOATS, 0.0)
        totals = [[code.variable(zero) for _ in range(self.blocks)] for _ in range(self.rows)]

        def add(row: int, x: ir.Value, weights: list[ir.Value]) -> None:
            for total, weight in zip(totals[row], weights, strict=True):
                total.set(code.multiply_add(weight, x, total.get()))

        if self.form.numbers == "bfloat16":
            reads_ahead = self.rows > 1 and self.blocks > 1
            share = self._share_of_next(first_row, of_rows) if reads_ahead else None
            with code.loop(self.builder.lshr(self.inputs, LONG(1))) as pair:
                two = self.builder.mul(pair.index, LONG(2))
                at = self.builder.mul(pair.index, LONG(2 * LANES))
                words = [code.load(code.after(start, at), WORDS) for start in self.weights]
                if reads_ahead:  # half as much as is read
                    line = code.after(share, self.builder.mul(pair.index, LONG(LANES * self.blocks)))
                    for number in range(self.blocks // 2):
                        code.fetch(code.after(line, 2 * LANES * number))
                if rounds_activations(self.form, code.instructions):
                    for row, start in enumerate(self.x):
                        x = code.splat(code.load(code.after(start, two), WORD))
                        for total, word in zip(totals[row], words, strict=True):
                            total.set(code.dot_bfloat16(total.get(), word, x))
                else:
                    halves = [code.split_bfloat16(word) for word in words]
                    for row, start in enumerate(self.x):
                        for which in (0, 1):
                            x = code.splat(code.load(code.after(start, self.builder.add(two, LONG(which))), FLOAT))
                            add(row, x, [half[which] for half in halves])
                if self.rows > 1:
                    code.end_turn()
        else:
            with code.loop(self.inputs) as turn:
                at = self.builder.mul(turn.index, LONG(LANES))
                weights = [code.load_floats(code.after(start, at), self.form.numbers) for start in self.weights]
                for row, start in enumerate(self.x):
                    add(row, code.splat(code.load(code.after(start, turn.index), FLOAT)), weights)
                if self.rows > 1:
                    code.end_turn()
        return [[total.get() for total in of_row] for of_row in totals]

    def _share_of_next(self, first_row: ir.Value, of_rows: ir.Value) -> ir.Value:
        """Returns where the share of the next blocks begins for the rows from one on, of so many."""
        size = self.builder.mul(self.inputs, LONG(self.blocks * LANES))
        place = self.builder.add(size, self.builder.udiv(self.builder.mul(size, first_row), of_rows))
        return self.code.after(self.weights[0], place)

    def sums_of_bytes(self) -> list[list[ir.Value]]:
        """Returns the sums of each row and block, over weights and activations in bytes."""
        code, builder, form = self.code, self.builder, self.form
        totals = [[code.variable(code.filled(FLOATS, 0.0)) for _ in self.weights] for _ in self.x]
        with code.loop(self.groups) as group:
            for part in range(GROUP // form.group):
                self._add_group(totals, group.index, part)
        found = [[total.get() for total in of_row] for of_row in totals]
        if form.by_row:
            scales = [code.load_floats(start, form.scale) for start in self.scales]
            found = [[builder.fmul(*pair) for pair in zip(of_row, scales, strict=True)] for of_row in found]
        return found

    def unpack(self, found: ir.Value) -> None:
        """Stores the weights of the tile's only block as float32."""
        if not self.form.in_bytes:
            self._unpack_floats(found)
            return
        with self.code.loop(self.groups) as group:
            for part in range(GROUP // self.form.group):
                self._unpack_group(found, group.index, part)

    def _unpack_floats(self, found: ir.Value) -> None:
        code, builder, (start,) = self.code, self.builder, self.weights
        together = self.form.together
        with code.loop(builder.udiv(self.inputs, LONG(together))) as turn:
            at = builder.mul(turn.index, LONG(LANES * together))
            place = code.after(start, at)
            if together == 2:
                numbers = list(code.split_bfloat16(code.load(place, WORDS)))
            else:
                numbers = [code.load_floats(place, self.form.numbers)]
            for which, number in enumerate(numbers):
                code.store(number, code.after(found, builder.add(at, LONG(which * LANES))))

    def _unpack_group(self, found: ir.Value, group: ir.Value, part: int) -> None:
        code, builder, form = self.code, self.builder, self.form
        if form.by_row:
            scale = code.load_floats(self.scales[0], form.scale)
        else:
            scale = self._scales(self.scales[0], group, part)
        lowest = self._scales(self.minimums[0], group, part) if form.minimum else None
        for chunk in self._firsts(part):
            for which, four in enumerate(self._chunks(self.weights[0], group, chunk)):
                first = builder.add(builder.mul(group, LONG(GROUP)), LONG(4 * (chunk + form.apart * which)))
                for place, number in enumerate(self._numbers(four)):
                    value = builder.fmul(number, scale)
                    at = builder.mul(builder.add(first, LONG(place)), LONG(LANES))
                    code.store(builder.fadd(value, lowest) if lowest else value, code.after(found, at))

    def _numbers(self, four: ir.Value) -> list[ir.Value]:
        """Returns the numbers of four inputs, each of which is a byte of every lane, as FLOATS."""
        code, builder = self.code, self.builder
        words, less = builder.bitcast(four, WORDS), bias(self.form, code.instructions)
        found = []
        for byte in range(4):
            raised = builder.shl(words, code.filled(WORDS, 24 - 8 * byte))
            signed = self.form.numbers == "int8" and not less
            number = (builder.ashr if signed else builder.lshr)(raised, code.filled(WORDS, 24))
            found.append(builder.sitofp(builder.sub(number, code.filled(WORDS, less)), FLOATS))
        return found

    def _add_group(self, totals: list[list[Variable]], group: ir.Value, part: int) -> None:
        """Adds the products of one group of the weight: a part of a group of activations, or all of it."""
        code, builder, form = self.code, self.builder, self.form
        sums = [self._sum(start, group, part) for start in self.x_sums]
        starts = [code.splat(builder.mul(total, WORD(-bias(form, code.instructions)))) for total in sums]
        dots = [[ByteDots(code, form.bits, start) for _ in self.weights] for start in starts]
        first = builder.mul(group, LONG(GROUP))
        for chunk in self._firsts(part):
            pairs = [self._chunks(start, group, chunk) for start in self.weights]
            for which in (0, 1):
                for row, start in enumerate(self.x):
                    place = builder.add(first, LONG(4 * (chunk + form.apart * which)))
                    x = builder.bitcast(code.splat(code.load(code.after(start, place), WORD)), BYTES)
                    for dot, pair in zip(dots[row], pairs, strict=True):
                        dot.add(pair[which], x)
        scales = [None if form.by_row else self._scales(start, group, part) for start in self.scales]
        for row, start in enumerate(self.x_scales):
            x_scale = code.load(code.after(start, group), FLOAT)
            x_scales = code.splat(x_scale)
            for total, dot, scale in zip(totals[row], dots[row], scales, strict=True):
                factor = x_scales if scale is None else builder.fmul(scale, x_scales)
                total.set(code.multiply_add(builder.sitofp(dot.sum(), FLOATS), factor, total.get()))
            if form.minimum:
                x_sum = code.splat(builder.fmul(x_scale, builder.sitofp(sums[row], FLOAT)))
                for total, minimum in zip(totals[row], self.minimums, strict=True):
                    lowest = self._scales(minimum, group, part)
                    total.set(code.multiply_add(lowest, x_sum, total.get()))

    def _sum(self, start: ir.Value, group: ir.Value, part: int) -> ir.Value:
        """Returns the sum of the activations that meet one group of the weight."""
        first, count = self.builder.mul(group, LONG(GROUP // SUMMED)), self.form.group // SUMMED
        places = [self.builder.add(first, LONG(part * count + which)) for which in range(count)]
        words = [self.code.load(self.code.after(start, place), WORD) for place in places]
        return words[0] if count == 1 else self.builder.add(*words)

    def _scales(self, start: ir.Value, group: ir.Value, part: int) -> ir.Value:
        """Returns the scales, or the minimums, of one group of the weight: FLOATS."""
        code, builder, form = self.code, self.builder, self.form
        if form.scale != "int8":
            return code.load_floats(code.after(start, builder.mul(group, LONG(LANES))), form.scale)
        groups = SHARED // GROUP
        record = code.after(start, builder.mul(builder.udiv(group, LONG(groups)), LONG(form.record)))
        whole = builder.mul(builder.urem(group, LONG(groups)), LONG(GROUP // form.group * LANES))
        place = builder.add(whole, LONG((2 + part) * LANES))  # two bytes in each lane are the float16
        return builder.fmul(code.load_floats(code.after(record, place), "int8"), code.load_floats(record, "float16"))

    def _firsts(self, part: int) -> list[int]:
        """Returns the fours of inputs of a part of a group, but those that are taken together with an earlier one."""
        chunks = self.form.group // 4
        whole = range(part * chunks, (part + 1) * chunks)
        return [chunk for chunk in whole if chunk // self.form.apart % 2 == 0]

    def _chunks(self, start: ir.Value, group: ir.Value, chunk: int) -> list[ir.Value]:
        """Returns the weights of four inputs, and of those that are taken together with them: BYTES each."""
        builder, bits = self.builder, self.form.bits
        in_group = builder.mul(group, LONG(GROUP * LANES * bits // 8))

        def load(at: int) -> ir.Value:
            place = self.code.after(start, builder.add(in_group, LONG(at * BYTES_A_CHUNK)))
            if self.rows > 1:
                self.code.fetch(self.code.after(place, AHEAD))
            return self.code.load(place, BYTES)

        if bits == 8:
            return [load(chunk), load(chunk + 1)]
        if bits == 4:
            return self._halves(load(chunk))
        half, pair = chunk // 4, chunk % 4 // 2  # sixteen inputs: their lower four bits, then all their upper two
        upper = load(3 * half + 2)
        lower = self._halves(load(3 * half + pair))
        return [builder.or_(number, self._upper_bits(upper, 2 * pair + which)) for which, number in enumerate(lower)]

    def _halves(self, both: ir.Value) -> list[ir.Value]:
        """Returns the lower and the upper four bits of bytes."""
        code, builder = self.code, self.builder
        return [builder.and_(both, code.filled(BYTES, 15)), builder.lshr(both, code.filled(BYTES, 4))]

    def _upper_bits(self, four: ir.Value, which: int) -> ir.Value:
        """Returns two of the bits of bytes, the first or a later two, where they belong in numbers of six bits."""
        code, builder = self.code, self.builder
        if which < 2:
            moved = builder.shl(four, code.filled(BYTES, 4 - 2 * which))
        else:
            moved = builder.lshr(four, code.filled(BYTES, 2 * which - 4))
        return builder.and_(moved, code.filled(BYTES, 0x30))


@intrinsic
def round_group(typing_context: Any, target: Any, x: Any, rounded: Any, scales: Any, sums: Any, group: Any) -> Any:
    """Rounds 32 float32 of x to int8 from -127 to 127, the largest magnitude becoming 127; with their scale, and
    the sums of 16 each.

    All arrays are flat, groups one after the other. With NaN or infinity among them the scale is no number either, and
    so is every product.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        code = Code(builder, target.value)
        x_at, rounded_at, scales_at, sums_at = pointers(context, builder, signature, values, 1, 2, 3, 4)
        first = builder.mul(values[5], LONG(GROUP))
        halves = [code.load(code.after(x_at, builder.add(first, LONG(which))), FLOATS) for which in (0, LANES)]
        # Without their signs, floats are in the order of their bits, beyond infinity NaN: the largest is one there is.
        sizes = [builder.and_(builder.bitcast(half, WORDS), code.filled(WORDS, 0x7FFFFFFF)) for half in halves]
        both = code.call("llvm.umax.v16i32", WORDS, *sizes)
        largest = builder.bitcast(code.call("llvm.vector.reduce.umax.v16i32", WORD, both), FLOAT)
        finite = builder.fcmp_ordered("<", largest, FLOAT(float("inf")))
        usable = builder.and_(finite, builder.fcmp_ordered(">", largest, FLOAT(SMALLEST)))
        factor = builder.select(usable, builder.fdiv(FLOAT(127.0), largest), FLOAT(0.0))
        for which, half in enumerate(halves):
            nearest = code.call("llvm.rint.v16f32", FLOATS, builder.fmul(half, code.splat(factor)))
            word = builder.select(finite, builder.fptosi(nearest, WORDS), code.filled(WORDS, 0))
            narrow = builder.trunc(word, ir.VectorType(BYTE, LANES))
            code.store(narrow, code.after(rounded_at, builder.add(first, LONG(which * LANES))))
            # Bytes without a sign are summed in one instruction.
            raised = builder.zext(builder.xor(narrow, code.filled(narrow.type, 0x80)), WORDS)
            total = builder.sub(code.call("llvm.vector.reduce.add.v16i32", WORD, raised), WORD(0x80 * LANES))
            place = builder.add(builder.mul(values[5], LONG(GROUP // SUMMED)), LONG(which))
            code.store(total, code.after(sums_at, place))
        code.store(builder.fdiv(largest, FLOAT(127.0)), code.after(scales_at, values[5]))
        return context.get_dummy_value()

    return types.void(target, x, rounded, scales, sums, types.intp), generate

"""What a decoding step does besides products, sixteen numbers at a time: norms, rotations, exponentials, mixing values.

The exponential is a polynomial (Cephes, Moshier 1989): within 2 units in the last place of float32 from -87 to 88, and
0 below. SiLU divides by one more than it.

Letters beyond the usual: Z numbers of a vector, laid end to end in flat arrays.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llamita.backend.torch.infer.kernels.simd import FLOAT, FLOATS, LANES, LONG, WORD, WORDS, Code, pointers

ROWS_AHEAD = 8
"""Rows of keys or values from those that are read to those that are fetched meanwhile."""
LOWEST, HIGHEST = -87.3, 88.3
"""Exponents beyond which the exponential is no ordinary float32."""
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exponential(code: Code, x: ir.Value) -> ir.Value:
    """Returns e^x in each lane: 2^n e^r with a whole n and r between -ln(2) / 2 and ln(2) / 2."""
    builder = code.builder

    def all_lanes(value: float) -> ir.Value:
        return code.filled(FLOATS, value)

    held = code.call("llvm.maxnum.v16f32", FLOATS, x, all_lanes(LOWEST))
    held = code.call("llvm.minnum.v16f32", FLOATS, held, all_lanes(HIGHEST))
    whole = code.call("llvm.rint.v16f32", FLOATS, builder.fmul(held, all_lanes(LOG2_E)))
    rest = code.multiply_add(whole, all_lanes(-LN2_HIGH), held)
    rest = code.multiply_add(whole, all_lanes(-LN2_LOW), rest)
    value = all_lanes(POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        value = code.multiply_add(value, rest, all_lanes(coefficient))
    value = code.multiply_add(builder.fmul(value, rest), rest, builder.fadd(rest, all_lanes(1.0)))
    exponent = builder.shl(builder.fptosi(whole, WORDS), code.filled(WORDS, 23))
    value = builder.bitcast(builder.add(builder.bitcast(value, WORDS), exponent), FLOATS)
    value = builder.select(builder.fcmp_ordered("<", x, all_lanes(LOWEST)), all_lanes(0.0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)  # NaN stays NaN


@intrinsic
def score(
    typing_context: Any, code: Any, kind: Any, rows: Any, count: Any, query: Any, query_at: Any, query_step: Any,
    keys: Any, at: Any, step: Any, size: Any, scale: Any, scores: Any, place: Any, place_step: Any
) -> Any:  # fmt: skip
    """Stores `scale` times the dot product of each of `rows` queries with each of `count` keys: those of the first
    query in scores from `place` on, and those of each further one `place_step` behind. Queries lie `query_step` numbers
    apart, and keys `step`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        query_p, keys_p, scores_p = pointers(context, builder, signature, values, 4, 7, 12)
        query_p, keys_p = writer.after(query_p, values[5]), writer.after(keys_p, values[8])
        queries = [writer.after(query_p, builder.mul(values[6], LONG(row))) for row in range(rows.value)]
        beside = [writer.after(keys_p, builder.mul(values[9], LONG(number))) for number in range(count.value)]
        ahead = builder.mul(values[9], LONG(ROWS_AHEAD))
        totals = [[writer.variable(writer.filled(FLOATS, 0.0)) for _ in beside] for _ in queries]
        with writer.loop(builder.lshr(values[10], LONG(4))) as turn:
            first = builder.mul(turn.index, LONG(LANES))
            if rows.value == 1:  # else arithmetic takes so long that the processor reads ahead by itself
                for key in beside:
                    writer.fetch(writer.after(key, builder.add(first, ahead)))
            numbers = [writer.load_floats(writer.after(key, first), kind.value) for key in beside]
            for start, of_row in zip(queries, totals, strict=True):
                part = writer.load(writer.after(start, first), FLOATS)
                for key, total in zip(numbers, of_row, strict=True):
                    total.set(writer.multiply_add(part, key, total.get()))
        sums = sums_of_lanes(writer, [total.get() for of_row in totals for total in of_row])
        scaled = builder.fmul(sums, writer.splat(values[11], rows.value * count.value))
        for row in range(rows.value):
            of_row = writer.picked(scaled, scaled, range(row * count.value, (row + 1) * count.value))
            at_row = builder.add(values[13], builder.mul(values[14], LONG(row)))
            writer.store(of_row, writer.after(scores_p, at_row))
        return context.get_dummy_value()

    four = (types.intp,) * 4
    arguments = (code, kind, rows, count, query, types.intp, types.intp, keys, *four[:3], types.float32, scores)
    return types.void(*arguments, types.intp, types.intp), generate


def sums_of_lanes(code: Code, vectors: list[ir.Value]) -> ir.Value:
    """Returns the sum over the lanes of each of a power of two of vectors, side by side in one."""
    for width in (8, 4, 2, 1):  # what is left of a vector in two parts of so many lanes is added to one
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_halved(code, x, y, 2 * LANES, width) for x, y in pairs]
        else:
            vectors = [_halved(code, vectors[0], vectors[0], vectors[0].type.count, width)]
    return vectors[0]


def _halved(code: Code, x: ir.Value, y: ir.Value, lanes: int, width: int) -> ir.Value:
    """Adds every second `width` of the first `lanes` lanes of two vectors, laid end to end, to those before them."""
    earlier = [lane for lane in range(lanes) if lane % (2 * width) < width]
    return code.builder.fadd(code.picked(x, y, earlier), code.picked(x, y, [lane + width for lane in earlier]))


def sum_of_lanes(code: Code, vector: ir.Value) -> ir.Value:
    """Returns the sum over the lanes of one vector."""
    return code.builder.extract_element(sums_of_lanes(code, [vector]), WORD(0))


@intrinsic
def mix(
    typing_context: Any, code: Any, kind: Any, count: Any, out: Any, out_at: Any, memory: Any, at: Any, step: Any,
    size: Any, weights: Any, place: Any
) -> Any:  # fmt: skip
    """Adds `count` rows of a memory, `step` numbers apart, to out[out_at : out_at + size], each times its weight, of
    which the first is weights[place]."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        out_p, memory_p, weights_p = pointers(context, builder, signature, values, 3, 5, 9)
        out_p, memory_p = writer.after(out_p, values[4]), writer.after(memory_p, values[6])
        rows = [writer.after(memory_p, builder.mul(values[7], LONG(row))) for row in range(count.value)]
        shares, ahead = [], builder.mul(values[7], LONG(ROWS_AHEAD))
        for number in range(count.value):
            weight = writer.load(writer.after(weights_p, builder.add(values[10], LONG(number))), FLOAT)
            shares.append(writer.splat(weight))
        with writer.loop(builder.lshr(values[8], LONG(4))) as turn:
            first = builder.mul(turn.index, LONG(LANES))
            at_place = writer.after(out_p, first)
            total = writer.load(at_place, FLOATS)
            for row, share in zip(rows, shares, strict=True):
                writer.fetch(writer.after(row, builder.add(first, ahead)))
                total = writer.multiply_add(writer.load_floats(writer.after(row, first), kind.value), share, total)
            writer.store(total, at_place)
        return context.get_dummy_value()

    whole = (types.intp, types.intp, types.intp)
    arguments = (code, kind, count, out, types.intp, memory, *whole, weights, types.intp)
    return types.void(*arguments), generate


@intrinsic
def mix_rows(
    typing_context: Any, code: Any, kind: Any, rows: Any, out: Any, out_at: Any, out_step: Any, memory: Any, at: Any,
    step: Any, count: Any, size: Any, weights: Any, place: Any, place_step: Any
) -> Any:  # fmt: skip
    """Adds `count` rows of a memory, `step` numbers apart, each times its weight, to each of `rows` rows of `size`
    numbers of out, `out_step` apart. The weights of each lie side by side, `place_step` from those of the row
    before."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        out_p, memory_p, weights_p = pointers(context, builder, signature, values, 3, 6, 11)
        out_p, memory_p = writer.after(out_p, values[4]), writer.after(memory_p, values[7])
        weights_p = writer.after(weights_p, values[12])
        outs, of_rows = (
            [writer.after(pointer, builder.mul(values[step], LONG(row))) for row in range(rows.value)]
            for pointer, step in ((out_p, 5), (weights_p, 13))
        )
        with writer.loop(builder.lshr(values[10], LONG(4))) as turn:
            first = builder.mul(turn.index, LONG(LANES))
            places = [writer.after(each, first) for each in outs]
            totals = [writer.variable(writer.load(each, FLOATS)) for each in places]
            column_p = writer.after(memory_p, first)
            with writer.loop(values[9]) as inner:
                number = inner.index
                numbers = writer.load_floats(writer.after(column_p, builder.mul(values[8], number)), kind.value)
                for total, each in zip(totals, of_rows, strict=True):
                    weight = writer.splat(writer.load(writer.after(each, number), FLOAT))
                    total.set(writer.multiply_add(numbers, weight, total.get()))
            for total, each in zip(totals, places, strict=True):
                writer.store(total.get(), each)
        return context.get_dummy_value()

    whole = (types.intp, types.intp)
    arguments = (code, kind, rows, out, *whole, memory, *whole, *whole, weights, *whole)
    return types.void(*arguments), generate


@intrinsic
def save(typing_context: Any, code: Any, kind: Any, memory: Any, at: Any, x: Any, x_at: Any, size: Any) -> Any:
    """Puts `size` numbers of x, float32, into a memory of some type from `at` on, each to the nearest."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        memory_p, x_p = pointers(context, builder, signature, values, 2, 4)
        memory_p, x_p = writer.after(memory_p, values[3]), writer.after(x_p, values[5])
        with writer.loop(builder.lshr(values[6], LONG(4))) as turn:
            first = builder.mul(turn.index, LONG(LANES))
            numbers = writer.load(writer.after(x_p, first), FLOATS)
            writer.store(writer.narrowed(numbers, kind.value), writer.after(memory_p, first))
        return context.get_dummy_value()

    return types.void(code, kind, memory, types.intp, x, types.intp, types.intp), generate


@intrinsic
def sum_of_squares(typing_context: Any, code: Any, x: Any, at: Any, size: Any) -> Any:
    """Returns the sum of the squares of `size` numbers, a multiple of 16, from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        (x_p,) = pointers(context, builder, signature, values, 1)
        x_p = writer.after(x_p, values[2])
        total = writer.variable(writer.filled(FLOATS, 0.0))
        with writer.loop(builder.lshr(values[3], LONG(4))) as turn:
            numbers = writer.load(writer.after(x_p, builder.mul(turn.index, LONG(LANES))), FLOATS)
            total.set(writer.multiply_add(numbers, numbers, total.get()))
        return sum_of_lanes(writer, total.get())

    return types.float32(code, x, types.intp, types.intp), generate


@intrinsic
def round_numbers(typing_context: Any, code: Any, kind: Any, x: Any, at: Any, size: Any) -> Any:
    """Rounds `size` numbers of x from `at` on, float32, to the nearest of a type, in place."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        (x_p,) = pointers(context, builder, signature, values, 2)
        x_p = writer.after(x_p, values[3])
        with writer.loop(builder.lshr(values[4], LONG(4))) as turn:
            place = writer.after(x_p, builder.mul(turn.index, LONG(LANES)))
            numbers = writer.narrowed(writer.load(place, FLOATS), kind.value)
            if kind.value == "bfloat16":
                numbers = writer.from_bfloat16(numbers)
            elif kind.value == "float16":
                numbers = writer.from_float16(numbers)
            writer.store(numbers, place)
        return context.get_dummy_value()

    return types.void(code, kind, x, types.intp, types.intp), generate


@intrinsic
def largest(typing_context: Any, code: Any, x: Any, at: Any, count: Any) -> Any:
    """Returns the largest of `count` numbers, a multiple of 16, from `at` on; NaN where one of them is."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        (x_p,) = pointers(context, builder, signature, values, 1)
        x_p = writer.after(x_p, values[2])
        most = writer.variable(writer.filled(FLOATS, float("-inf")))
        with writer.loop(builder.lshr(values[3], LONG(4))) as turn:
            numbers = writer.load(writer.after(x_p, builder.mul(turn.index, LONG(LANES))), FLOATS)
            most.set(writer.call("llvm.maximum.v16f32", FLOATS, most.get(), numbers))
        return writer.call("llvm.vector.reduce.fmaximum.v16f32", FLOAT, most.get())

    return types.float32(code, x, types.intp, types.intp), generate


@intrinsic
def exponentials(typing_context: Any, code: Any, x: Any, at: Any, largest: Any, count: Any) -> Any:
    """Puts e^(x - largest) into the place of `count` numbers, a multiple of 16, from `at` on; returns their sum."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        (x_p,) = pointers(context, builder, signature, values, 1)
        x_p = writer.after(x_p, values[2])
        most = writer.splat(values[3])
        total = writer.variable(writer.filled(FLOATS, 0.0))
        with writer.loop(builder.lshr(values[4], LONG(4))) as turn:
            place = writer.after(x_p, builder.mul(turn.index, LONG(LANES)))
            value = exponential(writer, builder.fsub(writer.load(place, FLOATS), most))
            writer.store(value, place)
            total.set(builder.fadd(total.get(), value))
        return sum_of_lanes(writer, total.get())

    return types.float32(code, x, types.intp, types.float32, types.intp), generate


@intrinsic
def gate(typing_context: Any, code: Any, gates: Any, gate_at: Any, ups: Any, up_at: Any, out: Any, out_at: Any) -> Any:
    """Stores silu(gate) * up for 16 numbers each (Shazeer 2020, arXiv:2002.05202)."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        writer = Code(builder, code.value)
        gates_p, ups_p, out_p = pointers(context, builder, signature, values, 1, 3, 5)
        value = writer.load(writer.after(gates_p, values[2]), FLOATS)
        one = writer.filled(FLOATS, 1.0)
        below = builder.fadd(one, exponential(writer, builder.fneg(value)))
        gated = builder.fmul(builder.fdiv(value, below), writer.load(writer.after(ups_p, values[4]), FLOATS))
        writer.store(gated, writer.after(out_p, values[6]))
        return context.get_dummy_value()

    return types.void(code, gates, types.intp, ups, types.intp, out, types.intp), generate

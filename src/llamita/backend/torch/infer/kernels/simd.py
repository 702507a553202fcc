"""Vectors of sixteen numbers in kernels that Numba compiles, for three sets of instructions.

`Code` writes the LLVM instructions of a kernel: it has a verb for each thing that a kernel does with vectors (load,
multiply and add, dot products of bytes), and knows how each is said to a processor with AVX-512, with AVX2, or to any.
A vector has 16 lanes whatever the processor's registers hold; LLVM cuts it into as many of them as it takes.

A `Static` argument is known when a kernel is compiled: its instructions, a number of rows. Numba compiles a kernel for
each, and keeps them apart on disk.
"""

import functools
import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox

from llamita.backend.torch.infer.kernels.instructions import Instructions

LANES = 16


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash("bfloat")


LONG, FLOAT = ir.IntType(64), ir.FloatType()
WORD, HALF, BYTE = ir.IntType(32), ir.IntType(16), ir.IntType(8)
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS = ir.VectorType(WORD, LANES)
HALVES = ir.VectorType(HALF, LANES)
FLOAT16S = ir.VectorType(ir.HalfType(), LANES)
HALF_PAIRS = ir.VectorType(HALF, 2 * LANES)
BFLOAT16_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)
"""Two numbers for each lane."""
BYTES = ir.VectorType(BYTE, 4 * LANES)
"""Four bytes for each lane."""


@dataclass(frozen=True)
class Static:
    """A value that a kernel is compiled for."""

    value: Any


class Target(NamedTuple):
    """What a kernel is compiled for: a set of instructions, as these sources say it."""

    instructions: Instructions
    sources: str
    """A hash: of a kernel kept on disk, Numba knows only its own file's age."""


def target(instructions: Instructions) -> Static:
    """Returns the first argument of kernels."""
    return Static(Target(instructions, _sources()))


@functools.cache
def _sources() -> str:
    found = hashlib.sha256(f"{numba.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


class StaticType(types.Type):
    """Numba's type of one static value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(f"static({value!r})")


register_model(StaticType)(models.OpaqueModel)


@typeof_impl.register(Static)
def _type_of_static(static: Static, _: Any) -> StaticType:
    return StaticType(static.value)


@lower_constant(StaticType)
def _constant_static(context: Any, _: Any, __: Any, ___: Any) -> Any:
    return context.get_dummy_value()


@unbox(StaticType)
def _unbox_static(_: StaticType, __: Any, unboxing: Any) -> NativeValue:
    return NativeValue(unboxing.context.get_dummy_value())


def pointers(context: Any, builder: ir.IRBuilder, signature: Any, values: Any, *places: int) -> list[ir.Value]:
    """Returns the addresses of the arrays at some places of an intrinsic's arguments."""
    return [context.make_array(signature.args[place])(context, builder, values[place]).data for place in places]


class Code:
    """Writes a kernel's instructions for one instruction set."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.builder, self.instructions = builder, target.instructions

    # --- memory ---

    def after(self, pointer: ir.Value, count: ir.Value | int) -> ir.Value:
        """Returns the address so many items further on."""
        return self.builder.gep(pointer, [LONG(count) if isinstance(count, int) else count])

    def load(self, pointer: ir.Value, kind: ir.Type) -> ir.Value:
        """Loads a value of some type, wherever it lies."""
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = 1
        return value

    def fetch(self, pointer: ir.Value) -> None:
        """Asks for the line of an address to be brought into the second cache; an address beyond memory is no error."""
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, WORD, WORD, WORD])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [pointer, WORD(0), WORD(2), WORD(1)])  # for reading, of data

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer())).align = 1

    # --- control ---

    def loop(self, count: ir.Value) -> AbstractContextManager[Any]:
        """Repeats what is written inside for each number below `count`, which is `.index`."""
        return cgutils.for_range(self.builder, count, intp=LONG)

    def end_turn(self) -> None:
        """Ends a turn of a loop: nothing of the next is loaded before, for which registers may be too few."""
        self.builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    def variable(self, value: ir.Value) -> "Variable":
        """Returns a value that changes from one turn of a loop to the next."""
        return Variable(self.builder, value)

    # --- vectors ---

    def splat(self, value: ir.Value, lanes: int = LANES) -> ir.Value:
        """Returns a vector with the value in each of its lanes."""
        nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return self.picked(self.builder.insert_element(nothing, value, WORD(0)), nothing, [0] * lanes)

    def picked(self, x: ir.Value, y: ir.Value, places: Iterable[int]) -> ir.Value:
        """Returns a vector of the numbers at some places of two vectors laid end to end."""
        numbers = list(places)
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(WORD, len(numbers)), numbers))

    def filled(self, kind: ir.VectorType, value: float) -> ir.Value:
        """Returns a vector with a number in all its places that is known already."""
        return ir.Constant(kind, [value] * kind.count)

    def multiply_add(self, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """Returns x * y + total, rounded once."""
        return self.call("llvm.fma.v16f32", FLOATS, x, y, total)

    def call(self, name: str, kind: ir.Type, *values: ir.Value) -> ir.Value:
        """Calls an instruction by LLVM's name for it."""
        function = ir.FunctionType(kind, [value.type for value in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), values)

    def by_halves(self, name: str, kind: ir.VectorType, *values: ir.Value) -> ir.Value:
        """Calls an instruction of 256 bits on both halves of vectors of 512."""
        half = ir.VectorType(kind.element, kind.count // 2)
        first, second = (self.call(name, half, *(self._half(value, which) for value in values)) for which in (0, 1))
        return self.picked(first, second, range(kind.count))

    def _half(self, vector: ir.Value, which: int) -> ir.Value:
        size = vector.type.count // 2
        return self.picked(vector, ir.Constant(vector.type, ir.Undefined), range(which * size, (which + 1) * size))

    # --- numbers of two bytes ---

    def load_floats(self, pointer: ir.Value, kind: str) -> ir.Value:
        """Loads 16 numbers of a type as float32."""
        if kind == "float32":
            return self.load(pointer, FLOATS)
        if kind == "int8":
            return self.builder.sitofp(self.load(pointer, ir.VectorType(BYTE, LANES)), FLOATS)
        halves = self.load(pointer, HALVES)
        return self.from_bfloat16(halves) if kind == "bfloat16" else self.from_float16(halves)

    def from_bfloat16(self, halves: ir.Value) -> ir.Value:
        """Returns float32 for bfloat16 given as its bits: they are the upper half."""
        words = self.builder.shl(self.builder.zext(halves, WORDS), self.filled(WORDS, 16))
        return self.builder.bitcast(words, FLOATS)

    def from_float16(self, halves: ir.Value) -> ir.Value:
        """Returns float32 for float16 given as its bits."""
        return self.builder.fpext(self.builder.bitcast(halves, FLOAT16S), FLOATS)

    def split_bfloat16(self, words: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns the earlier and the later of the two bfloat16 in each word, as float32."""
        earlier = self.builder.shl(words, self.filled(WORDS, 16))
        later = self.builder.and_(words, self.filled(WORDS, 0xFFFF0000))
        return self.builder.bitcast(earlier, FLOATS), self.builder.bitcast(later, FLOATS)

    def to_bfloat16(self, floats: ir.Value) -> ir.Value:
        """Returns the bits of the nearest bfloat16, of the even one where two are as near; the floats are finite."""
        words = self.builder.bitcast(floats, WORDS)
        odd = self.builder.and_(self.builder.lshr(words, self.filled(WORDS, 16)), self.filled(WORDS, 1))
        rounded = self.builder.add(self.builder.add(words, self.filled(WORDS, 0x7FFF)), odd)
        return self.builder.trunc(self.builder.lshr(rounded, self.filled(WORDS, 16)), HALVES)

    def narrowed(self, floats: ir.Value, kind: str) -> ir.Value:
        """Returns the nearest numbers of a type: float16, the bits of bfloat16, or float32 as they are."""
        if kind == "bfloat16":
            return self.to_bfloat16(floats)
        return self.builder.fptrunc(floats, FLOAT16S) if kind == "float16" else floats

    def dot_bfloat16(self, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """Adds the dot product of the two bfloat16 in each word. AVX-512 alone has it."""
        pairs = (self.builder.bitcast(words, BFLOAT16_PAIRS) for words in (x, y))
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)


class Variable:
    """A value that changes; LLVM keeps it in a register."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.room = builder, cgutils.alloca_once(builder, value.type)
        self.set(value)

    def get(self) -> ir.Value:
        return self.builder.load(self.room)

    def set(self, value: ir.Value) -> None:
        self.builder.store(value, self.room)


class ByteDots:
    """Sums, in each lane, of products of four weights and four activations, both of a byte.

    With AVX-512 weights are unsigned, and so they are where they have less than eight bits; elsewhere int8 ones are
    signed.
    """

    def __init__(self, code: Code, bits: int, start: ir.Value) -> None:
        self.code, self.bits, self.start = code, bits, start
        self.total = code.variable(code.filled(HALF_PAIRS, 0) if self.in_halves else start)

    @property
    def in_halves(self) -> bool:
        """Whether products are summed in 16 bits: with weights of four bits 32 in a row are not too large for that."""
        return self.bits == 4 and self.code.instructions == "avx2"

    def add(self, weights: ir.Value, activations: ir.Value) -> None:
        """Adds four products in each lane; both are BYTES."""
        code, builder = self.code, self.code.builder
        total = self.total.get()
        if code.instructions == "avx512":
            words = (builder.bitcast(each, WORDS) for each in (weights, activations))
            self.total.set(code.call("llvm.x86.avx512.vpdpbusd.512", WORDS, total, *words))
        elif code.instructions == "portable":
            self.total.set(self._portable(total, weights, activations))
        elif self.bits < 8:
            products = code.by_halves("llvm.x86.avx2.pmadd.ub.sw", HALF_PAIRS, weights, activations)
            self.total.set(builder.add(total, products if self.in_halves else self._sum_of_pairs(products)))
        else:  # the instruction wants one side without signs: they go to the other
            absolute = code.call("llvm.abs.v64i8", BYTES, weights, ir.IntType(1)(0))
            signed = code.by_halves("llvm.x86.avx2.psign.b", BYTES, activations, weights)
            products = code.by_halves("llvm.x86.avx2.pmadd.ub.sw", HALF_PAIRS, absolute, signed)
            self.total.set(builder.add(total, self._sum_of_pairs(products)))

    def sum(self) -> ir.Value:
        """Returns the sums as WORDS."""
        if not self.in_halves:
            return self.total.get()
        return self.code.builder.add(self.start, self._sum_of_pairs(self.total.get()))

    def _sum_of_pairs(self, halves: ir.Value) -> ir.Value:
        return self.code.by_halves("llvm.x86.avx2.pmadd.wd", WORDS, halves, self.code.filled(HALF_PAIRS, 1))

    def _portable(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        builder, code = self.code.builder, self.code
        words = [builder.bitcast(each, WORDS) for each in (weights, activations)]
        for byte in range(4):
            up, down = code.filled(WORDS, 24 - 8 * byte), code.filled(WORDS, 24)
            w, x = (builder.ashr(builder.shl(each, up), down) for each in words)
            total = builder.add(total, builder.mul(w, x))
        return total

"""Runs a compiled function on PyTorch's own threads, so that kernels and operators never wait for each other's pools.

PyTorch keeps its threads with OpenMP on Linux. `parallel` enters the very library that PyTorch has loaded: there is one
pool in the process, and a region costs about a microsecond while its threads are awake. Inside, the threads are a team:
they take shares of the work, and meet before what needs all of it, for a tenth of that. Where the library is not to be
found the calling thread is a team by itself.

Compiled code finds OpenMP's functions by names of ours, so that it can be kept on disk.
"""

import ctypes
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llamita.backend.torch.infer.kernels.choice import openmp_library
from llamita.backend.torch.infer.kernels.compiled import INSIDE
from llamita.backend.torch.infer.kernels.simd import LONG, WORD

ENTER, NUMBER, COUNT = "llamita_enter_threads", "llamita_thread_number", "llamita_thread_count"
YIELD = "llamita_yield"
OF_OPENMP = {ENTER: "GOMP_parallel", NUMBER: "omp_get_thread_num", COUNT: "omp_get_num_threads"}
POINTER = ir.IntType(8).as_pointer()
TEAM = types.UniTuple(types.int64, 3)
"""A thread's number, how many there are, and where the counters lie that they meet by."""
COUNTERS = ir.ArrayType(LONG, 16)
"""How many threads are at a meeting, and in the next line of memory how many meetings were held."""
MEETINGS = 8
LOOKS = 20_000
"""Looks at the counter before a waiting thread lets others have the processor: some ten microseconds, more than threads
with equal shares of a decoding step are apart. It does not pause between them, which takes three times as long."""


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
def _enter_alone(function: int, data: int, threads: int, flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)


@ctypes.CFUNCTYPE(ctypes.c_int)
def _zero() -> int:
    return 0


@ctypes.CFUNCTYPE(ctypes.c_int)
def _one() -> int:
    return 1


ALONE = {ENTER: _enter_alone, NUMBER: _zero, COUNT: _one}


def _make_known() -> None:
    """Gives compiled code the addresses of the functions."""
    path = openmp_library()
    library = None if path is None else ctypes.CDLL(str(path))
    for name, theirs in OF_OPENMP.items():
        function = ALONE[name] if library is None else getattr(library, theirs)
        _name(name, function)
    _name(YIELD, ctypes.CDLL(None).sched_yield)


def _name(name: str, function: Any) -> None:
    llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_make_known()


@intrinsic
def parallel(typing_context: Any, body: Any, threads: Any, arguments: Any) -> Any:
    """Calls `body(team, *arguments)` on each of so many threads, of which OpenMP may give fewer.

    A body raises nothing: the others would wait for it in vain.
    The calling function holds the arrays among the arguments, and the threads do not count who else does: at each call
    of theirs they would wait for one another's counts.
    """
    signature = body.get_call_type(typing_context, (TEAM, *arguments.types), {})

    def generate(context: Any, builder: ir.IRBuilder, _: Any, values: Any) -> Any:
        _, threads_value, arguments_value = values
        counters = cgutils.alloca_once(builder, COUNTERS)
        builder.store(ir.Constant(COUNTERS, None), counters)
        shared = ir.LiteralStructType([LONG, arguments_value.type])
        place = builder.ptrtoint(counters, LONG)
        packed = builder.insert_value(ir.Constant(shared, ir.Undefined), place, 0)
        room = cgutils.alloca_once(builder, shared)
        borrowed = _borrowed(context, builder, arguments, arguments_value)
        builder.store(builder.insert_value(packed, borrowed, 1), room)
        thread = _thread_function(context, builder.module, shared, body.dispatcher, signature)
        kind = ir.FunctionType(ir.VoidType(), [thread.type, POINTER, WORD, WORD])
        enter = cgutils.get_or_insert_function(builder.module, kind, ENTER)
        data = builder.bitcast(room, POINTER)
        alone = builder.icmp_signed("==", threads_value, LONG(1))
        with builder.if_else(alone) as (here, in_region):
            with here:
                builder.call(thread, [data])
            with in_region:
                builder.call(enter, [thread, data, builder.trunc(threads_value, WORD), WORD(0)])
        return context.get_dummy_value()

    return types.void(body, types.intp, arguments), generate


def _borrowed(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
    """Returns a value whose arrays, and those in tuples, have no owner that is counted."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for place, inner in enumerate(kind.types):
            found = _borrowed(context, builder, inner, builder.extract_value(value, place))
            value = builder.insert_value(value, found, place)
    return value


def _thread_function(context: Any, module: ir.Module, shared: ir.Type, dispatcher: Any, signature: Any) -> ir.Function:
    """Returns the function that each thread enters: it reads what it shares with the others, and calls the body."""
    kind = ir.FunctionType(ir.VoidType(), [POINTER])
    function = ir.Function(module, kind, module.get_unique_name("llamita_thread"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    received = builder.load(builder.bitcast(function.args[0], shared.as_pointer()))
    counters, arguments = builder.extract_value(received, 0), builder.extract_value(received, 1)
    of_openmp = ir.FunctionType(WORD, [])
    number, threads = (
        builder.sext(builder.call(cgutils.get_or_insert_function(module, of_openmp, name), []), LONG)
        for name in (NUMBER, COUNT)
    )
    team = cgutils.pack_array(builder, [number, threads, counters])
    compiled = dispatcher.overloads[signature.args]
    context.active_code_library.add_linking_library(compiled.library)
    passed = [builder.extract_value(arguments, place) for place in range(len(signature.args) - 1)]
    context.call_internal_no_propagate(builder, compiled.fndesc, signature, [team, *passed])
    builder.ret_void()
    return function


@njit(**INSIDE)
def share(team, count):
    """Returns the first of so many pieces of work that a thread has to do, and the one after its last."""
    number, threads, _ = team
    return count * number // threads, count * (number + 1) // threads


@njit(**INSIDE)
def meet(team):
    """Waits until all threads of a team have come here: what each wrote before, all can read afterwards."""
    if team[1] > 1:
        wait_for_all(team)


@intrinsic
def wait_for_all(typing_context: Any, team: Any) -> Any:
    """Does as `meet` for a team of several."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, values: Any) -> Any:
        threads, place = (builder.extract_value(values[0], which) for which in (1, 2))
        arrived = builder.inttoptr(place, LONG.as_pointer())
        held = builder.gep(arrived, [LONG(MEETINGS)])
        before = builder.load_atomic(held, "monotonic", 8)
        number = builder.atomic_rmw("add", arrived, LONG(1), "acq_rel")
        is_last = builder.icmp_signed("==", number, builder.sub(threads, LONG(1)))
        with builder.if_else(is_last) as (last, others):
            with last:
                builder.store_atomic(LONG(0), arrived, "monotonic", 8)
                builder.store_atomic(builder.add(before, LONG(1)), held, "release", 8)
            with others:
                _wait(builder, held, before)
        return context.get_dummy_value()

    return types.void(TEAM), generate


def _wait(builder: ir.IRBuilder, counter: ir.Value, before: ir.Value) -> None:
    """Waits until a counter is another than before."""
    looks = cgutils.alloca_once_value(builder, LONG(0))
    look, again, done = (builder.append_basic_block(name) for name in ("look", "again", "done"))
    builder.branch(look)
    builder.position_at_end(look)
    same = builder.icmp_signed("==", builder.load_atomic(counter, "acquire", 8), before)
    builder.cbranch(same, again, done)
    builder.position_at_end(again)
    count = builder.add(builder.load(looks), LONG(1))
    builder.store(count, looks)
    with builder.if_then(builder.icmp_signed(">", count, LONG(LOOKS))):
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORD, []), YIELD), [])
    builder.branch(look)
    builder.position_at_end(done)

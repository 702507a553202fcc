"""Runs a compiled function on PyTorch's own threads, so that kernels and operators never wait for each other's pools.

PyTorch keeps its threads with OpenMP on Linux. `parallel` enters the very library that PyTorch has loaded: there is one
pool in the process, and a region costs about a microsecond while its threads are awake. Where that library is not to
be found the calling thread does all the work.

Compiled code finds OpenMP's functions by names of ours, so that it can be kept on disk.
"""

import ctypes
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamita.backend.torch.infer.kernels.choice import openmp_library
from llamita.backend.torch.infer.kernels.simd import LONG, WORD

ENTER, NUMBER, COUNT = "llamita_enter_threads", "llamita_thread_number", "llamita_thread_count"
OF_OPENMP = {ENTER: "GOMP_parallel", NUMBER: "omp_get_thread_num", COUNT: "omp_get_num_threads"}
POINTER = ir.IntType(8).as_pointer()


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
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_make_known()


@intrinsic
def parallel(typing_context: Any, body: Any, threads: Any, count: Any, arguments: Any) -> Any:
    """Calls `body(first, last, *arguments)` on so many threads, each with its share of range(count)."""
    signature = body.get_call_type(typing_context, (types.intp, types.intp, *arguments.types), {})

    def generate(context: Any, builder: ir.IRBuilder, _: Any, values: Any) -> Any:
        _, threads_value, count_value, arguments_value = values
        shared = ir.LiteralStructType([LONG, arguments_value.type])
        packed = builder.insert_value(ir.Constant(shared, ir.Undefined), count_value, 0)
        room = cgutils.alloca_once(builder, shared)
        builder.store(builder.insert_value(packed, arguments_value, 1), room)
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

    return types.void(body, types.intp, types.intp, arguments), generate


def _thread_function(context: Any, module: ir.Module, shared: ir.Type, dispatcher: Any, signature: Any) -> ir.Function:
    """Returns the function that each thread enters: it reads what it shares with the others, and calls the body."""
    kind = ir.FunctionType(ir.VoidType(), [POINTER])
    function = ir.Function(module, kind, module.get_unique_name("llamita_thread"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    received = builder.load(builder.bitcast(function.args[0], shared.as_pointer()))
    count, arguments = builder.extract_value(received, 0), builder.extract_value(received, 1)
    of_openmp = ir.FunctionType(WORD, [])
    number, threads = (
        builder.sext(builder.call(cgutils.get_or_insert_function(module, of_openmp, name), []), LONG)
        for name in (NUMBER, COUNT)
    )
    first = builder.sdiv(builder.mul(count, number), threads)
    last = builder.sdiv(builder.mul(count, builder.add(number, LONG(1))), threads)
    compiled = dispatcher.overloads[signature.args]
    context.active_code_library.add_linking_library(compiled.library)
    passed = [builder.extract_value(arguments, place) for place in range(len(signature.args) - 2)]
    context.call_internal_no_propagate(builder, compiled.fndesc, signature, [first, last, *passed])
    builder.ret_void()
    return function

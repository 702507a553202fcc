"""How kernels are compiled, kept on disk, and called."""

from collections.abc import Callable
from typing import Any

from numba import njit, typeof


def _can_keep() -> bool:
    """Returns whether Numba has a folder to keep compiled kernels in."""
    try:
        njit(cache=True)(_can_keep)
        return True
    except RuntimeError:
        return False


COMPILED: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": _can_keep()}
INSIDE: dict[str, Any] = {**COMPILED, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""For functions that compiled ones alone call: there is less to compile."""


class Kernel:
    """A compiled function for arguments of the same types at each call.

    It is compiled, or read from disk, for those of the first call. Afterwards they are not looked at again, since that
    takes longer than many a product: arrays are writable and contiguous, or memory is misread, and `Static` ones hold
    the same.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._entry: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._entry is None:
            kinds = tuple(typeof(argument) for argument in arguments)
            self._function.compile(kinds)
            self._entry = self._function.overloads[kinds].entry_point
        return self._entry(*arguments)

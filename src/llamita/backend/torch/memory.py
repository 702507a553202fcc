"""Memory that comes from the system and goes back to it, past the allocator, which keeps what is let go."""

import contextlib
import math
import mmap

import torch
from torch import Tensor


def own_memory(size: int, dtype: torch.dtype, lasting: bool = False) -> Tensor:
    """Returns room for so many numbers; `lasting`: in huge pages, where the system has them, which are found faster."""
    pages = mmap.mmap(-1, max(size * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if lasting and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=size)


def laid_out(x: Tensor) -> Tensor:
    """Returns the numbers of a view one after the other, in lasting memory of their own."""
    return own_memory(math.prod(x.shape), x.dtype, lasting=True).view(x.shape).copy_(x)

"""The number types that this machine's processor multiplies fast, by the flags that the system names.

Knows no framework.
"""

import functools
import platform
from pathlib import Path

FLAGS = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}
"""The instructions of x86 processors for products in a type. Without them a product in it is far slower than one in
float32."""


def multiplies(dtype: str) -> bool:
    """Returns whether the CPU has instructions for products in a number type."""
    return dtype == "float32" or not FLAGS[dtype].isdisjoint(cpu_flags())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Returns the flags of the first processor in /proc/cpuinfo; none where there is no such file."""
    file = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not file.is_file():
        return frozenset()
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return frozenset(next((value.split() for name, _, value in lines if name.strip() == "flags"), ()))

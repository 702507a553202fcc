"""The sets of instructions that kernels are written for. Needs no compiler."""

from typing import Literal

Instructions = Literal["avx512", "avx2", "portable"]
"""AVX-512 with products of bytes (VNNI) and of bfloat16; AVX2 with FMA and float16; what any processor has."""

"""Graphics cards by name: their memory, and the operations a second that their makers publish."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes; `bf16` and `fp32` are operations a second of dense products, as the data sheets give them.

    fp32 is what PyTorch multiplies float32 with unless TF32 is asked for: the ordinary units, not the tensor cores.
    """

    memory: float
    bf16: float
    fp32: float


GPUS: Mapping[str, Gpu] = {
    "l4": Gpu(24e9, 121e12, 30.3e12),
    "l40s": Gpu(48e9, 362e12, 91.6e12),
    "a10": Gpu(24e9, 125e12, 31.2e12),
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12),
    "h100": Gpu(80e9, 989e12, 67e12),
    "h200": Gpu(141e9, 989e12, 67e12),
    "b200": Gpu(180e9, 2250e12, 75e12),
    "rtx-3090": Gpu(24e9, 71e12, 35.6e12),
    "rtx-4090": Gpu(24e9, 165e12, 82.6e12),
    "mi300x": Gpu(192e9, 1307e12, 163e12),
}
"""Dense products without sparsity: NVIDIA's and AMD's data sheets; the RTX cards accumulate in float32."""

UTILIZATION = 0.4
"""The share of the published rate that training reaches: 0.46 in Chowdhery et al. 2022 (PaLM, table 3), and mostly a
little less for smaller models and on fewer devices."""


def gpu(name: str) -> Gpu:
    """Returns the card of this name; ValueError for an unknown one."""
    if name not in GPUS:
        raise ValueError(f"no graphics card named {name!r}; choose one of {', '.join(GPUS)}, or give --gpu-memory")
    return GPUS[name]

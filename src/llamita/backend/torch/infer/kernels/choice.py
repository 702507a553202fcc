"""Which instructions the kernels are compiled for: those that LLAMITA_KERNELS names, or the processor's best.

Read before anything is compiled, since an instruction that a processor lacks ends the process. The kernels' own modules
are imported here alone, and only where they are wanted: they need Numba.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llamita.backend.torch.infer.kernels.instructions import Instructions

if TYPE_CHECKING:
    from llamita.backend.torch.infer.kernels.decode import Decoder
    from llamita.backend.torch.model.llama import Llama

VARIABLE = "LLAMITA_KERNELS"
NEEDED: dict[Instructions, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}
"""LLVM's names of the features that a set needs, the fastest set first."""


def features() -> frozenset[str]:
    """Returns the features that LLVM, which Numba compiles with, finds in this processor."""
    from llvmlite import binding

    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def supported() -> list[Instructions]:
    """Returns the sets that this processor has, the fastest first."""
    found = features()
    return [name for name, needed in NEEDED.items() if needed <= found]


def openmp_library() -> Path | None:
    """Returns the OpenMP library that PyTorch brought along, and has loaded; None where its threads are of another."""
    for folder in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs"):
        for path in sorted(folder.glob("libgomp*")):
            return path
    return None


def chosen_instructions() -> Instructions | None:
    """Returns the set to compile for; None where nothing is asked for, or where PyTorch's threads cannot be shared.

    ValueError where LLAMITA_KERNELS names no set, or one that this processor lacks, and where Numba is not installed.
    """
    asked = os.environ.get(VARIABLE, "off")
    if asked == "off":
        return None
    if asked not in ("auto", *NEEDED):
        raise ValueError(f"{VARIABLE}={asked} is not known; give off, auto or one of {', '.join(NEEDED)}")
    if asked == "auto" and openmp_library() is None:
        return None  # one thread alone is slower than PyTorch's operators
    if importlib.util.find_spec("numba") is None:
        raise ValueError(f"{VARIABLE}={asked} needs Numba: pip install 'llamita[fast]'")
    if asked != "auto" and asked not in supported():
        raise ValueError(f"{VARIABLE}={asked}: this processor has only {', '.join(supported())}")
    return supported()[0] if asked == "auto" else cast(Instructions, asked)


def weights_in_blocks() -> Any:
    """Returns the module `blocked`, which puts weights into blocks."""
    from llamita.backend.torch.infer.kernels import blocked

    return blocked


def decoder_of(model: "Llama") -> "Decoder | None":
    """Returns what runs decoding steps in few calls; None where the weights do not lie in blocks, or the family has
    other operations."""
    if model.instructions is None:
        return None
    from llamita.backend.torch.infer.kernels.decode import Decoder

    return Decoder(model) if Decoder.fits(model) else None

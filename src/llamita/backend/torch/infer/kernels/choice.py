"""Which instructions the kernels are compiled for: the processor's best, or those that LLAMITA_KERNELS names.

Read before anything is compiled, since an instruction that a processor lacks ends the process. The kernels' own modules
are imported here alone, and only where they are wanted: they need Numba.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llamita.backend.torch.infer.kernels.instructions import Instructions

if TYPE_CHECKING:
    from llamita.backend.torch.infer.kernels.decode import Decoder
    from llamita.backend.torch.infer.kernels.draw import TokenDrawer
    from llamita.backend.torch.infer.kernels.head import GreedyHead
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


class Choice(NamedTuple):
    """What kernels are compiled for: `instructions`, None for no kernels; and why."""

    instructions: Instructions | None
    reason: str

    @property
    def shown(self) -> str:
        """What multiplies, and why."""
        what = "PyTorch's operators" if self.instructions is None else f"{self.instructions} kernels"
        return f"{what} ({self.reason})" if self.reason else what


NO_KERNELS = Choice(None, "")


def choose_kernels() -> Choice:
    """Returns what kernels are compiled for, as LLAMITA_KERNELS asks; "auto" where it is not set.

    "auto" is the best set that this processor has. It is none, so that PyTorch's operators run, where Numba is not
    installed, where PyTorch's threads cannot be shared, since one thread is slower than they are, and where a processor
    has the portable set alone, which was never measured on one. ValueError where a set is named that is unknown or that
    this processor lacks, or for which Numba is not installed.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "off", *NEEDED):
        raise ValueError(f"{VARIABLE}={asked} is not known; give off, auto or one of {', '.join(NEEDED)}")
    if asked == "off":
        return Choice(None, f"{VARIABLE}=off")
    if importlib.util.find_spec("numba") is None:
        if asked == "auto":
            return Choice(None, "kernels of our own need Numba: pip install 'llamita[fast]'")
        raise ValueError(f"{VARIABLE}={asked} needs Numba: pip install 'llamita[fast]'")
    if asked != "auto":
        if asked not in supported():
            raise ValueError(f"{VARIABLE}={asked}: this processor has only {', '.join(supported())}")
        return Choice(asked, "asked for")
    if openmp_library() is None:
        return Choice(None, "PyTorch's threads are not of GNU's OpenMP, which kernels of our own could share")
    if supported()[0] == "portable":
        return Choice(None, "this processor has neither AVX2 nor AVX-512")
    return Choice(supported()[0], "the best of this processor")


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


def greedy_head_of(model: "Llama") -> "GreedyHead | None":
    """Returns what finds the likeliest tokens by a model's output head; None where that does not lie in blocks, or
    something is done to its logits."""
    if model.instructions is None or model.config.num_labels or not model.transform.changes_nothing:
        return None
    from llamita.backend.torch.infer.kernels.head import GreedyHead
    from llamita.backend.torch.model.reordered import held_in_blocks

    held = held_in_blocks(model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head)
    return None if held is None else GreedyHead(held)


def drawer_for(instructions: Instructions | None) -> "TokenDrawer | None":
    """Returns what draws tokens; None without kernels."""
    if instructions is None:
        return None
    from llamita.backend.torch.infer.kernels.draw import TokenDrawer

    return TokenDrawer(instructions)

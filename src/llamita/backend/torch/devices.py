"""Devices of PyTorch by name, and the kernels that there are for them."""

import torch

from llamita.backend.torch.infer.paged_attention import TableKernel


def choose_device(name: str) -> str:
    """Returns a PyTorch device by name, or a GPU if there is one for "auto"; ValueError where it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}); give auto, cpu, or cuda on a GPU") from None
    if torch.device(name).type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not one that this backend runs on; give auto, cpu, or cuda on a GPU")
    return name


def table_kernel(device: torch.device) -> TableKernel | None:
    """Returns the kernel that attends through tables of blocks: on a GPU, where there is Triton.

    Triton is imported there alone, since that takes time and memory.
    """
    if device.type != "cuda":
        return None
    try:
        from llamita.backend.torch.infer.kernels.table_attention import attention_over_tables
    except ImportError:  # PyTorch comes with Triton for GPUs alone
        return None
    return attention_over_tables

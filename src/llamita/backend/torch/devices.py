"""Where PyTorch computes and in which mode: devices by name, the kernels that suit few rows."""

import contextlib
from collections.abc import Iterator

import torch

from llamita.backend.torch.infer.paged_attention import TableKernel

attention_over_tables: TableKernel | None
try:
    from llamita.backend.torch.infer.kernels.table_attention import attention_over_tables
except ImportError:  # PyTorch comes with Triton for GPUs alone
    attention_over_tables = None


def choose_device(name: str) -> str:
    """A PyTorch device by name, or a GPU if there is one for "auto"; ValueError where it cannot be used."""
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
    """The kernel that attends through tables of blocks: on a GPU, where there is Triton."""
    return attention_over_tables if device.type == "cuda" else None


@contextlib.contextmanager
def fast_few_rows(device: torch.device, dtype: torch.dtype, rows: int) -> Iterator[None]:
    """The settings under which PyTorch multiplies so many rows fastest.

    On a CPU, oneDNN reads bfloat16 weights for one row at half the speed of PyTorch's own matrix-vector product.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or rows > 1:
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)

"""A model's weights on a CPU in the order in which their kernels read them, for a model that is used, not trained.

Large ones lie in oneDNN's own order, which PyTorch calls prepacked: a plain weight is packed anew at each product,
which for few rows takes longer than the product itself. Small ones in bfloat16 lie column by column, for a kernel that
costs less to call. Knows nothing of runners.
"""

import functools
import mmap
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend.torch.model.fused import PackedParameter
from llamita.backend.torch.model.llama import Embedding, Linear, Llama
from llamita.backend.torch.model.weights import (
    TORCH_DTYPES,
    build_model,
    copy_values,
    finite_pieces,
    model_without_values,
    tensor_from_host,
)
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import check_arrays

SMALLEST = 2**18
"""Numbers in a weight from which on it is faster prepacked: below, what it costs to call the operator is more."""
SUM = 0  # an embedding bag's mode


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """`layers.linear` over a prepacked weight; it has no gradient.

    PyTorch's compiler puts frozen weights through the same operator.
    """
    return torch.ops.mkldnn._linear_pointwise(x_D, weight_CD, bias_C, "none", [], "")


def linear_of_columns(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """`layers.linear` over a bfloat16 weight that lies column by column: W x is the sum of the columns of W, each times
    a number of x. For one row PyTorch's embedding bag computes just that, summing in float32, in a third to a half of
    the time of oneDNN's product."""
    n_out, n_in = weight_CD.shape
    if x_D.numel() != n_in:
        return F.linear(x_D, weight_CD, bias_C)
    columns_D, begin_1 = _every_column(n_in)
    y_1C = torch.embedding_bag(weight_CD.mT, columns_D, begin_1, mode=SUM, per_sample_weights=x_D.reshape(-1))[0]
    y_C = y_1C.view(*x_D.shape[:-1], n_out)
    return y_C if bias_C is None else y_C + bias_C


@functools.cache
def _every_column(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count), torch.zeros(1, dtype=torch.int64)


def prepack(weight_CD: Tensor) -> Tensor:
    """The same values in an order that is oneDNN's own; `to_dense` gives them back as they were."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_CD)


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether prepacked weights of this type can be multiplied on this processor by this build of PyTorch."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    x_RD, weight_CD = torch.ones(1, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    try:
        with torch.inference_mode():
            return torch.equal(linear(x_RD, prepack(weight_CD)), F.linear(x_RD, weight_CD))
    except (AttributeError, RuntimeError):  # no such operator, or none for this processor
        return False


class PrepackedEmbedding(Embedding):
    """A table (V, D) that is the output head too: as it is for looking tokens up, beside a prepacked copy.

    With `array`, the mapped file that `weight_VD` lies in, memory holds the copy alone.
    """

    def __init__(self, weight_VD: Tensor, array: HostArray | None) -> None:
        nn.Module.__init__(self)  # not that of an embedding, which would make room for another table
        self.weight = nn.Parameter(weight_VD, requires_grad=False)
        self.array = array
        self.head_VD = prepack(weight_VD)
        self._forget()

    def _forget(self) -> None:
        """A system reads more of a file than was asked for; without this all of it would be in memory in the end."""
        if self.array is not None:
            self.array.forget(0, len(self.array.data))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = super().forward(tokens_BT)
        self._forget()
        return x_BTD

    def multiply(self, hidden_BTD: Tensor) -> Tensor:
        return linear(hidden_BTD, self.head_VD)


@torch.no_grad()
def build_prepacked(
    config: ModelConfig, arrays: Mapping[str, HostArray], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Llama:
    """`weights.build_model` of a model that is only used; the weights of linear maps lie as their kernels read them.

    Where there are no kernels for that, it is an ordinary one. Each weight is packed as it is read, so that memory
    holds one plain weight at a time. An embedding that is the output head too, in a mapped file with numbers of this
    type, stays there.
    """
    if config.quantization or torch.device(device).type != "cpu" or not can_prepack(dtype):
        return build_model(config, arrays, dtype=dtype, device=device)
    check_arrays(config, arrays)
    model = model_without_values(config, dtype)
    model.prepacked = True
    tied = config.tie_word_embeddings and not config.num_labels
    plain_X = torch.empty(0, dtype=dtype)  # one plain weight after the other, the largest first
    for packed in sorted(model.packed_parameters(), key=lambda packed: -packed.parameter.numel()):
        module, _, kind = packed.name.rpartition(".")
        owner, size = model.get_submodule(module), packed.parameter.numel()
        large = kind == "weight" and size >= SMALLEST
        if large and isinstance(owner, Linear):
            if not size <= len(plain_X) <= 2 * size:
                plain_X = _memory_of_its_own(size, dtype)
            owner.weight = nn.Parameter(prepack(_read(packed, arrays, plain_X[:size])), requires_grad=False)
            owner.product = linear
        elif large and tied and isinstance(owner, Embedding):
            model.model.embed_tokens = _tied_embedding(packed, arrays, dtype)
        else:
            values = _read(packed, arrays, torch.empty(size, dtype=dtype))
            if kind == "weight" and isinstance(owner, Linear) and dtype == torch.bfloat16:
                values, owner.product = values.mT.contiguous().mT, linear_of_columns
            setattr(owner, kind, nn.Parameter(values, requires_grad=False))
    return model


def _memory_of_its_own(size: int, dtype: torch.dtype) -> Tensor:
    """Room for so many numbers that goes back to the system when it is let go, and not to the allocator."""
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)


def _read(packed: PackedParameter, arrays: Mapping[str, HostArray], room_X: Tensor) -> Tensor:
    """The values of a parameter in its shape, from the arrays of its parts."""
    values = room_X.view(packed.parameter.shape)
    parts = dict(zip(packed.parts, packed.split(values), strict=True))
    copy_values(parts, ((name, arrays[name]) for name in parts))
    return values


def _tied_embedding(packed: PackedParameter, arrays: Mapping[str, HostArray], dtype: torch.dtype) -> PrepackedEmbedding:
    array = arrays[packed.name]
    if array.mapping is None or TORCH_DTYPES[array.dtype] != dtype:
        return PrepackedEmbedding(_read(packed, arrays, torch.empty(packed.parameter.numel(), dtype=dtype)), None)
    for _ in finite_pieces(packed.name, array):
        pass
    return PrepackedEmbedding(tensor_from_host(array), array)

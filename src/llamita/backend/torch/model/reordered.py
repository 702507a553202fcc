"""A model's weights on a CPU in the order in which their kernels read them, for a model that is used, not trained.

With kernels of our own all lie in their blocks. Without, large ones lie in oneDNN's own order, which PyTorch calls
prepacked: a plain weight is reordered anew at each product, which for few rows takes longer than the product itself.
Small ones in bfloat16 lie column by column, for a kernel that costs less to call. Knows nothing of runners.

Letters beyond the usual: R rows, X numbers laid end to end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend.torch.infer.kernels.choice import weights_in_blocks
from llamita.backend.torch.infer.kernels.gguf_blocks import can_hold
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.memory import own_memory
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.llama import Embedding, KernelWeight, Linear, Llama
from llamita.backend.torch.model.quantized import QuantizedLinear
from llamita.backend.torch.model.weights import (
    TORCH_DTYPES,
    build_model,
    copy_values,
    finite_pieces,
    host_from_tensor,
    model_without_values,
    tensor_from_host,
)
from llamita.model.config import ModelConfig
from llamita.model.host_array import ITEM_BYTES, HostArray
from llamita.model.parameters import check_arrays

if TYPE_CHECKING:
    from llamita.backend.torch.infer.kernels.blocked import BlockedWeight

SMALLEST = 2**18
"""Numbers in a weight from which on it is faster reordered: below, what it costs to call the operator is more."""
SUM = 0  # an embedding bag's mode


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Computes `layers.linear` over a reordered weight; it has no gradient.

    PyTorch's compiler puts frozen weights through the same operator.
    """
    return torch.ops.mkldnn._linear_pointwise(x_D, weight_CD, bias_C, "none", [], "")


def linear_of_columns(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Computes `layers.linear` over a bfloat16 weight stored column by column: W x is the sum of the columns of W, each
    times a number of x. For one row PyTorch's embedding bag computes just that, summing in float32, in a third to a
    half of the time of oneDNN's product."""
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


def reorder(weight_CD: Tensor) -> Tensor:
    """Returns the same values in an order that is oneDNN's own; `to_dense` gives them back as they were."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_CD)


@functools.cache
def can_reorder(dtype: torch.dtype) -> bool:
    """Returns whether reordered weights of this type can be multiplied on this processor by this build of PyTorch."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    x_RD, weight_CD = torch.ones(1, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    try:
        with torch.inference_mode():
            return torch.equal(linear(x_RD, reorder(weight_CD)), F.linear(x_RD, weight_CD))
    except (AttributeError, RuntimeError):  # no such operator, or none for this processor
        return False


class ReorderedEmbedding(Embedding):
    """A table (V, D) that is the output head too: reordered, so that memory holds it once. `rows` is the array or the
    file in which tokens are looked up."""

    def __init__(self, weight_VD: Tensor, rows: HostArray) -> None:
        nn.Module.__init__(self)  # not that of an embedding, which would make room for another table
        self.weight = nn.Parameter(reorder(weight_VD), requires_grad=False)
        self.dtype, self.rows = weight_VD.dtype, rows
        self._forget()

    def _forget(self) -> None:
        """Lets go of the file's pages: a system reads ahead, and would end with all of it in memory."""
        self.rows.forget(0, math.prod(self.rows.shape) * ITEM_BYTES[self.rows.dtype])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_XD = tensor_from_host(self.rows.rows(tokens_BT.reshape(-1).numpy())).to(self.dtype)
        self._forget()
        return x_XD.view(*tokens_BT.shape, -1)

    def multiply(self, hidden_BTD: Tensor) -> Tensor:
        return linear(hidden_BTD, self.weight)


class BlockedEmbedding(Embedding):
    """A table (V, D) that is the output head too, in blocks, where tokens are looked up as well."""

    def __init__(self, kernel: KernelWeight, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.weight, self.kernel, self.dtype = without_memory(kernel), kernel, dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        assert self.kernel is not None
        return self.kernel.rows(tokens_BT).to(self.dtype)

    def multiply(self, hidden_BTD: Tensor) -> Tensor:
        assert self.kernel is not None
        return self.kernel.product(hidden_BTD, self.weight)


def without_memory(kernel: KernelWeight) -> nn.Parameter:
    """Returns a parameter of the shape and type of a weight whose numbers lie in blocks."""
    return nn.Parameter(torch.empty(kernel.shape, dtype=kernel.dtype, device="meta"), requires_grad=False)


@torch.no_grad()
def build_reordered(
    config: ModelConfig,
    arrays: Mapping[str, HostArray],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    instructions: Instructions | None = None,
    packed: bool = False,
) -> Llama:
    """Builds a model for inference, as `weights.build_model` does: linear maps lie as their kernels read them.

    `instructions` are those that kernels of our own are compiled for; None: there are none. `packed`: they may multiply
    the blocks of a file as they are, with activations rounded to bytes. Where there are no kernels at all, it is an
    ordinary model. Each weight is reordered as it is read, so that memory holds one plain weight at a time. The tokens
    of an embedding that is the output head too are looked up in its blocks or in its file.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and instructions is not None:
        return _build_blocked(config, arrays, dtype, instructions, packed)
    if config.quantization or not on_cpu or not can_reorder(dtype):
        return build_model(config, arrays, dtype=dtype, device=device)
    check_arrays(config, arrays)
    model = model_without_values(config, dtype)
    model.reordered = True
    tied = config.tie_word_embeddings and not config.num_labels
    plain_X = torch.empty(0, dtype=dtype)  # one plain weight after the other, the largest first
    for fused in sorted(model.fused_parameters(), key=lambda fused: -fused.parameter.numel()):
        module, _, kind = fused.name.rpartition(".")
        owner, size = model.get_submodule(module), fused.parameter.numel()
        large = kind == "weight" and size >= SMALLEST
        if large and isinstance(owner, Linear):
            if not size <= len(plain_X) <= 2 * size:
                plain_X = own_memory(size, dtype)
            owner.weight = nn.Parameter(reorder(_read(fused, arrays, plain_X[:size])), requires_grad=False)
            owner.product = linear
        elif large and tied and isinstance(owner, Embedding):
            model.model.embed_tokens = _tied_embedding(fused, arrays, dtype)
        else:
            values = _read(fused, arrays, torch.empty(size, dtype=dtype))
            if kind == "weight" and isinstance(owner, Linear) and dtype == torch.bfloat16:
                values, owner.product = values.mT.contiguous().mT, linear_of_columns
            setattr(owner, kind, nn.Parameter(values, requires_grad=False))
    return model


def _build_blocked(
    config: ModelConfig,
    arrays: Mapping[str, HostArray],
    dtype: torch.dtype,
    instructions: Instructions,
    packed: bool,
) -> Llama:
    """Builds a model whose weights lie in blocks, in the type of their file where float32 is asked for: the numbers are
    the same."""
    if config.quantization:
        return build_model(config, arrays, dtype=dtype, instructions=instructions)
    check_arrays(config, arrays)
    model = model_without_values(config, dtype)
    model.reordered, model.instructions = True, instructions
    tied = config.tie_word_embeddings and not config.num_labels
    # The largest first: the memory that each takes beside its blocks while it is put into them is then at its least.
    for fused in sorted(model.fused_parameters(), key=lambda fused: -fused.parameter.numel()):
        module, _, kind = fused.name.rpartition(".")
        owner, size = model.get_submodule(module), fused.parameter.numel()
        in_blocks = kind == "weight" and (isinstance(owner, Linear) or (tied and isinstance(owner, Embedding)))
        if not in_blocks or fused.parameter.shape[1] % 2:
            values = _read(fused, arrays, torch.empty(size, dtype=dtype))
            setattr(owner, kind, nn.Parameter(values, requires_grad=False))
            continue
        kernel = _blocked_weight(fused, arrays, dtype, instructions, packed)
        if isinstance(owner, Linear):
            owner.weight, owner.kernel, owner.product = without_memory(kernel), kernel, kernel.product
        else:
            model.model.embed_tokens = BlockedEmbedding(kernel, dtype)
    return model


def _blocked_weight(
    fused: FusedParameter,
    arrays: Mapping[str, HostArray],
    dtype: torch.dtype,
    instructions: Instructions,
    packed: bool,
) -> BlockedWeight:
    blocked = weights_in_blocks()
    parts = [arrays[name] for name in fused.parts]
    kinds = {part.packed.kind if part.packed is not None else "" for part in parts}
    if packed and can_hold(kinds):
        rows = [(part.packed.kind, part.packed.read()) for part in parts if part.packed is not None]
        held: BlockedWeight = blocked.blocked_rows(rows, instructions)
        if not held.is_finite:
            raise ValueError(f"{' or '.join(fused.parts)} holds NaN or infinite values; the weights are damaged")
        return held
    stored = {TORCH_DTYPES[part.dtype] for part in parts}
    narrow = dtype == torch.float32 and len(stored) == 1 and stored <= {torch.bfloat16, torch.float16}
    room_X = own_memory(fused.parameter.numel(), stored.pop() if narrow else dtype)
    found: BlockedWeight = blocked.blocked_floats(_read(fused, arrays, room_X), instructions, dtype == torch.bfloat16)
    return found


def _read(fused: FusedParameter, arrays: Mapping[str, HostArray], room_X: Tensor) -> Tensor:
    """Returns the values of a parameter in its shape, from the arrays of its parts."""
    values = room_X.view(fused.parameter.shape)
    parts = dict(zip(fused.parts, fused.split(values), strict=True))
    copy_values(parts, ((name, arrays[name]) for name in parts))
    return values


def _tied_embedding(fused: FusedParameter, arrays: Mapping[str, HostArray], dtype: torch.dtype) -> ReorderedEmbedding:
    array = arrays[fused.name]
    if array.mapping is not None and TORCH_DTYPES[array.dtype] == dtype:
        for _ in finite_pieces(fused.name, array):
            pass
        return ReorderedEmbedding(tensor_from_host(array), array)
    weight_VD = _read(fused, arrays, own_memory(fused.parameter.numel(), dtype))
    return ReorderedEmbedding(weight_VD, array if array.stays_readable else host_from_tensor(weight_VD))


def weights_held_in_blocks(model: Llama) -> list[BlockedWeight]:
    """Returns a model's weights that lie in blocks."""
    found = map(held_in_blocks, model.modules())
    return [weight for weight in found if weight is not None]


def held_in_blocks(module: nn.Module) -> BlockedWeight | None:
    """Returns a module's weight in blocks; None where it lies otherwise, or the module has none."""
    found: BlockedWeight | None = getattr(module, "blocks" if isinstance(module, QuantizedLinear) else "kernel", None)
    return found

"""A model's weights on a CPU in blocks, the order in which oneDNN's kernels read them.

A plain weight is put into that order anew at each product, which for few rows takes longer than the product itself. Here
it is done once, for a model that is used and no longer trained. Knows nothing of runners or files.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.checkpoint import HostArray
from llamita.torch_backend.model import Embedding, Linear, Llama
from llamita.torch_backend.weights import TORCH_DTYPES, tensor_from_host

SMALLEST = 2**18
"""Numbers in a weight from which on blocks are faster: below, what it costs to call their operator is more."""


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """`layers.linear` over a weight in blocks; it has no gradient.

    PyTorch's compiler puts frozen weights through the same operator.
    """
    return torch.ops.mkldnn._linear_pointwise(x_D, weight_CD, bias_C, "none", [], "")


def to_blocks(weight_CD: Tensor) -> Tensor:
    """The same values in an order that is oneDNN's own; `to_dense` gives them back as they were."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_CD)


@functools.cache
def can_block(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies over blocks of this type; PyTorch's kernels differ from system to system."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    x_RD, weight_CD = torch.ones(1, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    try:
        with torch.inference_mode():
            return torch.equal(linear(x_RD, to_blocks(weight_CD)), F.linear(x_RD, weight_CD))
    except (AttributeError, RuntimeError):  # no such operator, or none for this processor
        return False


@torch.no_grad()
def block_weights(model: Llama, embedding: HostArray | None = None) -> None:
    """Put the weights of the linear maps into blocks, one after the other; small ones stay as they are.

    An embedding that is the output head too stays as it is for looking tokens up, beside a copy in blocks. `embedding`
    is where its values came from: in a mapped file of the model's own type, they are looked up there, and memory holds
    the copy alone.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.numel() >= SMALLEST:
            module.weight = nn.Parameter(to_blocks(module.weight), requires_grad=False)
            module.product = linear
    table = model.model.embed_tokens
    tied = model.config.tie_word_embeddings and not model.config.num_labels
    if not tied or not isinstance(table, Embedding) or table.weight.numel() < SMALLEST:
        return
    table.product, table.head_VD = linear, to_blocks(table.weight)
    if embedding is not None and embedding.mapping is not None:
        if TORCH_DTYPES[embedding.dtype] == table.weight.dtype:
            table.weight = nn.Parameter(tensor_from_host(embedding), requires_grad=False)

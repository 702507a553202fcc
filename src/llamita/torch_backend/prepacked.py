"""A model's weights on a CPU in the order in which oneDNN's kernels read them, which PyTorch calls prepacked.

A plain weight is packed anew at each product, which for few rows takes longer than the product itself.
Here it is done once, for a model that is used and no longer trained. Knows nothing of runners.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.checkpoint import HostArray
from llamita.torch_backend.model import Embedding, Linear, Llama
from llamita.torch_backend.weights import TORCH_DTYPES, tensor_from_host

SMALLEST = 2**18
"""Numbers in a weight from which on it is faster prepacked: below, what it costs to call the operator is more."""


def linear(x_D: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """`layers.linear` over a prepacked weight; it has no gradient.

    PyTorch's compiler puts frozen weights through the same operator.
    """
    return torch.ops.mkldnn._linear_pointwise(x_D, weight_CD, bias_C, "none", [], "")


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

    `array` is where its values came from. If that is a mapped file with numbers of the same type, tokens are looked up
    there, and memory holds the copy alone.
    """

    def __init__(self, table: Embedding, array: HostArray | None) -> None:
        nn.Module.__init__(self)
        mapped = array is not None and array.mapping is not None and TORCH_DTYPES[array.dtype] == table.weight.dtype
        self.array = array if mapped else None
        if self.array is not None:  # in place of what the table had in memory, which is free before the copy is made
            table.weight = nn.Parameter(tensor_from_host(self.array), requires_grad=False)
        self.weight = table.weight
        self.head_VD = prepack(self.weight)
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
def prepack_weights(model: Llama, embedding: HostArray | None = None) -> None:
    """Prepack the weights of the linear maps, one after the other, where there are kernels for them; small ones stay.

    `embedding` are the values of the embedding where they came from, for one that is the output head too.
    """
    some = model.model.norm.weight  # never quantised
    if some.device.type != "cpu" or not can_prepack(some.dtype):
        return
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.numel() >= SMALLEST:
            module.weight = nn.Parameter(prepack(module.weight), requires_grad=False)
            module.product = linear
    table = model.model.embed_tokens
    tied = model.config.tie_word_embeddings and not model.config.num_labels
    if tied and isinstance(table, Embedding) and table.weight.numel() >= SMALLEST:
        model.model.embed_tokens = PrepackedEmbedding(table, embedding)

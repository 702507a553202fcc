"""The twins of the model's linear map and embedding whose weights are int8 or int4, with the same face.

Weight and scales have their names in a checkpoint, are not trained, and keep their types whatever that of the model is;
what goes in has a gradient, so that an adapter can be trained over them.
Knows nothing of how numbers are rounded or multiplied: `quantize.py` does.

Letters beyond the usual: M rows of activations.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend.torch.infer.kernels.choice import weights_in_blocks
from llamita.backend.torch.infer.kernels.gguf_blocks import in_halves
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.model import quantize
from llamita.backend.torch.model.layers import Adapters, Operations
from llamita.model.quantization import QUANTIZATION_GROUP, quantized_shapes

if TYPE_CHECKING:
    from llamita.backend.torch.infer.kernels.blocked import BlockedWeight


class QuantizedLinear(nn.Module):
    """A weight (n_out, n_in) of so many bits, its scales, and perhaps a bias (n_out,) in the model's type.

    With kernels of our own, all rows go through them. Else few rows of bfloat16 go through a kernel that reads the
    weight as it is; more of them, or another type or device, through `operations.linear` over the dequantised weight.
    `arrange` comes once the values are there.
    """

    def __init__(self, size: torch.Size, bias: bool, operations: Operations, bits: int) -> None:
        super().__init__()
        n_out, n_in = size
        shape, scales = quantized_shapes(n_out, n_in, bits)
        dtype = torch.int8 if bits == 8 else torch.uint8
        self.name = ""  # its place in the model, by which adapters know it
        self.n_out, self.n_in, self.bits = n_out, n_in, bits
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(scales, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.product = operations.linear
        self.dtype = torch.float32
        self.fits_kernel = False
        self.kernel_scale: Tensor | None = None  # where the weight lies in the order of the int4 kernel
        self.blocks: BlockedWeight | None = None  # where it lies in the order of kernels of our own

    def arrange(self, dtype: torch.dtype, instructions: Instructions | None = None) -> None:
        """Prepares for activations of this type: puts the weight into the order of the kernel that will read it.

        `instructions` are those that kernels of our own are compiled for, None: there are none.
        """
        if self.kernel_scale is not None or self.blocks is not None:
            self.weight = nn.Parameter(self.plain_weight(), requires_grad=False)
            self.kernel_scale = self.blocks = None
        self.dtype = dtype
        if instructions is not None and self.n_in % QUANTIZATION_GROUP == 0 and self.weight.device.type == "cpu":
            values = self.weight.data if self.bits == 8 else in_halves(quantize.unpacked(self.weight.data))
            self.blocks = weights_in_blocks().blocked_bytes(values, self.weight_scale.data, self.bits, instructions)
            self.weight = nn.Parameter(self.weight.data.to("meta"), requires_grad=False)  # holds no numbers any more
            return
        self.fits_kernel = quantize.kernel_fits(self.weight, self.n_out, self.n_in, dtype)
        if self.fits_kernel and self.bits == 4:
            self.weight.data = quantize.to_blocks(self.weight.data)
            self.kernel_scale = quantize.scales_and_zeros(self.weight_scale.data)

    @property
    def kernel_bytes(self) -> int:
        """Bytes that the kernel reads beyond the weight and scales that are held: its own form of them."""
        if self.blocks is not None:
            return self.blocks.nbytes - self.weight_scale.nbytes  # the stored weight holds no memory
        return 0 if self.kernel_scale is None else self.kernel_scale.nbytes - self.weight_scale.nbytes

    def plain_weight(self) -> Tensor:
        """Returns the values in the order in which they are stored."""
        if self.blocks is not None:
            return self.blocks.values() if self.bits == 8 else quantize.packed(self.blocks.values())
        return self.weight.data if self.kernel_scale is None else quantize.from_blocks(self.weight.data)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (n_out, n_in) in floating-point numbers."""
        if self.blocks is not None:
            return quantize.dequantize(self.plain_weight(), self.weight_scale, self.n_in, dtype)
        if self.kernel_scale is not None:
            return quantize.dequantize_blocks(self.weight, self.weight_scale, dtype)
        return quantize.dequantize(self.weight, self.weight_scale, self.n_in, dtype)

    def forward(self, x: Tensor, adapters: Adapters | None = None, product: None = None) -> Tensor:
        y = self.multiply(x)
        return y if adapters is None else adapters.changed(self.name, x, y)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies the input (..., n_in) by the weight: (..., n_out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(x.to(_autocast_dtype(x)), self)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if self.blocks is not None:
            return self.blocks.product(x, self.weight, self.bias)
        rows = x.numel() // self.n_in
        if not self.fits_kernel or rows > quantize.KERNEL_ROWS or x.dtype != self.dtype:
            return self.product(x, self.dequantized(x.dtype), self.bias)
        x_MD = x.reshape(rows, self.n_in).contiguous()
        if self.kernel_scale is None:
            y_MC = quantize.int8_product(x_MD, self.weight, self.weight_scale)
        else:
            y_MC = quantize.int4_product(x_MD, self.weight, self.kernel_scale)
        y = y_MC.view(*x.shape[:-1], self.n_out)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """The product with a dequantised weight, which is made again for the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad @ ctx.layer.dequantized(grad.dtype), None


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which a product of `x` is computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class QuantizedEmbedding(QuantizedLinear):
    """A table (V, D) in int8: looked up by `forward`, and by `multiply` the output head where both are tied."""

    def __init__(self, size: torch.Size, operations: Operations) -> None:
        super().__init__(size, False, operations, bits=8)

    def forward(self, tokens_BT: Tensor) -> Tensor:  # type: ignore[override]  # no adapter changes it
        if self.blocks is not None:
            return self.blocks.rows(tokens_BT).to(self.dtype)
        values_BTD = F.embedding(tokens_BT, self.weight).to(self.dtype)
        return values_BTD * self.weight_scale[tokens_BT].to(self.dtype)[..., None]

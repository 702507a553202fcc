"""The twins of the model's linear map and embedding whose weights are int8 or int4, with the same face.

Weight and scales have their names in a checkpoint and keep their types whatever that of the model is. Knows nothing of
how numbers are rounded, packed or multiplied: `quantize.py` does.
"""

import mlx.core as mx
import mlx.nn as nn

from llamita.backend.mlx.model import quantize
from llamita.backend.mlx.model.layers import Adapters, Operations
from llamita.model.quantization import quantized_shapes


class QuantizedLinear(nn.Module):
    """A weight (n_out, n_in) of so many bits, its scales, and perhaps a bias (n_out,) in the model's type.

    Multiplied by MLX's kernel for packed weights, which reads the weight as it is; an input that is no multiple of the
    kernel's groups meets the dequantised weight. `arrange` comes once the values are there.
    """

    def __init__(self, size: tuple[int, ...], bias: bool, operations: Operations, bits: int) -> None:
        super().__init__()
        n_out, n_in = size
        shape, scales = quantized_shapes(n_out, n_in, bits)
        self.name = ""  # its place in the model, by which adapters know it
        self.n_in = n_in
        self.weight = mx.zeros(shape, mx.int8 if bits == 8 else mx.uint8)
        self.weight_scale = mx.zeros(scales, mx.bfloat16)
        self.bias = mx.zeros(n_out) if bias else None
        self.product = operations.linear
        self.dtype = mx.float32
        self._packed: quantize.Packed | None = None

    def arrange(self, dtype: mx.Dtype) -> None:
        """Packs the weight for activations of this type; the packed words take the stored values' place."""
        self.dtype = dtype
        if quantize.packs(self.n_in):
            kernel = mx.float32 if mx.default_device() == mx.cpu else dtype  # a CPU's is far slower in bfloat16
            self._packed = quantize.pack(self.plain_weight(), self.weight_scale, kernel)
            mx.eval(list(vars(self._packed).values()))  # not left to a compiled step, or to another thread
            self.weight = self._packed.words

    @property
    def kernel_bytes(self) -> int:
        """Bytes that the kernel reads beyond the weight and scales as they are stored: its own form of the scales."""
        if self._packed is None:
            return 0
        return self._packed.scales.nbytes + self._packed.biases.nbytes - self.weight_scale.nbytes

    def plain_weight(self) -> mx.array:
        """Returns the values in the order in which they are stored."""
        return self.weight if self._packed is None else quantize.unpack(self._packed)

    def dequantized(self, dtype: mx.Dtype) -> mx.array:
        """Returns the weight (n_out, n_in) in floating-point numbers."""
        return quantize.dequantize(self.plain_weight(), self.weight_scale, self.n_in, dtype)

    def __call__(self, x: mx.array, adapters: Adapters | None = None, dtype: mx.Dtype | None = None) -> mx.array:
        """Multiplies as `multiply` does, whatever the `dtype` of other products is."""
        y = self.multiply(x)
        return y if adapters is None else adapters.changed(self.name, x, y)

    def multiply(self, x: mx.array) -> mx.array:
        """Multiplies the input (..., n_in) by the weight: (..., n_out)."""
        if self._packed is None:
            return self.product(x, self.dequantized(x.dtype), self.bias)
        y = quantize.product(x, self._packed).astype(x.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(QuantizedLinear):
    """A table (V, D) in int8: looked up by `__call__`, and by `multiply` the output head where both are tied."""

    def __init__(self, size: tuple[int, ...], operations: Operations) -> None:
        super().__init__(size, False, operations, bits=8)

    def __call__(self, tokens_BT: mx.array) -> mx.array:  # type: ignore[override]  # no adapter changes it
        if self._packed is not None:
            return quantize.rows(self._packed, tokens_BT).astype(self.dtype)
        values_BTD, scale_BT = self.weight[tokens_BT], self.weight_scale[tokens_BT]
        return values_BTD.astype(self.dtype) * scale_BT[..., None].astype(self.dtype)

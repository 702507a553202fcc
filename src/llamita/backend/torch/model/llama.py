"""The Llama: embedding, pre-norm blocks of attention and SwiGLU, final norm, output head.

Built from the table of parameters, whose names it gives and takes; inside, query, key and value projections are one
matrix, and so are gate and up, since one large product is faster than three. Knows nothing of training or requests.

Letters beyond the usual: E the pairs of a head that rotate, G heads of several kinds side by side, R positions that are
wanted.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamita.backend.interface import AttentionName
from llamita.backend.torch.infer.kernels.instructions import Instructions
from llamita.backend.torch.infer.kv_cache import CacheStep
from llamita.backend.torch.model import attention as masks
from llamita.backend.torch.model import flex, layers
from llamita.backend.torch.model.dropout import drop
from llamita.backend.torch.model.fused import FusedParameter, canonical_names
from llamita.backend.torch.model.head import LogitTransform, OutputHead
from llamita.backend.torch.model.layers import FUSED, Adapters, Operations
from llamita.backend.torch.model.quantized import QuantizedEmbedding, QuantizedLinear
from llamita.model.config import ModelConfig
from llamita.model.parameters import BLOCK_NORMS, stored_arrays

Trace = Callable[[str, Tensor], None]
Mask = Tensor | flex.BlockMask
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What computes `layers.linear` of an input, a weight and a bias or None."""


class ModelOutput(NamedTuple):
    """`logits_BTV` over the vocabulary (over the labels for a classifier); `hidden_BTD` after the final norm."""

    logits_BTV: Tensor
    hidden_BTD: Tensor


class KernelWeight(Protocol):
    """A weight (n_out, n_in) in the order of a kernel."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def product(self, x: Tensor, weight: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Computes `layers.linear` without looking at `weight`."""

    def plain(self) -> Tensor:
        """Returns the weight in floating-point numbers, in its ordinary order."""

    def rows(self, wanted: Tensor) -> Tensor:
        """Returns some rows."""


class Linear(nn.Module):
    """A weight (n_out, n_in) and perhaps a bias (n_out,), not yet initialised. With a `kernel`, that holds it."""

    def __init__(self, n_out: int, n_in: int, bias: bool, operations: Operations) -> None:
        super().__init__()
        self.name = ""  # its place in the model, by which adapters know it
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.product = operations.linear
        self.kernel: KernelWeight | None = None

    def forward(self, x: Tensor, adapters: Adapters | None = None, product: Product | None = None) -> Tensor:
        """`product` takes the place of the model's own."""
        y = (product or self.product)(x, self.weight, self.bias)
        return y if adapters is None else adapters.changed(self.name, x, y)


class Embedding(nn.Module):
    kernel: KernelWeight | None = None

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.product = operations.linear

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)

    def multiply(self, hidden_BTD: Tensor) -> Tensor:
        return self.product(hidden_BTD, self.weight)


class RMSNorm(nn.Module):
    """The norm of a model; with a unit offset it multiplies by 1 + weight, all of it in float32."""

    def __init__(self, size: int, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.unit_offset = config.rms_norm_eps, config.unit_offset_norm
        self.norm = operations.rms_norm

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.unit_offset:
            return self.norm(x_BTD.float(), 1 + self.weight.float(), self.eps).to(x_BTD.dtype)
        return self.norm(x_BTD, self.weight, self.eps)


@dataclass(frozen=True)
class Context:
    """All that a layer needs to know of one forward pass: rotations, who sees whom, whether dropout is drawn, adapters.

    `window_mask` is for layers with a sliding window, None where all that `mask` and `causal` allow lies within it.
    With a `cache`, that is what knows.
    """

    rotations: tuple[tuple[Tensor, Tensor], ...]
    """Cosines and sines, each (B, T, E), of the rotations that layers choose from."""
    mask: Mask | None = None
    causal: bool = True
    window_mask: Mask | None = None
    cache: CacheStep | None = None
    training: bool = False
    adapters: Adapters | None = None
    trace: Trace | None = None
    attention_of: Collection[int] = ()
    """The layers whose attention probabilities `trace` is shown."""
    product: Product | None = None
    """What multiplies by the matrices of the blocks, None for the model's own product."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, operations: Operations) -> None:
        super().__init__()
        self.layer = layer
        self.N, self.K, self.H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        self.qkv_proj = Linear((self.N + 2 * self.K) * self.H, D, bias or config.query_key_value_bias, operations)
        self.o_proj = Linear(D, self.N * self.H, bias, operations)
        normed = (self.N, self.K) if config.norm_all_heads else (1, 1)
        self.q_norm = RMSNorm(normed[0] * self.H, config, operations) if config.query_key_norm else None
        self.k_norm = RMSNorm(normed[1] * self.H, config, operations) if config.query_key_norm else None
        self.norm_all_heads = config.norm_all_heads
        self.spec, self.rotation = config.attention(layer), config.rotation(layer)
        self.dropout = config.dropout
        self.attend = operations.attention

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        N, K, H = self.N, self.K, self.H
        heads_BTGH = self.qkv_proj(x_BTD, context.adapters, context.product).unflatten(-1, (N + 2 * K, H))
        rotated_BTGH = self.normed(heads_BTGH[..., : N + K, :])
        if self.rotation is not None:
            rotated_BTGH = layers.apply_rope(rotated_BTGH, *context.rotations[self.rotation])
        if context.cache is not None:
            rotated_TGH, v_TKH = rotated_BTGH[0], heads_BTGH[0, :, N + K :]
            mixed_TNH = context.cache.attend(self.layer, rotated_TGH[:, :N], rotated_TGH[:, N:], v_TKH)
            return self.o_proj(mixed_TNH.flatten(-2)[None], context.adapters)
        q_BNTH = rotated_BTGH[..., :N, :].transpose(1, 2)
        k_BKTH = rotated_BTGH[..., N:, :].transpose(1, 2)
        v_BKTH = heads_BTGH[..., N + K :, :].transpose(1, 2)
        dropout = self.dropout if context.training else 0.0
        mask, causal = context.mask, context.causal
        if self.spec.window and context.window_mask is not None:
            mask, causal = context.window_mask, False
        if context.trace and self.layer in context.attention_of:
            assert not isinstance(mask, flex.BlockMask), "FlexAttention keeps no probabilities"
            weights_BNTT = masks.attention_weights(q_BNTH.float(), k_BKTH.float(), mask, causal, self.spec)
            context.trace(f"layers.{self.layer}.attention", weights_BNTT)
        if isinstance(mask, flex.BlockMask):
            assert not dropout, "FlexAttention draws no dropout"
            mixed_BNTH = flex.attention(q_BNTH, k_BKTH, v_BKTH, mask, self.spec)
        else:
            mixed_BNTH = self.attend(q_BNTH, k_BKTH, v_BKTH, mask, causal, dropout, self.spec)
        return self.o_proj(mixed_BNTH.transpose(1, 2).flatten(-2), context.adapters, context.product)

    def normed(self, heads_BTGH: Tensor) -> Tensor:
        """Returns queries and keys with their norms, where there are any: over each head, or over all heads at once."""
        if self.q_norm is None or self.k_norm is None:
            return heads_BTGH
        q_BTNH, k_BTKH = heads_BTGH[..., : self.N, :], heads_BTGH[..., self.N :, :]
        if self.norm_all_heads:
            q_BTNH = self.q_norm(q_BTNH.flatten(-2)).view_as(q_BTNH)
            k_BTKH = self.k_norm(k_BTKH.flatten(-2)).view_as(k_BTKH)
            return torch.cat((q_BTNH, k_BTKH), -2)
        return torch.cat((self.q_norm(q_BTNH), self.k_norm(k_BTKH)), -2)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        D, C, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(2 * C, D, bias, operations)
        self.down_proj = Linear(D, C, bias, operations)
        self.activation = config.hidden_act
        self.gate = operations.gates[config.hidden_act]

    def forward(self, x_BTD: Tensor, adapters: Adapters | None = None, product: Product | None = None) -> Tensor:
        return self.down_proj(self.gate(self.gate_up_proj(x_BTD, adapters, product)), adapters, product)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, operations: Operations) -> None:
        super().__init__()
        self.norms = BLOCK_NORMS[config.norm_placement]

        def add(*norms: str) -> None:
            for name in filter(None, norms):
                self.add_module(name, RMSNorm(config.hidden_size, config, operations))

        add(self.norms.before_attention)
        self.self_attn = Attention(config, layer, operations)
        add(self.norms.after_attention, self.norms.before_feed_forward)
        self.mlp = FeedForward(config, operations)
        add(self.norms.after_feed_forward)
        self.dropout, self.multiplier = config.dropout, config.residual_multiplier

    def forward(self, x_BTD: Tensor, context: Context, rows_R: Tensor | None = None) -> Tensor:
        """`rows_R` are the positions that are wanted, None for all; the others are spared the feed-forward layer."""
        norms = self.norms
        y_BTD = self.self_attn(self.normed(norms.before_attention, x_BTD), context)
        x_BTD = x_BTD + self.added(self.normed(norms.after_attention, y_BTD), context)
        x_BTD = x_BTD if rows_R is None else x_BTD[:, rows_R]
        y_BTD = self.mlp(self.normed(norms.before_feed_forward, x_BTD), context.adapters, context.product)
        return x_BTD + self.added(self.normed(norms.after_feed_forward, y_BTD), context)

    def normed(self, norm: str, x_BTD: Tensor) -> Tensor:
        """Returns the input through the norm of this name; unchanged where there is none in this place."""
        normed_BTD: Tensor = self.get_submodule(norm)(x_BTD) if norm else x_BTD
        return normed_BTD

    def added(self, y_BTD: Tensor, context: Context) -> Tensor:
        """Returns a sublayer's result as it is added to the residual stream: after dropout, where drawn, and scaled."""
        y_BTD = drop(y_BTD, self.dropout) if self.dropout and context.training else y_BTD
        return y_BTD if self.multiplier == 1.0 else y_BTD * self.multiplier


class Body(nn.Module):
    """Everything below the output head; the name `model` and those inside are the canonical ones."""

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, operations)
        self.layers = nn.ModuleList(Block(config, i, operations) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config, operations)


class Llama(nn.Module):
    """A Llama-family model. Made by `weights.build_model`, which gives the parameters their values.

    `model(tokens_BT)` returns logits and last hidden states. `operations` chooses between the readable form of each
    operation (`layers.PLAIN`) and the fused one (`layers.FUSED`).
    """

    def __init__(self, config: ModelConfig, operations: Operations = FUSED) -> None:
        super().__init__()
        self.config = config
        self.reordered = False  # whether weights lie in a kernel's order, to be used and not changed
        self.instructions: Instructions | None = None  # those of the kernels in whose blocks weights lie
        self.ropes = [layers.RopeTable(torch.from_numpy(turns), scale) for turns, scale in config.rotations]
        self.transform = LogitTransform.of(config)
        self.model = Body(config, operations)
        if config.num_labels:
            self.score = Linear(config.num_labels, config.hidden_size, False, operations)
        elif not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, False, operations)
        if config.quantization:
            self._take_twins(operations, 8 if config.quantization == "int8" else 4)
        self._name_linear_maps()

    def _take_twins(self, operations: Operations, bits: int) -> None:
        """Puts the quantised twin of each linear map and of the embedding in its place, but for a classifier's head."""
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Embedding):
                    setattr(parent, name, QuantizedEmbedding(child.weight.shape, operations))
                elif isinstance(child, Linear) and name != "score":
                    has_bias, child_bits = child.bias is not None, 8 if name == "lm_head" else bits
                    setattr(parent, name, QuantizedLinear(child.weight.shape, has_bias, operations, child_bits))

    def _name_linear_maps(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Linear | QuantizedLinear):
                module.name = name

    @property
    def head(self) -> OutputHead:
        """The output head as losses take it: its own matrix, or the embedding's where tied, or the classifier's."""
        if self.config.num_labels:
            return OutputHead(self.score.weight, self.transform)
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        weight_VD = head.dequantized(head.dtype) if isinstance(head, QuantizedLinear) else head.weight
        return OutputHead(weight_VD, self.transform)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: CacheStep | None = None,
        trace: Trace | None = None,
        training: bool = False,
        adapters: Adapters | None = None,
    ) -> ModelOutput:
        """Returns logits (B, T, V) and hidden states (B, T, D) after the final norm, for tokens (B, T).

        positions_BT defaults to 0, 1, .... segments_BT keeps attention inside a document of a packed row, and marks
        padding on either side with 0. With a `cache`, there is one row of chunks of several sequences, whose positions
        and earlier keys and values the cache knows. `trace(name, x_BTD)` is shown the residual stream after the
        embedding, after each block, and after the final norm. Dropout is drawn only where `training` is true.
        """
        hidden_BTD = self.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            trace=trace,
            training=training,
            adapters=adapters,
        )
        return ModelOutput(self.logits(hidden_BTD, adapters), hidden_BTD)

    def logits(self, hidden_BTD: Tensor, adapters: Adapters | None = None) -> Tensor:
        """Returns logits (..., V) of hidden states (..., D), or those of the labels."""
        if self.config.tie_word_embeddings and not self.config.num_labels:
            return self.transform(self.model.embed_tokens.multiply(hidden_BTD))
        return self.transform((self.score if self.config.num_labels else self.lm_head)(hidden_BTD, adapters))

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: CacheStep | None = None,
        trace: Trace | None = None,
        training: bool = False,
        adapters: Adapters | None = None,
        rows_R: Tensor | None = None,
        attention_of: Collection[int] = (),
        recompute: Collection[int] = (),
        product: Product | None = None,
        attention: AttentionName = "masked",
    ) -> Tensor:
        """Returns the hidden states of `forward`, or of some rows, without the product with the output head.

        The trace is also shown the attention probabilities (B, N, T, T) of the layers in `attention_of`, as
        `layers.0.attention` and so on: float32, from the layer's own queries and keys. They come without a cache only.
        The blocks in `recompute` keep their input alone for the backward pass, which runs them a second time, with the
        same random numbers (Chen et al. 2016, arXiv:1604.06174). `product` multiplies by the matrices of the blocks in
        place of the model's own product. `attention` flex keeps documents and windows apart by FlexAttention (flex.py).
        """
        if cache is None:
            context = self.context(tokens_BT, positions_BT, segments_BT, training, adapters, attention)
            if attention_of:
                context = replace(context, trace=trace, attention_of=attention_of)
            if product is not None:
                context = replace(context, product=product)
        else:
            assert positions_BT is None, "the cache knows the positions"
            assert segments_BT is None, "the cache keeps sequences apart"
            assert not attention_of, "attention over a cache keeps no probabilities"
            assert product is None, "a cache is for inference, which multiplies as the model does"
            rotations = tuple(rope.at(cache.positions_1T, cache.longest) for rope in self.ropes)
            context = Context(rotations, cache=cache, adapters=adapters)
        x_BTD = self.embedded(tokens_BT)
        if self.config.dropout and training:
            x_BTD = drop(x_BTD, self.config.dropout)
        if trace:
            trace("embedding", x_BTD)
        for i, block in enumerate(self.model.layers):
            wanted_R = rows_R if i == len(self.model.layers) - 1 else None
            if i in recompute:
                x_BTD = checkpoint(block, x_BTD, context, wanted_R, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, context, wanted_R)
            if trace:
                trace(f"layers.{i}", x_BTD)
        x_BTD = self.model.norm(x_BTD)
        if trace:
            trace("norm", x_BTD)
        return x_BTD

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        """Returns what enters the first block, (B, T, D)."""
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        if self.config.embedding_multiplier != 1.0:  # rounded to the type of the embeddings first
            x_BTD = x_BTD * x_BTD.new_full((), self.config.embedding_multiplier)
        return x_BTD

    def context(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        segments_BT: Tensor | None,
        training: bool = False,
        adapters: Adapters | None = None,
        attention: AttentionName = "masked",
    ) -> Context:
        """Returns rotations and masks, computed once for all layers."""
        T, device = tokens_BT.shape[1], tokens_BT.device
        if positions_BT is None:
            positions_BT = torch.arange(T, device=device)[None]
        rotations = tuple(layers.rope_table(positions_BT, r.frequencies_E.to(device), r.scale) for r in self.ropes)
        mask, window_mask = self._masks(segments_BT, T, device, attention)
        return Context(rotations, mask, mask is None, window_mask, training=training, adapters=adapters)

    def _masks(
        self, segments_BT: Tensor | None, T: int, device: torch.device, attention: AttentionName
    ) -> tuple[Mask | None, Mask | None]:
        """Returns the mask of layers without a window and of those with one; None for what is causal alone."""
        window = self.config.sliding_window if self.config.sliding_window < T else 0
        if attention == "flex":
            blocks = None if segments_BT is None else flex.block_mask(segments_BT, T, device=device)
            return blocks, flex.block_mask(segments_BT, T, window, device) if window else None
        mask = None if segments_BT is None else masks.segment_mask(segments_BT)
        if not window:
            return mask, None
        window_mask = masks.window_mask(T, window, device)
        return mask, window_mask if mask is None else mask & window_mask

    def fused_parameters(self) -> Iterator[FusedParameter]:
        """Yields every parameter with the canonical parameters that it holds, in the order of the table."""
        table = {array.name: array for array in stored_arrays(self.config)}
        for name, parameter in self.named_parameters():
            rows = [table[part] for part in canonical_names(name)]
            sizes = [row.shape[0] for row in rows]
            assert sum(sizes) == parameter.shape[0], f"{name} is not made of {[row.name for row in rows]}"
            yield FusedParameter(name, parameter, tuple(row.name for row in rows), tuple(sizes), rows[0].weight_decay)

    def canonical_state(self) -> dict[str, Tensor]:
        """Returns views of the parameters under canonical names; copies, where weights lie in a kernel's order."""
        result: dict[str, Tensor] = {}
        for fused in self.fused_parameters():
            module, _, kind = fused.name.rpartition(".")
            owner, values = self.get_submodule(module), fused.parameter.detach()
            if isinstance(owner, QuantizedLinear) and kind == "weight":
                values = owner.plain_weight()
            elif isinstance(owner, Linear | Embedding) and owner.kernel is not None and kind == "weight":
                values = owner.kernel.plain().to(self.model.norm.weight.dtype)
            elif values.is_mkldnn:
                values = values.to_dense()
            result |= zip(fused.parts, fused.split(values), strict=True)
        return result

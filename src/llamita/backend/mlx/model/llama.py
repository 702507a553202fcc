"""The Llama: embedding, pre-norm blocks of attention and SwiGLU, final norm, output head.

Built from the table of parameters, whose names it gives and takes; inside, query, key and value projections are one
matrix, and so are gate and up, since one large product is faster than three. `nn.Module` is used as a tree of named
arrays and no more. Knows nothing of training or requests.

Letters beyond the usual: E the pairs of a head that rotate, G heads of several kinds side by side, R positions that are
wanted.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from llamita.backend.mlx.infer.kv_cache import PagedStep
from llamita.backend.mlx.model import attention as masks
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.head import LogitTransform, OutputHead
from llamita.backend.mlx.model.layers import FUSED, Adapters, Operations
from llamita.backend.mlx.model.quantized import QuantizedEmbedding, QuantizedLinear
from llamita.model.config import ModelConfig
from llamita.model.parameters import BLOCK_NORMS, canonical_names, stored_arrays

Trace = Callable[[str, mx.array], None]


class ModelOutput(NamedTuple):
    """`logits_BTV` over the vocabulary (over the labels for a classifier); `hidden_BTD` after the final norm."""

    logits_BTV: mx.array
    hidden_BTD: mx.array


class Linear(nn.Module):
    """A weight (n_out, n_in) and perhaps a bias (n_out,), not yet initialised."""

    def __init__(self, n_out: int, n_in: int, bias: bool, operations: Operations) -> None:
        super().__init__()
        self.name = ""  # its place in the model, by which adapters know it
        self.weight = mx.zeros((n_out, n_in))
        self.bias = mx.zeros(n_out) if bias else None
        self.product = operations.linear

    def __call__(self, x: mx.array, adapters: Adapters | None = None, dtype: mx.Dtype | None = None) -> mx.array:
        """Multiplies in the type of the weight, or in `dtype`, to which the weight is rounded for it."""
        weight, bias = self.weight, self.bias
        if dtype is not None:
            weight, bias = weight.astype(dtype), None if bias is None else bias.astype(dtype)
        y = self.product(x, weight, bias)
        return y if adapters is None else adapters.changed(self.name, x, y)


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.weight = mx.zeros((config.vocab_size, config.hidden_size))
        self.product = operations.linear

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        return self.weight[tokens_BT]

    def multiply(self, hidden_BTD: mx.array) -> mx.array:
        return self.product(hidden_BTD, self.weight)


class RMSNorm(nn.Module):
    """The norm of a model; with a unit offset it multiplies by 1 + weight, all of it in float32."""

    def __init__(self, size: int, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.weight = mx.zeros(size)
        self.eps, self.unit_offset = config.rms_norm_eps, config.unit_offset_norm
        self.norm = operations.rms_norm

    def __call__(self, x_BTD: mx.array) -> mx.array:
        if self.unit_offset:
            weight_D = 1 + self.weight.astype(mx.float32)
            return self.norm(x_BTD.astype(mx.float32), weight_D, self.eps).astype(x_BTD.dtype)
        return self.norm(x_BTD, self.weight, self.eps)


@dataclass(frozen=True)
class Context:
    """All that a layer needs to know of one forward pass: rotations, who sees whom, dropout where drawn, adapters.

    `positions_BT` None stands for 0, 1, .... `window_mask` is for layers with a sliding window, None where all that
    `mask` and `causal` allow lies within it. With a `cache`, that is what knows.
    """

    rotations: tuple[tuple[mx.array, float], ...]
    """Frequencies [E], and the factor on what is turned, of the rotations that layers choose from."""
    positions_BT: mx.array | None = None
    mask: mx.array | None = None
    causal: bool = True
    window_mask: mx.array | None = None
    cache: PagedStep | None = None
    dropout: masks.Dropout | None = None
    adapters: Adapters | None = None
    dtype: mx.Dtype | None = None
    """The type of products with weights that are not quantised; None for that of each weight."""
    trace: Trace | None = None
    attention_of: Collection[int] = ()
    """The layers whose attention probabilities `trace` is shown."""


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
        self.attend, self.rotate = operations.attention, operations.rotate

    def __call__(self, x_BTD: mx.array, context: Context) -> mx.array:
        N, K, H = self.N, self.K, self.H
        heads_BTGH = self.qkv_proj(x_BTD, context.adapters, context.dtype).reshape(*x_BTD.shape[:2], N + 2 * K, H)
        rotated_BTGH = self.normed(heads_BTGH[..., : N + K, :])
        if self.rotation is not None:
            rotated_BTGH = self.rotate(rotated_BTGH, context.positions_BT, *context.rotations[self.rotation])
        if context.cache is not None:
            rotated_TGH, v_TKH = rotated_BTGH[0], heads_BTGH[0, :, N + K :]
            mixed_TNH = context.cache.attend(self.layer, rotated_TGH[:, :N], rotated_TGH[:, N:], v_TKH)
            return self.o_proj(mixed_TNH.flatten(-2)[None], context.adapters, context.dtype)
        q_BNTH = rotated_BTGH[..., :N, :].swapaxes(1, 2)
        k_BKTH = rotated_BTGH[..., N:, :].swapaxes(1, 2)
        v_BKTH = heads_BTGH[..., N + K :, :].swapaxes(1, 2)
        mask, causal = context.mask, context.causal
        if self.spec.window and context.window_mask is not None:
            mask, causal = context.window_mask, False
        if context.trace and self.layer in context.attention_of:
            q, k = q_BNTH.astype(mx.float32), k_BKTH.astype(mx.float32)
            context.trace(f"layers.{self.layer}.attention", masks.attention_weights(q, k, mask, causal, self.spec))
        mixed_BNTH = self.attend(q_BNTH, k_BKTH, v_BKTH, mask, causal, context.dropout, self.spec)
        return self.o_proj(mixed_BNTH.swapaxes(1, 2).flatten(-2), context.adapters, context.dtype)

    def normed(self, heads_BTGH: mx.array) -> mx.array:
        """Returns queries and keys with their norms, where there are any: over each head, or over all heads at once."""
        if self.q_norm is None or self.k_norm is None:
            return heads_BTGH
        q_BTNH, k_BTKH = heads_BTGH[..., : self.N, :], heads_BTGH[..., self.N :, :]
        if self.norm_all_heads:
            normed = [
                norm(x.flatten(-2)).reshape(x.shape) for norm, x in ((self.q_norm, q_BTNH), (self.k_norm, k_BTKH))
            ]
        else:
            normed = [self.q_norm(q_BTNH), self.k_norm(k_BTKH)]
        return mx.concatenate(normed, axis=-2).astype(heads_BTGH.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        D, C, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(2 * C, D, bias, operations)
        self.down_proj = Linear(D, C, bias, operations)
        self.gate = operations.gates[config.hidden_act]

    def __call__(self, x_BTD: mx.array, adapters: Adapters | None = None, dtype: mx.Dtype | None = None) -> mx.array:
        return self.down_proj(self.gate(self.gate_up_proj(x_BTD, adapters, dtype)), adapters, dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, operations: Operations) -> None:
        super().__init__()
        self.norms, self.multiplier = BLOCK_NORMS[config.norm_placement], config.residual_multiplier
        for name in filter(None, self.norms):
            self[name] = RMSNorm(config.hidden_size, config, operations)
        self.self_attn = Attention(config, layer, operations)
        self.mlp = FeedForward(config, operations)

    def __call__(self, x_BTD: mx.array, context: Context, rows_R: mx.array | None = None) -> mx.array:
        """`rows_R` are the positions that are wanted, None for all; the others are spared the feed-forward layer."""
        norms = self.norms
        y_BTD = self.self_attn(self.normed(norms.before_attention, x_BTD), context)
        x_BTD = x_BTD + self.added(self.normed(norms.after_attention, y_BTD), context)
        x_BTD = x_BTD if rows_R is None else x_BTD[:, rows_R]
        y_BTD = self.mlp(self.normed(norms.before_feed_forward, x_BTD), context.adapters, context.dtype)
        return x_BTD + self.added(self.normed(norms.after_feed_forward, y_BTD), context)

    def normed(self, norm: str, x_BTD: mx.array) -> mx.array:
        """Returns the input through the norm of this name; unchanged where there is none in this place."""
        return self[norm](x_BTD) if norm else x_BTD

    def added(self, y_BTD: mx.array, context: Context) -> mx.array:
        """Returns a sublayer's result as it is added to the residual stream: after dropout, where drawn, and scaled."""
        y_BTD = context.dropout(y_BTD) if context.dropout else y_BTD
        return y_BTD if self.multiplier == 1.0 else y_BTD * self.multiplier


BlockRun = Callable[[Block, mx.array, Context], mx.array]
"""Returns the output of a block for all positions."""


class Body(nn.Module):
    """Everything below the output head; the name `model` and those inside are the canonical ones."""

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, operations)
        self.layers = [Block(config, i, operations) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config, operations)


class Llama(nn.Module):
    """A Llama-family model. Made by `weights.build_model`, which gives the parameters their values.

    `model(tokens_BT)` returns logits and last hidden states. `operations` chooses between the readable form of each
    operation (`layers.PLAIN`) and the fused one (`layers.FUSED`).
    """

    def __init__(self, config: ModelConfig, operations: Operations = FUSED) -> None:
        super().__init__()
        self.config = config
        self.transform, self._rotations = LogitTransform.of(config), config.rotations
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
        for _, parent in self.named_modules():
            for name, child in list(parent.items()):
                if isinstance(child, Embedding):
                    parent[name] = QuantizedEmbedding(child.weight.shape, operations)
                elif isinstance(child, Linear) and name != "score":
                    child_bits = 8 if name == "lm_head" else bits
                    parent[name] = QuantizedLinear(child.weight.shape, child.bias is not None, operations, child_bits)

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

    def __call__(
        self,
        tokens_BT: mx.array,
        *,
        positions_BT: mx.array | None = None,
        segments_BT: mx.array | None = None,
        cache: PagedStep | None = None,
        trace: Trace | None = None,
        adapters: Adapters | None = None,
    ) -> ModelOutput:
        """Returns logits (B, T, V) and hidden states (B, T, D) after the final norm, for tokens (B, T).

        positions_BT defaults to 0, 1, .... segments_BT keeps attention inside a document of a packed row, and marks
        padding on either side with 0. With a `cache`, there is one row of chunks of several sequences, whose positions
        and earlier keys and values the cache knows. `trace(name, x_BTD)` is shown the residual stream after the
        embedding, after each block, and after the final norm.
        """
        hidden_BTD = self.hidden(
            tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache, trace=trace, adapters=adapters
        )
        return ModelOutput(self.logits(hidden_BTD, adapters), hidden_BTD)

    def logits(self, hidden_BTD: mx.array, adapters: Adapters | None = None) -> mx.array:
        """Returns logits (..., V) of hidden states (..., D), or those of the labels."""
        if self.config.tie_word_embeddings and not self.config.num_labels:
            return self.transform(self.model.embed_tokens.multiply(hidden_BTD))
        return self.transform((self.score if self.config.num_labels else self.lm_head)(hidden_BTD, adapters))

    def hidden(
        self,
        tokens_BT: mx.array,
        *,
        positions_BT: mx.array | None = None,
        segments_BT: mx.array | None = None,
        cache: PagedStep | None = None,
        trace: Trace | None = None,
        dropout: masks.Dropout | None = None,
        adapters: Adapters | None = None,
        dtype: mx.Dtype | None = None,
        rows_R: mx.array | None = None,
        attention_of: Collection[int] = (),
        run_block: Mapping[int, BlockRun] | None = None,
    ) -> mx.array:
        """Returns the hidden states of `__call__`, or of some rows, without logits; with `dropout`, for training.

        Products with weights are in `dtype`, without one in the type of each weight; a `cache` comes without both. The
        trace is also shown the attention probabilities (B, N, T, T) of the layers in `attention_of`, as
        `layers.0.attention` and so on: float32, from the layer's own queries and keys. They come without a cache only.
        `run_block` runs some blocks, by their number, in another way than by a call (train/recomputation.py).
        """
        if cache is None:
            context = self.context(tokens_BT, positions_BT, segments_BT, dropout, adapters, dtype)
            if attention_of:
                context = replace(context, trace=trace, attention_of=attention_of)
        else:
            assert positions_BT is None, "the cache knows the positions"
            assert segments_BT is None, "the cache keeps sequences apart"
            assert not attention_of, "attention over a cache keeps no probabilities"
            context = Context(self.rotations(), cache.positions_1T, cache=cache, adapters=adapters)
        x_BTD = self.model.embed_tokens(tokens_BT)
        if self.config.embedding_multiplier != 1.0:  # rounded to the type of the embeddings first
            x_BTD = x_BTD * mx.array(self.config.embedding_multiplier, x_BTD.dtype)
        x_BTD = dropout(x_BTD) if dropout else x_BTD
        if trace:
            trace("embedding", x_BTD)
        for i, block in enumerate(self.model.layers):
            if run_block and i in run_block:
                x_BTD = run_block[i](block, x_BTD, context)
            else:
                x_BTD = block(x_BTD, context, rows_R if i == len(self.model.layers) - 1 else None)
            if trace:
                trace(f"layers.{i}", x_BTD)
        x_BTD = self.model.norm(x_BTD)
        if trace:
            trace("norm", x_BTD)
        return x_BTD

    def context(
        self,
        tokens_BT: mx.array,
        positions_BT: mx.array | None,
        segments_BT: mx.array | None,
        dropout: masks.Dropout | None = None,
        adapters: Adapters | None = None,
        dtype: mx.Dtype | None = None,
    ) -> Context:
        """Returns rotations and masks, computed once for all layers."""
        T = tokens_BT.shape[1]
        mask = None if segments_BT is None else masks.segment_mask(segments_BT)
        window, window_mask = self.config.sliding_window, None
        if window and window < T:
            window_mask = masks.window_mask(T, window)
            window_mask = window_mask if mask is None else mask & window_mask
        causal = mask is None
        return Context(self.rotations(), positions_BT, mask, causal, window_mask, None, dropout, adapters, dtype)

    def rotations(self) -> tuple[tuple[mx.array, float], ...]:
        """Returns `Context.rotations`."""
        return tuple((mx.array(frequencies_E), scale) for frequencies_E, scale in self._rotations)

    # --- names and values ---

    def fused_parameters(self) -> Iterator[FusedParameter]:
        """Yields every parameter with the canonical parameters that it holds, in the order of the table."""
        table = {array.name: array for array in stored_arrays(self.config)}
        found = {}
        for module_name, owner in self.named_modules():
            for key, parameter in ((key, value) for key, value in owner.items() if isinstance(value, mx.array)):
                name = f"{module_name}.{key}"
                rows = [table[part] for part in canonical_names(name)]
                sizes = tuple(row.shape[0] for row in rows)
                assert sum(sizes) == parameter.shape[0], f"{name} is not made of {[row.name for row in rows]}"
                parts = tuple(row.name for row in rows)
                found[parts[0]] = FusedParameter(name, owner, key, parts, sizes, rows[0].weight_decay)
        yield from (found[name] for name in table if name in found)

    def canonical_state(self) -> dict[str, mx.array]:
        """Returns the parameters under their canonical names, rows of fused ones cut apart."""
        result: dict[str, mx.array] = {}
        for fused in self.fused_parameters():
            of_twin = isinstance(fused.owner, QuantizedLinear) and fused.key == "weight"
            values = fused.owner.plain_weight() if of_twin else fused.parameter
            result |= zip(fused.parts, fused.split(values), strict=True)
        return result

"""A whole model: attention with rotary positions, the layer, and the layers between embeddings and logits.

One class serves Llama, Qwen2 and Qwen3. What sets them apart shows in the checkpoint: Qwen2 has biases on the
projections to queries, keys and values; Qwen3 has norms over each head of queries and of keys.

Letters: N rows of the batch, L positions of this call, H heads, E size of a head, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
from attention import scaled_dot_product_attention_grouped
from config import ModelConfig
from layers import MLP, Embedding, RMSNorm
from positional_encoding import RoPE
from projection import project

Weights = Mapping[str, Any]
"""Arrays by the names that they have in the checkpoint, such as "model.layers.0.self_attn.q_proj.weight"."""


class Cache(Protocol):
    """The keys and values of one layer that earlier calls have computed."""

    offset: int | list[int]
    """How many positions it holds; a list has a number for each row of the batch."""

    def update_and_fetch(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array, mx.array | str]:
        """Takes keys and values of new positions, (N, H, L, E); returns those of all, and a mask."""


class NoCache:
    """In the place of a cache: nothing came before, and nothing is kept."""

    offset = 0

    def update_and_fetch(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array, str]:
        return key, value, "causal"


class Attention:
    """Attention with rotary positions and shared key and value heads."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        """prefix: what the names of this layer's weights begin with, such as "model.layers.0.self_attn."."""
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.wq, self.wk, self.wv, self.wo = (weights[f"{prefix}{name}_proj.weight"] for name in "qkvo")
        self.bq, self.bk, self.bv, self.bo = (weights.get(f"{prefix}{name}_proj.bias") for name in "qkvo")
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if f"{prefix}q_norm.weight" in weights:
            self.q_norm = RMSNorm(self.head_dim, weights[f"{prefix}q_norm.weight"], config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, weights[f"{prefix}k_norm.weight"], config.rms_norm_eps)
        self.rope = RoPE(self.head_dim, config.max_position_embeddings, config.rope_theta)

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        """Returns what each position gathers. x and the result: (N, L, D).

        The first of the L positions is `cache.offset`; read it before the cache takes the new keys. Where it is a list,
        row n begins at position offset[n]. Norms, where the model has them, go over each head of queries and of keys,
        before the rotation. Each of the four projections has its bias, `self.bq` to `self.bo`; one that the model does
        not have is None. H * E need not be D.
        """
        # to do: `project` to queries, keys and values, each (N, L, H, E); the norms; `self.rope` for queries and keys,
        #        with the slice of positions, or a list of slices; heads before positions; `cache.update_and_fetch`;
        #        `scaled_dot_product_attention_grouped` with the cache's mask; heads side by side; `project` with wo.
        N, L, _ = x.shape
        query = project(x, self.wq, self.bq).reshape(N, L, self.num_heads, self.head_dim)
        key = project(x, self.wk, self.bk).reshape(N, L, self.num_kv_heads, self.head_dim)
        value = project(x, self.wv, self.bv).reshape(N, L, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        first = cache.offset
        positions = [slice(n, n + L) for n in first] if isinstance(first, list) else slice(first, first + L)
        query, key = self.rope(query, positions), self.rope(key, positions)
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        key, value, mask = cache.update_and_fetch(key, value)
        gathered = scaled_dot_product_attention_grouped(query, key, value, mask=mask)
        return project(gathered.swapaxes(1, 2).reshape(N, L, -1), self.wo, self.bo)
        # done


class TransformerBlock:
    """One layer: attention and the feed-forward network, each behind a norm and beside a residual connection."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        """prefix: what the names of this layer's weights begin with, such as "model.layers.0."."""
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(D, weights[f"{prefix}input_layernorm.weight"], eps)
        self.attention = Attention(config, weights, f"{prefix}self_attn.")
        self.post_attention_norm = RMSNorm(D, weights[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        self.mlp = MLP(D, config.intermediate_size, gate, up, down)

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        """Returns the hidden states after this layer. x and the result: (N, L, D).

        Source: Touvron et al. 2023 (https://arxiv.org/abs/2302.13971), section 2.2: the input of each half is
        normalised, and what is added back is the input before its norm.
        """
        # to do: attention on the normalised x, added to x; then the same with the feed-forward network.
        h = x + self.attention(self.input_norm(x), cache)
        return h + self.mlp(self.post_attention_norm(h))
        # done


class Model:
    """Embeddings, layers, a last norm, and logits."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, weights["model.embed_tokens.weight"])
        self.blocks = [
            TransformerBlock(config, weights, f"model.layers.{number}.") for number in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, weights["model.norm.weight"], config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else weights["lm_head.weight"]

    def __call__(self, tokens: mx.array, caches: Sequence[Cache] | None = None) -> mx.array:
        """Returns the logits of the token after each position: (N, L, V).

        tokens: (N, L), integers. caches: one for each layer, in order; None for a `NoCache` for each. The logits come
        from `project` with `self.lm_head`, or from `self.embedding.as_linear` where that is None.
        """
        # to do: embeddings, blocks, `self.norm`, logits.
        caches = [NoCache() for _ in self.blocks] if caches is None else caches
        h = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            h = block(h, cache)
        h = self.norm(h)
        return self.embedding.as_linear(h) if self.lm_head is None else project(h, self.lm_head)
        # done

"""The Llama: self-attention, the feed-forward network, a layer, and the whole model.

`weights` holds all of a model's arrays by their names in its file; `config` its sizes. B counts texts, T the positions
that are read now, D is the width of the model, C that of the feed-forward network, N and K count the query heads and
the key and value heads. H is the size of a head, config.head_dim; N * H need not be D. No function changes the x that
it is given; where x is float32, the result is float32 too.
"""

import numpy as np
from attention import causal_mask, grouped_attention
from cache import KeyValueCache
from config import LlamaConfig
from functions import embedding, linear, rms_norm, silu
from rope import angles, rotate_halves

Weights = dict[str, np.ndarray]


def self_attention(
    config: LlamaConfig, weights: Weights, layer: int, x: np.ndarray, cache: KeyValueCache | None = None
) -> np.ndarray:
    """Returns what each position gathers from those that it sees. x and the result: (B, T, D).

    The projections are model.layers.{layer}.self_attn.q_proj.weight, (N * H, D), k_proj.weight and v_proj.weight,
    (K * H, D), and at the end o_proj.weight, (D, N * H). Outputs 0 to H - 1 of a projection are head 0, the next H are
    head 1, and so on; o_proj reads the heads in the same order. Queries and keys are turned by their positions
    (`rotate_halves`, with config.rope_theta), values are not. The T positions are first, first + 1, and so on. With
    a cache there are more keys than T: it adds those of the positions before.
    """
    batch, T, _ = x.shape
    prefix = f"model.layers.{layer}.self_attn"
    first = 0 if cache is None else cache.length
    # to do: query, (B, N, T, H), key and value, (B, K, T, H): project, divide into heads, exchange positions and heads;
    #        then turn query and key.
    query, key, value = (
        linear(x, weights[f"{prefix}.{name}_proj.weight"]).reshape(batch, T, -1, config.head_dim).swapaxes(1, 2)
        for name in "qkv"
    )
    turn = angles(first + np.arange(T), config.head_dim, config.rope_theta)
    query, key = rotate_halves(query, turn), rotate_halves(key, turn)
    # done
    if cache is not None:
        key, value = cache.extend(key, value)  # (B, K, S, H): those of the positions before, too
    # to do: `grouped_attention` with a causal mask; exchange heads and positions again; the heads side by side; o_proj.
    gathered = grouped_attention(query, key, value, causal_mask(T, key.shape[2]))
    return linear(gathered.swapaxes(1, 2).reshape(batch, T, -1), weights[f"{prefix}.o_proj.weight"])
    # done


def feed_forward(weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """Returns x through the feed-forward network with a gate. x and the result: (B, T, D).

    The projections are model.layers.{layer}.mlp.gate_proj.weight and up_proj.weight, (C, D), and down_proj.weight,
    (D, C). x through gate_proj goes through SiLU and multiplies x through up_proj, element by element; down_proj leads
    back to D.

    Source: Shazeer 2020 (https://arxiv.org/abs/2002.05202), equation 6.
    """
    prefix = f"model.layers.{layer}.mlp"
    # to do: one or two lines with `linear` and `silu`.
    gated = silu(linear(x, weights[f"{prefix}.gate_proj.weight"])) * linear(x, weights[f"{prefix}.up_proj.weight"])
    return linear(gated, weights[f"{prefix}.down_proj.weight"])
    # done


def one_layer(
    config: LlamaConfig, weights: Weights, layer: int, x: np.ndarray, cache: KeyValueCache | None = None
) -> np.ndarray:
    """Returns the hidden states after this layer. x and the result: (B, T, D).

    Self-attention reads x normalised with model.layers.{layer}.input_layernorm.weight, and its result is added to x.
    The feed-forward network reads that sum normalised with model.layers.{layer}.post_attention_layernorm.weight, and
    its result is added to the sum. The cache goes to self_attention. `x = x + y` makes a new array; `x += y` would
    change the caller's.

    Source: Touvron et al. 2023 (https://arxiv.org/abs/2302.13971), section 2.2.
    """
    prefix = f"model.layers.{layer}"
    # to do: two additions; `rms_norm` takes config.rms_norm_eps.
    y = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
    x = x + self_attention(config, weights, layer, y, cache)
    y = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + feed_forward(weights, layer, y)
    # done


def forward(
    config: LlamaConfig, weights: Weights, tokens: np.ndarray, caches: list[KeyValueCache] | None = None
) -> np.ndarray:
    """Returns the logits of the token after each position. tokens: (B, T), integers; the result: (B, T, vocabulary).

    The tokens' vectors, rows of model.embed_tokens.weight, go through config.num_hidden_layers layers in order, then
    through a norm with model.norm.weight, and a linear map with lm_head.weight gives the logits. Where
    config.tie_word_embeddings is True, there is no lm_head.weight, and the map is model.embed_tokens.weight.
    `caches` has one cache for each layer; where it is None, each layer gets None.
    """
    # to do: five lines.
    x = embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        x = one_layer(config, weights, layer, x, None if caches is None else caches[layer])
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return linear(x, weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"])
    # done

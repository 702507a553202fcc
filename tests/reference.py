"""The oracle: a Llama's forward pass in float64 numpy, written from the papers, one obvious line at a time.

It shares nothing with the library but the canonical parameter names. Backends and other people's programs are held
to it.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def rope(x, positions, frequencies, scale=1.0):
    """x is (T, H) for one head; pair (i, i + H/2) turns by positions * frequency i, as complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * positions[:, None] * np.asarray(frequencies)) * scale
    return np.concatenate([turned.real, turned.imag], axis=-1)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rope_frequencies(config, local=False):
    """Radians per position of each pair and the factor on rotated vectors, pair by pair from the papers.

    `local` layers, which have a sliding window, may turn by a base of their own, unscaled.
    """
    H, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if local and config.rope_local_base_freq:
        theta, scaling = config.rope_local_base_freq, None
    frequencies, scale = [], 1.0
    for i in range(H // 2):
        frequency = theta ** (-2 * i / H)
        if scaling is None:
            frequencies.append(frequency)
            continue
        slow = frequency / scaling.factor
        first_length = scaling.original_max_position_embeddings
        if scaling.rope_type == "linear":
            frequency = slow
        elif scaling.rope_type == "llama3":
            wavelength = 2 * np.pi / frequency
            if wavelength > first_length / scaling.low_freq_factor:
                frequency = slow
            elif wavelength >= first_length / scaling.high_freq_factor:
                smooth = first_length / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                frequency = (1 - smooth) * slow + smooth * frequency
        elif scaling.rope_type == "yarn":
            borders = [
                H * np.log(first_length / (turns * 2 * np.pi)) / (2 * np.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            ]
            low, high = max(np.floor(borders[0]), 0), min(np.ceil(borders[1]), H - 1)
            ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
            frequency = slow * ramp + frequency * (1 - ramp)
            scale = 0.1 * np.log(scaling.factor) + 1
        frequencies.append(frequency)
    return frequencies, scale


def soft_cap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def attention(q, k, v, allowed, scale=None, cap=0.0):
    """One head: q (T, H), k and v (S, H), allowed (T, S) of booleans."""
    return attention_weights(q, k, allowed, scale, cap) @ v


def attention_weights(q, k, allowed, scale=None, cap=0.0):
    scores = soft_cap(q @ k.T * (1 / np.sqrt(q.shape[-1]) if scale is None else scale), cap)
    return softmax(np.where(allowed, scores, -np.inf))


def forward(config, weights, tokens, segments=None, attention=False):
    """Residual streams, hidden states and logits of ONE sequence of token ids; weights by canonical name.

    Returns a dict: "embedding", "layers.0", ..., "norm", "logits", each float64. With segments, a position sees only
    its own segment; in a layer with a sliding window of W, itself and the W - 1 positions before it. With attention,
    "layers.0.attention", ... too: the probabilities (N, T, T).
    """
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    tokens = np.asarray(tokens)
    positions = np.arange(len(tokens))
    segments = np.ones(len(tokens)) if segments is None else np.asarray(segments)
    allowed = (positions[None, :] <= positions[:, None]) & (segments[None, :] == segments[:, None])
    group = config.num_attention_heads // config.num_key_value_heads
    H = config.head_dim

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def head(x, i):
        return x[:, i * H : (i + 1) * H]

    def norm(x, name):
        """x through the norm of that name; as it is where the model has none there."""
        if f"{name}.weight" not in weights:
            return x
        return rms_norm(x, weights[f"{name}.weight"] + config.unit_offset_norm, config.rms_norm_eps)

    x = weights["model.embed_tokens.weight"][tokens] * config.embedding_multiplier
    streams = {"embedding": x}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        window = config.window(layer)
        seen = allowed & (positions[:, None] - positions[None, :] < window) if window else allowed
        after = config.norm_placement == "after"
        y = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (linear(y, f"{prefix}.self_attn.{n}_proj") for n in "qkv")
        if config.norm_all_heads:
            q, k = norm(q, f"{prefix}.self_attn.q_norm"), norm(k, f"{prefix}.self_attn.k_norm")
        frequencies, rope_scale = rope_frequencies(config, local=window > 0)
        heads, maps = [], []
        for i in range(config.num_attention_heads):
            q_i, k_i = head(q, i), head(k, i // group)
            if config.query_key_norm and not config.norm_all_heads:
                q_i, k_i = norm(q_i, f"{prefix}.self_attn.q_norm"), norm(k_i, f"{prefix}.self_attn.k_norm")
            if layer not in config.layers_without_rope:
                q_i, k_i = (rope(x_i, positions, frequencies, rope_scale) for x_i in (q_i, k_i))
            scale = config.attention_multiplier or None
            maps.append(attention_weights(q_i, k_i, seen, scale, config.attn_logit_softcapping))
            heads.append(maps[-1] @ head(v, i // group))
        y = linear(np.concatenate(heads, axis=-1), f"{prefix}.self_attn.o_proj")
        if config.norm_placement in ("after", "both"):
            y = norm(y, f"{prefix}.post_attention_layernorm")
        x = x + y * config.residual_multiplier
        if config.norm_placement == "before":
            y = norm(x, f"{prefix}.post_attention_layernorm")
        else:
            y = x if after else norm(x, f"{prefix}.pre_feedforward_layernorm")
        gate = {"silu": silu, "gelu_pytorch_tanh": gelu}[config.hidden_act]
        gated = gate(linear(y, f"{prefix}.mlp.gate_proj")) * linear(y, f"{prefix}.mlp.up_proj")
        y = linear(gated, f"{prefix}.mlp.down_proj")
        x = x + norm(y, f"{prefix}.post_feedforward_layernorm") * config.residual_multiplier
        streams[f"layers.{layer}"] = x
        if attention:
            streams[f"layers.{layer}.attention"] = np.stack(maps)
    return streams | {"norm": norm(x, "model.norm"), "logits": output_logits(config, weights, x)}


def output_logits(config, weights, x):
    """The logits of states (T, D) before the final norm."""
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    x = rms_norm(x, weights["model.norm.weight"] + config.unit_offset_norm, config.rms_norm_eps)
    head_name = "score.weight" if config.num_labels else "lm_head.weight"
    logits = x @ weights.get(head_name, weights["model.embed_tokens.weight"]).T
    return logits if config.num_labels else soft_cap(logits / config.logits_scaling, config.final_logit_softcapping)


def cross_entropy(logits, labels):
    """Sum of nats over the labels that are not -100."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    scored = labels != -100
    probabilities = softmax(logits[scored])
    return -np.log(probabilities[np.arange(scored.sum()), labels[scored]]).sum()

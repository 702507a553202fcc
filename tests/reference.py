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


def rope_frequencies(config):
    """Radians per position of each pair and the factor on rotated vectors, pair by pair from the papers."""
    H, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
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


def attention(q, k, v, allowed):
    """One head: q (T, H), k and v (S, H), allowed (T, S) of booleans."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    return softmax(np.where(allowed, scores, -np.inf)) @ v


def forward(config, weights, tokens, segments=None):
    """Residual streams, hidden states and logits of ONE sequence of token ids; weights by canonical name.

    Returns a dict: "embedding", "layers.0", ..., "norm", "logits", each float64. With segments, a position sees only
    its own segment; in a layer with a sliding window of W, itself and the W - 1 positions before it.
    """
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    tokens = np.asarray(tokens)
    positions = np.arange(len(tokens))
    segments = np.ones(len(tokens)) if segments is None else np.asarray(segments)
    allowed = (positions[None, :] <= positions[:, None]) & (segments[None, :] == segments[:, None])
    group = config.num_attention_heads // config.num_key_value_heads
    H = config.head_dim
    frequencies, rope_scale = rope_frequencies(config)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def head(x, i):
        return x[:, i * H : (i + 1) * H]

    x = weights["model.embed_tokens.weight"][tokens]
    streams = {"embedding": x}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        y = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (linear(y, f"{prefix}.self_attn.{n}_proj") for n in "qkv")
        seen = allowed
        if config.sliding_window and layer >= config.full_attention_layers:
            seen = allowed & (positions[:, None] - positions[None, :] < config.sliding_window)
        heads = []
        for i in range(config.num_attention_heads):
            q_i, k_i = head(q, i), head(k, i // group)
            if config.query_key_norm:
                q_i = rms_norm(q_i, weights[f"{prefix}.self_attn.q_norm.weight"], config.rms_norm_eps)
                k_i = rms_norm(k_i, weights[f"{prefix}.self_attn.k_norm.weight"], config.rms_norm_eps)
            q_i, k_i = (rope(x_i, positions, frequencies, rope_scale) for x_i in (q_i, k_i))
            heads.append(attention(q_i, k_i, head(v, i // group), seen))
        x = x + linear(np.concatenate(heads, axis=-1), f"{prefix}.self_attn.o_proj")
        y = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gated = silu(linear(y, f"{prefix}.mlp.gate_proj")) * linear(y, f"{prefix}.mlp.up_proj")
        x = x + linear(gated, f"{prefix}.mlp.down_proj")
        streams[f"layers.{layer}"] = x
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head_name = "score.weight" if config.num_labels else "lm_head.weight"
    output = weights.get(head_name, weights["model.embed_tokens.weight"])
    return streams | {"norm": x, "logits": x @ output.T}


def cross_entropy(logits, labels):
    """Sum of nats over the labels that are not -100."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    scored = labels != -100
    probabilities = softmax(logits[scored])
    return -np.log(probabilities[np.arange(scored.sum()), labels[scored]]).sum()

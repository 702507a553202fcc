"""A small Llama, given whole: functions of a dictionary of parameters. The course min-llama is about what is in here.

B: rows; T: positions; D: width; N, K: query and key heads; H: head size.
"""

import math

import mlx.core as mx
import numpy as np
from config import Sizes
from framework import floats
from lora import adapted
from mlx import nn

LINEAR_MAPS = ("query", "key", "value", "output", "gate", "up", "down")


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its name."""
    head = sizes.width // sizes.heads
    found: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab_size, sizes.width)}
    for layer in range(sizes.layers):
        found |= {
            f"{layer}.attention_norm": (sizes.width,),
            f"{layer}.query": (sizes.heads * head, sizes.width),
            f"{layer}.key": (sizes.key_value_heads * head, sizes.width),
            f"{layer}.value": (sizes.key_value_heads * head, sizes.width),
            f"{layer}.output": (sizes.width, sizes.heads * head),
            f"{layer}.feed_forward_norm": (sizes.width,),
            f"{layer}.gate": (sizes.hidden, sizes.width),
            f"{layer}.up": (sizes.hidden, sizes.width),
            f"{layer}.down": (sizes.width, sizes.hidden),
        }
    return {**found, "norm": (sizes.width,)}


def initialized(sizes: Sizes, seed: int) -> dict[str, mx.array]:
    """Returns fresh parameters: norms are ones, the rest is normal, smaller where a layer adds to the stream."""
    random = np.random.default_rng(seed)
    parameters = {}
    for name, shape in shapes(sizes).items():
        adds = name.endswith((".output", ".down"))
        scale = 0.05 / math.sqrt(2 * sizes.layers) if adds else 0.05
        parameters[name] = floats(np.ones(shape) if len(shape) == 1 else scale * random.normal(size=shape))
    return parameters


def hidden_states(
    parameters: dict[str, mx.array], sizes: Sizes, tokens: mx.array, positions: mx.array, mask: mx.array
) -> mx.array:
    """Returns the last hidden states (B, T, D). tokens, positions: (B, T); mask: booleans (B, T, T), query before key.

    A linear map NAME has an adapter where the parameters have NAME.a and NAME.b.
    """
    head = sizes.width // sizes.heads

    def linear(x: mx.array, name: str) -> mx.array:
        if f"{name}.a" in parameters:
            return adapted(x, parameters[name], parameters[f"{name}.a"], parameters[f"{name}.b"], sizes.alpha)
        return x @ parameters[name].T

    def norm(x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, parameters[name], sizes.epsilon)

    frequencies = sizes.theta ** (-mx.arange(0, head, 2) / head)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def heads_of(x: mx.array, count: int) -> mx.array:
        return x.reshape(*x.shape[:2], count, head).transpose(0, 2, 1, 3)

    def turned(x: mx.array) -> mx.array:
        first, second = x.split(2, axis=-1)
        return mx.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    x = parameters["embedding"][tokens]
    for layer in range(sizes.layers):
        y = norm(x, f"{layer}.attention_norm")
        query_BNTH = turned(heads_of(linear(y, f"{layer}.query"), sizes.heads))
        key_BKTH = turned(heads_of(linear(y, f"{layer}.key"), sizes.key_value_heads))
        value_BKTH = heads_of(linear(y, f"{layer}.value"), sizes.key_value_heads)
        mixed_BNTH = mx.fast.scaled_dot_product_attention(
            query_BNTH, key_BKTH, value_BKTH, scale=head**-0.5, mask=mask[:, None]
        )
        x = x + linear(mixed_BNTH.transpose(0, 2, 1, 3).flatten(2), f"{layer}.output")
        y = norm(x, f"{layer}.feed_forward_norm")
        x = x + linear(nn.silu(linear(y, f"{layer}.gate")) * linear(y, f"{layer}.up"), f"{layer}.down")
    return norm(x, "norm")


def logits_of(
    parameters: dict[str, mx.array], sizes: Sizes, tokens: mx.array, positions: mx.array, mask: mx.array
) -> mx.array:
    """Returns the logits (B, T, V); the output head is the embedding."""
    return hidden_states(parameters, sizes, tokens, positions, mask) @ parameters["embedding"].T

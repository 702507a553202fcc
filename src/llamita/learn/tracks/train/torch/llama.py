"""A small Llama, given whole: functions of a dictionary of parameters. The course min-llama is about what is in here.

B: rows; T: positions; D: width; N, K: query and key heads; H: head size.
"""

import math

import numpy as np
import torch
from config import Sizes
from framework import floats
from lora import adapted
from torch import Tensor
from torch.nn import functional as F

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


def initialized(sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Returns fresh parameters: norms are ones, the rest is normal, smaller where a layer adds to the stream."""
    random = np.random.default_rng(seed)
    parameters = {}
    for name, shape in shapes(sizes).items():
        adds = name.endswith((".output", ".down"))
        scale = 0.05 / math.sqrt(2 * sizes.layers) if adds else 0.05
        parameters[name] = floats(np.ones(shape) if len(shape) == 1 else scale * random.normal(size=shape))
    return parameters


def hidden_states(
    parameters: dict[str, Tensor], sizes: Sizes, tokens: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """Returns the last hidden states (B, T, D). tokens, positions: (B, T); mask: booleans (B, T, T), query before key.

    A linear map NAME has an adapter where the parameters have NAME.a and NAME.b.
    """
    head = sizes.width // sizes.heads

    def linear(x: Tensor, name: str) -> Tensor:
        if f"{name}.a" in parameters:
            return adapted(x, parameters[name], parameters[f"{name}.a"], parameters[f"{name}.b"], sizes.alpha)
        return x @ parameters[name].T

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (sizes.width,), parameters[name], sizes.epsilon)

    frequencies = sizes.theta ** (-torch.arange(0, head, 2) / head)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def heads_of(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, head)).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    x = parameters["embedding"][tokens]
    for layer in range(sizes.layers):
        y = norm(x, f"{layer}.attention_norm")
        query_BNTH = turned(heads_of(linear(y, f"{layer}.query"), sizes.heads))
        key_BKTH = turned(heads_of(linear(y, f"{layer}.key"), sizes.key_value_heads))
        value_BKTH = heads_of(linear(y, f"{layer}.value"), sizes.key_value_heads)
        mixed_BNTH = F.scaled_dot_product_attention(
            query_BNTH, key_BKTH, value_BKTH, attn_mask=mask[:, None], enable_gqa=True
        )
        x = x + linear(mixed_BNTH.transpose(1, 2).flatten(2), f"{layer}.output")
        y = norm(x, f"{layer}.feed_forward_norm")
        x = x + linear(F.silu(linear(y, f"{layer}.gate")) * linear(y, f"{layer}.up"), f"{layer}.down")
    return norm(x, "norm")


def logits_of(parameters: dict[str, Tensor], sizes: Sizes, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Returns the logits (B, T, V); the output head is the embedding."""
    return hidden_states(parameters, sizes, tokens, positions, mask) @ parameters["embedding"].T

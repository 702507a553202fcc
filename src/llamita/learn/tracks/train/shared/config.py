"""The sizes of the small Llama that is trained here, and the tokens that no text has."""

from dataclasses import dataclass

VOCAB_SIZE = 512
START, END, PADDING, USER, ASSISTANT = range(VOCAB_SIZE - 5, VOCAB_SIZE)
"""The beginning and the end of a story or a turn, what fills rows up, and who is speaking."""
LEARNED = VOCAB_SIZE - 5
"""Tokens of the tokenizer: 256 bytes and the merges."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a Llama."""

    vocab_size: int = VOCAB_SIZE
    width: int = 64
    layers: int = 2
    heads: int = 4
    """Query heads; the width is a multiple of them."""
    key_value_heads: int = 2
    hidden: int = 160
    """Width of the feed-forward network."""
    theta: float = 10000.0
    epsilon: float = 1e-5
    alpha: float = 16.0
    """Of the low-rank adapters, where there are any."""

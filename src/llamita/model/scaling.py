"""One number for a whole training: from a model's depth follow its shape, its data, batch, learning rate and steps.

Every rule is a function of its own with its source, and all numbers that were chosen here stand below.
"""

from dataclasses import dataclass
from typing import Any

from llamita.model.config import ModelConfig
from llamita.model.presets import feed_forward_width
from llamita.model.sizes import count_parameters, flops_per_token

DEEPEST = 128
"""No rule was fitted to models of more than some 100 blocks."""
WIDTH_PER_BLOCK = 64
"""Width over depth, as in nanochat (Karpathy 2025); Kaplan et al. 2020 (arXiv:2001.08361, figure 5) found the loss to
change little for ratios from 30 to 200."""
HEAD_SIZE = 64
"""The size of a head of GPT-2 and of Llama 3.2 at 1B: as many heads as blocks."""
TOKENS_PER_PARAMETER = 20
"""Compute-optimal training (Hoffmann et al. 2022, arXiv:2203.15556, table 3)."""
SHORTEST_ROW, LONGEST_ROW = 256, 2048
"""Tokens: the rows of `llamita train` by default, and those of Llama (Touvron et al. 2023)."""


@dataclass(frozen=True)
class Scaled:
    """A training that a depth stands for. `tokens` are at least 20 a parameter, in whole updates."""

    depth: int
    model: ModelConfig
    parameters: int
    """Those in matrix products, the output head included: the embedding alone is looked up, not multiplied."""
    sequence_length: int
    batch_size: int
    """Rows in an update."""
    learning_rate: float
    steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length

    @property
    def flops(self) -> float:
        """Operations of the whole training."""
        return float(self.tokens) * flops_per_token(self.model, self.sequence_length)

    def options(self) -> dict[str, Any]:
        """Returns what it sets of `llamita train`, by the names of the flags."""
        return {
            "depth": self.depth,
            "preset": "",
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
        }


def at_depth(depth: int, vocab_size: int, sequence_length: int = 0, batch_size: int = 0) -> Scaled:
    """Returns the training of a model with so many blocks; lengths of rows and of batches that are given stand.

    ValueError for a depth that is not between 1 and `DEEPEST`.
    """
    model = model_at_depth(depth, vocab_size, sequence_length)
    length = sequence_length or model.max_position_embeddings
    parameters = count_parameters(model).matrices
    tokens = TOKENS_PER_PARAMETER * parameters
    compute = float(tokens) * flops_per_token(model, length)
    rows = batch_size or max(1, round(tokens_in_batch(compute) / length))
    steps = max(1, -(-tokens // (rows * length)))
    rate = float(f"{learning_rate(compute):.2g}")  # a rate of two digits is read and typed more easily
    return Scaled(depth, model, parameters, length, rows, rate, steps)


def model_at_depth(depth: int, vocab_size: int, sequence_length: int = 0, **changes: Any) -> ModelConfig:
    """Returns the shape: width 64 a block, a head for each 64, SwiGLU of 8/3 the width, one matrix for both ends.

    Embedding and output head are one matrix since small models spend much of their parameters on them (Press & Wolf
    2017, arXiv:1608.05859; Liu et al. 2024, arXiv:2402.14905, for models below a billion). `changes` are fields.
    """
    if not 1 <= depth <= DEEPEST:
        raise ValueError(f"depth={depth} must be a number of blocks from 1 to {DEEPEST}")
    width = WIDTH_PER_BLOCK * depth
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": feed_forward_width(width, 32),
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_SIZE,
        "num_key_value_heads": width // HEAD_SIZE,
        "max_position_embeddings": max(sequence_length, row_length(width)),
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(fields | _heads(changes) | changes))


def row_length(width: int) -> int:
    """Returns the tokens of a row: twice the width, so that attention's products stay a third of those with matrices.

    The ratio is 12 L D T operations to 6 x 12 L D^2 (`flops_per_token`), T / (6 D). Within the bounds above.
    """
    return min(max(2 * width, SHORTEST_ROW), LONGEST_ROW)


def tokens_in_batch(compute: float) -> float:
    """Returns the best number of tokens in an update: 0.2920 C^0.3271 for C operations of training.

    Bi et al. 2024 (DeepSeek LLM, arXiv:2401.02954, equation 1), fitted from 1e17 to 2e19 operations and checked at
    1e20; below, it is extrapolated. That it grows with the training is what the noise of gradients asks for (McCandlish
    et al. 2018, arXiv:1812.06162).
    """
    return 0.2920 * compute**0.3271


def learning_rate(compute: float) -> float:
    """Returns the best highest learning rate for AdamW: 0.3118 C^-0.1250 for C operations of training.

    Bi et al. 2024, the same equation. C grows as the sixth power of the depth, so the rate falls as its 0.75th: a
    little more slowly than 1 / width (Yang et al. 2022, arXiv:2203.03466).
    """
    return 0.3118 * compute**-0.1250


def _heads(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns fields that follow from changed ones: as many key/value heads as heads."""
    if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
        return {"num_key_value_heads": changes["num_attention_heads"]}
    return {}

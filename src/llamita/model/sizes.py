"""What is counted from the table of parameters: parameters, operations, bytes."""

from dataclasses import dataclass

from llamita.model.config import ModelConfig
from llamita.model.parameters import EMBEDDING, parameter_table


@dataclass(frozen=True)
class ParameterCounts:
    """`matrices` multiply activations at every token: all linear weights and the output head, not the embedding."""

    total: int
    embedding: int
    matrices: int
    per_layer: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    table = parameter_table(config)
    embedding = next(row.size for row in table if row.name == EMBEDDING)
    matrices = sum(row.size for row in table if len(row.shape) == 2 and row.name != EMBEDDING)
    if config.tie_word_embeddings and not config.num_labels:
        matrices += embedding  # the embedding is the output head as well
    per_layer = sum(row.size for row in table if row.name.startswith("model.layers.0."))
    return ParameterCounts(sum(row.size for row in table), embedding, matrices, per_layer)


def flops_per_token(config: ModelConfig, context_length: int) -> int:
    """Floating-point operations of a training step (forward and backward) per token.

    6 x the matrix parameters, plus 12 L N H T for the two products of attention over T positions, causality not
    subtracted (Chowdhery et al. 2022, appendix B).
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context_length
    return 6 * count_parameters(config).matrices + attention


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int) -> int:
    """Bytes of keys and values that one position adds to the cache."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number

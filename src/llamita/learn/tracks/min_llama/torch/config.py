"""The sizes of a model."""

from dataclasses import dataclass


@dataclass
class LlamaConfig:
    """The sizes of a Llama, under the names that checkpoints store as `model_args`."""

    vocab_size: int = 32000
    dim: int = 512
    """Width of the hidden states."""
    n_layers: int = 8
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads; None for as many as query heads."""
    max_seq_len: int = 1024
    rope_theta: float = 10000.0
    """The base of the speeds at which positions turn; the original course knows no other."""
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    multiple_of: int = 32
    """The width of the feed-forward network is rounded up to a multiple of this, where `hidden_dim` is None."""
    hidden_dim: int | None = None

    @classmethod
    def from_arguments(cls, arguments: dict) -> "LlamaConfig":
        """Returns the config of a checkpoint's `model_args`; arguments that this model has no use for are left out."""
        renamed = {"norm_eps": "layer_norm_eps"}
        given = {renamed.get(name, name): value for name, value in arguments.items()}
        return cls(**{name: value for name, value in given.items() if name in cls.__dataclass_fields__})

"""The limits of an engine: how much it does at once, and how much memory it takes."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class EngineConfig:
    """The limits of an engine. ValueError names the field, its value and what is allowed."""

    max_sequences: int = 32
    """Most sequences that run at the same time; others wait."""
    prefill_tokens: int = 512
    """Most prompt tokens in a step while no sequence is decoding."""
    mixed_prefill_tokens: int = 32
    """Most prompt tokens in a step beside decoding sequences, or as many as these, if they are more. It bounds the time
    between two of their tokens while a long prompt is read."""
    draft_tokens: int = 4
    """Most tokens guessed ahead for a sequence in a step, with speculative decoding."""
    block_size: int = 16
    """Positions in a block of the key/value memory, the unit that sequences share and give back."""
    blocks: int = 0
    """Blocks of the key/value memory; 0: as many as fit `cache_bytes`."""
    cache_bytes: int = 0
    """Bytes of the key/value memory, at least those of the model's whole length; 0: a share of the free memory."""
    prefix_caching: bool = True
    """Keep the keys and values of a text's beginning for other texts that begin alike."""
    warm_up: bool = True
    """Prepare a GPU's steps, and compile a CPU's kernels, when the engine is made. A GPU takes seconds for it, which
    pays where much is decoded; so does a CPU, but only the first time."""

    def __post_init__(self) -> None:
        at_least_one = ("max_sequences", "prefill_tokens", "mixed_prefill_tokens", "block_size")
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name in at_least_one else 0
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name}={value!r} is not allowed; give a whole number >= {least}")

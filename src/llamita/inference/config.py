"""How much an engine does at once, and how much memory it takes."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class EngineConfig:
    """The limits of an engine. ValueError names the field, its value and what is allowed."""

    max_sequences: int = 32
    """Sequences that run at the same time; others wait."""
    prefill_tokens: int = 512
    """Prompt tokens in a step while nothing is being decoded."""
    mixed_prefill_tokens: int = 32
    """Prompt tokens in a step beside decoding sequences, or as many as these are, if they are more. It bounds the time
    between two tokens of theirs while a long prompt is read."""
    draft_tokens: int = 4
    """Tokens guessed ahead for a sequence in a step, where something guesses (speculative decoding)."""
    block_size: int = 16
    """Positions in a block of the key/value memory: what sequences share and give back."""
    blocks: int = 0
    """Blocks of the key/value memory; 0: as many as `cache_bytes` hold."""
    cache_bytes: int = 0
    """Bytes of the key/value memory, the model's whole length in any case; 0: a share of what is free."""
    prefix_caching: bool = True
    """Keep what was computed for the beginning of a text, for others that begin alike."""
    warm_up: bool = True
    """Make the steps of a GPU ready when the engine is made; it takes seconds, and pays where much is decoded."""

    def __post_init__(self) -> None:
        at_least_one = ("max_sequences", "prefill_tokens", "mixed_prefill_tokens", "block_size")
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name in at_least_one else 0
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name}={value!r} is not allowed; give a whole number >= {least}")

"""The output head: from hidden states to logits, with what some families do to these afterwards."""

from dataclasses import dataclass, field

import mlx.core as mx

from llamita.model.config import ModelConfig


@dataclass(frozen=True)
class LogitTransform:
    """Logits divided by `scaling` (Granite), then bent to cap * tanh(logit / cap) (Gemma 2); a cap of 0 bends none."""

    scaling: float = 1.0
    soft_cap: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> "LogitTransform":
        return cls() if config.num_labels else cls(config.logits_scaling, config.final_logit_softcapping)

    def __call__(self, logits_V: mx.array) -> mx.array:
        if self.scaling != 1.0:
            logits_V = logits_V / self.scaling
        return self.soft_cap * mx.tanh(logits_V / self.soft_cap) if self.soft_cap else logits_V

    def slope(self, transformed_V: mx.array) -> mx.array | float:
        """Returns the derivative of `__call__`, from its result."""
        steepness = 1 / self.scaling
        return (1 - (transformed_V / self.soft_cap) ** 2) * steepness if self.soft_cap else steepness


@dataclass(frozen=True)
class OutputHead:
    """The matrix that turns hidden states into logits, and what is done to these; as losses take it."""

    weight_VD: mx.array
    transform: LogitTransform = field(default_factory=LogitTransform)

    def logits(self, hidden_D: mx.array) -> mx.array:
        """Returns logits (..., V) of hidden states (..., D), float32."""
        return self.transform((hidden_D.astype(self.weight_VD.dtype) @ self.weight_VD.T).astype(mx.float32))

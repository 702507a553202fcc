"""The output head: from hidden states to logits, with what some families do to these afterwards."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamita.model.config import ModelConfig


@dataclass(frozen=True)
class LogitTransform:
    """Logits divided by `scaling` (Granite), then bent to cap * tanh(logit / cap) (Gemma 2); a cap of 0 bends none."""

    scaling: float = 1.0
    soft_cap: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> "LogitTransform":
        return cls() if config.num_labels else cls(config.logits_scaling, config.final_logit_softcapping)

    @property
    def changes_nothing(self) -> bool:
        return self.scaling == 1.0 and not self.soft_cap

    def __call__(self, logits_V: Tensor) -> Tensor:
        if self.scaling != 1.0:
            logits_V = logits_V / self.scaling
        return self.soft_cap * torch.tanh(logits_V / self.soft_cap) if self.soft_cap else logits_V

    def slope(self, transformed_V: Tensor) -> Tensor:
        """Returns the derivative of `__call__`, from its result."""
        steepness = 1 / self.scaling
        if not self.soft_cap:
            return torch.full_like(transformed_V, steepness)
        return (1 - (transformed_V / self.soft_cap) ** 2) * steepness


@dataclass(frozen=True)
class OutputHead:
    """The matrix that turns hidden states into logits, and what is done to these; as losses take it."""

    weight_VD: Tensor
    transform: LogitTransform = field(default_factory=LogitTransform)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Returns logits (..., V) of hidden states (..., D)."""
        return self.transform(torch.nn.functional.linear(hidden_D, self.weight_VD))

"""What every model of the course shares: its config and how its weights begin."""

import torch
from config import LlamaConfig
from torch import nn
from utils import get_parameter_dtype


class LlamaPreTrainedModel(nn.Module):
    """A module that knows its `LlamaConfig`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_layers = config.n_layers

    def init_weights(self) -> None:
        """Draws all weights anew."""
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        return get_parameter_dtype(self)

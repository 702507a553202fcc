"""Small helpers that the other files share."""

import random

import numpy as np
import torch
from torch import nn


def get_parameter_dtype(module: nn.Module) -> torch.dtype:
    """Returns the number type of a module's first parameter."""
    return next(module.parameters()).dtype


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def read_checkpoint(path: str, device: str = "cpu") -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns `model_args` and the weights of a checkpoint, the weights under this course's names.

    A checkpoint of llama2.c names the projections wq, wk, wv and wo, and one of torch.compile has a prefix; both are
    renamed here. Nothing but tensors and plain values is read from the file.
    """
    content = torch.load(path, map_location=device, weights_only=True)
    names = {"wq": "compute_query", "wk": "compute_key", "wv": "compute_value", "wo": "compute_output"}
    state = {}
    for name, tensor in content["model"].items():
        parts = name.removeprefix("_orig_mod.").split(".")
        state[".".join(names.get(part, part) for part in parts)] = tensor
    return content["model_args"], state

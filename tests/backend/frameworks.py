"""Both backends behind one face, so that a test is written once: arrays in, arrays out, and the backend's own files.

`framework.layers`, `framework.attention` and so on are the modules of that name in its folder: they hold the same
functions with the same arguments.
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

FOLDERS = {
    **dict.fromkeys(("layers", "attention", "fused", "weights", "quantize"), "model"),
    **dict.fromkeys(("losses", "adamw"), "train"),
    **dict.fromkeys(("runner", "sampling", "paged_attention", "kv_cache"), "infer"),
}
"""Where a module lies in a backend's folder."""


class Framework:
    """What both have in common."""

    name = ""

    def __getattr__(self, module: str) -> ModuleType:
        return importlib.import_module(f"llamita.backend.{self.name}.{FOLDERS[module]}.{module}")

    def model(self, config: ModelConfig, arrays: dict[str, np.ndarray], precision: str) -> Any:
        return self.weights.build_model(config, host(arrays), dtype=self.dtype(precision))

    def runner(self, config: ModelConfig, arrays: dict[str, np.ndarray], precision: str) -> Any:
        return self.__getattr__("runner").runner_over(config, host(arrays), PRECISIONS[precision])


class Torch(Framework):
    name = "torch"

    def dtype(self, precision: str) -> torch.dtype:
        return getattr(torch, PRECISIONS[precision])

    def array(self, numbers: np.ndarray, precision: str = "") -> torch.Tensor:
        tensor = torch.from_numpy(np.array(numbers))  # a copy: some functions write into theirs
        return tensor.to(self.dtype(precision)) if precision else tensor

    def numbers(self, array: torch.Tensor) -> np.ndarray:
        return array.detach().double().numpy()

    def gradients(self, function: Any, *arrays: torch.Tensor) -> list[torch.Tensor]:
        leaves = [array.clone().requires_grad_() for array in arrays]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    def adamw(self, values: np.ndarray, decays: bool, settings: Any) -> Any:
        """(an optimiser of one parameter, a function that steps it with a gradient, one that reads the parameter)"""
        parameter = torch.nn.Parameter(self.array(values))
        packed = self.fused.PackedParameter("w", parameter, ("w",), (len(values),), decays)
        optimizer = self.__getattr__("adamw").AdamW([packed], settings)

        def step(gradient: np.ndarray, rate: float) -> None:
            parameter.grad = self.array(gradient)
            optimizer.step(rate)

        return step, lambda: self.numbers(parameter)


class Mlx(Framework):
    name = "mlx"

    def __init__(self) -> None:
        self.mx = importlib.import_module("mlx.core")

    def dtype(self, precision: str) -> Any:
        return getattr(self.mx, PRECISIONS[precision])

    def array(self, numbers: np.ndarray, precision: str = "") -> Any:
        array = self.mx.array(numbers)
        return array.astype(self.dtype(precision)) if precision else array

    def numbers(self, array: Any) -> np.ndarray:
        return np.array(array.astype(self.mx.float32)).astype(np.float64)

    def gradients(self, function: Any, *arrays: Any) -> list[Any]:
        return list(self.mx.grad(function, argnums=list(range(len(arrays))))(*arrays))

    def adamw(self, values: np.ndarray, decays: bool, settings: Any) -> Any:
        owner = {"w": self.array(values)}
        packed = self.fused.PackedParameter("w", owner, "w", ("w",), (len(values),), decays)
        optimizer = self.__getattr__("adamw").AdamW([packed], settings)
        return lambda gradient, rate: optimizer.step([self.array(gradient)], rate), lambda: self.numbers(owner["w"])


def host(arrays: dict[str, np.ndarray]) -> dict[str, HostArray]:
    return {name: HostArray.from_numpy(array) for name, array in arrays.items()}

"""PyTorch behind the contract of a backend (backend/interface.py)."""

from typing import Literal

from llamita.backend.interface import Backend
from llamita.backend.torch.devices import choose_device
from llamita.backend.torch.infer.runner import load_runner, runner_over
from llamita.backend.torch.model.lora import merged_arrays
from llamita.backend.torch.model.weights import quantize_arrays
from llamita.backend.torch.train.scorer import build_scorer
from llamita.backend.torch.train.step import build_train_step, read_shards


class TorchBackend:
    """The contract's functions in PyTorch."""

    name: Literal["torch"] = "torch"
    build_train_step = staticmethod(build_train_step)
    build_scorer = staticmethod(build_scorer)
    load_runner = staticmethod(load_runner)
    runner_over = staticmethod(runner_over)
    quantize_arrays = staticmethod(quantize_arrays)
    merged_arrays = staticmethod(merged_arrays)
    read_shards = staticmethod(read_shards)

    @property
    def device(self) -> str:
        """The device that it computes on by default: "cpu" or "cuda"."""
        return choose_device("auto")


BACKEND: Backend = TorchBackend()

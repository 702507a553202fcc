"""MLX behind the contract of a backend (backend/interface.py)."""

from typing import Literal

from llamita.backend.interface import Backend
from llamita.backend.mlx.devices import choose_device
from llamita.backend.mlx.infer.runner import load_runner, runner_over
from llamita.backend.mlx.model.lora import merged_arrays
from llamita.backend.mlx.model.weights import quantize_arrays
from llamita.backend.mlx.train.scorer import build_scorer
from llamita.backend.mlx.train.step import build_train_step, read_shards


class MlxBackend:
    """The contract's functions in MLX."""

    name: Literal["mlx"] = "mlx"
    build_train_step = staticmethod(build_train_step)
    build_scorer = staticmethod(build_scorer)
    load_runner = staticmethod(load_runner)
    runner_over = staticmethod(runner_over)
    quantize_arrays = staticmethod(quantize_arrays)
    merged_arrays = staticmethod(merged_arrays)
    read_shards = staticmethod(read_shards)

    @property
    def device(self) -> str:
        """The device that it computes on by default: "cpu" or "gpu"."""
        return choose_device("auto").name


BACKEND: Backend = MlxBackend()

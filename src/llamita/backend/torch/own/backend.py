"""PyTorch behind the contract of a backend, with modules that somebody has written in the course."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llamita.backend.adamw import AdamWSettings
from llamita.backend.group import ParallelSettings
from llamita.backend.interface import AttentionName, Precision, Recompute, Scorer
from llamita.backend.muon import MuonSettings
from llamita.backend.objectives import Classification, NextToken, Objective
from llamita.backend.opening import open_model
from llamita.backend.torch.devices import choose_device
from llamita.backend.torch.model.lora import merged_arrays
from llamita.backend.torch.model.weights import quantize_arrays
from llamita.backend.torch.own.cached import CachedModel, Written
from llamita.backend.torch.own.min_llama import MinLlamaModel
from llamita.backend.torch.own.numpy_llama import NumpyLlama
from llamita.backend.torch.own.program import Program
from llamita.backend.torch.own.runner import OwnRunner, llama_runner
from llamita.backend.torch.own.serving import Serving
from llamita.backend.torch.own.step import OwnTrainStep
from llamita.backend.torch.train.scorer import choose
from llamita.backend.torch.train.step import read_shards
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from llamita.model.parameters import InitializationName, initialize_parameters

CACHED: Mapping[str, type[Written]] = {"serving": Serving, "numpy": NumpyLlama}
"""The tracks whose model has a cache of keys and values; that of min-llama has none, but is trained."""


class OwnBackend:
    """Opens models with the modules of `program`, and trains them with its AdamW; what needs none is the library's.

    Models are held in float32. ValueError, in one line, for what the course's code has no part for.
    """

    name: Literal["torch"] = "torch"
    quantize_arrays = staticmethod(quantize_arrays)
    merged_arrays = staticmethod(merged_arrays)
    read_shards = staticmethod(read_shards)

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def device(self) -> str:
        """The device that it computes on by default: "cpu" or "cuda"."""
        return self._chosen("auto")

    def build_train_step(
        self,
        config: ModelConfig,
        arrays: Mapping[str, HostArray] | None = None,
        *,
        seed: int = 0,
        initialization: InitializationName = "fan-in",
        objective: Objective = NextToken(),  # noqa: B008 - it is frozen
        trainable: Callable[[str], bool] | None = None,
        adapter: LoraSettings | None = None,
        optimizer: AdamWSettings | None = None,
        muon: MuonSettings | None = None,
        max_grad_norm: float = 0.0,
        precision: Precision = "auto",
        device: str = "auto",
        threads: int = 0,
        compile: bool | None = None,
        recompute: Recompute = "none",
        attention: AttentionName = "masked",
        parallel: ParallelSettings | None = None,
    ) -> OwnTrainStep:
        """Returns their model with their AdamW; precision "auto" is fp32."""
        if self.program.track in CACHED:
            raise ValueError(f"--with cannot train with the course {self.program.track}; leave it out")
        _refuse_options(
            {
                "--tuning lora": adapter is not None,
                "--optimizer muon": muon is not None,
                "--compile": bool(compile),
                "--recompute": recompute not in ("none", 0),
                "--precision fp8": precision == "fp8",
                "--attention flex": attention == "flex",
                "several processes": parallel is not None,
            }
        )
        if not isinstance(objective, NextToken | Classification):
            raise ValueError("--with trains the next token or a classification, not this objective; leave it out")
        device, chosen = choose(device, "fp32" if precision == "auto" else precision, threads)
        if arrays is None:
            fresh = initialize_parameters(config, seed, initialization)
            arrays = {name: HostArray.from_numpy(array) for name, array in fresh}
        dropout = objective.dropout if isinstance(objective, Classification) else 0.0
        model = MinLlamaModel(self.program, config, arrays, device, head_dropout=dropout, trains=True)
        return OwnTrainStep(
            model,
            optimizer,
            objective=objective,
            trainable=trainable,
            max_grad_norm=max_grad_norm,
            precision=chosen,
            seed=seed,
        )

    def build_scorer(self, config: ModelConfig, arrays: Mapping[str, HostArray], **options: Any) -> Scorer:
        """Refuses: what has a reference or a teacher is not trained with the course's code."""
        raise ValueError("the course's code is no reference and no teacher; leave --with out")

    def load_runner(
        self,
        model: Path | str,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        exact: bool = False,
        adapters: Mapping[str, Path] | None = None,
    ) -> OwnRunner:
        """Opens what the library's `load_runner` opens, but an adapter; in float32, whatever the file has."""
        _refuse_options(
            {
                "--exact": exact,
                "--adapter": bool(adapters),
                f"--dtype {dtype}": dtype not in ("auto", "float32"),
            }
        )
        if threads > 0:
            torch.set_num_threads(threads)
        opened = open_model(model, "float32", on_cpu=True)
        if opened.default is not None:
            raise ValueError(f"--with cannot run {model}, an adapter; make one model of it by llamita merge")
        return self._runner(opened.config, opened.arrays, self._chosen(device))

    def runner_over(self, config: ModelConfig, arrays: Mapping[str, HostArray], dtype: str = "float32") -> OwnRunner:
        """Returns a runner over host arrays, on the CPU."""
        _refuse_options({f"--dtype {dtype}": dtype != "float32"})
        return self._runner(config, arrays, "cpu")

    def _chosen(self, device: str) -> str:
        """Returns a device by name; models with a cache make their masks on the CPU."""
        if self.program.track in CACHED:
            _refuse_options({f"--device {device}": device not in ("auto", "cpu")})
            return "cpu"
        return choose_device(device)

    def _runner(self, config: ModelConfig, arrays: Mapping[str, HostArray], device: str) -> OwnRunner:
        track = CACHED.get(self.program.track)
        if track is not None:
            return OwnRunner(CachedModel(self.program, track, config, arrays))
        return llama_runner(MinLlamaModel(self.program, config, arrays, device))


def _refuse_options(given: Mapping[str, bool]) -> None:
    """ValueError for an option that was given and that the course's code has no part for."""
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name} does not go with --with: the course's code has no part for it; leave one out")

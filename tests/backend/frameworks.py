"""Both backends behind one face, so that a test is written once: arrays in, arrays out, and the backend's own files.

`framework.layers`, `framework.attention` and so on are the modules of that name in its folder, `framework.backend` is
what the rest of the library gets. What a test needs beyond that and each framework does in its own way (dropout drawn
from a seed, gradients, an optimiser of a few arrays) is a method here.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray

NAMES = ("torch", "mlx")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

FOLDERS = {
    **dict.fromkeys(("layers", "attention", "fused", "head", "weights", "lora", "quantize"), "model"),
    **dict.fromkeys(("losses", "objectives", "adamw", "muon", "step"), "train"),
    **dict.fromkeys(("runner", "sampling", "noise", "paged_attention", "kv_cache"), "infer"),
}
"""Where a module lies in a backend's folder."""


class Framework:
    """What both have in common."""

    name = ""
    Runner = TrainStep = ""  # the names of its classes

    def __getattr__(self, module: str) -> ModuleType:
        if module not in FOLDERS:
            raise AttributeError(module)
        return importlib.import_module(f"llamita.backend.{self.name}.{FOLDERS[module]}.{module}")

    @property
    def backend(self) -> Any:
        return importlib.import_module(f"llamita.backend.{self.name}.backend").BACKEND

    def array(self, numbers: Any, precision: str = "") -> Any:
        raise NotImplementedError

    def numbers(self, array: Any) -> np.ndarray:
        """Float64 numbers of an array of the framework."""
        raise NotImplementedError

    def dtype(self, precision: str) -> Any:
        raise NotImplementedError

    # --- models ---

    def build_model(self, config: ModelConfig, arrays: Mapping[str, Any], precision: str = "fp32", **more: Any) -> Any:
        """A model of numpy's or host arrays; `operations` is "PLAIN" or "FUSED"."""
        if "operations" in more:
            more["operations"] = getattr(self.layers, more["operations"])
        return self.weights.build_model(config, host(arrays), dtype=self.dtype(precision), **more)

    def forward(self, model: Any, tokens_BT: np.ndarray, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """The residual stream at every place and the logits, float64, without dropout.

        `arrays` are `segments_BT` and `positions_BT`.
        """
        seen: dict[str, np.ndarray] = {}
        given = {name: self.array(values) for name, values in arrays.items()}
        output = model(self.array(tokens_BT), trace=lambda name, x: seen.update({name: self.numbers(x)}), **given)
        assert np.array_equal(seen["norm"], self.numbers(output.hidden_BTD))
        return seen | {"logits": self.numbers(output.logits_BTV)}

    def logits(self, model: Any, tokens_BT: np.ndarray, **arrays: np.ndarray) -> np.ndarray:
        return self.forward(model, tokens_BT, **arrays)["logits"]

    def runner_of(self, model: Any, **options: Any) -> Any:
        return getattr(self.runner, self.Runner)(model, **options)

    def runner_over(self, config: ModelConfig, arrays: Mapping[str, Any], precision: str = "fp32") -> Any:
        return self.backend.runner_over(config, host(arrays), PRECISIONS[precision])

    # --- sampling ---

    def distributions(
        self, logits_RV: np.ndarray, params: Sequence[Any], seen_RV: np.ndarray | None = None
    ) -> np.ndarray:
        """What tokens are drawn from, float64 (R, V), where prompts hold the tokens `seen_RV`."""
        sampling, columns = self.sampling, self.sampling.Columns(params)
        scores_RV = self.array(logits_RV.astype(np.float64))
        if seen_RV is not None:
            outputs_RV = self.array(np.zeros(seen_RV.shape, dtype=np.int32))
            scores_RV = sampling.penalize(scores_RV, self.array(seen_RV), outputs_RV, columns)
        scores_RV = sampling.truncate(self.below_the_largest(scores_RV) / columns.temperature_R1, columns)
        return self.softmax(scores_RV)

    def noise_of(
        self, seeds: Sequence[int], positions: Sequence[int], size: int, ids: Sequence[int] | None = None
    ) -> np.ndarray:
        """The Gumbel noise of each pair of seed and position, over a vocabulary or some of its ids."""
        keys_R2 = self.array(self.noise.stream_keys(list(seeds), list(positions)))
        some = [] if ids is None else [self.array(np.array(ids))]
        return self.numbers(self.noise.GumbelNoise(size).rows(keys_R2, *some))

    def below_the_largest(self, scores_RV: Any) -> Any:
        """Scores with each row's largest subtracted."""
        raise NotImplementedError

    def softmax(self, scores_RV: Any) -> np.ndarray:
        raise NotImplementedError

    # --- training ---

    def train_step(self, config: ModelConfig, arrays: Mapping[str, HostArray] | None = None, **options: Any) -> Any:
        """On the CPU, in float32 unless told, from the values of seed 3 unless told."""
        options = {"precision": "fp32", "device": "cpu", "seed": 3, **options}
        return self.backend.build_train_step(config, arrays, **options)

    def step_over(self, model: Any, *settings: Any, **options: Any) -> Any:
        """A training step over a model as it is, in float32."""
        return getattr(self.step, self.TrainStep)(model, *settings, **options)

    def update_gradients(self, step: Any, micro_batches: Sequence[Any]) -> tuple[Any, dict[str, np.ndarray]]:
        """What an update that changes nothing says, and by canonical name the gradients its optimiser was given."""
        found: dict[str, np.ndarray] = {}
        optimizer = step.optimizer

        def keep(*arguments: Any) -> None:
            for item, gradient in zip(optimizer.parameters, self.given_gradients(optimizer, *arguments), strict=True):
                parts = zip(item.parts, item.split(gradient), strict=True)
                found.update((name, self.numbers(values)) for name, values in parts)

        optimizer.step = keep
        try:
            return step.step(micro_batches, 1e-3), found
        finally:
            del optimizer.step

    def given_gradients(self, optimizer: Any, *arguments: Any) -> Sequence[Any]:
        """The gradients that a call of `optimizer.step` is about."""
        raise NotImplementedError

    def gradients(self, function: Callable[..., Any], *arrays: Any) -> list[Any]:
        """Of a scalar by each of the arrays."""
        raise NotImplementedError

    def optimizer(
        self, values: Sequence[np.ndarray], decays: Sequence[bool], settings: Any, **more: Any
    ) -> "Optimizer":
        """An optimiser over these arrays; `more` is as `Optimizer` takes it."""
        raise NotImplementedError


class Torch(Framework):
    name = "torch"
    Runner, TrainStep = "TorchRunner", "TorchTrainStep"

    def dtype(self, precision: str) -> torch.dtype:
        return getattr(torch, PRECISIONS[precision])

    def array(self, numbers: Any, precision: str = "") -> torch.Tensor:
        tensor = torch.from_numpy(np.array(numbers))  # a copy: some functions write into theirs
        return tensor.to(self.dtype(precision)) if precision else tensor

    def numbers(self, array: torch.Tensor) -> np.ndarray:
        return array.detach().double().numpy()

    @torch.no_grad()
    def forward(self, model: Any, tokens_BT: np.ndarray, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return super().forward(model, tokens_BT, **arrays)

    @torch.no_grad()
    def hidden(self, model: Any, tokens_BT: np.ndarray, seed: int | None = None) -> np.ndarray:
        """The states before the output head; with a seed, dropout is drawn from it."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed or 0)
            return self.numbers(model.hidden(self.array(tokens_BT), training=seed is not None))

    def gradients(self, function: Callable[..., Any], *arrays: torch.Tensor) -> list[torch.Tensor]:
        leaves = [array.clone().requires_grad_() for array in arrays]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    def given_gradients(self, optimizer: Any, *arguments: Any) -> Sequence[torch.Tensor]:
        return [item.parameter.grad.clone() for item in optimizer.parameters]

    @torch.no_grad()
    def cached_logits(self, model: Any, tokens_1T: np.ndarray, use: Any) -> np.ndarray:
        """(T, V), over a step's use of a memory of keys and values."""
        return self.numbers(model(self.array(tokens_1T), cache=use).logits_BTV[0])

    def fill(self, cache: Any, numbers_SKH: np.ndarray) -> None:
        """Every layer's keys and values get these numbers, a slot after another."""
        for memory in (*cache.keys, *cache.values):
            memory.copy_(self.array(numbers_SKH))

    def memory(self, numbers_SKH: np.ndarray, precision: str) -> torch.Tensor:
        """A layer's memory, given a slot after another."""
        return self.array(numbers_SKH, precision)

    def chunk_attention(self, span: Any, spec: Any) -> Any:
        return self.paged_attention.ChunkAttention(span, spec, torch.device("cpu"))

    def decode_attention(self, spans: Sequence[Any], spec: Any) -> Any:
        return self.paged_attention.DecodeAttention(spans, spec, torch.device("cpu"))

    def slots(self, memory: torch.Tensor) -> np.ndarray:
        """What a layer's memory holds, a slot after another: (S, K, H)."""
        return self.numbers(memory)

    def set_values(self, model: Any, name: str, values: np.ndarray) -> None:
        with torch.no_grad():
            model.canonical_state()[name].copy_(self.array(values))

    def parameters(self, model: Any) -> Sequence[torch.Tensor]:
        return list(model.parameters())

    def draw(self) -> list[float]:
        """Numbers of the generator that everybody shares."""
        return torch.rand(3).tolist()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def below_the_largest(self, scores_RV: torch.Tensor) -> torch.Tensor:
        return scores_RV - scores_RV.amax(-1, keepdim=True)

    def softmax(self, scores_RV: torch.Tensor) -> np.ndarray:
        return self.numbers(scores_RV.softmax(-1))

    def optimizer(
        self, values: Sequence[np.ndarray], decays: Sequence[bool], settings: Any, **more: Any
    ) -> "TorchOptimizer":
        return TorchOptimizer(self, values, decays, settings, **more)


class Mlx(Framework):
    name = "mlx"
    Runner, TrainStep = "MlxRunner", "MlxTrainStep"
    Runner = "MlxRunner"

    def __init__(self) -> None:
        self.mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'llamita[mlx]'")

    def dtype(self, precision: str) -> Any:
        return getattr(self.mx, PRECISIONS[precision])

    def array(self, numbers: Any, precision: str = "") -> Any:
        numbers = np.asarray(numbers)
        array = self.mx.array(numbers, dtype=getattr(self.mx, numbers.dtype.name.replace("bool", "bool_")))
        return array.astype(self.dtype(precision)) if precision else array

    def numbers(self, array: Any) -> np.ndarray:
        if array.dtype == self.mx.bfloat16:  # numpy has none
            array = array.astype(self.mx.float32)
        return np.array(array).astype(np.float64)

    def hidden(self, model: Any, tokens_BT: np.ndarray, seed: int | None = None) -> np.ndarray:
        """The states before the output head; with a seed, dropout is drawn from it."""
        drawn = {}
        if seed is not None:
            drawn["dropout"] = self.attention.Dropout(model.config.dropout, self.mx.random.key(seed))
        return self.numbers(model.hidden(self.array(tokens_BT), **drawn))

    def gradients(self, function: Callable[..., Any], *arrays: Any) -> list[Any]:
        return list(self.mx.grad(function, argnums=list(range(len(arrays))))(*arrays))

    def given_gradients(self, optimizer: Any, *arguments: Any) -> Sequence[Any]:
        return arguments[0]

    def cached_logits(self, model: Any, tokens_1T: np.ndarray, use: Any) -> np.ndarray:
        """(T, V), over a step's use of a memory of keys and values."""
        return self.numbers(model(self.array(tokens_1T), cache=use).logits_BTV[0])

    def fill(self, cache: Any, numbers_SKH: np.ndarray) -> None:
        """Every layer's keys and values get these numbers, a slot after another."""
        numbers_KSH = self.array(numbers_SKH.swapaxes(0, 1))
        for memory in (cache.keys, cache.values):
            memory[:] = [numbers_KSH.astype(layer.dtype) for layer in memory]

    def memory(self, numbers_SKH: np.ndarray, precision: str) -> Any:
        """A layer's memory, given a slot after another."""
        return self.array(numbers_SKH.swapaxes(0, 1), precision)

    def chunk_attention(self, span: Any, spec: Any) -> Any:
        return self.paged_attention.ChunkAttention(span, spec)

    def decode_attention(self, spans: Sequence[Any], spec: Any) -> Any:
        return self.paged_attention.DecodeAttention(spans, spec)

    def slots(self, memory: Any) -> np.ndarray:
        """What a layer's memory holds, a slot after another: (S, K, H)."""
        return self.numbers(memory).swapaxes(0, 1)

    def parameters(self, model: Any) -> Sequence[Any]:
        return [fused.parameter for fused in model.fused_parameters()]

    def set_values(self, model: Any, name: str, values: np.ndarray) -> None:
        (packed,) = [each for each in model.fused_parameters() if each.parts == (name,)]
        packed.replace(self.array(values))

    def draw(self) -> list[float]:
        """Numbers of the generator that everybody shares."""
        return self.mx.random.normal((3,)).tolist()

    def seed(self, seed: int) -> None:
        self.mx.random.seed(seed)

    def below_the_largest(self, scores_RV: Any) -> Any:
        return scores_RV - scores_RV.max(-1, keepdims=True)

    def softmax(self, scores_RV: Any) -> np.ndarray:
        return np.exp(self.numbers(scores_RV - self.sampling.logsumexp(scores_RV)))

    def optimizer(
        self, values: Sequence[np.ndarray], decays: Sequence[bool], settings: Any, **more: Any
    ) -> "MlxOptimizer":
        return MlxOptimizer(self, values, decays, settings, **more)


def make(name: str) -> Framework:
    """The framework of this name; a test that asks for one that is not installed is skipped."""
    return Torch() if name == "torch" else Mlx()


class Optimizer:
    """A backend's AdamW over a few arrays: `step(gradients, rate, scale)`, and the values as float64 numbers.

    The first array holds two canonical ones where it has more than one row. With `muon`, settings and what else it
    takes, it is Muon, and `names` and `sizes` are those of the canonical parameters in each array.
    """

    def __init__(
        self,
        framework: Framework,
        values: Sequence[np.ndarray],
        decays: Sequence[bool],
        settings: Any,
        *,
        names: Sequence[tuple[str, ...]] = (),
        sizes: Sequence[tuple[int, ...]] = (),
        muon: Sequence[Any] = (),
    ):
        self.framework = framework
        names = list(names) or [(f"w{i}",) for i in range(len(values))]
        sizes = list(sizes) or [(len(array),) for array in values]
        if not muon and len(values[0]) > 1:
            names[0], sizes[0] = ("w0.q", "w0.k"), (len(values[0]) - len(values[0]) // 3, len(values[0]) // 3)
        self.parameters = [framework.array(array) for array in values]
        rows = zip(self.parameters, names, sizes, decays, strict=True)
        self.packed = [self.make_packed(i, *row) for i, row in enumerate(rows)]
        self.own = framework.adamw.AdamW(self.packed, settings)
        if muon:
            self.own = framework.muon.Muon(self.packed, muon[0], settings, *muon[1:])
        self.state, self.load_state = self.own.state, self.own.load_state

    def values(self) -> list[np.ndarray]:
        return [self.framework.numbers(item.parameter) for item in self.packed]

    def make_packed(self, i: int, parameter: Any, names: tuple[str, ...], sizes: tuple[int, ...], decays: bool) -> Any:
        raise NotImplementedError


class TorchOptimizer(Optimizer):
    def make_packed(self, i: int, parameter: Any, names: tuple[str, ...], sizes: tuple[int, ...], decays: bool) -> Any:
        return self.framework.fused.FusedParameter(f"p{i}", torch.nn.Parameter(parameter), names, sizes, decays)

    def step(self, gradients: Sequence[np.ndarray], rate: float, scale: float = 1.0) -> None:
        for item, gradient in zip(self.packed, gradients, strict=True):
            item.parameter.grad = self.framework.array(gradient)
        self.own.step(rate, scale)


class MlxOptimizer(Optimizer):
    def make_packed(self, i: int, parameter: Any, names: tuple[str, ...], sizes: tuple[int, ...], decays: bool) -> Any:
        return self.framework.fused.FusedParameter(f"p{i}", {"own": parameter}, "own", names, sizes, decays)

    def step(self, gradients: Sequence[np.ndarray], rate: float, scale: float = 1.0) -> None:
        self.own.step([self.framework.array(gradient) for gradient in gradients], rate, scale)


def host(arrays: Mapping[str, Any]) -> dict[str, HostArray]:
    """Host arrays of numpy's; those that are one already stay."""
    return {name: a if isinstance(a, HostArray) else HostArray.from_numpy(a) for name, a in arrays.items()}


def to_numpy(arrays: Mapping[str, HostArray]) -> dict[str, np.ndarray]:
    return {name: array.to_numpy() for name, array in arrays.items()}


def normal(*shape: int, precision: str = "fp32", seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Float32 numbers that are those of the precision."""
    numbers = scale * np.random.default_rng([seed, *shape]).standard_normal(shape)
    return torch.from_numpy(numbers).to(getattr(torch, PRECISIONS[precision])).float().numpy()

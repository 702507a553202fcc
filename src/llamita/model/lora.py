"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): which linear maps they change, by how much, from what.

An adapter adds `scale * B A x` to a linear map's `W x`. Here are its shapes, its beginning and its checks, under the
canonical names of a checkpoint (`model.layers.0.self_attn.q_proj.lora_A.weight`), so that every backend has the same.
Knows nothing of files or of frameworks.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import FLOATING, HostArray
from llamita.model.parameters import CLASSIFIER, OUTPUT_HEAD, parameter_table, shortened, stored_arrays

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
ALL = "all"  # every projection of every block, but not the output head
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # (rank, n_in) and (n_out, rank)


@dataclass(frozen=True)
class LoraSettings:
    """The settings that an adapter is trained with. ValueError names the field, its value and what is allowed."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    """On what goes into the adapter, while training; the projections that are fused in one matrix share its draw."""
    targets: tuple[str, ...] = (ALL,)
    """Names of linear maps (q_proj, ..., lm_head), or `all` for those of the blocks."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} of an adapter must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha} of an adapter must be above 0; twice the rank is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} of an adapter must lie in [0, 1)")
        unknown = [name for name in self.targets if name not in (*PROJECTIONS, HEAD, ALL)]
        if unknown or not self.targets:
            found = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"targets of an adapter: {found}; choose from {ALL}, {', '.join(PROJECTIONS)}, {HEAD}")

    @property
    def names(self) -> tuple[str, ...]:
        """The targets by name, `all` written out."""
        chosen = {*self.targets, *(PROJECTIONS if ALL in self.targets else ())}
        return tuple(name for name in (*PROJECTIONS, HEAD) if name in chosen)

    def factors(self, config: ModelConfig) -> dict[str, "Factors"]:
        """The linear maps of a model that are to be changed; ValueError where it has none of a name."""
        maps = linear_maps(config)
        for name in self.names:
            if not any(is_called(module, name) for module in maps):
                raise ValueError(f"this model has no {name} of its own to adapt; leave it out of the targets")
        scale = self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        chosen = [module for module in maps if any(is_called(module, name) for name in self.names)]
        return {module: Factors(self.rank, scale) for module in chosen}


@dataclass(frozen=True)
class Factors:
    """The change of one linear map."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter with its values: A and B of every linear map that it changes, and what it replaces whole.

    `arrays` has both under canonical names; `config` is that of the model with the adapter.
    """

    config: ModelConfig
    factors: Mapping[str, Factors]
    arrays: Mapping[str, HostArray]
    name: str = field(default="this adapter", compare=False)

    def __post_init__(self) -> None:
        check_adapter(self)

    @property
    def replaced(self) -> dict[str, HostArray]:
        """Whole parameters, such as a classification head, that take the place of the base's or are new."""
        return {name: array for name, array in self.arrays.items() if not name.endswith((DOWN, UP))}

    def over(self, base: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """The arrays of the base model with those in place; what the adapted model lacks (an output head) is gone."""
        names = [row.name for row in stored_arrays(self.config)]
        present = {**base, **self.replaced}
        return {name: present[name] for name in names if name in present}


def linear_maps(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear maps that can be adapted, by canonical name without `.weight`, and their shapes (n_out, n_in)."""
    return {
        row.name.removesuffix(".weight"): (row.shape[0], row.shape[1])
        for row in parameter_table(config)
        if row.name.endswith("_proj.weight") or row.name == OUTPUT_HEAD
    }


def is_called(module: str, name: str) -> bool:
    """Whether a linear map has this name, or ends with it."""
    return module == name or module.endswith(f".{name}")


def adapter_shapes(config: ModelConfig, factors: Mapping[str, Factors]) -> dict[str, tuple[int, int]]:
    """The shapes of all A and B, in order."""
    maps, result = linear_maps(config), {}
    for module, factor in factors.items():
        n_out, n_in = maps[module]
        result[module + DOWN], result[module + UP] = (factor.rank, n_in), (n_out, factor.rank)
    return result


def initialize_adapter(
    config: ModelConfig, factors: Mapping[str, Factors], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 array): A from the uniform distribution between +-1/sqrt(n_in), B zeros, so that an adapter
    begins by changing nothing. Each A has a stream of its own, keyed by (seed, name)."""
    for name, shape in adapter_shapes(config, factors).items():
        if name.endswith(UP):
            yield name, np.zeros(shape, dtype=np.float32)
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
        bound = np.float32(1 / math.sqrt(shape[1]))
        stream = np.random.Generator(np.random.Philox(key=key))
        yield name, (stream.random(shape, dtype=np.float32) * 2 - 1) * bound


def check_adapter(adapter: Adapter) -> None:
    """Raise ValueError with all that is missing, extra, misshapen or of another type."""
    table = {row.name: row.shape for row in parameter_table(adapter.config)}
    expected = adapter_shapes(adapter.config, adapter.factors)
    faults = [f"{name} is missing" for name in expected if name not in adapter.arrays]
    if adapter.config.num_labels and CLASSIFIER not in adapter.arrays:
        faults.append(f"{CLASSIFIER} is missing")
    for name, array in adapter.arrays.items():
        shape = expected.get(name, None if name.endswith((DOWN, UP)) else table.get(name))
        if shape is None:
            faults.append(f"{name} is not part of it")
        elif array.shape != shape:
            faults.append(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
        elif array.dtype not in FLOATING:
            faults.append(f"{name} has dtype {array.dtype}, expected one of {', '.join(FLOATING)}")
    if faults:
        raise ValueError(f"{adapter.name} does not fit the model: {shortened(faults, 5)}")

"""Rotary positions: how they are stretched past the length first trained on, and the frequencies that follow.

Numbers alone, for every backend; tensors are turned in a backend's layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

TOO_LARGE = 2**31  # no count in a real model reaches it; a config that does is broken

RopeType = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched past the length that a model was first trained on.

    linear: all by `factor` (Chen et al. 2023, arXiv:2306.15595). llama3: long waves by `factor`, short ones not at all,
    those between gradually (Llama 3.1). yarn: the same idea by the number of turns within the first length, and softer
    attention (Peng et al. 2023, arXiv:2309.00071). Field names are Hugging Face's.
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int = 0
    """The length first trained on; llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What yarn multiplies queries and keys by; by default 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the borders of yarn's ramp to whole pairs."""

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            known = ", ".join(get_args(RopeType))
            raise ValueError(f"rotary scaling of type {self.rope_type!r} is not supported; Llamita has {known}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), -math.inf)
        if self.factor < 1:
            raise ValueError(f"factor={self.factor!r} of rotary scaling must be at least 1")
        if self.rope_type != "linear":
            check_count("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor!r} must be above low_freq_factor={self.low_freq_factor!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields that this type has, as in a `config.json`."""
        names = {"linear": (), "llama3": _LLAMA3, "yarn": _YARN}[self.rope_type]
        values = {name: getattr(self, name) for name in ("rope_type", "factor", *names)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], max_position_embeddings: int) -> "RopeScaling | None":
        """Reads the rotary positions of a `config.json`, which `read_rope` gives; None where nothing is scaled."""
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if kind in get_args(RopeType) and values.get("factor") is None and not (kind == "yarn" and "factor" in values):
            raise ValueError(f"the rotary scaling of type {kind!r} in config.json lacks its factor")
        known = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        for name in ("beta_fast", "beta_slow"):
            if not known.get(name):
                known.pop(name, None)  # 0 stands for the usual value
        if "truncate" in values:
            known["truncate"] = bool(values["truncate"])  # null is false
        if kind == "linear":
            known.pop("original_max_position_embeddings", None)
        else:
            known.setdefault("original_max_position_embeddings", max_position_embeddings)
        length = known.get("original_max_position_embeddings")
        if isinstance(length, float) and length.is_integer():
            known["original_max_position_embeddings"] = int(length)
        if kind == "yarn" and "factor" not in known:  # null: what the two lengths say
            check_count("original_max_position_embeddings", known["original_max_position_embeddings"])
            known["factor"] = max_position_embeddings / known["original_max_position_embeddings"]
        return cls(**({"factor": 1.0} | known | {"rope_type": kind}))


def read_rope(values: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Returns the rotary positions of a `config.json` in one object, `rope_theta` included, as transformers reads them.

    `rope_scaling`, the older key, counts instead of `rope_parameters`, the whole of it. A `rope_theta` inside counts
    before the one beside it, and `theta` where there is none. `original_max_position_embeddings` beside it counts
    before the one inside.
    """
    scaling, parameters = rope_object(values, "rope_scaling"), rope_object(values, "rope_parameters")
    for key, given in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"{key} in config.json differs from layer to layer, which is not supported")
    rope = dict(scaling or parameters)
    for found in (values, rope):
        if found.get("rope_theta") is not None:
            check_number("rope_theta", found["rope_theta"], 0.0)
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = theta if values.get("rope_theta") is None else values["rope_theta"]
    if values.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return rope


def rope_object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns the object under a key of a `config.json`, an empty one for null; ValueError for what is no object."""
    found = values.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{key}={found!r} in config.json must be an object")
    return found or {}


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = (
    *("original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, float32 [H/2], and what rotated queries and keys are multiplied by.

    Pair i turns by theta^(-2 i / H) (Su et al. 2021, arXiv:2104.09864), slower where the model scales its positions;
    see `RopeScaling` for the papers.
    """
    H = head_dim
    plain = theta ** (-np.arange(0, H, 2) / H)
    if scaling is None:
        return plain.astype(np.float32), 1.0
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched.astype(np.float32), 1.0
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # of each pair within the first length
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (kept * plain + (1 - kept) * stretched).astype(np.float32), 1.0

    def pair_of(turns: float) -> float:
        """The number of the pair, perhaps between two, that turns so often within the first length."""
        length = scaling.original_max_position_embeddings
        return H * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, H - 1)
    ramp = np.clip((np.arange(H // 2) - first) / (last - first or 1e-3), 0.0, 1.0)
    return (ramp * stretched + (1 - ramp) * plain).astype(np.float32), _attention_factor(scaling)


def _attention_factor(scaling: RopeScaling) -> float:
    """How much larger YaRN makes queries and keys, each, so that attention over more positions stays as sharp."""

    def factor(strength: float) -> float:
        return 0.1 * strength * math.log(scaling.factor) + 1

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return factor(scaling.mscale) / factor(scaling.mscale_all_dim)
    return factor(1.0)


def check_count(name: str, value: Any) -> None:
    """Raise ValueError, naming it, for a value that is no positive whole number of a real model's size."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < TOO_LARGE:
        raise ValueError(f"{name}={value!r} must be a positive whole number")


def check_number(name: str, value: Any, low: float) -> None:
    """Raise ValueError, naming it, for a value that is no finite number above `low`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= low:
        raise ValueError(f"{name}={value!r} must be a finite number above {low:g}")

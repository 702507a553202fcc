"""A small base and adapters over it, for the tests of LoRA and of the adapters that runners serve."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import DOWN, UP, Adapter, LoraSettings
from llamita.model.parameters import initialize_parameters
from llamita.storage import safetensors
from llamita.storage.peft_directory import AdapterFiles, BaseModel, weights_digest
from tests.backend.models import save

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
WHOLE_GROUPS = dataclasses.replace(CONFIG, intermediate_size=64)  # every matrix has a form that MLX's kernel takes
TOKENS = np.random.default_rng(5).integers(0, 61, (3, 12))
EVERYTHING = LoraSettings(4, 8, targets=("all", "lm_head"))


def fresh(config: ModelConfig, seed: int = 1) -> dict[str, HostArray]:
    return {name: HostArray.from_numpy(values) for name, values in initialize_parameters(config, seed)}


def save_base(directory: Path, config: ModelConfig = CONFIG) -> Path:
    return save(config, fresh(config), directory)


def shake(step: Any, seed: int = 9) -> Any:
    """Values for B, which begins as zeros; a classifier's head stays."""
    random, arrays = np.random.default_rng(seed), dict(step.weights())
    for name, array in sorted(arrays.items()):
        if name.endswith(UP):
            arrays[name] = HostArray.from_numpy(random.normal(0, 0.1, array.shape).astype(np.float32))
    step.load_state(arrays, step.state())
    return step


def fill_with_nan(adapter: Path) -> None:
    """Makes one array of an adapter directory NaN."""
    file = adapter / "adapter_model.safetensors"
    values = dict(safetensors.read_safetensors(file))
    name = next(iter(values))
    values[name] = HostArray.from_numpy(np.full(values[name].shape, np.nan, np.float32))
    safetensors.write_safetensors(adapter / "nan", values)
    (adapter / "nan").replace(file)


def batch(seed: int = 0, rows: int = 4, T: int = 12) -> Batch:
    generator = np.random.Generator(np.random.Philox(key=seed))
    block = generator.integers(0, 61, (rows, T + 1), dtype=np.int32)
    return Batch(block[:, :-1], block[:, 1:].copy(), None, np.arange(rows, dtype=np.int64))


def labelled(rows: int = 4, T: int = 12) -> Batch:
    labels = np.full((rows, T), IGNORE_INDEX, dtype=np.int32)
    labels[:, -1] = np.arange(rows) % 3
    return dataclasses.replace(batch(), labels_BT=labels)


def save_adapter(
    directory: Path, config: ModelConfig, arrays: Mapping[str, HostArray], settings: LoraSettings, base: Path
) -> Path:
    directory.mkdir()
    AdapterFiles(settings, BaseModel(str(base), weights_digest(base))).save(directory, config, arrays)
    return directory


def summed(plain: Mapping[str, np.ndarray], adapter: Adapter) -> dict[str, np.ndarray]:
    """W + scale B A in float64, by name."""
    found = {name: array.astype(np.float64) for name, array in plain.items()}
    for module, factors in adapter.factors.items():
        down_RD, up_CR = (adapter.arrays[module + kind].to_numpy().astype(np.float64) for kind in (DOWN, UP))
        found[f"{module}.weight"] += factors.scale * (up_CR @ down_RD)
    return found


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest difference of two sets of arrays, as a share of each array's largest number."""
    a, b = ({name: x.to_numpy() if isinstance(x, HostArray) else x for name, x in each.items()} for each in (a, b))
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in a)

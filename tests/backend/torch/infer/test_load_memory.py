"""Loading a model takes little more memory than its weights, in the type asked for, whatever type the file has."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamita.backend.torch.infer.kernels.choice import choose_kernels
from llamita.model import host_array
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import parameter_table
from llamita.model.sizes import count_parameters
from llamita.storage import files, model_directory

CONFIG = ModelConfig(16000, 1024, 4096, 5, 8, 8, 64)
PARAMETERS = count_parameters(CONFIG).total  # 117 million: copying takes up to 30 MB, whatever the size
CODE = """
import contextlib, importlib, json, os, pathlib, sys
from llamita.backend.torch.infer.runner import load_runner

for name in ("head", "decode"):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"llamita.backend.torch.infer.kernels.{name}")

def memory(name):
    return int(pathlib.Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

for line in sys.stdin:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    small, large, asked, os.environ["LLAMITA_KERNELS"] = json.loads(line)
    load_runner(small, asked)  # a small model: all that is loaded once is in memory now
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    model = load_runner(large, asked).model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps([memory("VmHWM") - before, weights]), flush=True)
    os._exit(0)
"""
"""Tells of each load that it is asked for its peak and the weights, in a process of its own with the imports done."""


def write(directory: Path, config: ModelConfig, dtype: str) -> None:
    """A model whose parameters all begin like one array of noise, which is quickly made."""
    rows = parameter_table(config)
    noise = np.random.default_rng(0).normal(0, 0.02, max(row.size for row in rows)).astype(np.float32)
    data = ((noise.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else noise).view(np.uint8).data
    item = host_array.ITEM_BYTES[dtype]
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config, dtype)
        model_directory.save_tensors(
            temporary, {row.name: HostArray(dtype, row.shape, data[: row.size * item]) for row in rows}
        )


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[..., list[int]]]:
    """Returns the peak and the weights of a load: `measure(small, large, dtype, kernels)`."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CODE], text=True, **pipes) as process:

        def measured(*given: Any) -> list[int]:
            print(json.dumps([str(item) for item in given]), file=process.stdin, flush=True)
            found = process.stdout.readline()
            assert found, process.stderr.read()[-2000:]
            return json.loads(found)

        yield measured


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Returns the directory of a small and a large model, by the type that they are stored in and the files."""

    @functools.cache
    def written(stored: str, shards: int) -> Path:
        directory = tmp_path_factory.mktemp(stored)
        with pytest.MonkeyPatch.context() as patch:
            if shards > 1:  # files of float32 here
                patch.setattr(model_directory, "MAX_SHARD_BYTES", PARAMETERS * 4 // shards)
            write(directory / "small", ModelConfig(100, 32, 64, 2, 4, 4, 64), stored)
            write(directory / "large", CONFIG, stored)
        return directory

    return written


@pytest.mark.medium
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read a peak of memory")
@pytest.mark.parametrize("kernels", ["off", "auto"])
@pytest.mark.parametrize(
    ("stored", "asked", "shards"), [("BF16", "bfloat16", 1), ("F32", "bfloat16", 4), ("BF16", "float32", 1)]
)
def test_the_peak_is_at_most_a_fifth_above_the_weights(stored, asked, shards, kernels, models, measure, monkeypatch):
    monkeypatch.setenv("LLAMITA_KERNELS", kernels)
    in_blocks = kernels == "auto" and choose_kernels().instructions is not None
    directory = models(stored, shards)
    for _ in range(3):  # a system short of memory may take pages of libraries before, and give them back meanwhile
        peak, weights = measure(directory / "small", directory / "large", asked, kernels)
        if peak <= 1.2 * weights:
            break
    embedding = CONFIG.vocab_size * CONFIG.hidden_size  # which no kernel multiplies: it has the type asked for
    widened = 2 * (embedding if in_blocks and stored == "BF16" else PARAMETERS) if asked == "float32" else 0
    assert 2 * PARAMETERS + widened <= weights <= 1.001 * (2 * PARAMETERS + widened)  # norms are not multiplied either
    assert weights <= peak <= 1.2 * weights

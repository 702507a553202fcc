"""Models by their name on the hub, from a local cache laid out as the hub's client lays it out, without a network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamita.backend.torch.model import weights
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory, safetensors
from llamita.text.bpe import train_bpe_from_iterator

CONFIG = ModelConfig(264, 16, 32, 2, 4, 2, 64)
REVISION = "0123456789abcdef0123456789abcdef01234567"

CODE = """
import sys, json
from llamita.backend.torch.infer.runner import load_runner
from llamita.storage import model_directory
for name in sys.argv[1:]:
    try:
        runner = load_runner(name)
        print(json.dumps([str(model_directory.resolve_model_directory(name)), runner.config.hidden_size]))
    except OSError as error:
        print(json.dumps(str(error)))
"""


def write_model(directory: Path) -> None:
    """A small model in two shards with an index and a tokenizer, as those on the hub are."""
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, CONFIG)
        train_bpe_from_iterator(["a small text"] * 2, CONFIG.vocab_size).save(temporary)
        arrays = weights.to_host_arrays(weights.build_model(CONFIG))
        names = list(arrays)
        index = {"metadata": {}, "weight_map": {}}
        for number, part in enumerate((names[:7], names[7:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            safetensors.write_safetensors(temporary / file, {name: arrays[name] for name in part})
            index["weight_map"] |= dict.fromkeys(part, file)
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index))


def lay_out(cache: Path, name: str, directory: Path) -> None:
    """models--owner--name with blobs by their hash, links to them in a snapshot, and a branch that names it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for made in (snapshot, repository / "blobs", repository / "refs"):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / "main").write_text(REVISION)


@pytest.fixture
def cache(tmp_path) -> Path:
    write_model(tmp_path / "made")
    lay_out(tmp_path / "cache", "someone/small", tmp_path / "made")
    return tmp_path / "cache"


def load(names: Sequence[str], cache: Path, directory: Path) -> list[object]:
    """What becomes of each name, in one process, as the hub's client reads its variables when it is imported."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *names],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_name_is_found_in_the_cache(cache, tmp_path):
    found = [str(cache / "models--someone--small" / "snapshots" / REVISION), 16]
    names = ("someone/small", "someone/small@main", f"someone/small@{REVISION}")
    assert load(names, cache, tmp_path) == [found] * 3


def test_a_link_out_of_the_cache_is_refused(cache, tmp_path):
    snapshot = cache / "models--someone--small" / "snapshots" / REVISION
    shard = snapshot / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(shard, outside)
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="must lie in the same directory"):
        model_directory.load_tensors(snapshot)


def test_what_is_not_there_is_one_line(cache, tmp_path):
    (tmp_path / "runs").mkdir()
    message, mistyped = load(("someone/else", "runs/frist"), cache, tmp_path)
    assert str(message).startswith("there is no directory someone/else, and the hub gives no such model: ")
    assert "\n" not in str(message)
    assert mistyped == "runs/frist does not exist; expected a model directory or a training run"

"""mlx-lm and Llamita on the same directories: the same residual stream after every layer, for each family it has."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.backend.torch.model import weights
from llamita.model.config import ModelConfig
from llamita.model.rope import RopeScaling
from llamita.storage import files, model_directory
from llamita.workflows.verify import verify

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from llamita.backend.mlx.peers import MlxLmRunner
from tests.backend.torch.model.test_families import FAMILIES, made_by_transformers, tokens

SMALL = ModelConfig(97, 32, 48, 2, 4, 2, 64)


def saved(directory, config, dtype=torch.float32):
    """A model with random weights, norms and biases off their ones and zeros, as Llamita writes it."""
    model = weights.build_model(config, seed=1, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.0
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config, "F32" if dtype == torch.float32 else "BF16")
        model_directory.save_tensors(temporary, weights.to_host_arrays(model))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_that_of_mlx_lm(family, tmp_path):
    """Models that transformers wrote, in prompts of up to 65 tokens; windows are passed by none of them."""
    _, ours = made_by_transformers(family, tmp_path)
    theirs, config = MlxLmRunner(tmp_path / "theirs"), ours.config
    for length in (1, 2, 31, 65):
        if config.sliding_window and length > config.sliding_window:
            with pytest.raises(ValueError, match="sliding_window=32 of them; compare at most 32 tokens, not 65"):
                theirs.forward(tokens(1, length).numpy())
            break
        result = verify(TorchRunner(ours), theirs, config, tokens(1, length)[0].tolist())
        assert result.agrees, (length, result.places)
        assert len(result.places) == config.num_hidden_layers + 3
    batch = theirs.forward(tokens(3, 20).numpy())["logits"]
    assert np.abs(batch - TorchRunner(ours).forward(tokens(3, 20).numpy())["logits"]).max() < 1e-4 * np.abs(batch).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {"rope_scaling": RopeScaling("llama3", 8.0, 16), "rope_theta": 500000.0},
        {"rope_scaling": RopeScaling("yarn", 4.0, 16, mscale=1.0, mscale_all_dim=0.7, beta_fast=8.0)},
        {"query_key_value_bias": True, "tie_word_embeddings": True},
        {"query_key_norm": True, "head_dim": 24},
    ],
    ids=["biases", "llama3", "yarn", "qwen2", "qwen3"],
)
def test_what_llamita_writes_is_read_alike(tmp_path, changes):
    directory = saved(tmp_path / "m", dataclasses.replace(SMALL, head_dim=changes.pop("head_dim", 0) or 8, **changes))
    runner = load_runner(directory)
    assert verify(runner, MlxLmRunner(directory), runner.config).agrees


def test_bfloat16_weights_are_run_in_float32(tmp_path):
    directory = saved(tmp_path / "m", SMALL, torch.bfloat16)
    assert verify(load_runner(directory, "float32"), MlxLmRunner(directory), SMALL).agrees


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 2}, "it has nothing for num_labels=2"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 16, attention_factor=1.5)}, "nothing for attention_factor=1.5"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 16, mscale=0.7)}, "nothing for mscale without mscale_all_dim"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 16, truncate=False)}, "nothing for truncate=false"),
        ({"query_key_norm": True, "attention_bias": True}, r"parameters not in model"),
        ({"query_key_value_bias": True, "head_dim": 24}, r"[Ss]hape"),
    ],
)
def test_what_mlx_lm_does_not_run_is_one_line(tmp_path, changes, words):
    directory = saved(tmp_path / "m", dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=rf"mlx-lm does not run .*{words}") as fault:
        MlxLmRunner(directory)
    assert "\n" not in str(fault.value)


def test_nothing_in_a_directory_is_executed(tmp_path):
    directory = saved(tmp_path / "m", SMALL)
    values = json.loads((directory / "config.json").read_text())
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w')")
    (directory / "config.json").write_text(json.dumps(values | {"model_file": "evil.py"}))
    with pytest.warns(UserWarning, match="model_file"), pytest.raises(ValueError, match="mlx-lm does not run"):
        MlxLmRunner(directory)
    assert not (tmp_path / "written").exists()

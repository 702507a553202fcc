"""Planted errors are found, and their layer named."""

import dataclasses
import re
import sys

import numpy as np
import pytest

from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.model import weights
from llamita.cli.main import main
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.storage import files, model_directory
from llamita.storage.rotation import to_halves
from llamita.workflows.verify import verify

CONFIG = ModelConfig(97, 32, 48, 4, 4, 2, 64)


def model_arrays() -> dict[str, HostArray]:
    return dict(weights.to_host_arrays(weights.build_model(CONFIG, seed=1)))


def rotated_otherwise(arrays):
    name = "model.layers.2.self_attn.k_proj.weight"
    return CONFIG, arrays | {name: to_halves(arrays[name], CONFIG.head_dim)}


def swapped(arrays):
    one, other = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    return CONFIG, arrays | {one: arrays[other], other: arrays[one]}


def other_epsilon(arrays):
    return dataclasses.replace(CONFIG, rms_norm_eps=1e-2), arrays


def other_head(arrays):
    numbers = arrays["lm_head.weight"].to_numpy().copy()
    numbers[5] += 1
    return CONFIG, arrays | {"lm_head.weight": HostArray.from_numpy(numbers)}


@pytest.mark.parametrize(
    ("plant", "place"),
    [(rotated_otherwise, "layers.2"), (swapped, "layers.1"), (other_epsilon, "layers.0"), (other_head, "logits")],
)
def test_a_planted_error_is_found_and_its_layer_named(plant, place):
    arrays = model_arrays()
    config, wrong = plant(arrays)
    result = verify(runner_over(config, wrong), runner_over(CONFIG, arrays), CONFIG)
    assert result.first_fault.name == place
    assert not result.agrees
    before = result.places[: result.places.index(result.first_fault)]
    assert all(found.largest == 0 for found in before)


def test_equal_models_agree():
    arrays = model_arrays()
    result = verify(runner_over(CONFIG, arrays), runner_over(CONFIG, arrays), CONFIG, tokens=[1, 2, 3])
    assert result.agrees
    assert (result.tokens, result.same_likeliest, result.unclear) == (3, 3, 0)
    assert [place.name for place in result.places] == [
        "embedding",
        *(f"layers.{i}" for i in range(4)),
        "norm",
        "logits",
    ]
    with pytest.raises(ValueError, match="must be ids from 0 to 96"):
        verify(runner_over(CONFIG, arrays), runner_over(CONFIG, arrays), CONFIG, tokens=[97])


def test_nan_is_a_difference():
    arrays = model_arrays()
    good = runner_over(CONFIG, arrays)

    class Broken:
        def forward(self, tokens_BT, capture=()):
            found = good.forward(tokens_BT, capture)
            return found | {"layers.3": np.full_like(found["layers.3"], np.nan)}

    assert verify(Broken(), good, CONFIG).first_fault.name == "layers.3"


def save(directory, config, arrays):
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config)
        model_directory.save_tensors(temporary, arrays)


def test_the_verb_prints_each_layer_and_its_status_tells(tmp_path, capsys):
    pytest.importorskip("transformers")
    arrays = model_arrays()
    save(tmp_path / "good", CONFIG, arrays)
    save(tmp_path / "wrong", *rotated_otherwise(arrays))
    assert main(["verify", str(tmp_path / "good")]) == 0
    out = capsys.readouterr().out
    assert "layers.3" in out
    assert "equal within 0.0001" in out
    assert "the likeliest token is the same at 64 of 64 positions" in out
    assert main(["verify", str(tmp_path / "wrong"), "--against", str(tmp_path / "good")]) == 1
    out = capsys.readouterr().out
    assert "the two first differ at layers.2" in out
    assert next(line for line in out.splitlines() if "differs here" in line).startswith("layers.2")


@pytest.mark.parametrize(
    ("plant", "place"),
    [(rotated_otherwise, "layers.2"), (swapped, "layers.1"), (other_epsilon, "layers.0"), (other_head, "logits")],
)
@pytest.mark.parametrize("against", ["mlx-lm", "transformers"])
def test_a_planted_error_is_found_by_another_library(against, plant, place, tmp_path, capsys, monkeypatch):
    """The port is wrong, not the file: arrays and config are changed on their way into Llamita's model."""
    pytest.importorskip(against.replace("-", "_"))
    arrays = model_arrays()
    save(tmp_path / "m", CONFIG, arrays)
    assert main(["verify", str(tmp_path / "m"), "--against", against]) == 0
    assert "equal within 0.0001" in capsys.readouterr().out
    config, wrong = plant(arrays)
    monkeypatch.setattr(model_directory, "load_tensors", lambda directory: wrong)
    monkeypatch.setattr(model_directory, "load_config", lambda directory: config)
    assert main(["verify", str(tmp_path / "m"), "--against", against]) == 1
    out = capsys.readouterr().out
    assert f"the two first differ at {place}" in out
    assert next(line for line in out.splitlines() if "differs here" in line).startswith(place)


@pytest.mark.parametrize(
    ("missing", "package"), [("mlx", r"mlx\[cpu\]|mlx"), ("mlx_lm", "mlx-lm"), ("llama_cpp", "llama-cpp-python")]
)
def test_what_is_not_installed_is_named_as_pip_names_it(missing, package, tmp_path, capsys, monkeypatch):
    save(tmp_path / "m", CONFIG, model_arrays())
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name in [name for name in sys.modules if f"{name}.".startswith((f"{missing}.", "llamita.backend.mlx."))]:
        monkeypatch.delitem(sys.modules, name)
    if missing == "mlx_lm":
        pytest.importorskip("mlx.core")
    monkeypatch.setitem(sys.modules, missing, None)
    against = str(tmp_path / "m.gguf") if missing == "llama_cpp" else "mlx-lm"
    assert main(["verify", str(tmp_path / "m"), "--against", against]) == 2
    assert re.fullmatch(
        f"error: the package '({package})' is not installed; install it with: pip install '?({package})'?\n",
        capsys.readouterr().err,
    )


def test_a_backend_is_not_held_to_itself(tmp_path, capsys):
    for name, other in (("torch", "mlx"), ("mlx", "torch")):
        assert main(["verify", str(tmp_path), "--backend", name, "--against", name]) == 2
        assert capsys.readouterr().err == f"error: {name} would be compared with itself; give --against {other}\n"

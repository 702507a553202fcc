"""`llamita info`: the numbers it prints against counts made by hand, and its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from llamita.cli.info import fold_layers, short_bytes, short_number
from llamita.cli.main import main
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters, parameter_table
from llamita.model.presets import PRESETS, preset
from llamita.storage.model_directory import save_config, save_tensors

SMALL = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
# A layer: norms 2 x 8; q and o 8 x 8; k and v 4 x 8; three of 12 x 8.
LAYER = 16 + 2 * 64 + 2 * 32 + 3 * 96
TOTAL = 2 * 80 + 3 * LAYER + 8  # embedding and head, layers, the last norm


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the weights of SMALL."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_config(directory, SMALL)
    save_tensors(directory, {name: HostArray.from_numpy(array) for name, array in initialize_parameters(SMALL, seed=0)})
    return directory


def test_json_holds_the_counts_made_by_hand(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model), "--json", "--batch-size", "2", "--sequence-length", "5"]) == 0
    facts = json.loads(capsys.readouterr().out)
    matrices = TOTAL - 80 - 3 * 16 - 8  # all but the embedding and the norms
    assert facts["parameters"] == {"total": TOTAL, "embedding": 80, "matrices": matrices, "per_layer": LAYER}
    attention = 12 * 3 * 8 * 5  # 12 L N H T
    assert facts["flops_per_token"] == {"sequence_length": 5, "training": 6 * matrices + attention}
    assert facts["kv_bytes_per_token"] == {"float32": 2 * 3 * 2 * 2 * 4, "bfloat16": 2 * 3 * 2 * 2 * 2}
    memory = facts["training_memory"]
    assert (memory["weights"], memory["all_gradients"], memory["optimizer"]) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL)
    parts = ("weights", "optimizer", "gradients", "activations", "logits", "workspace")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert (memory["batch_size"], memory["sequence_length"]) == (2, 5)
    assert facts["file_bytes"] == {"float32": 4 * TOTAL, "bfloat16": 2 * TOTAL}
    assert facts["file_bytes_on_disk"] == (model / "model.safetensors").stat().st_size > 4 * TOTAL
    assert [row["name"] for row in facts["table"]] == [row.name for row in parameter_table(SMALL)]
    assert sum(int(np.prod(row["shape"])) for row in facts["table"]) == TOTAL


def test_the_tables_show_the_same_numbers(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["info", str(model), "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model.embed_tokens.weight 10 x 8 80 normal 1 yes" in lines
    assert "model.layers.{0..2}." in lines
    assert "self_attn.k_proj.weight 4 x 8 96 normal 0.354 yes" in lines
    assert "input_layernorm.weight 8 24 ones no" in lines
    assert f"parameters {TOTAL:,}" in lines
    assert "in matrix products 1,520 (output head included)" in lines
    assert "key-value cache 48 B a token in bfloat16, 96 B in float32" in lines
    assert "training memory" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_a_hundred_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    assert f"{sum(row.size for row in parameter_table(preset(name))):,}" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100


def test_the_list_of_presets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in PRESETS:
        row = next(line for line in out.splitlines() if line.startswith(name + " "))
        assert f"{sum(row.size for row in parameter_table(preset(name))):,}" in row
    assert main(["info", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert [entry["name"] for entry in listed] == list(PRESETS)
    assert listed[-3]["config"]["rope_scaling"]["factor"] == 32.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "'tinny' is neither a preset nor a directory; did you mean 'tiny'?"),
        (["./nowhere"], "nowhere does not exist"),
        (["tiny", "--batch-size", "0"], "batch_size=0 must be positive"),
        (["tiny", "--sequence-length", "-1"], "sequence_length=-1 must"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_directory_without_weights_and_one_with_a_presets_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    save_config(tmp_path / "tiny", SMALL)
    assert main(["info", "./tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == TOTAL
    assert facts["file_bytes_on_disk"] is None
    assert main(["info", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > TOTAL


def test_layers_fold_only_where_they_are_equal() -> None:
    rows = parameter_table(SMALL)
    assert [entry[:3] for entry in fold_layers(rows)][:2] == [
        ("", "model.embed_tokens.weight", 1),
        ("model.layers.{0..2}.", "input_layernorm.weight", 3),
    ]
    without_middle = tuple(row for row in rows if not row.name.startswith("model.layers.1."))
    assert ("model.layers.{0,2}.", "mlp.up_proj.weight", 2) in [entry[:3] for entry in fold_layers(without_middle)]
    first = tuple(row for row in rows if ".1." not in row.name and ".2." not in row.name)
    assert ("model.layers.0.", "mlp.up_proj.weight", 1) in [entry[:3] for entry in fold_layers(first)]


def test_short_numbers() -> None:
    values = (0, 999, 1000, 999_999, 1_234_567, 46_100_000_000, 2e15, 5e18)
    assert [short_number(value) for value in values] == [
        "0 ", "999 ", "1 k", "1 M", "1.23 M", "46.1 G", "2 P", "5e+03 P",
    ]  # fmt: skip
    assert short_bytes(5120) == "5.12 kB"

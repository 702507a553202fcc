"""`llamita quantize`: what it writes, what reads it, and the mistakes that it names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import llamita
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import load_runner
from llamita.backend.torch.model import quantize, weights
from llamita.cli.main import main
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import check_arrays
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows.quantize import carry_over
from llamita.workflows.verify import verify

CONFIG = ModelConfig(300, 64, 160, 2, 4, 2, 64)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "source"
    with files.atomic_directory(path) as directory:
        model_directory.save_config(directory, CONFIG)
        model_directory.save_tensors(directory, weights.to_host_arrays(weights.build_model(CONFIG, seed=3)))
        train_bpe_from_iterator(meadow.corpus(0, 200, "train"), 300).save(directory)
        (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return path


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request, source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / request.param
    assert main(["quantize", str(source), str(path), "--to", request.param]) == 0
    return path


def test_the_directory_holds_what_the_table_says(source, quantized) -> None:
    scheme = quantized.name
    config, arrays = model_directory.load_config(quantized), model_directory.load_tensors(quantized)
    assert config == replace(CONFIG, quantization=scheme)
    bits, group = (8, -1) if scheme == "int8" else (4, 32)
    expected = {"quant_method": "llamita", "bits": bits, "group_size": group}
    assert json.loads((quantized / "config.json").read_text())["quantization_config"] == expected
    check_arrays(config, arrays)
    assert (arrays[Q_PROJ].dtype, arrays[Q_PROJ].shape) == (("I8", (64, 64)) if scheme == "int8" else ("U8", (64, 32)))
    assert arrays[Q_PROJ + "_scale"].shape == ((64,) if scheme == "int8" else (64, 2))
    assert arrays["model.embed_tokens.weight"].dtype == arrays["lm_head.weight"].dtype == "I8"
    assert arrays["model.norm.weight"].dtype == "BF16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantized / name).read_bytes() == (source / name).read_bytes()


def test_the_weights_are_near_the_sources(source, quantized) -> None:
    """Root mean square of the differences, as a share: 0.8% expected of int8 rows of 64, 8.6% of int4."""
    arrays, others = model_directory.load_tensors(quantized), model_directory.load_tensors(source)
    values, scale = (weights.tensor_from_host(arrays[name]) for name in (Q_PROJ, Q_PROJ + "_scale"))
    weight = torch.from_numpy(others[Q_PROJ].to_numpy().copy())
    error = (quantize.dequantize(values, scale, 64, torch.float32) - weight).norm() / weight.norm()
    assert error < (0.01 if quantized.name == "int8" else 0.1)


def test_it_generates_and_is_saved_as_the_same_bytes(source, quantized, tmp_path) -> None:
    llm = llamita.load(quantized)
    text = llm.generate("The fox", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert len(text.token_ids) == 5
    llamita.save(llm, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (quantized / name).read_bytes()


def test_verify_and_info_read_it(source, quantized, capsys) -> None:
    assert main(["verify", str(quantized), "--against", str(quantized)]) == 0
    assert main(["verify", str(quantized), "--against", str(source), "--tolerance", "1e-4"]) == 1
    assert "differs here" in capsys.readouterr().out
    result = verify(load_runner(quantized, "float32"), load_runner(source), CONFIG)
    assert 1e-3 < result.places[-1].mean < (0.01 if quantized.name == "int8" else 0.06)
    assert main(["verify", str(quantized)]) == 2
    assert "transformers cannot read; give --against" in one_line(capsys)
    assert main(["info", str(quantized), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    header = facts["file_bytes_on_disk"] - facts["file_bytes"][quantized.name]
    assert 0 < header < 8000
    assert main(["info", str(quantized)]) == 0
    assert f"in {quantized.name}" in capsys.readouterr().out


def test_a_bfloat16_source_in_shards(source, tmp_path, monkeypatch, capsys) -> None:
    """Read from shards, written as shards, streamed; the values are those of one file."""
    monkeypatch.setattr(model_directory, "MAX_SHARD_BYTES", 30_000)
    llm = llamita.load(source, dtype="bfloat16")
    llamita.save(llm, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert main(["quantize", str(tmp_path / "shards"), str(tmp_path / "int8"), "--to", "int8"]) == 0
    assert "% of the source's bytes" in capsys.readouterr().out
    assert len(list((tmp_path / "int8").glob("model-*.safetensors"))) > 2
    found = model_directory.load_tensors(tmp_path / "int8")
    expected = weights.quantize_arrays(replace(CONFIG, quantization="int8"), llm.runner.weights().items())
    for name, array in expected:
        assert (found[name].shape, bytes(found[name].data)) == (array.shape, bytes(array.data))


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_mistakes_are_named(source, quantized, tmp_path, capsys) -> None:
    there = tmp_path / "there"
    there.mkdir()
    cases = {
        (str(quantized), str(tmp_path / "x"), "--to", "int8"): "is quantised already",
        (str(source), str(there), "--to", "int8"): "exists already",
        (str(tmp_path / "none"), str(tmp_path / "x"), "--to", "int4"): "does not exist",
        (str(there), str(tmp_path / "x"), "--to", "int4"): "holds no config.json",
    }
    for arguments, message in cases.items():
        assert main(["quantize", *arguments]) == 2
        assert message in one_line(capsys)
    assert main(["convert", str(quantized), str(tmp_path / "x"), "--to", "gguf-f16"]) == 2
    assert "is quantised" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert main(["quantize", str(source), str(there), "--to", "int8", "--overwrite"]) == 0


def test_a_damaged_source_leaves_nothing(source, tmp_path, capsys) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    arrays = dict(model_directory.load_tensors(broken))
    numbers = arrays[Q_PROJ].to_numpy().copy()
    numbers[3, 4] = np.nan
    (broken / "model.safetensors").unlink()  # still mapped
    model_directory.save_tensors(broken, arrays | {Q_PROJ: HostArray.from_numpy(numbers)})
    assert main(["quantize", str(broken), str(tmp_path / "out"), "--to", "int4"]) == 2
    assert f"{Q_PROJ} holds NaN" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def changed(arrays: dict[str, HostArray], fault: str) -> dict[str, HostArray]:
    scale = Q_PROJ + "_scale"
    if fault == "no scale":
        return {name: array for name, array in arrays.items() if name != scale}
    if fault == "scale of another shape":
        return arrays | {scale: HostArray.from_bf16_bits(np.zeros((64, 7), np.uint16))}
    if fault == "scale of another type":
        return arrays | {scale: HostArray.from_numpy(np.zeros(arrays[scale].shape, np.float32))}
    if fault == "weight not quantised":
        return arrays | {Q_PROJ: HostArray.from_numpy(np.zeros((64, 64), np.float32))}
    if fault == "scale of a norm":
        return arrays | {"model.norm.weight_scale": arrays[scale]}
    assert fault == "scale is NaN"
    return arrays | {scale: HostArray.from_bf16_bits(np.full(arrays[scale].shape, 0x7FC0, np.uint16))}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no scale", f"{Q_PROJ}_scale is missing"),
        ("scale of another shape", f"{Q_PROJ}_scale has shape [64, 7], expected [64"),
        ("scale of another type", f"{Q_PROJ}_scale has dtype F32, expected BF16"),
        ("weight not quantised", f"{Q_PROJ} has"),
        ("scale of a norm", "model.norm.weight_scale is not part of this model"),
        ("scale is NaN", f"{Q_PROJ}_scale holds NaN or infinite values"),
    ],
)
def test_hostile_files_are_refused_in_one_line(quantized, tmp_path, capsys, fault, message) -> None:
    broken = shutil.copytree(quantized, tmp_path / "broken")
    arrays = changed(dict(model_directory.load_tensors(quantized)), fault)
    (broken / "model.safetensors").unlink()
    model_directory.save_tensors(broken, arrays)
    assert main(["generate", str(broken), "The fox"]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "llamita", "bits": 3, "group_size": 32},
        {"quant_method": "llamita", "bits": 4, "group_size": 64},
        "llamita",
    ],
)
def test_another_scheme_is_refused_by_name(scheme) -> None:
    values = CONFIG.to_dict() | {"quantization_config": scheme}
    with pytest.raises(ValueError, match=r"quantization_config=.* is not supported; Llamita has"):
        ModelConfig.from_dict(values)
    with pytest.raises(ValueError, match="quantization='int3' must be int8, int4"):
        replace(CONFIG, quantization="int3")


def test_files_around_the_weights_are_carried_over(tmp_path):
    first, second, output = (tmp_path / name for name in ("first", "second", "output"))
    for place in (first, second, output):
        place.mkdir()
    (first / "added_tokens.json").write_text("{}")
    for place, text in ((first, "of the first"), (second, "of the second")):
        (place / "tokenizer.json").write_text(text)
    (second / "additional_chat_templates").mkdir()
    (second / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (second / "weights.bin").write_text("not carried")
    carry_over(output, first, second)
    found = {file.relative_to(output).as_posix(): file.read_text() for file in output.rglob("*") if file.is_file()}
    assert found == {
        "added_tokens.json": "{}",
        "tokenizer.json": "of the first",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }

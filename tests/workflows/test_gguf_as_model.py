"""A GGUF file in the place of a model directory: every verb gives the answers of the directory that it becomes."""

import io
import json
import re

import gguf as library
import numpy as np
import pytest

import llamita
from llamita import SamplingParams
from llamita.cli.main import main
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.storage import gguf as gguf_file
from llamita.storage.formats import gguf
from llamita.storage.formats.foreign import ForeignModel
from llamita.text.bpe import train_bpe_from_iterator
from tests.backend.frameworks import NAMES
from tests.storage.formats.helpers import rewritten

TEMPLATE = "{% for m in messages %}<r0>{{ m.content }}<r1>{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of matrices in Q4_1 (quantised by llama.cpp's own library) and f32, and the directory made from it."""
    root = tmp_path_factory.mktemp("gguf")
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 300, "train"), 400, reserved_tokens=4)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig(
        tokenizer.vocab_size, 64, 128, 2, 4, 2, 512, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    arrays = {name: HostArray.from_numpy(array) for name, array in initialize_parameters(config, seed=3)}
    gguf.write_model(root / "plain.gguf", ForeignModel(config, arrays, tokenizer))
    rewritten(root / "plain.gguf", root / "model.gguf", {}, library.GGMLQuantizationType.Q4_1)
    assert main(["convert", str(root / "model.gguf"), str(root / "directory")]) == 0
    return root


def test_its_weights_are_few_in_memory_at_a_time_and_those_of_the_library(files):
    arrays = gguf_file.load_tensors(files / "model.gguf")
    reader = {tensor.name: tensor for tensor in library.GGUFReader(files / "model.gguf").tensors}
    for ours, theirs in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        assert arrays[ours]._bytes is None
        expected = library.quants.dequantize(reader[theirs].data, reader[theirs].tensor_type)
        np.testing.assert_array_equal(arrays[ours].to_numpy(), expected)
        arrays[ours].forget(0, 1)
        assert arrays[ours]._bytes is None


@pytest.fixture
def dequantised(monkeypatch) -> None:
    """Kernels of our own would multiply the file's blocks as they are, with activations rounded to bytes."""
    monkeypatch.setenv("LLAMITA_KERNELS", "off")


@pytest.mark.parametrize("backend", NAMES)
def test_it_is_loaded_as_the_directory_is(files, backend, dequantised):
    file, directory = (llamita.load(files / name, backend=backend) for name in ("model.gguf", "directory"))
    assert file.config == directory.config
    assert str(file.runner.dtype).endswith("float32")
    tokens = [[1, 5, 9, 300, 7]]
    ours, theirs = (llm.runner.forward(tokens)["logits"] for llm in (file, directory))
    np.testing.assert_array_equal(ours, theirs)
    prompts, greedy = ["Once upon a time", "The fox"], SamplingParams(max_tokens=20, temperature=0.0)
    assert [g.text for g in file.generate(prompts, greedy)] == [g.text for g in directory.generate(prompts, greedy)]
    narrow = llamita.load(files / "model.gguf", backend=backend, dtype="bfloat16")
    assert str(narrow.runner.dtype).endswith("bfloat16")


@pytest.mark.medium
def test_every_verb_that_reads_a_model_takes_it(files, tmp_path, capsys, monkeypatch, dequantised):
    said = {}
    for name in ("model.gguf", "directory"):
        model, output = str(files / name), []
        for arguments in (
            ["generate", model, "Once", "--max-tokens", "8", "--temperature", "0"],
            ["info", model, "--json"],
            ["classify", "zero-shot", model, "--data", "meadow:20"],
            ["evaluate", model, "--task", "meadow", "--limit", "4"],
        ):
            assert main(arguments) == 0, arguments
            output.append(capsys.readouterr().out.replace(model, "MODEL"))
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n/quit\n"))
        assert main(["chat", model, "--max-tokens", "8", "--temperature", "0"]) == 0
        output.append(re.sub(r"[\d,.]+ tokens/s", "", capsys.readouterr().out.replace(model, "MODEL")))
        facts = json.loads(output[1])
        assert facts.pop("file_bytes_on_disk") > 0
        output[1] = facts
        said[name] = output
    assert said["model.gguf"] == said["directory"]
    assert main(["verify", str(files / "model.gguf"), "--against", str(files / "directory")]) == 0


@pytest.mark.medium
def test_it_is_tuned_like_a_directory_and_the_adapter_finds_it_again(files, tmp_path, capsys):
    arguments = ["--data", "meadow", "--conversations", "40", "--steps", "2", "--batch-size", "4", "--answers", "0"]
    run = tmp_path / "run"
    lora = ["--tuning", "lora", "--lora-rank", "2", "--evaluation-rows", "4"]
    assert main(["sft", "--model", str(files / "model.gguf"), "--output", str(run), *arguments, *lora]) == 0
    assert llamita.load(run).generate("Once", SamplingParams(max_tokens=3)).token_ids
    assert main(["merge", str(run), "--output", str(tmp_path / "merged")]) == 0
    assert llamita.load(tmp_path / "merged").config.hidden_size == 64


def test_quantising_it_writes_a_directory(files, tmp_path):
    assert main(["quantize", str(files / "model.gguf"), str(tmp_path / "int8"), "--to", "int8"]) == 0
    assert llamita.load(tmp_path / "int8").generate("Once", SamplingParams(max_tokens=3)).token_ids

"""Conversions end to end: every route there and back, the gate that refuses a wrong copy, and the library's face."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llamita
from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.model import weights
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.cli.main import main
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.storage.formats import foreign, llama2c
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from llamita.workflows import convert as workflow
from llamita.workflows.convert import ConvertConfig, Tools, convert
from llamita.workflows.finetune import FinetuneConfig, load_base
from tests.text.test_tiktoken_ranks import RANKS
from tests.text.test_tiktoken_ranks import write as write_ranks

TOOLS = Tools(BACKEND, read_pickle, write_pickle)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small model with a tokenizer, as Llamita writes it."""
    directory = tmp_path_factory.mktemp("source") / "model"
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 200, "train"), 300)
    config = ModelConfig(300, 32, 64, 2, 4, 2, 64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config)
        model_directory.save_tensors(temporary, weights.to_host_arrays(weights.build_model(config, seed=5)))
        tokenizer.save(temporary)
    return directory


def arrays(directory: Path) -> dict[str, bytes]:
    return {name: bytes(array.data) for name, array in model_directory.load_tensors(directory).items()}


@pytest.mark.parametrize("to", ["gguf-f32", "llama2c", "llama2c-pt", "course-pt"])
def test_there_and_back_is_bit_identical(source, tmp_path, to):
    there = convert(source, tmp_path / "m", ConvertConfig(to=to), TOOLS)
    assert (there.kind, there.difference) == ("Hugging Face directory", 0.0)
    back = convert(tmp_path / "m", tmp_path / "back", ConvertConfig(tokenizer=source), TOOLS)
    assert back.kind == {"llama2c": "llama2.c model", "gguf-f32": "GGUF file"}.get(to, "training checkpoint")
    assert arrays(tmp_path / "back") == arrays(source)
    assert model_directory.load_config(tmp_path / "back") == model_directory.load_config(source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("to", workflow.TOLERANCES)
def test_quantised_forms_stay_within_their_tolerance(source, tmp_path, to):
    done = convert(source, tmp_path / "q.bin", ConvertConfig(to=to), TOOLS)
    assert 0 < done.difference < workflow.TOLERANCES[to]
    back = convert(tmp_path / "q.bin", tmp_path / "back", ConvertConfig(), TOOLS)
    assert back.difference == 0


def test_a_copy_that_differs_is_refused_and_removed(source, tmp_path, monkeypatch):
    original = llama2c.to_pairs
    monkeypatch.setattr(llama2c, "to_pairs", lambda array, head_dim: original(array, head_dim // 2))
    with pytest.raises(ValueError, match=r"logits of the copy differ.*nothing was written"):
        convert(source, tmp_path / "m.bin", ConvertConfig(to="llama2c"), TOOLS)
    assert not list(tmp_path.iterdir())


def test_metas_directory(source, tmp_path):
    convert(source, tmp_path / "m.pt", ConvertConfig(to="llama2c-pt"), TOOLS)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    meta = tmp_path / "meta"
    meta.mkdir()
    arguments = content["model_args"]
    (meta / "params.json").write_text(json.dumps({**arguments, "norm_eps": 1e-5}))
    torch.save(content["model"], meta / "consolidated.00.pth")
    done = convert(meta, tmp_path / "back", ConvertConfig(), TOOLS)
    assert done.kind == "Meta's checkpoint"
    assert arrays(tmp_path / "back") == arrays(source)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"no consolidated"):
        convert(meta, tmp_path / "again", ConvertConfig(), TOOLS)


def test_metas_files_in_other_forms(source, tmp_path):
    """Tables of complex numbers, a name without a number, Mistral's safetensors."""
    convert(source, tmp_path / "m.pt", ConvertConfig(to="llama2c-pt"), TOOLS)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    parameters = json.dumps({**content["model_args"], "norm_eps": 1e-5})
    table = {"freqs_cis": torch.ones(4, 4, dtype=torch.complex64)}
    for name in ("consolidated.00.pth", "consolidated.pth", "consolidated.safetensors"):
        meta = tmp_path / name.replace(".", " ")
        meta.mkdir()
        (meta / "params.json").write_text(parameters)
        if name.endswith(".pth"):
            torch.save(content["model"] | table, meta / name)
        else:
            save_file({key: value.clone() for key, value in content["model"].items()}, meta / name)
        assert not convert(meta, tmp_path / "out", ConvertConfig(overwrite=True), TOOLS).has_tokenizer
        assert arrays(tmp_path / "out") == arrays(source)


@pytest.mark.parametrize("files", [1, 2])
def test_a_directory_of_pickled_weights(source, tmp_path, files):
    """As transformers wrote them before safetensors, rotary tables among them; the hint where it is opened is true."""
    shutil.copytree(source, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "model" / "model.safetensors").unlink()
    for i in range(files):
        part = {name: state[name] for name in list(state)[i::files]}
        torch.save(part, tmp_path / "model" / f"pytorch_model{f'-{i + 1:05d}-of-00002' if files > 1 else ''}.bin")
    with pytest.raises(FileNotFoundError, match=r"only `llamita convert` reads: llamita convert \S+model DIR$"):
        llamita.load(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "out", ConvertConfig(), TOOLS)
    assert (done.kind, done.has_tokenizer) == ("Hugging Face directory", True)
    assert arrays(tmp_path / "out") == arrays(source)
    torch.save([1, 2], tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold a dictionary of arrays"):
        convert(tmp_path / "model", tmp_path / "other", ConvertConfig(), TOOLS)


def test_how_to_generate_goes_along(source, tmp_path):
    """An end that generation_config.json alone names, and the defaults of sampling."""
    shutil.copytree(source, tmp_path / "model")
    given = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "pad_token_id": None}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(given))
    convert(tmp_path / "model", tmp_path / "copy", ConvertConfig(), TOOLS)
    found = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6}


def test_mistrals_directory_is_hugging_faces_beside_its_own_form(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / "params.json").write_text('{"dim": 32, "n_layers": 2}')
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"not read")
    done = convert(tmp_path / "model", tmp_path / "copy", ConvertConfig(), TOOLS)
    assert (done.kind, done.has_tokenizer) == ("Hugging Face directory", True)
    assert arrays(tmp_path / "copy") == arrays(source)


def test_metas_llama_3_has_a_rank_file_for_a_tokenizer(tmp_path):
    """Its tokens, the special ones among them, go along to a Hugging Face directory, a GGUF file and back."""
    size, ranks = len(RANKS) + 256, len(RANKS)
    config = ModelConfig(size, 32, 64, 2, 4, 2, 64, bos_token_id=1, eos_token_id=2)
    model = foreign.ForeignModel(config, weights.to_host_arrays(weights.build_model(config, seed=5)))
    meta = tmp_path / "meta"
    meta.mkdir()
    parameters = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "max_seq_len": 64}
    (meta / "params.json").write_text(json.dumps(parameters | {"vocab_size": size, "rope_theta": 10000.0}))
    write_pickle(meta / "consolidated.00.pth", foreign.to_meta_names(model))
    write_ranks(meta / "tokenizer.model")
    assert convert(meta, tmp_path / "hf", ConvertConfig(), TOOLS).has_tokenizer
    convert(tmp_path / "hf", tmp_path / "m.gguf", ConvertConfig(to="gguf-f32"), TOOLS)
    convert(tmp_path / "m.gguf", tmp_path / "back", ConvertConfig(), TOOLS)
    expected = Tokenizer.load(meta / "tokenizer.model")
    for name in ("hf", "back"):
        found = Tokenizer.load(tmp_path / name)
        assert arrays(tmp_path / name) == {name: bytes(array.data) for name, array in model.arrays.items()}
        for text in ("It's 12345 aaaab qzqzq qzqzqz", *meadow.corpus(1, 20, "validation")):
            assert found.encode(text) == expected.encode(text)
        assert found.encode("<|eot_id|>", allow_special=True) == [ranks + 9]
        assert (found.bos_id, found.eos_id) == (ranks, ranks + 1)
    assert model_directory.load_config(tmp_path / "hf").eos_token_id == (ranks + 1, ranks + 9)
    assert model_directory.load_config(tmp_path / "hf").bos_token_id == ranks
    write_ranks(meta / "tokenizer.model", RANKS | {b"one more": ranks})
    with pytest.raises(ValueError, match=f"the tokenizer has {size + 1} tokens and the model {size} embeddings"):
        convert(meta, tmp_path / "too large", ConvertConfig(), TOOLS)
    # Llama 1 and 2 came with one tokenizer for all sizes, a directory above; another model's is left there.
    (meta / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert not convert(meta, tmp_path / "without", ConvertConfig(), TOOLS).has_tokenizer
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    assert not convert(meta, tmp_path / "without", ConvertConfig(overwrite=True), TOOLS).has_tokenizer
    write_ranks(tmp_path / "tokenizer.model")
    assert convert(meta, tmp_path / "with", ConvertConfig(), TOOLS).has_tokenizer


@pytest.mark.parametrize("width", [128, 640])
def test_a_width_that_begins_like_a_pickle(tmp_path, width):
    config = ModelConfig(60, width, 32, 1, 4, 4, 16, tie_word_embeddings=True)
    with files.atomic_directory(tmp_path / "source") as directory:
        model_directory.save_config(directory, config)
        model_directory.save_tensors(directory, weights.to_host_arrays(weights.build_model(config)))
    convert(tmp_path / "source", tmp_path / "m.bin", ConvertConfig(to="llama2c"), TOOLS)
    assert convert(tmp_path / "m.bin", tmp_path / "back", ConvertConfig(), TOOLS).kind == "llama2.c model"


class Sneaky:
    """Writes a file when it is unpickled by a reader that executes what it reads."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_pickle_is_executed(tmp_path):
    torch.save({"model_args": {}, "model": Sneaky(str(tmp_path / "executed"))}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt is not opened: it asks for .*open, and a file that holds more"):
        convert(tmp_path / "m.pt", tmp_path / "out", ConvertConfig(), TOOLS)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("end", [2, 10, 100, 2000, -1])
def test_a_truncated_pickle_is_refused(source, tmp_path, end):
    convert(source, tmp_path / "m.pt", ConvertConfig(to="course-pt"), TOOLS)
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:end])
    with pytest.raises(ValueError, match=r"m\.pt is no"):
        convert(tmp_path / "m.pt", tmp_path / "out", ConvertConfig(), TOOLS)


def test_mistakes_are_named(source, tmp_path):
    (tmp_path / "text").write_text("Once upon a time")
    with pytest.raises(ValueError, match="is no model that Llamita knows: a Hugging Face directory, a GGUF"):
        convert(tmp_path / "text", tmp_path / "out", ConvertConfig(), TOOLS)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(source, tmp_path / "text", ConvertConfig(to="llama2c"), TOOLS)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", ConvertConfig(), TOOLS)
    with pytest.raises(ValueError, match="is a safetensors file alone; give the directory"):
        convert(source / "model.safetensors", tmp_path / "out", ConvertConfig(), TOOLS)
    large = train_bpe_from_iterator(meadow.corpus(0, 300, "train"), 320)
    large.save(tmp_path / "large")
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens and the model 300 embeddings"):
        convert(source, tmp_path / "out", ConvertConfig(tokenizer=tmp_path / "large"), TOOLS)
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_generates_from_ids(source, tmp_path, capsys):
    convert(source, tmp_path / "m.bin", ConvertConfig(to="llama2c"), TOOLS)
    assert main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "bare")]) == 0
    out = capsys.readouterr().out
    assert "llama2.c model, 2 layers of width 32" in out
    assert "its logits equal the source's" in out
    assert "It has no tokenizer" in out
    model = llamita.load(tmp_path / "bare")
    assert model.tokenizer is None
    ids = model.generate((1, 5, 9), llamita_params()).token_ids
    assert ids == llamita.load(source).generate((1, 5, 9), llamita_params()).token_ids
    assert len(ids) == 8


def llamita_params():
    from llamita.backend.sampling_params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_and_save(source, tmp_path, dtype):
    model = llamita.load(source, dtype=dtype)
    llamita.save(model, tmp_path / "copy")
    copy = llamita.load(tmp_path / "copy")
    assert copy.config == model.config
    tokens = np.arange(20)[None]
    assert np.array_equal(copy.runner.forward(tokens)["logits"], model.runner.forward(tokens)["logits"])
    assert copy.generate("Once", llamita_params()).text == model.generate("Once", llamita_params()).text
    stored = {array.dtype for array in model_directory.load_tensors(tmp_path / "copy").values()}
    assert stored == {"F32" if dtype == "float32" else "BF16"}
    with pytest.raises(FileExistsError, match="exists already"):
        llamita.save(model, tmp_path / "copy")
    llamita.save(model, tmp_path / "copy", overwrite=True)


def test_the_package_has_no_other_attributes():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        llamita.lode  # noqa: B018


def test_a_copy_keeps_the_ends_that_generation_config_adds(source, tmp_path):
    """Llama 3's instruction models name what ends a turn there alone."""
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    convert(directory, tmp_path / "copy", ConvertConfig(), TOOLS)
    convert(directory, tmp_path / "m.gguf", ConvertConfig(to="gguf-f32"), TOOLS)
    llamita.save(llamita.load(directory, device="cpu"), tmp_path / "saved")
    for place in ("copy", "m.gguf", "saved"):
        found, generation = (
            read(tmp_path / place) for read in (model_directory.load_config, model_directory.load_generation_config)
        )
        assert set(model_directory.end_tokens(found, generation)) == {2, 7}
    for place in ("copy", "saved"):  # where transformers looks
        assert json.loads((tmp_path / place / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert load_base(FinetuneConfig(model=directory)).config.eos_token_ids == (2, 7)

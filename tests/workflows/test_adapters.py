"""Tuning an adapter as a run: its checkpoints, resuming, what opens them, merging, what is refused."""

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import llamita
from llamita.backend.objectives import NextToken
from llamita.backend.torch.infer.runner import load_runner
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.packing import Rows, RowsConfig
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig
from llamita.training.examples import Examples
from llamita.workflows.finetune import FinetuneConfig, finetune, load_base
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import check_run
from tests.backend.adapters import fill_with_nan
from tests.training.helpers import MODEL, Altered, Silence, cut_short, documents


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning on made-up documents."""

    run: RunConfig
    finetune: FinetuneConfig = FinetuneConfig()
    training: TrainingConfig = TrainingConfig()
    machine: MachineConfig = MachineConfig()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    directory.mkdir()
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 60, "train"), 300)
    tokenizer.save(directory)
    model = replace(MODEL, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    model_directory.save_config(directory, model)
    model_directory.save_tensors(directory, to_host_arrays(build_model(model, seed=4)))
    return directory


def tune(output, base, **changes):
    options = {
        "model": base, "output": output, "steps": 12, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 2,
        "learning_rate": 1e-2, "precision": "fp32", "device": "cpu", "dropout": 0.1, "tuning": "lora",
        "lora_rank": 4, "lora_dropout": 0.2, "lora_targets": ("all", "lm_head"), **changes,
    }  # fmt: skip
    config = resolve(Config, **options)
    check_run(config)

    rows = Rows(documents(), RowsConfig("pad", 16))
    held_out = Rows(documents(1, 20), RowsConfig("pad", 16))
    examples = Examples(BatchIterator(rows, 4, 0), lambda: evaluation_batches(held_out, 4, 8))
    return finetune(
        config, load_base(config.finetune), Altered(), kind="test", identity={}, examples=examples,
        objective=NextToken(), display=Silence(),
    )  # fmt: skip


def adapter_of(run):
    return {
        "adapter": (run / "adapter_model.safetensors").read_bytes(),
        "optimizer": (run / "optimizer.safetensors").read_bytes(),
    }


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, base):
    tune(tmp_path / "whole", base)
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    cut_short(whole, cut, lost_steps=[12])
    assert (cut / "checkpoints" / "step-00000010").is_dir()
    tune(cut, base, resume=True)
    assert adapter_of(cut / "last") == adapter_of(whole / "last")
    assert not list(whole.rglob("model.safetensors"))


def test_a_run_of_an_adapter_opens_everywhere_and_merges_into_an_equal_model(tmp_path, base, capsys):
    run = tmp_path / "run"
    tune(run, base)
    tokens = [[1, 5, 9, 12, 7]]
    before = load_runner(base).forward(tokens)["logits"]
    tuned = load_runner(run).forward(tokens)["logits"]
    assert np.abs(tuned - before).max() > 0.01
    assert main(["merge", str(run), "--output", str(tmp_path / "merged")]) == 0
    assert "15 linear maps changed, rank 4" in capsys.readouterr().out
    np.testing.assert_allclose(load_runner(tmp_path / "merged").forward(tokens)["logits"], tuned, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run / "best", dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), tuned, atol=1e-5)
    assert main(["generate", str(run), "The fox", "--temperature", "0", "--max-tokens", "6", "--no-echo"]) == 0
    ours = capsys.readouterr().out
    merged = ["generate", str(tmp_path / "merged"), "The fox", "--temperature", "0", "--max-tokens", "6", "--no-echo"]
    assert main(merged) == 0
    assert capsys.readouterr().out == ours


def test_an_adapter_without_config_and_tokenizer_is_measured_with_its_bases(tmp_path, base, capsys):
    """As peft leaves it."""
    tune(tmp_path / "run", base)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "run" / "best" / name, bare)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who?", "choices": ["the fox", "the owl"], "answer": 0}\n')
    (tmp_path / "texts.txt").write_text("0 ||| A sad day.\n1 ||| A glad day.\n")
    found = []
    for model in (bare, tmp_path / "run" / "best"):
        capsys.readouterr()
        assert main(["evaluate", str(model), "--task", "multiple-choice", "--data", str(questions)]) == 0
        words = ["--data", str(tmp_path / "texts.txt"), "--labels", "sad", "glad", "--suffix", "It was"]
        assert main(["classify", "zero-shot", str(model), *words]) == 0
        found.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("recorded in")])
    assert found[0] == found[1]


def test_an_adapter_generates_and_merges_with_the_settings_of_its_base(tmp_path, base):
    """An end and a temperature that the base's generation_config.json alone names; the adapter as peft leaves it."""
    shutil.copytree(base, tmp_path / "base")
    given = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(given))
    tune(tmp_path / "run", tmp_path / "base", steps=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "run" / "last" / name, bare)
    model = llamita.load(bare, device="cpu", backend="torch")
    assert model.generation == given
    assert model.engine._eos == {2, 7}
    assert main(["merge", str(bare), "--output", str(tmp_path / "merged")]) == 0
    theirs = pytest.importorskip("transformers").GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (theirs.eos_token_id, theirs.temperature) == ([2, 7], 0.6)
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "of the run")]) == 0
    own = json.loads((tmp_path / "run" / "last" / "generation_config.json").read_text())
    assert json.loads((tmp_path / "of the run" / "generation_config.json").read_text()) == given | own


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_an_adapter_over_a_quantised_base_runs_and_merges(tmp_path, base, scheme):
    assert main(["quantize", str(base), str(tmp_path / "base"), "--to", scheme]) == 0
    tune(tmp_path / "run", tmp_path / "base", lora_targets=("all",))
    tokens = [[1, 5, 9, 12, 7]]
    tuned = load_runner(tmp_path / "run", "float32").forward(tokens)["logits"]
    assert np.abs(tuned - load_runner(tmp_path / "base", "float32").forward(tokens)["logits"]).max() > 0.01
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    merged = load_runner(tmp_path / "merged", "float32").forward(tokens)["logits"]
    np.testing.assert_allclose(merged, tuned, atol=0.05 * np.abs(tuned).max())  # written in bfloat16


def edited(directory, tmp_path, name="adapter_config.json", **changes):
    """A copy with some settings changed."""
    copy = tmp_path / "edited"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | changes))
    return copy


def test_bad_adapters_are_refused_in_one_line(tmp_path, base, capsys):
    tune(tmp_path / "run", base, steps=4)
    good = tmp_path / "run" / "best"

    def refused(directory, message, *more):
        assert main(["generate", str(directory), "The fox", "--max-tokens", "4", *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert message in error

    for changes, message in (
        ({"r": 5}, "lora_A.weight has shape [4, 16], expected [5, 16]"),
        ({"target_modules": ["q_proj"]}, "is not part of it"),
        ({"target_modules": "("}, "target_modules, or a pattern, is broken"),
        ({"target_modules": ["embed_tokens"]}, "names no linear map of this model"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=['embed_tokens'] is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"r": 0}, "must be numbers above 0"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "is gone"),
        ({"base_model_name_or_path": None}, "does not say which model it adapts"),
    ):
        refused(edited(good, tmp_path, **changes), message)
    refused(edited(good, tmp_path, "adapter_base.json", sha256="0" * 64), "their SHA-256 differ")
    pickled = edited(good, tmp_path)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "adapter_model.bin is a pickled file")
    damaged = edited(good, tmp_path)
    fill_with_nan(damaged)
    refused(damaged, "holds NaN or infinite values")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model_directory.save_tensors(other, to_host_arrays(build_model(model_directory.load_config(base), seed=5)))
    refused(other, "their SHA-256 differ", "--adapter", f"x={good}")
    for verb in (["quantize", str(good), str(tmp_path / "q"), "--to", "int8"], ["merge", str(base), "--output", "q"]):
        assert main(verb) == 2
        assert "merge" in capsys.readouterr().err


def test_what_cannot_be_tuned_so_is_refused_in_one_line(tmp_path, base):
    for changes, message in (
        ({"tuning": "head"}, "--tuning head trains a classifier's head"),
        ({"lora_rank": 0}, "rank=0 of an adapter"),
        ({"lora_targets": ("w_proj",)}, "'w_proj'; choose from all, q_proj"),
        ({"lora_dropout": 1.0}, "dropout=1.0"),
        ({"lora_alpha": 0}, "alpha=0"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(tmp_path / "run", base, **changes)
    assert not (tmp_path / "run").exists()
    tune(tmp_path / "run", base, steps=4)
    with pytest.raises(ValueError, match=r"tuning\.rank was 4 and is now 3"):
        tune(tmp_path / "run", base, steps=4, resume=True, lora_rank=3)
    with pytest.raises(ValueError, match="holds an adapter, and a whole model is needed"):
        tune(tmp_path / "again", tmp_path / "run")

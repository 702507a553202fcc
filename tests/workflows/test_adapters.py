"""Tuning an adapter as a run: its checkpoints, resuming, what opens them, merging, what is refused."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llamita import checkpoint
from llamita.data import meadow
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.packing import Rows, RowsConfig
from llamita.objective import NextToken
from llamita.text.bpe import train_bpe_from_iterator
from llamita.torch_backend.train_step import build_train_step
from llamita.torch_backend.weights import build_model, to_host_arrays
from llamita.training.interfaces import Examples
from llamita.workflows.finetune import FinetuneConfig, finetune, load_base, resumed
from tests.training.helpers import MODEL, Silence, documents


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig):
    """Tuning on made-up documents."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    directory.mkdir()
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 60, "train"), 300)
    tokenizer.save(directory)
    model = replace(MODEL, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    checkpoint.save_config(directory, model)
    checkpoint.save_tensors(directory, to_host_arrays(build_model(model, seed=4)))
    return directory


def tune(output, base, **changes):
    options = {
        "model": base, "output": output, "steps": 12, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 2,
        "learning_rate": 1e-2, "precision": "fp32", "device": "cpu", "dropout": 0.1, "tuning": "lora",
        "lora_rank": 4, "lora_dropout": 0.2, "lora_targets": ("all", "lm_head"), **changes,
    }  # fmt: skip
    config = resumed(Config(**options))

    def step(*arguments, **named):
        made = build_train_step(*arguments, **named)
        made.peak_flops = lambda: 1e11
        return made

    rows = Rows(documents(), RowsConfig("pad", 16))
    held_out = Rows(documents(1, 20), RowsConfig("pad", 16))
    examples = Examples(BatchIterator(rows, 4, 0), lambda: evaluation_batches(held_out, 4, 8))
    return finetune(
        config, load_base(config), step, kind="test", identity={}, examples=examples, objective=NextToken(),
        display=Silence(),
    )  # fmt: skip


def adapter_of(run):
    return {
        "adapter": (run / "adapter_model.safetensors").read_bytes(),
        "optimizer": (run / "optimizer.safetensors").read_bytes(),
    }


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, base):
    tune(tmp_path / "whole", base)
    whole = tmp_path / "whole"
    shutil.copytree(whole, tmp_path / "cut", symlinks=True)
    cut = tmp_path / "cut"
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    assert (cut / "checkpoints" / "step-00000010").is_dir()
    tune(cut, base, resume=True)
    assert adapter_of(cut / "last") == adapter_of(whole / "last")
    assert not list(whole.rglob("model.safetensors"))

"""Recipes: what each comes to, as a table; the printed commands, run small; the rows that mini-llama's way gives."""

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from llamita.cli.main import main
from llamita.cli.recipe import commands, resolved
from llamita.data import meadow
from llamita.data.batches import IGNORE_INDEX
from llamita.data.packing import RowsConfig
from llamita.data.shards import load_tokenizer
from llamita.model.sizes import count_parameters
from llamita.training.config import with_options
from llamita.training.run_directory import read_manifest
from llamita.training.trainer import split
from llamita.workflows.pretrain import make_examples, model_config
from llamita.workflows.recipes import RECIPES, recipe

COMMON = {
    "schedule": "cosine", "learning_rate": 1e-3, "decay_steps": 0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "optimizer": "adamw", "momentum": 0.95, "nesterov": True, "orthogonalization_steps": 5, "depth": 0,
    "epsilon": 1e-8, "bias_correction": "textbook", "max_grad_norm": 1.0, "keep_checkpoints": 2, "seed": 0,
    "precision": "auto", "initialization": "fan-in", "sample_tokens": 100, "sample_prompt": "",
    "keep_every": 0, "on_spike": "report", "spike_deviations": 7.0, "spike_limit": 10,
}  # fmt: skip
OPTIONS = {
    "mini-llama-wikitext": {
        "preset": "mini-llama", "set": (), "mode": "pad", "sequence_length": 512, "within_documents": False,
        "steps": 225, "batch_size": 128, "micro_batch_size": 16, "warmup_steps": 22, "minimum_learning_rate": 0.0,
        "dropout": 0.0, "evaluate_every": 25, "evaluation_rows": 512, "checkpoint_every": 25,
    },
    "scratch-shakespeare": {
        "preset": "scratch", "set": ("num_key_value_heads=2",), "mode": "random", "sequence_length": 256,
        "steps": 1000, "batch_size": 16, "micro_batch_size": 16, "warmup_steps": 100, "minimum_learning_rate": 1e-4,
        "within_documents": False, "dropout": 0.2, "evaluate_every": 100, "evaluation_rows": 0,
        "checkpoint_every": 100,
    },
    "lillm-39m": {
        "preset": "lillm-39m", "set": (), "mode": "pack", "sequence_length": 512, "within_documents": True,
        "steps": 24_000, "batch_size": 64, "micro_batch_size": 16, "warmup_steps": 200,
        "minimum_learning_rate": 1e-4, "dropout": 0.0, "evaluate_every": 500, "evaluation_rows": 512,
        "checkpoint_every": 500,
    },
}  # fmt: skip
PREPARATION = {  # vocabulary, parameters; beginning and end marked, source, what lies between documents, split
    "mini-llama-wikitext": (32_000, 21_499_136, True, True, "wikitext", "blank-line", "document"),
    "scratch-shakespeare": (4_000, 2_008_192, False, False, "text", "file", "tail"),
    "lillm-39m": (8_192, 39_006_720, True, True, "text", "blank-line", "document"),
}


class Vocabulary:
    """A tokenizer as far as the model's shape depends on it."""

    bos_id, eos_id, pad_id = 1, 2, None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_to_these_options(name):
    found = recipe(name)
    expected = COMMON | OPTIONS[name] | {"recipe": name, "output": Path("runs") / name}
    expected |= {"data": (Path(f"{name}-data"),), "weights": ()}
    assert resolved(found.train) == expected
    config = model_config(found.train, Vocabulary(found.tokenizer.vocab_size))
    prepare = found.prepare
    assert PREPARATION[name] == (
        *(found.tokenizer.vocab_size, count_parameters(config).total),
        *(prepare.bos, prepare.eos, prepare.source, prepare.separator, prepare.split),
    )
    assert (prepare.tokenizer, (prepare.output,)) == (found.tokenizer.output, found.train.data)


def write_texts(directory, shared=None):
    """The files that recipes name: WikiText and Tiny Shakespeare as they are where they lie here, else made-up ones."""
    stories = list(meadow.corpus(0, 400, "train"))
    (directory / "corpus.txt").write_text("\n\n".join(stories))
    talk = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "Once."}]
    (directory / "conversations.jsonl").write_text("".join(
        json.dumps({"messages": [*talk, {"role": "user", "content": f"And {i}?"}, talk[1]]}) + "\n" for i in range(60)
    ))  # fmt: skip
    articles = [f" \n = Story {i} = \n \n {' '.join(stories[3 * i : 3 * i + 3])} \n" for i in range(60)]
    play = "\n\n".join(f"THE FOX:\n{story}" for story in stories)
    texts = {
        "wiki.train.tokens": "".join(articles[:50]),
        "wiki.valid.tokens": "".join(articles[50:]),
        "input.txt": play,
    }
    real = {"wiki.train.tokens": "wikitext-2/test.txt", "wiki.valid.tokens": "wikitext-2/valid.txt"}
    real["input.txt"] = "tinyshakespeare/input.txt"
    for name, text in texts.items():
        source = shared and shared / real[name]
        (directory / name).write_text(source.read_text("utf-8")[:60_000] if source and source.is_file() else text)


SMALL = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4")
SHORT = {
    "tokenizer": ["--vocab-size", "600"],
    "train": shlex.split("--steps 2 --batch-size 4 --micro-batch-size 2 --sample-tokens 4 --evaluation-rows 8"),
    "generate": ["--max-tokens", "4"],
    "sft": shlex.split("--steps 2 --epochs 0 --batch-size 4 --evaluation-rows 8"),
    "chat": ["--max-tokens", "4"],
}


@pytest.mark.medium
@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_train_a_small_model(name, tmp_path, monkeypatch, capsys):
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    write_texts(tmp_path, shared)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n/quit\n"))
    for command in commands(recipe(name)):
        program, verb, *rest = shlex.split(command)
        assert program == "llamita"
        small = ["--set", *SMALL, "num_key_value_heads=2"] if verb == "train" else []
        assert main([verb, *rest, *SHORT.get(verb, []), *small]) == 0, command
    manifest = read_manifest(Path("runs") / name)
    arguments, expected = manifest["arguments"], OPTIONS[name]
    assert arguments["recipe"] == name
    for option in ("preset", "mode", "sequence_length", "dropout", "within_documents"):
        assert arguments[option] == expected[option], option
    assert (arguments["steps"], arguments["batch_size"], arguments["micro_batch_size"]) == (2, 4, 2)
    assert manifest["identity"]["model"]["num_key_value_heads"] == 2
    capsys.readouterr()

    # It is gone on with as it was begun, the recipe named or not.
    assert main(["train", "--recipe", name, "--output", f"runs/{name}", "--resume"]) == 0
    assert "trained 2 updates" in capsys.readouterr().out


def test_mini_llamas_rows_are_articles_between_their_marks_padded_and_not_scored_there(tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = recipe("mini-llama-wikitext")
    for command in commands(found)[:2]:
        assert main([*shlex.split(command)[1:], *SHORT.get(shlex.split(command)[1], [])]) == 0
    config = with_options(found.train, batch_size=8 * 16)
    tokenizer = load_tokenizer(config.data[0])
    rows = RowsConfig(config.mode, config.sequence_length, config.within_documents)
    batch = make_examples(config, tokenizer, rows).batches.next()
    micro_batches = split(batch, config.training.rows_at_once)
    assert [part.tokens_BT.shape for part in micro_batches] == [(16, 512)] * 8
    for tokens_T, labels_T in zip(batch.tokens_BT, batch.labels_BT, strict=True):
        scored = labels_T != IGNORE_INDEX
        count = int(scored.sum())
        assert tokens_T[0] == tokenizer.bos_id
        assert 0 < count < 512
        assert scored[:count].all()
        assert np.array_equal(labels_T[: count - 1], tokens_T[1:count])
        assert labels_T[count - 1] == tokenizer.eos_id


def test_changes_to_the_shape_come_on_top_of_the_recipes_own(tmp_path, monkeypatch, capsys):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands(recipe("scratch-shakespeare"))[:2]:
        assert main([*shlex.split(command)[1:], *SHORT.get(shlex.split(command)[1], [])]) == 0
    assert main(["train", "--recipe=scratch-shakespeare", *SHORT["train"], "--set", *SMALL]) == 0
    model = read_manifest("runs/scratch-shakespeare")["identity"]["model"]
    assert (model["num_key_value_heads"], model["hidden_size"]) == (2, 32)


def test_what_a_recipe_lacks_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in {
        ("recipe", "pancakes"): "there is no recipe 'pancakes'; choose one of mini-llama-wikitext, scratch-",
        ("train", "--recipe", "pancakes"): "there is no recipe 'pancakes'; choose one of",
        ("train", "--recipe", "lillm-39m"): "there is no lillm-39m-data; llamita recipe lillm-39m prints the commands",
    }.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {words}")
        assert error.count("\n") == 1


def test_a_recipe_is_printed_in_full(capsys):
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["recipe", "mini-llama-wikitext"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("def mini_llama_wikitext() -> Recipe:\n")
    assert "warmup_steps           22\n" in text
    assert "--source wikitext --files wiki.train.tokens --validation-files wiki.valid.tokens\n" in text
    assert main(["train", "--recipe", "lillm-39m", "--help"]) == 0
    assert "(default: 24000)" in capsys.readouterr().out

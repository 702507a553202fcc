"""The dial of `llamita train`: what --depth sets, what is given over it, what is refused; and --recompute in a run."""

import json

import pytest

from llamita.cli import tuning
from llamita.cli.main import main
from llamita.model.scaling import at_depth
from llamita.storage import model_directory
from llamita.text.tokenizer import Tokenizer
from llamita.training.config import flat_options, with_options
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain
from tests.training.helpers import Altered, Silence, prepare_stories, weights_of

QUICK = ["--steps", "2", "--batch-size", "2", "--evaluation-rows", "2", "--sample-tokens", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("stories"))


def test_a_depth_sets_what_is_not_given(data, tmp_path):
    scaled = at_depth(2, Tokenizer.load(data / "tokenizer").vocab_size)
    config = resolve(PretrainConfig, output=tmp_path, data=data, depth=2)
    found = flat_options(config)
    assert {name: found[name] for name in scaled.options()} == scaled.options()
    given = resolve(PretrainConfig, output=tmp_path, data=data, depth=2, learning_rate=0.5, batch_size=4)
    assert given.training.learning_rate == 0.5
    assert given.training.batch_size == 4
    assert given.training.steps > config.training.steps  # as many tokens in smaller updates
    flags = ["--data", str(data), "--output", str(tmp_path), "--depth", "2"]
    assert tuning.defaults(PretrainConfig, flags) == config


def test_what_a_run_used_stands_in_it_and_is_gone_on_with(data, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "--data", str(data), "--output", str(run), "--depth", "1", "--sequence-length", "32"]
    assert main([*command, *QUICK]) == 0
    manifest = json.loads((run / "run.json").read_text())
    arguments, shape = manifest["arguments"], manifest["identity"]["model"]
    scaled = at_depth(1, shape["vocab_size"], 32, 2)
    assert (arguments["depth"], arguments["preset"], arguments["steps"]) == (1, "", 2)
    assert arguments["learning_rate"] == scaled.learning_rate == manifest["identity"]["training"]["learning_rate"]
    assert shape["hidden_size"] == 64
    assert model_directory.load_config(run / "last").num_hidden_layers == 1
    assert main(["train", "--output", str(run), "--resume"]) == 0
    capsys.readouterr()
    assert main(["train", "--output", str(run), "--resume", "--depth", "2"]) == 2
    assert "cannot be resumed so" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "2", "--preset", "tiny"], "--depth 2 and --preset tiny both name a shape; give one of them"),
        (["--depth", "999"], "depth=999 must be a number of blocks from 1 to 128"),
        (["--recompute", "-1"], "recompute=-1 must be a number of blocks, all or none"),
        (["--recompute", "9"], "recompute=9 must lie between 0 and the model's 3 blocks"),
    ],
)
def test_mistakes_are_refused_in_one_line(data, tmp_path, capsys, flags, message):
    assert main(["train", "--data", str(data), "--output", str(tmp_path / "run"), *flags, *QUICK]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_depth_without_data_asks_for_data(tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path / "run"), "--depth", "2"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_a_recomputed_run_has_the_same_weights_and_is_resumed_without(data, tmp_path):
    """Recomputation is the machine's: a run that was begun with it goes on without it, and comes to the same."""
    options = {"data": data, "depth": 2, "sequence_length": 32, "batch_size": 2, "steps": 6, "schedule": "constant"}
    options |= {"dropout": 0.1, "evaluation_rows": 2, "sample_tokens": 0, "device": "cpu", "precision": "fp32"}
    plain = resolve(PretrainConfig, output=tmp_path / "plain", **options)
    again = resolve(PretrainConfig, output=tmp_path / "again", recompute="all", **options | {"steps": 3})
    pretrain(plain, Altered(), display=Silence())
    pretrain(again, Altered(), display=Silence())
    rest = resolve(PretrainConfig, output=tmp_path / "again", resume=True, steps=6, recompute="none")
    pretrain(with_options(rest, data=data), Altered(), display=Silence())
    assert weights_of(tmp_path / "again" / "last") == weights_of(tmp_path / "plain" / "last")

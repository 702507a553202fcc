"""Options put together: what is given, what a run was begun with, what a recipe says, what the verb has by itself."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from llamita.cli import tuning
from llamita.cli.main import VERBS, main
from llamita.training.config import flat_options, saved_options, with_options
from llamita.training.run_directory import open_run
from llamita.workflows.classify import ClassifyConfig
from llamita.workflows.dpo import DpoConfig
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, step_options
from llamita.workflows.reinforcement import RlConfig
from llamita.workflows.sft import SftConfig

VERB_CONFIGS = (PretrainConfig, SftConfig, DpoConfig, RlConfig, ClassifyConfig)


def begin(config):
    """Leave a run of these options, of which nothing was trained."""
    with open_run(config.run.output, {}, saved_options(config), resume=False):
        pass


def names(config):
    """The options of a configuration, of all its groups, each as often as it is there."""
    for field in fields(config):
        value = getattr(config, field.name)
        yield from names(value) if is_dataclass(value) else [field.name]


@pytest.mark.parametrize("verb", VERB_CONFIGS)
def test_no_two_groups_of_a_verb_have_an_option_of_one_name(verb):
    found = list(names(resolve(verb, output="run")))
    assert len(found) == len(set(found))
    assert {"output", "resume", "steps", "weight_decay", "seed", "device"} <= set(found)


@pytest.mark.parametrize("verb", VERB_CONFIGS)
def test_what_a_step_is_built_with_follows_from_the_flags(verb):
    asked = {"precision": "fp8", "attention": "flex", "recompute": 2, "compile": True}
    assert asked.items() <= step_options(resolve(verb, output="run", **asked)).items()
    assert not {"attention", "recompute", "compile"} & step_options(resolve(verb, output="run")).keys()


def test_what_is_left_out_is_the_verbs_own():
    config = resolve(SftConfig, output="run", model="base", steps=7, lora_targets=["q_proj"])
    assert (config.run.output, config.finetune.model) == (Path("run"), Path("base"))
    assert (config.training.steps, config.finetune.lora_targets) == (7, ("q_proj",))
    assert config.training.learning_rate == 3e-4
    assert config.training.adamw.weight_decay == 0.0
    assert resolve(PretrainConfig, output="run").training.adamw.weight_decay == 0.1


@pytest.mark.parametrize("verb", VERB_CONFIGS)
def test_a_run_is_gone_on_with_as_it_was_begun_but_for_what_is_given(verb, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.5, "beta2": 0.5, "threads": 3}
    values |= {"data": "base"} if verb is PretrainConfig else {"model": "base", "lora_rank": 2}
    begun = resolve(verb, output=tmp_path / "run", log=("tensorboard",), **values)
    begin(begun)
    monkeypatch.chdir("/")
    again = resolve(verb, output=tmp_path / "run", resume=True)
    expected = flat_options(begun) | flat_options(begun.training.resolved()) | {"resume": True}
    base = tmp_path / "base"
    expected |= {"data": (base,)} if verb is PretrainConfig else {"model": base}
    assert flat_options(again) == expected
    changed = resolve(verb, output=tmp_path / "run", resume=True, batch_size=16, threads=0)
    assert flat_options(changed) == expected | {"batch_size": 16, "threads": 0}


def test_options_of_other_versions_are_passed_over(tmp_path):
    config = resolve(SftConfig, output=tmp_path / "run", steps=5)
    with open_run(tmp_path / "run", {}, {"steps": 5, "of_another_version": 1}, resume=False):
        pass
    assert resolve(SftConfig, output=tmp_path / "run", resume=True) == with_options(config, resume=True)


def test_a_recipe_stands_below_what_is_given_and_a_run_above_it(tmp_path):
    config = resolve(PretrainConfig, recipe="scratch-shakespeare", steps=5)
    assert (config.run.output, config.preset, config.dropout) == (Path("runs/scratch-shakespeare"), "scratch", 0.2)
    assert config.training.steps == 5
    begin(with_options(config, output=tmp_path / "run"))
    again = resolve(PretrainConfig, recipe="scratch-shakespeare", output=tmp_path / "run", resume=True)
    assert again.training.steps == 5


@pytest.mark.parametrize(("given", "message"), [
    ({}, "--output is missing"),
    ({"output": "run", "learning_rat": 1.0}, "SftConfig has no option learning_rat"),
    ({"output": "run", "recipe": "lillm-39m"}, "SftConfig has no option recipe"),
    ({"output": "run", "steps": 0}, "steps=0 must be at least 1"),
    ({"output": "nowhere", "resume": True}, "nowhere holds no training run to resume; leave --resume out"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(given, message):
    with pytest.raises((ValueError, OSError), match=message):
        resolve(SftConfig, **given)


def test_flags_that_are_left_out_are_those_of_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    begin(resolve(DpoConfig, output=run, beta=0.7, steps=5))
    assert tuning.defaults(DpoConfig, ["--output", str(run)]) is None
    assert tuning.defaults(DpoConfig, ["--resume", f"--output={run}"]).beta == 0.7
    assert main(["dpo", "--output", str(run), "--resume", "--help"]) == 0
    assert "(default: 0.7)" in capsys.readouterr().out
    assert [name for name, verb in VERBS.items() if verb.trains] == ["train", "sft", "dpo", "rl", "classify train"]

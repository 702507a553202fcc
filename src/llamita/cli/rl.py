"""`llamita rl`: flags, finding the reward, and a closing line. The work lies in workflows/reinforcement.py."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from llamita.cli.tuning import stopped, training_backend
from llamita.workflows.reinforcement import RlConfig
from llamita.workflows.rewards import BUILT_IN, Reward


def run(config: RlConfig) -> int:
    """Tune a model on its own answers, each of which a reward judges, or carry on an interrupted run.

    A line of --data is {"prompt": a text or messages, ...} or {"messages": [...]}; meadow is stories from nothing, of
    which 200 are held out where --evaluation-rows is 0.

    Examples:
      llamita rl --model runs/stories --data meadow --output runs/better
      llamita rl --model MODEL --data prompts.jsonl --reward rewards.py:short --output RUN --group 16
      llamita rl --output RUN --resume

    A reward is a function of a sample, which has `prompt` and `answer`, texts, `record`, the prompt's JSON object, and
    `ended`, false where the answer was cut off; it returns a number.
    Ctrl-C, SIGTERM and SIGUSR1 finish the update, save and end; a second one ends at once.
    """
    from llamita.workflows.reinforcement import reinforce

    result = reinforce(config, training_backend(config), load_reward)
    if result.interrupted:
        return stopped("rl", config, result)
    print(f"tuned in {result.step} updates; saved {result.checkpoint}")
    if result.best is not None:
        print(f"best at step {result.best.step}: mean reward {result.best.measures['reward']:.4f} on held-out prompts")
    print(f"try it with: llamita generate {config.run.output}")
    return 0


def load_reward(name: str) -> Reward:
    """Returns a reward by its name, or a function by its path: `module:function`, the current directory included, or
    `file.py:function`. ValueError or FileNotFoundError where there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, colon, function_name = name.rpartition(":")
    if not colon or not path or not function_name.isidentifier():
        raise ValueError(
            f"reward={name!r} is not known; use {', '.join(BUILT_IN)}, module:function or file.py:function"
        )
    module = _module_of_file(Path(path)) if path.endswith(".py") else _module(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward={name!r}: {path} has no function {function_name!r}")
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Reward(name if not path.endswith(".py") else f"{Path(path).name}:{function_name}", function, digest)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with a reward")
    spec = importlib.util.spec_from_file_location(f"llamita_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's own file
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"the module {name!r} of the reward cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())

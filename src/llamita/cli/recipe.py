"""`llamita recipe`: lists the recipes, or prints one in full: its source, every option, the commands.

The recipes themselves lie in workflows/recipes.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from llamita.workflows.pretrain import PretrainConfig
    from llamita.workflows.recipes import Recipe


@dataclass(frozen=True)
class RecipeConfig:
    """List the recipes, or print one in full: its function, every option that it gives, the commands for it."""

    name: tyro.conf.Positional[str] = ""
    """A recipe. Left out: the recipes are listed."""


def run(config: RecipeConfig) -> None:
    from llamita.workflows.recipes import RECIPES, recipe

    if not config.name:
        width = max(map(len, RECIPES))
        for name, function in RECIPES.items():
            print(f"{name:<{width}}  {(inspect.getdoc(function) or '').splitlines()[0]}")
        print("\nllamita recipe NAME prints one in full; llamita train --recipe NAME trains with it")
        return
    found = recipe(config.name)
    print(inspect.getsource(RECIPES[config.name]))
    print("# Every option of the training (llamita train --help explains them); the machine's own are left out")
    for name, value in resolved(found.train).items():
        print(f"{name:<22} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    print("\n# The commands")
    print("\n".join(commands(found)))


def resolved(config: PretrainConfig) -> dict[str, Any]:
    """Returns every option but the machine's, with those filled in that follow from others."""
    from llamita.training.config import flat_options

    options = flat_options(replace(config, training=config.training.resolved()))
    left_out = {*flat_options(config.machine), "own_code", "log", "resume"}
    return {name: value for name, value in options.items() if name not in left_out}


def commands(recipe: Recipe) -> list[str]:
    """Returns the commands that carry out a recipe, in order."""
    return [
        f"llamita tokenizer train {flags(recipe.tokenizer, positional='files')}",
        f"llamita prepare {flags(recipe.prepare)}",
        f"llamita train --recipe {recipe.train.recipe}",
        *recipe.afterwards,
    ]


def flags(config: Any, positional: str = "") -> str:
    """Returns the options of a configuration that differ from its defaults, as on a command line."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        values = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        name = field.name.replace("_", "-")
        if field.name == positional:
            words = [*values, *words]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *values]
    return shlex.join(words)

"""The options of a verb that trains, put together: those given, those of the run that goes on, those of a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llamita.storage import files
from llamita.training import run_directory
from llamita.training.config import RunConfig, TrainingVerb, flat_options, with_options
from llamita.workflows.pretrain import options_of_depth
from llamita.workflows.recipes import recipe

SEEDS = "seeds.json"
"""In the directory of a run over several seeds, in the place of run.json: its options, later its accuracies."""

Verb = TypeVar("Verb", bound=TrainingVerb)


def resolve(verb: type[Verb], **given: Any) -> Verb:
    """Returns the options of a verb: first those `given` by the names of their flags, then the rest.

    The rest is, with `resume`, what the run in `output` was begun with; else, with `recipe`, what the recipe says;
    else, with `depth`, what follows from it (model/scaling.py); else the verb's own defaults.
    `resolve(SftConfig, output="runs/answers", resume=True)` goes on with a run as it was.
    ValueError or FileNotFoundError, in one line, for a name that is no option, for values that cannot be, and where
    there is no such run or recipe.
    """
    if given.get("recipe") and not given.get("resume") and hasattr(verb, "recipe"):
        return with_options(recipe(given["recipe"]).train, **given)  # type: ignore[return-value]
    if given.get("output") is None:
        raise ValueError("--output is missing: give the directory of the run")
    options = verb(run=RunConfig(output=Path(given["output"])))  # type: ignore[call-arg] # of a protocol
    if given.get("depth") and not given.get("resume"):
        given = {"preset": ""} | (options_of_depth(Path(given["data"]), given) if given.get("data") else given)
    earlier: Mapping[str, Any] = {}
    if given.get("resume"):
        known = flat_options(options)  # a run of another version may have other options
        earlier = {name: value for name, value in options_of_run(options.run.output).items() if name in known}
    return with_options(options, **{**earlier, **given})


def options_of_run(output: Path) -> Mapping[str, Any]:
    """Returns what the run, or the run over seeds, in this directory was begun with."""
    seeds = output / SEEDS
    if seeds.is_file():
        return files.read_json(seeds)["arguments"]
    run_directory.check(output, resume=True)
    return run_directory.read_manifest(output)["arguments"]

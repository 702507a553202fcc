"""The `llamita` command: finds the verb, lets tyro derive its flags, turns a user's mistake into one line.

A verb's module is imported only when that verb is called, so `llamita --help` loads no framework and answers at once.
A verb's flags are the fields of the dataclass that its function takes; this file knows nothing of what a verb does.
"""

import atexit
import contextlib
import difflib
import gc
import importlib
import inspect
import io
import os
import shlex
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llamita import __version__
from llamita.cli import together
from llamita.training import exit_status

PACKAGE = Path(__file__).parents[1]
COLLECTED = 50_000
"""New objects between two searches for garbage. Python's 700 cost a start a seventh of its time: nearly all that it
makes stays. A step of training leaves some sixty objects that only a search finds."""
TRACEBACK_VARIABLE = "LLAMITA_TRACEBACK"
PACKAGES = {
    "llama_cpp": "llama-cpp-python",
    "mlx": "mlx[cpu]" if sys.platform == "linux" else "mlx",
    "mlx_lm": "mlx-lm",
}
"""The packages to install for modules of another name."""


@atexit.register
def _leave_garbage() -> None:
    """Leaves out the search for garbage among all that ends with the process, half a second after PyTorch.

    Triton, which PyTorch imports on a GPU and to compile, reports leaks where it is left out.
    """
    if "triton" not in sys.modules:
        gc.freeze()


class Verb(NamedTuple):
    """The module and name of a verb's function, its line in `llamita --help`, and whether it trains: then the flags
    that are left out may have the values of a run that goes on, or of a recipe."""

    module: str
    function: str
    help: str
    trains: bool = False


VERBS: Mapping[str, Verb] = {
    "quickstart": Verb("llamita.cli.quickstart", "run", "Train a small model from nothing and read what it writes."),
    "tokenizer train": Verb("llamita.cli.tokenizer", "train", "Train a tokenizer on text files."),
    "prepare": Verb("llamita.cli.prepare", "run", "Turn text into the token files that training reads."),
    "data show": Verb("llamita.cli.data", "show", "Look at prepared data as a model will see it."),
    "data merge": Verb("llamita.cli.data", "merge", "Put the parts that several machines prepared together."),
    "data meadow-tasks": Verb("llamita.cli.data", "meadow_tasks", "Write questions, preferences or labels to tune on."),
    "recipe": Verb("llamita.cli.recipe", "run", "List the recipes for training, or print one in full."),
    "plan": Verb("llamita.cli.plan", "run", "Show the memory, time and disk that a training will need."),
    "train": Verb("llamita.cli.train", "run", "Train a model from nothing, or carry on an interrupted run.", True),
    "sft": Verb("llamita.cli.sft", "run", "Tune a trained model on conversations.", True),
    "dpo": Verb("llamita.cli.dpo", "run", "Tune a model on pairs of answers, one preferred to the other.", True),
    "rl": Verb("llamita.cli.rl", "run", "Tune a model on its own answers, by a reward for each.", True),
    "classify train": Verb("llamita.cli.classify", "train", "Tune a model to label texts.", True),
    "classify evaluate": Verb("llamita.cli.classify", "evaluate", "Measure how well a tuned model labels texts."),
    "classify predict": Verb("llamita.cli.classify", "predict", "Label texts with a tuned model."),
    "classify zero-shot": Verb("llamita.cli.classify", "zero_shot", "Label texts with a model that was never tuned."),
    "classify calibrate": Verb("llamita.cli.classify", "calibrate", "Make a model as sure as it is right."),
    "merge": Verb("llamita.cli.merge", "run", "Write an adapter and its base as one model."),
    "quantize": Verb("llamita.cli.quantize", "run", "Write a model with its matrices in int8 or int4."),
    "generate": Verb("llamita.cli.generate", "run", "Continue a prompt with a trained model."),
    "chat": Verb("llamita.cli.chat", "run", "Talk with a trained model in the terminal."),
    "serve": Verb("llamita.cli.serve", "run", "Serve a model to OpenAI and Anthropic clients, and to a browser."),
    "evaluate": Verb("llamita.cli.evaluate", "run", "Measure a model: loss, stories, multiple choice, lm_eval."),
    "bench": Verb("llamita.cli.bench", "run", "Measure an OpenAI-compatible server under load."),
    "runs list": Verb("llamita.cli.runs", "list_runs", "List the training runs under a directory."),
    "runs show": Verb("llamita.cli.runs", "show", "Show all that is known of a run."),
    "runs diff": Verb("llamita.cli.runs", "diff", "List the differences of two runs."),
    "report": Verb("llamita.cli.report", "run", "Write a run as one HTML page."),
    "verify": Verb("llamita.cli.verify", "run", "Compare a model with a reference, layer by layer."),
    "convert": Verb("llamita.cli.convert", "run", "Convert models of other formats, and ours to them."),
    "learn start": Verb("llamita.cli.learn", "start", "Begin a course: write a small Llama yourself."),
    "learn check": Verb("llamita.cli.learn", "check", "Grade what you have written; mistakes are named."),
    "learn list": Verb("llamita.cli.learn", "list_lessons", "List the lessons of a course and how far you are."),
    "learn next": Verb("llamita.cli.learn", "show_next", "Show the first lesson that is not done."),
    "learn show": Verb("llamita.cli.learn", "show", "Show a lesson, or its solution."),
    "learn page": Verb("llamita.cli.learn", "write_page", "Open the lessons and your state as one HTML page."),
    "learn tracks": Verb("llamita.cli.learn", "list_tracks", "List the courses."),
    "info": Verb("llamita.cli.info", "run", "Count a model's parameters, operations and bytes; list the presets."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: those of the process) and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    show, (threshold, *older) = warnings.showwarning, gc.get_threshold()
    warnings.showwarning = _note(show)
    gc.set_threshold(COLLECTED, *older)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # a reader that has gone shows here, not at exit
        return status
    except KeyboardInterrupt:
        return exit_status.INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let that go nowhere instead of printing a warning.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_status.BROKEN_PIPE
    except ModuleNotFoundError as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not error.name or error.name.split(".")[0] == "llamita":
            raise
        module = error.name.split(".")[0]
        package = PACKAGES.get(module, module)
        return _fail(f"the package {package!r} is not installed; install it with: pip install {shlex.quote(package)}")
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(_one_line(error))
    except Exception as error:
        together.tell_launcher(f"{type(error).__name__}: {error}")
        print("This is a bug in Llamita, not a mistake of yours: please report it with what follows.", file=sys.stderr)
        raise
    finally:
        warnings.showwarning = show
        gc.set_threshold(threshold, *older)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments:
        print(overview(), file=sys.stderr)
        return exit_status.USER_MISTAKE
    if arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"llamita {__version__}")
        return 0
    if arguments[0] in VERBS:
        return _call(arguments[0], arguments[1:])
    group = arguments[0]
    if not any(name.startswith(f"{group} ") for name in VERBS):
        return _fail(_unknown(group))
    if len(arguments) == 1:
        print(overview(group), file=sys.stderr)
        return exit_status.USER_MISTAKE
    if arguments[1] in ("-h", "--help"):
        print(overview(group))
        return 0
    name = f"{group} {arguments[1]}"
    return _call(name, arguments[2:]) if name in VERBS else _fail(_unknown(name))


def _call(name: str, arguments: Sequence[str]) -> int:
    """Imports a verb's module, parses its arguments and calls it; returns its exit status, 0 where it returns None."""
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    defaults = importlib.import_module("llamita.cli.tuning").defaults if verb.trains else None
    arguments = together.restartable(arguments) if verb.trains else arguments
    try:
        with together.one_speaks():
            result = parse_and_call(getattr(module, verb.function), f"llamita {name}", arguments, verb.help, defaults)
    except SystemExit as stop:  # tyro has printed its help or what is wrong with the flags
        if not isinstance(stop.code, int):
            raise
        return stop.code
    return result if isinstance(result, int) else 0


def parse_and_call(
    function: Callable[..., Any],
    program: str,
    arguments: Sequence[str],
    description: str,
    defaults: Callable[[type, Sequence[str]], Any] | None = None,
) -> Any:
    """Calls `function` with the options that `arguments` give, and returns its result.

    The flags of a function of one dataclass are named as its fields (`--steps`, not `--config.steps`); one that is left
    out has the value in `defaults(class, arguments)`, an object of that class, or the class's own default. A dataclass
    in it is a group of flags. The flags of any other function are named as its parameters.
    """
    import tyro

    hints = typing.get_type_hints(function, include_extras=True)
    names = list(inspect.signature(function).parameters)
    taken = hints.get(names[0]) if len(names) == 1 else None
    # Help says MODEL rather than PATH, and INT rather than {None}|INT: leaving a flag out is how to say None.
    style = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
    shown: dict[str, Any] = {"prog": program, "args": arguments, "config": style}
    if not isinstance(taken, type) or not is_dataclass(taken):
        return tyro.cli(function, description=inspect.getdoc(function) or description, **shown)
    text = inspect.getdoc(taken) or ""
    if text.startswith(f"{taken.__name__}("):  # the signature that dataclasses write where there is no docstring
        text = ""
    default = defaults(taken, arguments) if defaults else None
    if default is not None:
        shown["default"] = default
    given = _parsed(taken, description=inspect.getdoc(function) or text or description, **shown)
    return function(given)


def _parsed(taken: type, **shown: Any) -> Any:
    """Returns the dataclass that the arguments give. Its own checks raise their ValueError, rather than tyro's box."""
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(taken, **shown)
    except SystemExit as stop:
        refusal = _refusal(stop)
        if refusal is not None:
            raise refusal from None
        if not stop.code:  # help, which went to stdout
            raise
    return tyro.cli(taken, **shown)  # once more, so that tyro says what is wrong with the flags


def _refusal(stop: SystemExit) -> ValueError | None:
    """Returns the ValueError of a dataclass's own check among the causes of tyro's exit, None where there is none."""
    error: BaseException | None = stop
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames):
            return error
        error = error.__cause__ or error.__context__
    return None


def overview(group: str = "") -> str:
    """Returns the text of `llamita --help`, or the part of it about one group of verbs such as `tokenizer`."""
    shown = {name: verb.help for name, verb in VERBS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {text}" for name, text in shown.items()]
    if group:
        return "\n".join([f"usage: llamita {group} VERB [options]", "", *lines])
    return "\n".join(
        [
            "usage: llamita VERB [options]",
            "",
            "Train, adapt, check and serve small Llama-family language models.",
            "",
            *lines,
            "",
            "llamita VERB --help lists the options of a verb; llamita --version prints the version.",
            f"A mistake is reported in one line; {TRACEBACK_VARIABLE}=1 adds where in the code it was found.",
        ]
    )


def _unknown(typed: str) -> str:
    """Returns the message about a verb that does not exist, with the closest one that does."""
    if typed.startswith("-"):
        return f"expected a verb first, got {typed!r}; llamita --help lists the verbs"
    group = typed.split()[0] if " " in typed else ""  # a group that exists: the slip is in the second word
    candidates = [name for name in VERBS if name.startswith(group)]
    known = {name: name for name in candidates} | {name.split()[0]: name for name in candidates if not group}
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.6)
    hint = f"did you mean 'llamita {known[close[0]]}'?" if close else "llamita --help lists the verbs"
    return f"there is no verb {typed!r}; {hint}"


def _one_line(error: Exception) -> str:
    """Returns the message of an error in one line; a system error as its message and the files it is about."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join([error.strerror, *(str(name) for name in (error.filename, error.filename2) if name)])
    return " ".join(text.split()) or type(error).__name__


def _note(show: Callable[..., None]) -> Callable[..., None]:
    """Returns a `warnings.showwarning` that prints Llamita's own warnings once, in one line that names no code."""

    told = set()

    def note(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
            if str(message) not in told:
                print(f"note: {message}", file=sys.stderr)
            told.add(str(message))
        else:
            show(message, category, filename, *more)

    return note


def _fail(message: str) -> int:
    together.tell_launcher(message)
    print(f"error{together.who()}: {message}", file=sys.stderr)
    return exit_status.USER_MISTAKE


if __name__ == "__main__":
    sys.exit(main())

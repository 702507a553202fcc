"""A reader's finished modules, to be run in the place of the library's own: `--with DIRECTORY`.

The grader judges them first, in a process of its own; what passes is executed in this one. The part in PyTorch, which
puts a model around them, is backend/torch/own/; it takes a `ReadersProgram` as it takes anything that is its `Program`,
so this file knows no tensor.

A further track whose folder holds a model gets an entry in `TRACKS`: the lessons that each use needs, and the modules
that are executed. An adapter of the track's name in backend/torch/own/ makes its `OwnModel` of them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from llamita.learn import course
from llamita.learn.course import Course
from llamita.learn.grading import Result, grade
from llamita.learn.harness import assembled, own_frames, told
from llamita.learn.track import Sources, sources_of

Use = Literal["generate", "train", "classify train", "classify"]
"""What the modules are to do: "classify" labels texts with a trained model."""


@dataclass(frozen=True)
class TrackUses:
    """What of a track is run, and what must be right for it."""

    framework: str
    modules: tuple[str, ...]
    lessons: Mapping[Use, tuple[str, ...]]
    """The lessons whose code each use runs; the others need not be written."""
    lacks: str = ""
    """Why it has no other uses."""
    further: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Modules that are run too where they are written: the lesson of each, and the check that it must pass then."""


LLAMA = ("rotary", "norm", "attention", "layer", "model")
TRACKS: Mapping[str, TrackUses] = {
    "min-llama": TrackUses(
        "torch",
        ("config", "llama", "optimizer", "classifier"),
        {
            "generate": LLAMA,
            "train": (*LLAMA, "optimizer"),
            "classify train": (*LLAMA, "optimizer", "classifier"),
            "classify": (*LLAMA, "classifier"),
        },
    ),
    "serving": TrackUses(
        "torch",
        ("config", "projection", "model", "kv_cache"),
        {"generate": ("basics", "attention", "rope", "grouped", "layers", "model", "cache")},
        "it has no optimiser and no classifier",
        {"batch": ("batching", "BatchKvCache.update_and_fetch")},
    ),
    "numpy": TrackUses(
        "numpy",
        ("config", "functions", "llama", "cache"),
        {"generate": ("functions", "norm", "rotary", "attention", "weights", "layer", "model", "cache")},
        "it has no gradient of a whole model and no classifier",
    ),
}
VERBS: Mapping[Use, str] = {
    "generate": "write",
    "train": "train",
    "classify train": "train a classifier",
    "classify": "label texts",
}


@dataclass(frozen=True)
class ReadersProgram:
    """The modules of a course's folder: `backend.torch.own.program.Program`."""

    directory: Path
    """Its absolute path, by which its code is told from others'."""
    track: str
    names: tuple[str, ...]
    sources: Sources

    def modules(self, more: Mapping[str, str]) -> SimpleNamespace:
        """Returns the modules, executed anew, with the lines that `more` has for some behind their texts."""
        sources = {name: (path, text + more.get(name, "")) for name, (path, text) in self.sources.items()}
        return assembled(sources, self.names)

    def is_own(self, path: Path) -> bool:
        return path.parent == self.directory

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, an error of the reader's code becomes a ValueError of one line, with the place in their file."""
        try:
            yield
        except Exception as error:
            if isinstance(error, SyntaxError) or own_frames(error, self.is_own):
                raise ValueError(f"the code in {self.directory} failed: {told(error, self.is_own)}") from error
            raise


def checked_program(directory: Path, use: Use) -> ReadersProgram:
    """Returns the modules in a course's folder once the checks of all that is needed of them pass.

    ValueError, in one line, where there is no such course, its track has no part for the use, or a check does not pass:
    the lesson, the check, what differs, and the mistake by its name.
    """
    opened = course.opened(directory)
    track, uses = opened.track, TRACKS.get(opened.track.name)
    if uses is None or opened.framework != uses.framework:
        known = ", ".join(f"{name} ({found.framework})" for name, found in TRACKS.items())
        raise ValueError(
            f"{directory} is the course {track.name} in {opened.framework}, whose code is no model that --with "
            f"can run; give the folder of {known}"
        )
    if use not in uses.lessons:
        known = ", ".join(name for name, found in TRACKS.items() if use in found.lessons)
        raise ValueError(
            f"{directory} is the course {track.name}, which cannot {VERBS[use]}: {uses.lacks}; give the folder of "
            f"{known}, or leave --with out"
        )
    lessons = [track.lesson(name) for name in uses.lessons[use]]
    optional = {check: module for module, (_, check) in uses.further.items()}
    lessons += [replace(track.lesson(name), checks=(check,)) for name, check in uses.further.values()]
    names = uses.modules + tuple(uses.further)
    for result in grade(replace(track, lessons=tuple(lessons)), opened.framework, directory):
        if result.state == "not written" and result.check in optional:
            names = tuple(name for name in names if name != optional[result.check])
        elif result.state != "passed":
            raise ValueError(_refusal(opened, result))
    own = directory.resolve()
    return ReadersProgram(own, track.name, names, sources_of(own.glob("*.py")))


def _refusal(opened: Course, result: Result) -> str:
    """Returns one line about a check that does not pass."""
    where = f"{opened.directory}: lesson {result.lesson}: {result.check}"
    if result.state == "not written":
        return f"{where} is not yet written; llamita learn show {result.lesson} is the lesson"
    if result.state == "error":
        return f"{where} fails: {result.text}"
    why = " and ".join(f"{mistake.name} (see {mistake.source})" for mistake in result.mistakes)
    return f"{where} is wrong: {result.text}{'; ' if why else ''}{why}"

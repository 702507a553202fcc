"""A reader's finished modules, to be run in the place of the library's own: `--with DIRECTORY`.

The grader judges them first, in a process of its own; what passes is executed in this one. The part in PyTorch, which
puts a model around them, is backend/torch/own/; it takes a `ReadersProgram` as it takes anything with the same two
methods, so this file knows no tensor.

A further track whose folder holds a model (`serving`, say) gets an entry in `TRACKS`: the lessons that each use needs,
and the modules that are executed. Where its modules are not a Llama, an AdamW and a classifier of these names, they get
an adapter beside backend/torch/own/, made from the same two methods; cli/own_code.py then chooses between the two.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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


MODEL = ("rotary", "norm", "attention", "layer", "model")
TRACKS: Mapping[str, TrackUses] = {
    "min-llama": TrackUses(
        "torch",
        ("config", "llama", "optimizer", "classifier"),
        {
            "generate": MODEL,
            "train": (*MODEL, "optimizer"),
            "classify train": (*MODEL, "optimizer", "classifier"),
            "classify": (*MODEL, "classifier"),
        },
    )
}
USUAL_THETA = 10000.0
"""The theta of the course's `apply_rotary_emb` where its caller names none."""
ANOTHER_DEFAULT = """

def _with_default(apply):
    return lambda query, key, head_dim, max_seq_len, theta={theta!r}: apply(query, key, head_dim, max_seq_len, theta)


apply_rotary_emb = _with_default(apply_rotary_emb)
"""


@dataclass(frozen=True)
class ReadersProgram:
    """The modules of a course's folder: `backend.torch.own.model.Program`."""

    directory: Path
    """Its absolute path, by which its code is told from others'."""
    names: tuple[str, ...]
    sources: Sources

    def modules(self, rope_theta: float) -> SimpleNamespace:
        """Returns the modules, executed anew; where it is not the usual one, `rope_theta` is given to theirs.

        An attention need not name a theta, so that rope.py gets a function more, in memory: one of another default.
        """
        sources = dict(self.sources)
        if rope_theta != USUAL_THETA:
            path, text = sources["rope"]
            sources["rope"] = (path, text + ANOTHER_DEFAULT.format(theta=rope_theta))
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

    ValueError, in one line, where there is no such course, its track has no model to run, or a check does not pass:
    the lesson, the check, what differs, and the mistake by its name.
    """
    opened = course.opened(directory)
    uses = TRACKS.get(opened.track.name)
    if uses is None or opened.framework != uses.framework:
        known = ", ".join(f"{name} in {found.framework}" for name, found in TRACKS.items())
        raise ValueError(
            f"{directory} is the course {opened.track.name} in {opened.framework}, whose code is no model that --with "
            f"can run; give the folder of {known}"
        )
    needed = tuple(opened.track.lesson(name) for name in uses.lessons[use])
    for result in grade(replace(opened.track, lessons=needed), opened.framework, directory):
        if result.state != "passed":
            raise ValueError(_refusal(opened, result))
    own = directory.resolve()
    return ReadersProgram(own, uses.modules, sources_of(own.glob("*.py")))


def _refusal(opened: Course, result: Result) -> str:
    """Returns one line about a check that does not pass."""
    where = f"{opened.directory}: lesson {result.lesson}: {result.check}"
    if result.state == "not written":
        return f"{where} is not yet written; llamita learn show {result.lesson} is the lesson"
    if result.state == "error":
        return f"{where} fails: {result.text}"
    why = " and ".join(f"{mistake.name} (see {mistake.source})" for mistake in result.mistakes)
    return f"{where} is wrong: {result.text}{'; ' if why else ''}{why}"

"""`llamita learn`: begins a course, guides through its lessons, and grades what the reader has written.

The course is learn/'s; here its state becomes lines.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from llamita.learn.grading import Result
    from llamita.learn.track import Track

HERE = Path()
SIGNS = {"passed": "ok", "wrong": "WRONG", "not written": "to do", "error": "ERROR"}


@dataclass(frozen=True)
class StartConfig:
    """Begin a course: a folder with lessons, files to complete, and a small trained model."""

    directory: tyro.conf.Positional[Path]
    """The folder to write; it must not exist."""
    track: str = "min-llama"
    """The course; `llamita learn tracks` is the list."""
    framework: str = ""
    """The framework in which its files are written; the course's first where none is given."""
    model: Path | None = None
    """The trained model of the course: a model directory, llama2.c's stories42M.pt, or what else `llamita convert`
    reads. Without it a small one is trained first, in about half a minute."""
    model_steps: int = 200
    """Updates of the small model."""


@dataclass(frozen=True)
class CheckConfig:
    """Run the checks of one lesson, or of all; the exit status is 1 where one does not pass."""

    lesson: tyro.conf.Positional[str] = ""
    """A lesson's name; without one, all."""
    directory: Path = HERE
    """The course's folder."""
    adapters: Path | None = None
    """Grade this file instead, wherever it lies: functions with the names of the course `adapters`, which call your
    own code. No course has to be started; its folder and the current one can be imported from."""
    seconds: float = 20.0
    """How long a check may take."""
    memory: float = 4.0
    """How many GiB of memory it may take."""


@dataclass(frozen=True)
class ListConfig:
    """List the lessons of a course, and what is written of each."""

    directory: Path = HERE
    """The course's folder."""


@dataclass(frozen=True)
class NextConfig:
    """Show the first lesson that does not pass its checks."""

    directory: Path = HERE
    """The course's folder."""


@dataclass(frozen=True)
class ShowConfig:
    """Show a lesson, or the solution of its file."""

    lesson: tyro.conf.Positional[str]
    """The lesson's name."""
    directory: Path = HERE
    """The course's folder."""
    solution: bool = False
    """Print the whole file of the lesson with the solutions in it."""


@dataclass(frozen=True)
class PageConfig:
    """Write the lessons and the state of their checks as one HTML page, and open it in a browser."""

    directory: Path = HERE
    """The course's folder."""
    output: Path | None = None
    """The file to write; course.html in the course's folder where none is given. An older one is replaced."""
    open: bool = True
    """Open it in the browser of this desktop; a program that reads the output gets the file alone."""


@dataclass(frozen=True)
class TracksConfig:
    """List the courses that there are."""


def start(config: StartConfig) -> None:
    from llamita.backend.choice import load_backend
    from llamita.backend.torch.pickles import read_pickle, write_pickle
    from llamita.learn import course, track
    from llamita.workflows.convert import Tools

    chosen = track.find(config.track)
    framework = config.framework or chosen.frameworks[0]
    chosen.solutions(framework)
    if config.model is None and chosen.model != "none" and not config.directory.exists():
        print(f"training a small model on stories for {config.model_steps} steps; --model takes one that you have")
    tools = Tools(load_backend("torch"), read_pickle, write_pickle)
    course.start(config.directory, chosen, framework, config.model, config.model_steps, tools)
    print(f"{config.directory}: {chosen.title}, {len(chosen.lessons)} lessons")
    print(f"Next: cd {config.directory}, then llamita learn next")


def check(config: CheckConfig) -> int:
    from llamita.learn.grading import Limits, grade

    if config.seconds <= 0 or config.memory <= 0:
        raise ValueError(f"seconds={config.seconds:g} and memory={config.memory:g} must be more than 0")
    limits = Limits(config.seconds, int(config.memory * 2**30))
    track, framework, place = _graded(config)
    results = []
    for result in grade(track, framework, place, config.lesson or None, limits):
        print("\n".join(lines_of(result)), flush=True)
        results.append(result)
    passed = sum(result.state == "passed" for result in results)
    print(f"{passed} of {len(results)} checks pass")
    return 0 if passed == len(results) else 1


def list_lessons(config: ListConfig) -> None:
    from llamita.learn import course
    from llamita.learn.grading import grade

    opened = course.opened(config.directory)
    results = list(grade(opened.track, opened.framework, opened.directory))
    names = max(len(lesson.name) for lesson in opened.track.lessons)
    files = max(len(lesson.file) for lesson in opened.track.lessons)
    for number, lesson in enumerate(opened.track.lessons, 1):
        state = _state_of(result for result in results if result.lesson == lesson.name)
        print(f"{number:>2}  {lesson.name:<{names}} {lesson.file:<{files}} {state:<6} {lesson.title}")


def show_next(config: NextConfig) -> None:
    from llamita.learn import course
    from llamita.learn.grading import grade

    opened = course.opened(config.directory)
    for result in grade(opened.track, opened.framework, opened.directory):
        if result.state != "passed":
            print(course.as_printed(opened, opened.track.lesson(result.lesson)))
            print("\n".join(lines_of(result)))
            return
    print(f"all checks pass; {opened.track.end}")


def show(config: ShowConfig) -> None:
    from llamita.learn import course

    opened = course.opened(config.directory)
    lesson = opened.track.lesson(config.lesson)
    if config.solution:
        print(opened.track.solutions(opened.framework)[lesson.file])
    else:
        print(course.as_printed(opened, lesson))


def write_page(config: PageConfig) -> None:
    import webbrowser

    from llamita.learn import course
    from llamita.learn.grading import grade
    from llamita.learn.page import page
    from llamita.storage.files import atomic_write

    opened = course.opened(config.directory)
    path = config.output or config.directory / "course.html"
    results = list(grade(opened.track, opened.framework, opened.directory))
    atomic_write(path, page(opened.track, results, course.figures(opened)))
    print(f"{path}: written")
    if config.open and sys.stdout.isatty():
        webbrowser.open(path.resolve().as_uri())


def list_tracks(config: TracksConfig) -> None:
    from llamita.learn import track

    for name in track.names():
        found = track.find(name)
        print(f"{name}  {found.title} ({', '.join(found.frameworks)}; {len(found.lessons)} lessons)")


def lines_of(result: "Result") -> Iterator[str]:
    """Yields what is printed of a result: its state, the first element that differs, and the mistake by its name."""
    yield f"{SIGNS[result.state]:<6} {result.lesson}: {result.check}"
    if result.state == "not written":
        yield "       not yet written"
    if result.text:
        yield f"       {_text(result.text)}"
    for mistake in result.mistakes:
        yield f"       {mistake.name}"
        yield f"       see {mistake.source}"
    if result.state == "wrong" and not result.mistakes:
        yield "       no mistake known by name explains it; compare your lines with the docstring, one at a time"


def _graded(config: CheckConfig) -> "tuple[Track, str, Path]":
    """The track, the framework, and what is graded: a started course's folder, or a file of adapters."""
    from llamita.learn import course, track

    if config.adapters is None:
        opened = course.opened(config.directory)
        return opened.track, opened.framework, opened.directory
    if config.directory != HERE:
        raise ValueError(f"--adapters {config.adapters} is graded where it lies; leave --directory out")
    if not config.adapters.is_file():
        raise ValueError(
            f"{config.adapters} is no file; llamita learn start DIR --track adapters writes one to fill in"
        )
    found = track.find("adapters")
    return found, found.frameworks[0], config.adapters


def _state_of(results: "Iterable[Result]") -> str:
    states = [SIGNS[result.state] for result in results]
    return next((state for state in states if state != "ok"), "ok")


def _text(text: str) -> str:
    from llamita.training.display import printable

    return printable(text)

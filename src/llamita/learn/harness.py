"""The process in which a reader's code runs.

`python -m llamita.learn.harness TRACK FRAMEWORK PLACE EVENTS CHECK...`

PLACE is a course's directory, whose files are put together with the solutions of those that a check is not about, or
one file, which is imported as it lies, with its own imports.

It writes a line of JSON to the file EVENTS when it imports that file, when a check begins and when it is done. Whatever
the code does otherwise (prints, exits, loops, takes all memory) is its parent's to see; grading.py is that parent.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from llamita.learn.checking import Check, Mistake, Outputs, difference, named
from llamita.learn.track import Sources, solutions_of, sources_of


def main(arguments: Sequence[str]) -> None:
    track, framework, place, events, *names = arguments
    grader = Grader(Path(track), framework, Path(place))
    with open(events, "a", encoding="utf-8") as file:

        def tell(event: Mapping[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        if grader.file is not None:
            tell({"imports": grader.file.name})
            grader.load()
        for name in names:
            tell({"begun": name})
            tell({"done": name, **grader.judge(name)})


class Grader:
    """Runs checks of a track on the files of a directory, or on one file, beside the solutions and known mistakes."""

    def __init__(self, track: Path, framework: str, place: Path) -> None:
        self.file = place if place.is_file() else None
        self.directory = place.parent if place.is_file() else place
        self.module: ModuleType | BaseException | None = None
        """That of the one file, or why it cannot be imported."""
        self.solutions = solutions_of(track, framework)
        own = sources_of([*track.glob("*.py"), *(track / framework / "grader").glob("*.py")])
        tables = assembled(own, ["checks", "mistakes"])
        self.checks: dict[str, Check] = {check.name: check for check in tables.checks.CHECKS}
        self.mistakes: Sequence[Mistake] = tables.mistakes.MISTAKES
        self.exercises = {check.file for check in self.checks.values()}
        self.known: dict[tuple[str, ...], Outputs | None] = {}
        """What the solutions give with mistakes planted, by the names of the check and the mistakes."""
        self.given = {"config"} & self.solutions.keys()
        """Modules without an exercise that checks use."""
        self.right = assembled(self.solutions, sorted(self.exercises | self.given))

    def judge(self, name: str) -> dict[str, Any]:
        """Returns the state of a check, `passed`, `wrong`, `not written` or `error`, and what is to be said of it."""
        check = self.checks[name]
        missing = [file for file in (check.file, *check.together) if not (self.directory / f"{file}.py").is_file()]
        if missing and self.file is None:
            return {"state": "error", "text": f"{missing[0]}.py is not in {self.directory}"}
        try:
            expected = self.with_mistakes(check, ())
            assert expected is not None
            got = self.of_reader(check)
            found = difference(got, expected, check.rtol, check.atol)
        except NotImplementedError:
            return {"state": "not written"}
        except KeyboardInterrupt:
            raise
        except SystemExit as stop:
            return {"state": "error", "text": f"the code ended the program by exit({stop.code!r})"}
        except BaseException as error:
            return {"state": "error", "text": told(error, self.is_readers)}
        if found is None:
            return {"state": "passed"}
        if check.together:
            return {"state": "wrong", "text": f"{found}; the lessons before this one say where"}
        own, below = ([each for each in self.mistakes if each.check in names] for names in ((name,), check.also))
        why = named(got, expected, check, own, lambda planted: self.with_mistakes(check, planted), below)
        return {"state": "wrong", "text": str(found), "mistakes": [[each.name, each.source] for each in why]}

    def load(self) -> None:
        """Imports the one file, once; why that fails is raised by every check."""
        assert self.file is not None
        try:
            self.module = imported(self.file)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.module = error

    def of_reader(self, check: Check) -> Outputs:
        """The results of the code under judgement."""
        if self.file is not None:
            if self.module is None:
                self.load()
            if isinstance(self.module, BaseException):
                raise self.module
            return check.run(SimpleNamespace(**{check.file: self.module}), self.right)
        sources = self.readers(check)
        with installed(sources):
            return self.run(check, sources)

    def run(self, check: Check, sources: Sources) -> Outputs:
        return check.run(assembled(sources, sorted({check.file, *self.given, *check.together})), self.right)

    def readers(self, check: Check) -> Sources:
        """The modules of a check: the reader's, save that other exercises are the solutions'."""
        kept = self.exercises - {check.file, *check.together}
        own = sources_of(path for path in self.directory.glob("*.py") if path.stem not in kept)
        return {**self.solutions, **own}

    def with_mistakes(self, check: Check, mistakes: Sequence[Mistake]) -> Outputs | None:
        """The results of the solutions with mistakes planted; None where they exclude each other or cannot run."""
        key = (check.name, *(mistake.name for mistake in mistakes))
        if key not in self.known:
            sources = dict(self.solutions)
            try:
                for mistake in mistakes:
                    path, text = sources[mistake.file]
                    sources[mistake.file] = (path, mistake.planted_in(text))
                self.known[key] = self.run(check, sources)
            except Exception:
                if [mistake.check for mistake in mistakes] in ([], [check.name]):
                    raise
                self.known[key] = None
        return self.known[key]

    def is_readers(self, path: Path) -> bool:
        """Whether a file is the reader's: in the directory, or for one file near it or where the grader was started."""
        if self.file is None:
            return path.parent == self.directory
        near = (self.directory, Path.cwd())
        return any(place in path.parents for place in near) and "site-packages" not in path.parts


def told(error: BaseException, is_own: Callable[[Path], bool]) -> str:
    """One line about an error: its kind, its message, and the last line of the reader's own code on the way there."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    what = what if len(what) <= 300 else f"{what[:300]}..."
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({Path(error.filename).name}, line {error.lineno})"
    own = own_frames(error, is_own)
    return f"{what} ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else what


def own_frames(error: BaseException, is_own: Callable[[Path], bool]) -> list[traceback.FrameSummary]:
    """Returns the frames of an error that lie in the reader's files."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if is_own(Path(frame.filename))]


def imported(file: Path) -> ModuleType:
    """Returns the module of a file, as one of its package where it lies in one; imported once in a process.

    The working directory, the folder above the package and the file's own folder can be imported from.
    """
    top, names = file.parent, [file.stem]
    while (top / "__init__.py").is_file():
        names.insert(0, top.name)
        top = top.parent
    sys.path[:0] = [str(place) for place in dict.fromkeys((Path.cwd(), top)) if str(place) not in sys.path]
    sys.path += [str(file.parent)] if str(file.parent) not in sys.path else []
    module = importlib.import_module(".".join(names))
    if module.__file__ is None or not file.samefile(module.__file__):
        raise ValueError(f"{file} cannot be imported: {'.'.join(names)} is {module.__file__}; give it another name")
    return module


def assembled(sources: Sources, names: Sequence[str]) -> SimpleNamespace:
    """Executes the modules `names`, which import each other by these names, and returns them; nothing stays behind."""
    with installed(sources):
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@contextlib.contextmanager
def installed(sources: Sources) -> Iterator[None]:
    """Inside, `import NAME` gives the module that `sources` has under that name, executed anew."""
    before = {name: sys.modules.pop(name) for name in sources if name in sys.modules}
    finder = Finder(sources)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in sources:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `sources` and executes their texts."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.sources:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=str(self.sources[fullname][0]))

    def exec_module(self, module: ModuleType) -> None:
        path, text = self.sources[module.__name__]
        module.__file__ = str(path)
        exec(compiled(text, str(path)), module.__dict__)


@functools.lru_cache(maxsize=256)
def compiled(text: str, path: str) -> CodeType:
    """The code of a file; a grader executes the same few texts for every check."""
    return compile(text, path, "exec")


if __name__ == "__main__":
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    main(sys.argv[1:])

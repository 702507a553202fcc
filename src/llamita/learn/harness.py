"""The process in which a reader's code runs.

`python -m llamita.learn.harness TRACK FRAMEWORK DIRECTORY EVENTS CHECK...`

It writes a line of JSON to the file EVENTS when a check begins and when it is done. Whatever the code does otherwise
(prints, exits, loops, takes all memory) is its parent's to see; grading.py is that parent.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from llamita.learn.checking import Check, Mistake, Outputs, difference, named

Sources = Mapping[str, tuple[Path, str]]
"""The modules of a program by name: their files and their texts."""


def main(arguments: Sequence[str]) -> None:
    track, framework, directory, events, *names = arguments
    grader = Grader(Path(track), framework, Path(directory))
    with open(events, "a", encoding="utf-8") as file:
        for name in names:
            file.write(json.dumps({"begun": name}) + "\n")
            file.flush()
            result = grader.judge(name)
            file.write(json.dumps({"done": name, **result}) + "\n")
            file.flush()


class Grader:
    """Runs checks of a track on the files of a directory, beside the solutions and their known mistakes."""

    def __init__(self, track: Path, framework: str, directory: Path) -> None:
        self.directory = directory
        self.solutions: Sources = {
            path.stem: (path, path.read_text("utf-8")) for path in sorted((track / framework).glob("*.py"))
        }
        files = [*track.glob("*.py"), *(track / framework / "grader").glob("*.py")]
        own = {path.stem: (path, path.read_text("utf-8")) for path in sorted(files)}
        tables = assembled(own, ["checks", "mistakes"])
        self.checks: dict[str, Check] = {check.name: check for check in tables.checks.CHECKS}
        self.mistakes: Sequence[Mistake] = tables.mistakes.MISTAKES
        self.exercises = {check.file for check in self.checks.values()}
        self.known: dict[tuple[str, ...], Outputs | None] = {}
        """What the solutions give with mistakes planted, by the names of the check and the mistakes."""
        self.right = assembled(self.solutions, sorted(self.exercises | {"config"}))

    def judge(self, name: str) -> dict[str, Any]:
        """Returns the state of a check, `passed`, `wrong`, `not written` or `error`, and what is to be said of it."""
        check = self.checks[name]
        missing = [file for file in (check.file, *check.together) if not (self.directory / f"{file}.py").is_file()]
        if missing:
            return {"state": "error", "text": f"{missing[0]}.py is not in {self.directory}"}
        try:
            expected = self.with_mistakes(check, ())
            assert expected is not None
            sources = self.readers(check)
            with installed(sources):
                got = self.run(check, sources)
                found = difference(got, expected, check.rtol, check.atol)
        except NotImplementedError:
            return {"state": "not written"}
        except KeyboardInterrupt:
            raise
        except SystemExit as stop:
            return {"state": "error", "text": f"the code ended the program by exit({stop.code!r})"}
        except BaseException as error:
            return {"state": "error", "text": told(error, self.directory)}
        if found is None:
            return {"state": "passed"}
        if check.together:
            return {"state": "wrong", "text": f"{found}; the lessons before this one say where"}
        mistakes = [mistake for mistake in self.mistakes if mistake.check == name]
        why = named(got, expected, check, mistakes, lambda planted: self.with_mistakes(check, planted))
        return {"state": "wrong", "text": str(found), "mistakes": [[each.name, each.source] for each in why]}

    def run(self, check: Check, sources: Sources) -> Outputs:
        return check.run(assembled(sources, sorted({check.file, "config", *check.together})), self.right)

    def readers(self, check: Check) -> Sources:
        """The modules of a check: the reader's, save that other exercises are the solutions'."""
        kept = self.exercises - {check.file, *check.together}
        found = dict(self.solutions)
        for path in sorted(self.directory.glob("*.py")):
            if path.stem not in kept:
                found[path.stem] = (path, path.read_text("utf-8"))
        return found

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
                if len(mistakes) < 2:
                    raise
                self.known[key] = None
        return self.known[key]


def told(error: BaseException, directory: Path) -> str:
    """One line about an error: its kind, its message, and the last line of the directory's code on the way there."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    what = what if len(what) <= 300 else f"{what[:300]}..."
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({Path(error.filename).name}, line {error.lineno})"
    own = frames_within(error, directory)
    return f"{what} ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else what


def frames_within(error: BaseException, directory: Path) -> list[traceback.FrameSummary]:
    """Returns the frames of an error that lie in files of a directory."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if Path(frame.filename).parent == directory]


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
        exec(compile(text, str(path), "exec"), module.__dict__)


if __name__ == "__main__":
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    main(sys.argv[1:])

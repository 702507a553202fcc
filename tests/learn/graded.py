"""A track's grader over files that are the solutions but for what a test changes."""

import functools
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llamita.learn import track
from llamita.learn.harness import Grader, assembled
from llamita.learn.track import Sources, solutions_of, sources_of


@functools.cache
def graded(name: str, framework: str) -> "Graded":
    """The one of this track and framework; the test is skipped where the framework is not there."""
    if framework == "mlx":
        pytest.importorskip("mlx.core")
    return Graded(name, framework)


class Graded:
    """The grader of a track in one framework."""

    def __init__(self, name: str, framework: str) -> None:
        self.track = track.find(name)
        self.framework = framework
        self.solutions = self.track.solutions(framework)
        self.skeletons = self.track.skeletons(framework)
        self.grader = Grader(self.track.directory, framework, self.track.directory)
        self.last: dict[str, str] = {}

    def judged(self, directory: Path, check: str, files: dict[str, str]) -> dict[str, Any]:
        """The judgement of a check, where these of the reader's files are other than the solutions."""
        directory.mkdir(exist_ok=True)
        texts = {**self.solutions, **files}
        written = self.last if self.grader.directory == directory else {}
        for name, text in texts.items():
            if written.get(name) != text:
                (directory / name).write_text(text, "utf-8")
        self.grader.directory, self.last = directory, texts
        return self.grader.judge(check)

    def replaced(self, file: str, *changes: tuple[str, str]) -> dict[str, str]:
        """A solution's file with changes, each of a text that occurs once."""
        text = self.solutions[file]
        for old, new in changes:
            assert text.count(old) == 1, (old, text.count(old))
            text = text.replace(old, new)
        return {file: text}

    def files(self) -> Sources:
        """The solutions as modules."""
        return solutions_of(self.track.directory, self.framework)

    def module(self, name: str) -> Any:
        """A module of the grader's own, such as its checks."""
        return getattr(assembled(sources_of([self.track.directory / f"{name}.py"]), [name]), name)

    def written(self, function: str, body: str, number: int = 0) -> dict[str, str]:
        """A solution's file with other lines for one to-do of a function, the first where no number is given."""
        file, text = next((file, text) for file, text in self.solutions.items() if f"def {function}(" in text)
        begin = text.index(f"def {function}(")
        for _ in range(number + 1):
            begin = text.index("# to do:", begin + 1)
        indent = " " * (begin - text.rindex("\n", 0, begin) - 1)
        end = text.index(f"{indent}# done", begin)
        return {
            file: f"{text[:begin]}# other lines\n{textwrap.indent(textwrap.dedent(body).strip(), indent)}\n{text[end:]}"
        }

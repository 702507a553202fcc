"""Tracks: folders of lessons, the solutions that skeletons are made from, and the checks with their known mistakes.

A track is a folder under tracks/ and needs no other file to be changed:

    track.toml          title, frameworks, the model that a folder is begun with, what to do at the end, and the lessons
                        in order: name, title, file, names of checks
    lessons/NAME.md     the text of each lesson; links to PACKAGE/FILE#NAME lead to definitions in the library's files
                        (links.py), and a line ![what one sees](NAME.svg) shows a figure
    figures.py          FIGURES: by name, a function that draws into the matplotlib figure it is given; may be missing
    FRAMEWORK/          the reader's files with solutions in them, between "# to do: ..." and "# done"
    shared/             those of them that are the same in all frameworks
    FRAMEWORK/grader/   modules that the two below import by their names, where frameworks differ
    checks.py           CHECKS: what each lesson runs (checking.py says what a check is)
    mistakes.py         MISTAKES: changes to the solutions, and what they are called

These files are data of the package: they run in the reader's process, never in the library's, save for figures.py
(figures.py of this folder says why).
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Sources = Mapping[str, tuple[Path, str]]
"""The modules of a program by name: their files and their texts."""
PACKAGE = Path(__file__).resolve().parents[1]
TRACKS = PACKAGE / "learn" / "tracks"
TO_DO = re.compile(r"^(?P<indent> *)# to do:.*\n(?:(?P=indent)# {4,}.*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Lesson:
    """One lesson of a track."""

    name: str
    title: str
    file: str
    """The file that the reader writes in."""
    checks: tuple[str, ...]
    """Names of its checks in checks.py."""
    text: str
    """Markdown; its links to the library name definitions, which links.py finds."""


@dataclass(frozen=True)
class Track:
    """A course of lessons in one or several frameworks."""

    name: str
    title: str
    frameworks: tuple[str, ...]
    lessons: tuple[Lesson, ...]
    directory: Path
    model: Literal["course", "directory", "none"]
    """The model that a folder is begun with: a course's stories.pt, a model directory, or none."""
    end: str
    """What there is to do once all checks pass."""
    file: str = ""
    """The reader's one file, imported with its own imports; empty where the grader puts modules together itself."""

    def lesson(self, name: str) -> Lesson:
        """Returns a lesson by its name; ValueError names those that there are."""
        for lesson in self.lessons:
            if lesson.name == name:
                return lesson
        raise ValueError(f"there is no lesson {name!r}; choose one of {', '.join(one.name for one in self.lessons)}")

    def solutions(self, framework: str) -> dict[str, str]:
        """Returns the texts of all of the reader's files, by file name, with the solutions in them."""
        if framework not in self.frameworks:
            raise ValueError(f"{self.name} is there for {', '.join(self.frameworks)}, not for {framework!r}")
        return {path.name: text for path, text in solutions_of(self.directory, framework).values()}

    def skeletons(self, framework: str) -> dict[str, str]:
        """Returns the same files with nothing solved: each solution is a to-do."""
        return {name: skeleton(text) for name, text in self.solutions(framework).items()}


def find(name: str) -> Track:
    """Returns the track of this name, such as `min-llama`; ValueError names those that there are."""
    directory = TRACKS / name.replace("-", "_")
    if name not in names():
        raise ValueError(f"there is no track {name!r}; choose one of {', '.join(names())}")
    content = tomllib.loads((directory / "track.toml").read_text("utf-8"))
    lessons = tuple(
        Lesson(
            name=entry["name"],
            title=entry["title"],
            file=entry["file"],
            checks=tuple(entry["checks"]),
            text=(directory / "lessons" / f"{entry['name']}.md").read_text("utf-8"),
        )
        for entry in content["lessons"]
    )
    frameworks, model = tuple(content["frameworks"]), content["model"]
    return Track(name, content["title"], frameworks, lessons, directory, model, content["end"], content.get("file", ""))


def names() -> list[str]:
    """Returns the names of all tracks."""
    return sorted(path.parent.name.replace("_", "-") for path in TRACKS.glob("*/track.toml"))


def solutions_of(directory: Path, framework: str) -> Sources:
    """Returns the reader's modules of a track's folder with the solutions in them, in the order of their names."""
    return sources_of([*(directory / framework).glob("*.py"), *(directory / "shared").glob("*.py")])


def sources_of(paths: Iterable[Path]) -> Sources:
    """Returns files as modules, in the order of their names."""
    return {path.stem: (path, path.read_text("utf-8")) for path in sorted(paths, key=lambda path: path.name)}


def skeleton(text: str) -> str:
    """Returns a file with its solutions taken out.

    What stands between a comment "# to do: ..." (further lines of it are indented) and "# done" becomes one
    statement that says that it is not yet written.
    """
    parts, position = [], 0
    for number, begin in enumerate(TO_DO.finditer(text), 1):
        indent = begin["indent"]
        end = text.find(f"\n{indent}# done\n", begin.end() - 1)
        assert end >= 0, f"to-do {number} has no end"
        parts += [text[position : begin.end()], f'{indent}raise NotImplementedError("not yet written")\n']
        position = end + len(f"\n{indent}# done\n")
    return "".join([*parts, text[position:]])

"""Links of lessons to the library's own code: `[text](PACKAGE/FILE#NAME)` leads to the definition of NAME in FILE.

NAME is a function's, a class's or a constant's, or a method's behind its class's: `Attention.forward`. Its lines are
looked up in the file whenever a text is written, so they are those of the library that is installed.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamita.learn.track import PACKAGE

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\(PACKAGE/(?P<file>[^)#\s]+)#(?P<name>[\w.]+)\)")
PARAGRAPH = re.compile(r"(?:.+\n?)+")


@dataclass(frozen=True)
class Definition:
    """A definition in a file of the library; lines count from 1."""

    file: str
    """Its place in the package, such as backend/torch/model/llama.py."""
    name: str
    lines: range
    """From its first decorator to its last line."""
    heads: tuple[range, ...] = ()
    """Of a method: the first lines of its class, to the end of the docstring."""

    @property
    def path(self) -> Path:
        return PACKAGE / self.file

    @property
    def uri(self) -> str:
        """The file and the lines as editors and forges read them."""
        return f"{self.path.as_uri()}#L{self.lines[0]}-L{self.lines[-1]}"

    def excerpt(self) -> list[list[tuple[int, str]]]:
        """Returns the text in pieces, line by line with the lines' numbers; before a method the head of its class."""
        lines = self.path.read_text("utf-8").splitlines()
        return [[(number, lines[number - 1]) for number in piece] for piece in (*self.heads, self.lines)]


def definition(file: str, name: str) -> Definition:
    """Returns the definition of a name in a file of the library; ValueError where there is none."""
    if not (PACKAGE / file).is_file():
        raise ValueError(f"the library has no file {file}; lead the link to where {name} is now")
    body, node, heads = ast.parse((PACKAGE / file).read_text("utf-8")).body, None, []
    for part in name.split("."):
        if isinstance(node, ast.ClassDef):
            heads.append(_head(node))
        node = next((child for child in body if part in _names(child)), None)
        if node is None:
            raise ValueError(f"{file} defines no {name}; lead the link to what is there in its place")
        body = node.body if isinstance(node, ast.ClassDef) else []
    assert node is not None
    return Definition(file, name, range(_first(node), (node.end_lineno or 0) + 1), tuple(heads))


def led(text: str, target: Callable[[Definition], str]) -> str:
    """Returns a text whose links lead to what `target` gives for the definitions that they name."""
    return LINK.sub(lambda link: f"[{link['text']}]({target(definition(link['file'], link['name']))})", text)


def divided(text: str) -> Sequence[tuple[str, Sequence[Definition]]]:
    """Returns a text in parts, each to the end of a paragraph that has links, with the definitions that these name.

    The last part has none.
    """
    parts, position = [], 0
    for paragraph in PARAGRAPH.finditer(text):
        links = dict.fromkeys((link["file"], link["name"]) for link in LINK.finditer(paragraph[0]))
        if links:
            parts.append((text[position : paragraph.end()], [definition(*link) for link in links]))
            position = paragraph.end()
    return [*parts, (text[position:], [])]


def _names(node: ast.stmt) -> set[str]:
    """Returns the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _head(node: ast.ClassDef) -> range:
    first = node.body[0]
    end = _first(first) if ast.get_docstring(node) is None else (first.end_lineno or 0) + 1
    return range(_first(node), end)


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])

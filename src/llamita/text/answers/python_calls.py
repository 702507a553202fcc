"""Reads calls of tools written as a list of Python calls, `[f(a="b", c=[1, None])]`, from text that comes in pieces.

Only literals are read, and nothing is run: Python's own parser sees the text once its brackets are closed.
"""

import ast
import json
import math
import re

from llamita.text.answers.json_calls import CLOSING, DEEPEST, SCALAR

PLAIN = re.compile(r"""[^\[\](){}"'\\]+""")
WITHIN_STRING = re.compile(r"""[^"'\\\n]+""")
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
ESCAPED = "\\'\"abfnrtvxNuU"
"""Letters that mean something behind a backslash; behind others the backslash stays, and of `\\/` the stroke, as JSON
has it."""
LONGEST = 65536
"""Most characters of a list of calls: Python's parser takes some hundred bytes for each."""
JSON_WORDS = ("true", "false", "null")
"""Names that models write for Python's, since many templates lay values out as JSON."""
BRACKETS = {**CLOSING, "(": ")"}


class PythonReader:
    """Finds the end of one list in brackets. Once `complete` or `broken`, nothing more is taken."""

    def __init__(self) -> None:
        self.complete = self.broken = False
        self._pieces: list[str] = []
        self._room = LONGEST
        self._stack: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str, start: int = 0) -> int:
        """Takes text from a place on; returns the place up to which it belongs to the list."""
        at, stop = start, min(len(text), start + self._room)
        while at < stop and not (self.complete or self.broken):
            at = self._within_string(text, at, stop) if self._quote else self._between_strings(text, at, stop)
        self._pieces.append(text[start:at])
        self._room -= at - start
        self.broken |= not self._room and not self.complete
        return at

    def calls(self) -> list[tuple[str, str]]:
        """Returns names and arguments, as the texts of JSON objects; none where it is no list of calls of literals."""
        if not self.complete or self.broken:
            return []
        text = ESCAPE.sub(_unescaped, "".join(self._pieces))
        try:
            whole = ast.parse(text, mode="eval").body
            return [_call(item, text) for item in whole.elts] if isinstance(whole, ast.List) else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return []

    def _within_string(self, text: str, at: int, stop: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        if (run := WITHIN_STRING.match(text, at, stop)) is not None:
            return run.end()
        letter = text[at]
        self._is_escaped = letter == "\\"
        self.broken = letter == "\n"  # such a string ends with its line
        if letter == self._quote:
            self._quote = ""
        return at + 1

    def _between_strings(self, text: str, at: int, stop: int) -> int:
        if (run := PLAIN.match(text, at, stop)) is not None:
            return run.end()
        letter = text[at]
        if letter in "\"'":
            self._quote = letter
        elif letter in BRACKETS:
            self._stack.append(BRACKETS[letter])
            self.broken = len(self._stack) > DEEPEST
        elif letter == "\\" or not self._stack or self._stack.pop() != letter:
            self.broken = True
        else:
            self.complete = not self._stack
        return at + 1


def _unescaped(found: re.Match[str]) -> str:
    letter = found[1]
    if letter in ESCAPED:
        return found[0]
    return letter if letter == "/" else "\\" + found[0]


def _call(node: ast.expr, source: str) -> tuple[str, str]:
    """Returns the name of a call and its arguments as JSON; ValueError for what is no call of literals by name."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("this is no call with named arguments")
    arguments: dict[str, str] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** names no arguments")
        arguments[keyword.arg] = _json(keyword.value, source)
    # JSON spells characters beyond the first 65,536 as two halves; a half alone is no text, and raises here.
    return _dotted(node.func), _object(arguments).encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("a call begins with a name")


def _json(node: ast.expr, source: str) -> str:
    """Returns a literal as JSON; ValueError for what JSON cannot hold."""
    if isinstance(node, ast.Name) and node.id in JSON_WORDS:
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        if node.value == math.inf:  # a number that no float holds: JSON has it as it is written
            written = ast.get_source_segment(source, node) or ""
            return written if SCALAR.fullmatch(written) else json.dumps(node.value, allow_nan=False)
        return json.dumps(node.value, ensure_ascii=False)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_number(node.operand):
        return "-" + _json(node.operand, source)
    if isinstance(node, ast.List | ast.Tuple):
        return f"[{', '.join(_json(item, source) for item in node.elts)}]"
    if isinstance(node, ast.Dict):
        fields: dict[str, str] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise ValueError("keys of JSON are texts")
            fields[key.value] = _json(value, source)
        return _object(fields)
    raise ValueError("this is no literal that JSON can hold")


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _object(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in fields.items()) + "}"

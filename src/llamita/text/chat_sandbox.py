"""Runs a chat template, which is somebody else's program, within bounds of time and memory.

Jinja's immutable sandbox keeps a template from reaching Python's insides and from changing what it is given. It does
not keep it from counting to a billion or from writing a gigabyte, so here every turn of a loop and every call of a
macro is counted against a clock, what can make a long text of short ones is checked before it is done, and filters and
methods that can do so otherwise are absent. Settings and helpers are those that Hugging Face's templates expect. Knows
nothing of messages or tokens.
"""

import datetime
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 200_000  # characters; the largest in use are a tenth of it
MAX_TEXT = 20_000_000  # characters of any text, entries of any list, that a template makes
MAX_ENTRIES = 200_000  # of lists and objects, all levels together, that are made into a text
MAX_TURNS = 1_000_000  # of loops and macros
MAX_SECONDS = 5.0
MAX_RANGE = 100_000
GENERATION = ("__generation_begins", "__generation_ends")

FILTERS = """
abs attr bool capitalize count d default dictsort e escape first float forceescape groupby indent int items join last
length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string striptags
title tojson trim unique upper wordcount
"""
METHODS = """
capitalize casefold count endswith find index isalnum isalpha isdigit islower isnumeric isspace istitle isupper join
lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
startswith strip swapcase title upper
"""
ALLOWED_FILTERS, ALLOWED_METHODS = frozenset(FILTERS.split()), frozenset(METHODS.split())


class TemplateError(ValueError):
    """A fault of a template, or one that it finds in the messages; one line."""


class Budget:
    """The turns of loops and the seconds that one rendering may still take."""

    def __init__(self) -> None:
        self._turns = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def turn(self) -> str:
        self._turns += 1
        if self._turns > MAX_TURNS or time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template ran for more than {MAX_SECONDS:g} s or {MAX_TURNS} turns of a loop")
        return ""


def size(length: int) -> None:
    """Refuse to make a text or a list of such a length."""
    if length > MAX_TEXT:
        raise TemplateError(f"the chat template makes a text or a list of {length} entries; {MAX_TEXT} are allowed")


def measured(value: Any) -> Any:
    """The value, where its text would not be too long: lists that hold one another grow by doubling, unseen."""
    if isinstance(value, list | tuple | dict):
        left, waiting = MAX_ENTRIES, [value]
        while waiting:
            inner = waiting.pop()
            left -= len(inner)
            if left < 0:
                raise TemplateError(f"the chat template makes a list of more than {MAX_ENTRIES} entries")
            values = inner.values() if isinstance(inner, dict) else inner
            waiting.extend(entry for entry in values if isinstance(entry, list | tuple | dict))
    return value


class Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant writes: the variables named `GENERATION`, texts
    that are empty unless they are given, are written before and after it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in GENERATION)
        return [begin, *body, end]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of Jinja with bounds on what an operator, a filter or a method can make."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "/"})

    def __init__(self) -> None:
        extensions = [Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=measured)
        kept = {name: function for name, function in self.filters.items() if name in ALLOWED_FILTERS}
        kept |= {"tojson": _tojson, "join": _join(kept["join"]), "replace": _replace, "indent": _indent}
        self.filters = {name: _measuring(function) for name, function in kept.items()}
        self.globals = {
            "range": _range,
            "dict": dict,
            **{name: self.globals[name] for name in ("namespace", "joiner", "cycler")},
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        tick = "__turn"
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.Output([nodes.Call(nodes.Name(tick, "load"), [], [], None, None)]))  # type: ignore[attr-defined]
        for found in list(tree.find_all(nodes.Concat)):
            # `a ~ b` has no hook of its own: it becomes the sum of two texts, which has.
            found.nodes = [nodes.Call(nodes.Name("__join", "load"), [nodes.List(found.nodes)], [], None, None)]
        for any_node in tree.find_all(nodes.Node):
            any_node.set_lineno(any_node.lineno or 1)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        if operator == "+" and None not in lengths:
            size(sum(length or 0 for length in lengths))
        elif operator == "*":
            for side, other in ((left, right), (right, left)):
                if isinstance(side, str) and isinstance(other, int):
                    size(len(side) * other)
                elif isinstance(side, list | tuple):
                    raise TemplateError("the chat template multiplies a list, which is not allowed here")
        elif operator == "%" and isinstance(left, str):
            raise TemplateError("the chat template formats with %, which is not allowed here; ~ joins texts")
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 256:
                raise TemplateError("the chat template computes with a number of more than 256 bits")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and (not isinstance(obj, str) or attr in ALLOWED_METHODS)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format`, which can pad to any width, is not among the methods allowed: leave it to that rule."""
        return None

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            if name == "replace" and len(arguments) >= 2:
                return _replace(owner, *arguments)
            if name == "join" and arguments:
                return _join_texts(owner, arguments[0])
        return super().call(context, function, *arguments, **named)


def compile_template(source: str) -> Callable[[Mapping[str, Any]], str]:
    """The template as a function of its variables; TemplateError where it is none, or where it breaks its bounds."""
    if len(source) > MAX_TEMPLATE:
        raise TemplateError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are allowed")
    environment = BoundedEnvironment()
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise TemplateError(f"the chat template is not one that Jinja reads: {_line(error)}") from None

    def render(variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        budget = Budget()
        helpers = {
            "__turn": budget.turn,
            "__join": lambda parts: _join_texts("", (str(measured(part)) for part in parts)),
        }
        try:
            for piece in template.generate(dict.fromkeys(GENERATION, "") | dict(variables) | helpers):
                length += len(piece)
                size(length)
                pieces.append(piece)
        except TemplateError:
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise TemplateError(f"the chat template cannot be applied to these messages: {_line(error)}") from None
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template does not end: {type(error).__name__}") from None
        return "".join(pieces)

    return render


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    size(len(form) * 1000)
    return datetime.datetime.now().strftime(form)


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > MAX_RANGE:
        raise TemplateError(f"the chat template counts to {len(found)}; at most {MAX_RANGE} are allowed")
    return found


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape what HTML reserves."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise TemplateError(f"the chat template indents JSON by {indent}; at most 64 are allowed")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if count is None else min(text.count(old), max(count, 0))
    size(len(text) + found * max(len(new) - len(old), 0))
    return text.replace(old, new, -1 if count is None else count)


def _join_texts(separator: str, parts: Any) -> str:
    parts = list(parts)
    size(sum(map(len, parts)) + len(separator) * len(parts))
    return separator.join(parts)


def _join(original: Callable[..., str]) -> Callable[..., str]:
    """Jinja's filter, the size of its result seen to first."""

    @jinja2.pass_eval_context
    def join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        parts = list(value)
        size(sum(len(str(part)) for part in parts) + len(str(d)) * len(parts))
        return original(context, parts, str(d), attribute)

    return join


def _measuring(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that first measures what it is given; Jinja passes some of them a context before it."""

    @functools.wraps(function)  # with the mark that says so
    def bounded(*arguments: Any, **named: Any) -> Any:
        for argument in arguments:
            measured(argument)
        return function(*arguments, **named)

    return bounded


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, 1000)
    lines = text.splitlines()
    size(len(text) + len(prefix) * len(lines))
    done = [prefix + line if (index or first) and (line or blank) else line for index, line in enumerate(lines)]
    return "\n".join(done) + ("\n" if text.endswith("\n") else "")

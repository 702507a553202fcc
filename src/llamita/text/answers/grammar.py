"""Grammars that hold an answer to calls of tools, in a model's own form and with arguments that fit their schemas.

They are in llguidance's variant of Lark's notation, for `SamplingParams.grammar`. What compiles them, and refuses a
JSON schema with a keyword that cannot be enforced, is the engine.

Names in a grammar are of two kinds: those in capitals are expressions, of which the longest match is taken, others are
rules. A rule marked [lazy] takes the shortest.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamita.text.answers.forms import ARGUMENTS_MARK, CALL_ID_MARK, PAIR_TAGS, AnswerFormat, CallForm, Section
from llamita.text.answers.functions import Function, functions, is_string

Choice = Literal["none", "auto", "required"]
ANYTHING = r"/(?s:.*)/"
FORCING = '%llguidance {"no_forcing": false}'
"""Where one text alone can come, the mask allows only the tokens that a tokenizer makes of it, which models know best.
No expression here swallows what must follow it, with which that would not end."""
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]?[ ]{0,16}", "lenient": False}
"""White space within arguments is bounded, since some models write blanks without end; a keyword that cannot be
enforced is refused."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
NO_LINE = ("list", "section", "pairs", "python")
"""Layouts in which no line ends between a mark and what it stands around."""
GAP = "/\\n?/"


@dataclass(frozen=True)
class Tags:
    """What stands around the name and the arguments of a call, `{}` being the name or the key.

    These are rules of a grammar, but for `end`, which ends a value and is text.
    """

    head: str
    before_value: str
    end: str
    after_value: str
    tail: str
    refused: str
    """The letter that, beside a line's end, no key may have."""


XML = Tags('"<function={}>\\n"', '"<parameter={}>\\n"', "\n</parameter>", '"\\n"', '"</function>"', ">")
PAIRS = Tags(f'"{{}}" {GAP}', f'"<arg_key>{{}}</arg_key>" {GAP} "<arg_value>"', "</arg_value>", GAP, "", "<")


def call_grammar(
    form: AnswerFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: Choice | Mapping[str, Any] = "auto",
    prompt: str = "",
    parallel: bool = True,
) -> str:
    """Returns the grammar of an answer for a request's tools and its `tool_choice`; "" where nothing is to be held.

    With `required`, the answer is one call or several of any of the tools, or with `{"type": "function", "function":
    {"name": ...}}` of that one; the arguments fit the schemas. With `auto`, the answer is free, but a call in it is of
    one of the tools, and the arguments of those that are `strict` fit; where none is, there is no grammar. Without
    `parallel` there is one call. An answer may begin with reasoning, unless `prompt`, the text that the template wrote,
    has closed it, and must end it where that has opened it. Raises ValueError where the template knows no tools, for
    tools of another form, for a choice that is none of them, and for a schema that the form cannot hold.
    """
    offered = functions(tools)
    if choice == "none" or (choice == "auto" and not any(function.strict for function in offered.values())):
        return ""
    if form.calls is None:
        raise ValueError("this model's chat template knows no calls of tools, so none can be asked of it")
    if form.calls.layout == "braces":
        raise ValueError(
            f"this model's form of calls ({form.calls.name}) cannot be forced; give tool_choice auto and no strict"
        )
    if choice not in ("auto", "required"):
        name = _chosen(choice)
        if name not in offered:
            raise ValueError(f"tool_choice names {name!r}, which is none of the tools: {', '.join(offered) or 'none'}")
        offered = {name: offered[name]}
    if not offered:
        raise ValueError("tool_choice asks for a call, and there are no tools; give some")
    return _Writer(form, form.calls, parallel, choice == "auto").grammar([*offered.values()], prompt)


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(self, form: AnswerFormat, calls: CallForm, parallel: bool, is_free: bool) -> None:
        self._form, self._calls = form, calls
        self._several = parallel and (calls.several or is_free)
        self._is_free = is_free
        self._rules: list[str] = []

    def grammar(self, offered: Sequence[Function], prompt: str) -> str:
        calls = " | ".join(self._call(number, function) for number, function in enumerate(offered))
        self._rules.append(f"one: {calls}")
        body = self._free_body() if self._is_free else self._held_body()
        start = f"{self._reasoning(prompt)} ({body})"
        return "\n".join([FORCING, f"start: {start.strip()}", f"TEXT: {ANYTHING}", *self._rules]) + "\n"

    # --- the whole answer --------------------------------------------------------------------------------------------

    def _reasoning(self, prompt: str) -> str:
        """The rule for reasoning before all else; nothing where there is none."""
        if self._form.reasoning is None or prompt.rstrip().endswith(self._form.reasoning[1]):
            return ""
        opening, closing = self._form.reasoning
        gap = "gap: /\\n{1,2}/"
        if closing in self._form.hidden:
            rest = f"TEXT {self._mark(closing)}"
        else:
            rest = "thought"
            self._rules.append(f"thought[lazy]: {_expression(f'(?s:.*){_escaped(closing)}')}")
        self._rules.append(gap)
        if self._form.begins_in_reasoning(prompt):
            return f"{rest} gap?"
        if self._is_free and opening not in self._form.hidden:
            return ""  # what is free may be reasoning as well
        return f"({self._mark(opening)} {rest} gap?)?"

    def _held_body(self) -> str:
        opening, closing = self._around()
        if self._calls.layout in ("list", "python"):
            items = 'one (", " one)*' if self._several else "one"
            return f'{opening} "[" {items} "]" {closing}'
        if self._calls.layout == "bare":
            return "one"
        if self._calls.layout == "section":
            return f"{opening} {self._items()} {closing}"
        between = '"\\n"' if self._calls.closing else ""
        call = f"{opening} one {closing}"
        return f"{call} ({between} {call})*" if self._several else call

    def _free_body(self) -> str:
        """Text with calls in it: behind a mark, nothing but a call may come."""
        opening, closing = self._around()
        if self._calls.layout == "bare":
            self._rules.append("OTHER: /[^{\\s](?s:.*)/")
            tag = f"{self._mark(self._calls.opening)}?" if self._calls.opening in self._form.hidden else ""
            return f"OTHER | {tag} one"
        if self._calls.opening in self._form.hidden:
            before = f"TEXT {opening}"
        else:
            self._rules.append(f"before[lazy]: {_expression(f'(?s:.*){_escaped(self._calls.opening)}')}")
            before = "before" + opening.removeprefix(self._mark(self._calls.opening))
        items = '"[" one (", " one)* "]"' if self._calls.layout in ("list", "python") else self._items()
        return f"({before} {items} {closing}){'*' if self._several else '?'} TEXT"

    def _items(self) -> str:
        """What stands between two marks: one call, or those of a section."""
        return f"one ({GAP} one)*" if self._calls.layout == "section" and self._several else "one"

    def _around(self) -> tuple[str, str]:
        """What stands before and behind calls, as templates write it."""
        if not self._calls.closing:
            return self._mark(self._calls.opening), ""
        line = '"\\n"' if self._calls.layout not in NO_LINE else ""
        return f"{self._mark(self._calls.opening)} {line}", f"{line} {self._mark(self._calls.closing)}"

    def _mark(self, name: str) -> str:
        """A mark as text, and what of it is a control token as that."""
        hidden = self._form.hidden
        tokens = "|".join(re.escape(token) for token in sorted(hidden, key=len, reverse=True))
        pieces = re.split(f"({tokens})", name) if tokens else [name]
        return " ".join(f"<[{hidden[piece]}]>" if piece in hidden else _text(piece) for piece in pieces if piece)

    # --- one call ----------------------------------------------------------------------------------------------------

    def _call(self, number: int, function: Function) -> str:
        """Adds the rule of a function's call without the marks around it; returns its name."""
        name = f"call_{number}"
        held = function.strict or not self._is_free
        if self._calls.layout in ("xml", "pairs"):
            if self._form.hidden.keys() & PAIR_TAGS:
                raise ValueError(
                    "this tokenizer has the tags of arguments as control tokens; no call can be held to them"
                )
            body = self._tagged(number, function, held, XML if self._calls.layout == "xml" else PAIRS)
        elif self._calls.layout == "python":
            body = self._python(number, function, held)
        elif self._calls.section is not None:
            body = self._in_section(self._calls.section, function, held)
        elif self._calls.layout == "named":
            call_id = f"{self._mark(CALL_ID_MARK)} /[a-zA-Z0-9]{{9}}/ " if self._calls.writes_ids else ""
            body = f"{_text(function.name)} {call_id}{self._mark(ARGUMENTS_MARK)} {_json(_arguments(function, held))}"
        else:
            head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{self._calls.arguments}": '
            body = f'{_text(head)} {_json(_arguments(function, held))} "}}"'
        self._rules.append(f"{name}: {body}")
        return name

    def _in_section(self, marks: Section, function: Function, held: bool) -> str:
        number = '":" /[0-9]{1,3}/' if marks.is_numbered else ""
        head = f"{self._mark(marks.opening + marks.before_name + function.name)} {number} {self._mark(marks.separator)}"
        return f"{head} {_json(_arguments(function, held))} {self._mark(marks.after_arguments + marks.closing)}"

    def _python(self, number: int, function: Function, held: bool) -> str:
        """A call as Python writes it, its values as JSON; required arguments come first."""
        schema = _arguments(function, held)
        if not held:
            self._rules.append(f'any_{number}: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ "=" {_json({})}')
            return f'{_text(function.name + "(")} (any_{number} (", " any_{number})*)? ")"'
        required, pairs = schema.get("required", ()), {True: list[str](), False: list[str]()}
        for place, key in enumerate(schema.get("properties") or {}):
            if not key.isidentifier():
                raise ValueError(f"the function {function.name} has the argument {key!r}, and this model writes names")
            self._rules.append(f"pair_{number}_{place}: {_text(key + '=')} {_json(_shared(function, key))}")
            pairs[key in required].append(f"pair_{number}_{place}")
        more = [f'(", " {pair})?' for pair in pairs[False]]
        first = [" ".join([pair, *more[place + 1 :]]) for place, pair in enumerate(pairs[False])]
        body = " ".join(['", "'.join(f" {pair} " for pair in pairs[True]), *more])
        if not pairs[True]:
            body = f"({' | '.join(first)})?" if first else ""
        return f'{_text(function.name + "(")} {body} ")"'

    def _tagged(self, number: int, function: Function, held: bool, tags: Tags) -> str:
        """A call as tags; arguments come in the order of the schema."""
        head = tags.head.format(_inner(function.name))
        schema = _arguments(function, held)
        if not held:
            self._rules.append(f"any_{number}[lazy]: {_expression(f'(?s:.*){_escaped(tags.end)}')}")
            any_key = tags.before_value.format('" /[^><\\n]{1,64}/ "')
            return f"{head} ({any_key} any_{number} {tags.after_value})* {tags.tail}"
        required, parts = schema.get("required", ()), []
        for place, key in enumerate(schema.get("properties") or {}):
            if tags.refused in key or "\n" in key:
                raise ValueError(
                    f"the function {function.name} has the argument {key!r}; a name has neither {tags.refused} nor \\n"
                )
            value = self._value(f"{number}_{place}", function, key, tags.end)
            part = f"{tags.before_value.format(_inner(key))} {value} {tags.after_value}"
            parts.append(part if key in required else f"({part})?")
        return " ".join([head, *parts, tags.tail])

    def _value(self, number: str, function: Function, key: str, end: str) -> str:
        """An argument's value with the tag behind it: strings as they are, all else as JSON."""
        schema = function.property_schema(key)
        if not is_string(schema):
            return f"{_json(_shared(function, key))} {_text(end)}"
        if "enum" in schema or "const" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return f"({' | '.join(map(_text, choices))}) {_text(end)}"
        for keyword in ("pattern", "format"):
            if keyword in schema:
                raise ValueError(
                    f"the argument {key} of the function {function.name} has a {keyword}, which cannot be enforced in "
                    "this model's form of calls; leave it out"
                )
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        length = f"{{{least},{most}}}" if least or most != "" else "*"
        self._rules.append(
            f"VALUE_{number}: {_expression(f'(?s:.){length}{_escaped(end)}')}"
            + (f" & ~{_expression(f'(?s:.*){_escaped(end.strip())}(?s:.+)')}" if least else "")
        )
        self._rules.append(f"value_{number}[lazy]: VALUE_{number}")
        return f"value_{number}"


def _shared(function: Function, key: str) -> dict[str, Any]:
    """Returns the schema of an argument with the definitions that it may name."""
    shared = {name: function.parameters[name] for name in ("$defs", "definitions") if name in function.parameters}
    return {**shared, **function.property_schema(key)}


def _chosen(choice: Any) -> str:
    """Returns the name of the function that a `tool_choice` names."""
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        inner = choice.get("function", choice)
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            return str(inner["name"])
    raise ValueError(
        f"tool_choice={choice!r:.80} is not allowed; give none, auto, required or "
        "{'type': 'function', 'function': {'name': ...}}"
    )


def _arguments(function: Function, held: bool) -> Mapping[str, Any]:
    """Returns the JSON schema of a call's arguments; ValueError where it allows something other than an object."""
    if not held:
        return {"type": "object"}
    schema = dict(function.parameters) or NO_ARGUMENTS
    if schema.setdefault("type", "object") != "object":
        raise ValueError(f"the parameters of the function {function.name} must be of the type object")
    return schema


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


def _inner(text: str) -> str:
    """A text as it stands within quotation marks of the notation."""
    return _text(text)[1:-1]


def _text(text: str) -> str:
    """A text as the notation has it: as JSON does."""
    return json.dumps(text, ensure_ascii=False)


def _expression(regex: str) -> str:
    return "/" + regex.replace("/", "\\/").replace("\n", "\\n") + "/"


def _escaped(text: str) -> str:
    """Returns a regular expression for this text alone, slashes left to `_expression`."""
    return "".join("\\" + letter if letter in r"\.+*?()|[]{}^$#&-~" else letter for letter in text)

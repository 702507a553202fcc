"""Grammars that hold an answer to calls of tools, in a model's own form and with arguments that fit their schemas.

They are in llguidance's variant of Lark's notation, for `SamplingParams.grammar`. What compiles them, and refuses a
JSON schema with a keyword that cannot be enforced, is the engine.

Names in a grammar are of two kinds: those in capitals are expressions, of which the longest match is taken, others are
rules. A rule marked [lazy] takes the shortest.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llamita.text.answers.forms import ARGUMENTS_MARK, CALL_ID_MARK, AnswerFormat, CallForm
from llamita.text.answers.functions import Function, functions, is_string

Choice = Literal["none", "auto", "required"]
ANYTHING = r"/(?s:.*)/"
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]?[ ]{0,16}", "lenient": False}
"""White space within arguments is bounded, since some models write blanks without end; a keyword that cannot be
enforced is refused."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
END_OF_VALUE = "</parameter>"


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
        return "\n".join([f"start: {start.strip()}", f"TEXT: {ANYTHING}", *self._rules]) + "\n"

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
        if self._calls.layout == "list":
            items = 'one (", " one)*' if self._several else "one"
            return f'{opening} "[" {items} "]" {closing}'
        if self._calls.layout == "bare":
            return "one"
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
        items = '"[" one (", " one)* "]"' if self._calls.layout == "list" else "one"
        return f"({before} {items} {closing}){'*' if self._several else '?'} TEXT"

    def _around(self) -> tuple[str, str]:
        """What stands before and behind calls, as templates write it."""
        if not self._calls.closing:
            return self._mark(self._calls.opening), ""
        line = '"\\n"' if self._calls.layout != "list" else ""
        return f"{self._mark(self._calls.opening)} {line}", f"{line} {self._mark(self._calls.closing)}"

    def _mark(self, name: str) -> str:
        """A mark as a control token, or as text where it is none."""
        return f"<[{self._form.hidden[name]}]>" if name in self._form.hidden else _text(name)

    # --- one call ----------------------------------------------------------------------------------------------------

    def _call(self, number: int, function: Function) -> str:
        """Adds the rule of a function's call without the marks around it; returns its name."""
        name = f"call_{number}"
        held = function.strict or not self._is_free
        if self._calls.layout == "xml":
            body = self._tagged(number, function, held)
        elif self._calls.layout == "named":
            call_id = f"{self._mark(CALL_ID_MARK)} /[a-zA-Z0-9]{{9}}/ " if self._calls.writes_ids else ""
            body = f"{_text(function.name)} {call_id}{self._mark(ARGUMENTS_MARK)} {_json(_arguments(function, held))}"
        else:
            head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{self._calls.arguments}": '
            body = f'{_text(head)} {_json(_arguments(function, held))} "}}"'
        self._rules.append(f"{name}: {body}")
        return name

    def _tagged(self, number: int, function: Function, held: bool) -> str:
        """A call as tags; arguments come in the order of the schema."""
        head, tail = _text(f"<function={function.name}>\n"), _text("</function>")
        schema = _arguments(function, held)
        if not held:
            self._rules.append(f"any_{number}[lazy]: {_expression(f'(?s:.*){_escaped(END_OF_VALUE)}')}")
            return f'{head} ("<parameter=" /[^>\\n]{{1,64}}/ ">\\n" any_{number} "\\n")* {tail}'
        required, parts = schema.get("required", ()), []
        for place, key in enumerate(schema.get("properties") or {}):
            if ">" in key or "\n" in key:
                raise ValueError(f"the function {function.name} has the argument {key!r}; a name has neither > nor \\n")
            value = self._value(f"{number}_{place}", function, key)
            part = f'{_text(f"<parameter={key}>" + chr(10))} {value} "\\n"'
            parts.append(part if key in required else f"({part})?")
        return " ".join([head, *parts, tail])

    def _value(self, number: str, function: Function, key: str) -> str:
        """An argument's value with the tag behind it: strings as they are, all else as JSON."""
        schema = function.property_schema(key)
        if not is_string(schema):
            shared = {
                name: function.parameters[name] for name in ("$defs", "definitions") if name in function.parameters
            }
            return f"{_json({**shared, **schema})} {_text(chr(10) + END_OF_VALUE)}"
        if "enum" in schema or "const" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return f"({' | '.join(map(_text, choices))}) {_text(chr(10) + END_OF_VALUE)}"
        for keyword in ("pattern", "format"):
            if keyword in schema:
                raise ValueError(
                    f"the argument {key} of the function {function.name} has a {keyword}, which cannot be enforced in "
                    "this model's form of calls; leave it out"
                )
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        length = f"{{{least},{most}}}" if least or most != "" else "*"
        self._rules.append(
            f"VALUE_{number}: {_expression(f'(?s:.){length}{chr(10)}{_escaped(END_OF_VALUE)}')}"
            + (f" & ~{_expression(f'(?s:.*){_escaped(END_OF_VALUE)}(?s:.+)')}" if least else "")
        )
        self._rules.append(f"value_{number}[lazy]: VALUE_{number}")
        return f"value_{number}"


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


def _text(text: str) -> str:
    """A text as the notation has it: as JSON does."""
    return json.dumps(text, ensure_ascii=False)


def _expression(regex: str) -> str:
    return "/" + regex.replace("/", "\\/").replace("\n", "\\n") + "/"


def _escaped(text: str) -> str:
    """Returns a regular expression for this text alone, slashes left to `_expression`."""
    return "".join("\\" + letter if letter in r"\.+*?()|[]{}^$#&-~" else letter for letter in text)

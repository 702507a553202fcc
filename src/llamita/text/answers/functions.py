"""The functions that a request offers as tools, out of OpenAI's form: names, and the JSON schema of the arguments."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
"""How Jinja writes these where a template lays arguments out as text, and so how models write them."""
KINDS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
"""Types of JSON by their first letter; what begins otherwise is a number."""


@dataclass(frozen=True)
class Function:
    """A function that a model may call. `parameters` is the JSON schema of its arguments, an object's."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def property_schema(self, name: str) -> Mapping[str, Any]:
        """The schema of one argument, where the function has it; what a `$ref` in it names is looked up."""
        properties = self.parameters.get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        for _ in range(8):
            reference = schema.get("$ref") if isinstance(schema, Mapping) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            schema = self.parameters
            for key in reference[2:].split("/"):
                schema = schema.get(key) if isinstance(schema, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}

    def json_value(self, name: str, text: str) -> str:
        """Returns an argument that was written as plain text as JSON: what its schema makes of it, else a string."""
        schema = self.property_schema(name)
        types = schema.get("type")
        if is_string(schema):
            return json.dumps(text, ensure_ascii=False)
        written = PYTHON_WORDS.get(text.strip(), text.strip())
        kind = KINDS.get(written[:1], "number")
        if isinstance(types, list) and "string" in types:
            fits = kind in types or (kind == "number" and "integer" in types)
        else:
            fits = bool(schema) or kind in ("object", "array")
        if fits and _is_json(written):
            return written
        return json.dumps(text, ensure_ascii=False)


def functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Function]:
    """Returns the functions of `tools` by name.

    A tool is `{"type": "function", "function": {...}}`, or the function's object itself beside the type. Raises
    ValueError that names the place of what is wrong.
    """
    found: dict[str, Function] = {}
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise ValueError(f"{where} is {kind!r:.60}; only objects of the type function can be called")
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} has no name; give {{'type': 'function', 'function': {{'name': ...}}}}")
        if name in found:
            raise ValueError(f"{where} has the name {name!r}, which an earlier one has; give each function its own")
        parameters, strict = inner.get("parameters"), inner.get("strict")
        if not isinstance(parameters, Mapping | None):
            raise ValueError(f"{where}: parameters={parameters!r:.60} must be a JSON schema, an object")
        if not isinstance(strict, bool | None):
            raise ValueError(f"{where}: strict={strict!r:.60} must be true or false")
        found[name] = Function(name, parameters or {}, bool(strict))
    return found


def is_string(schema: Mapping[str, Any]) -> bool:
    """Whether a schema allows strings alone."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and choices:
        return all(isinstance(choice, str) for choice in choices)
    return schema.get("type") == "string"


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_int=len, parse_float=len, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")

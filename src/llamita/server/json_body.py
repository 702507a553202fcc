"""Reads the body of a request as JSON, strictly: what is doubtful is refused with 400 rather than guessed at.

Refused are bytes that are not UTF-8, two equal keys in one object, NaN and infinities, numbers beyond any float, lone
surrogates, and nesting past a limit (found before anything is built).
"""

import json
import math
import re
from typing import Any

from llamita.server.errors import ApiError

STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")


def parse(body: bytes, max_depth: int) -> Any:
    """Returns the value that the body holds. Raises `ApiError` (400) that says what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise _refuse(f"the body is not UTF-8: byte {fault.start} is 0x{body[fault.start]:02x}") from None
    _check_depth(text, max_depth)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except ApiError:
        raise
    except ValueError as fault:
        raise _refuse(f"the body is not JSON: {fault}") from None
    except RecursionError:
        raise _refuse("the body is nested too deeply") from None
    if "\\u" in text and (found := _surrogate(value)):
        raise _refuse(f"a text of the body holds the lone surrogate U+{ord(found):04X}, which no text can hold")
    return value


def _check_depth(text: str, most: int) -> None:
    depth = 0
    for match in STRING_OR_BRACKET.finditer(text):
        sign = match[0]
        if sign in "[{":
            depth += 1
            if depth > most:
                raise _refuse(f"the body is nested deeper than {most} levels")
        elif sign in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _refuse(f"an object of the body has the key {twice!r:.80} more than once")
    return result


def _constant(name: str) -> Any:
    raise _refuse(f"the body holds {name}, which is not a number of JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _refuse(f"the body holds the number {digits:.40}, which is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 40:
        raise _refuse(f"the body holds a whole number of {len(digits)} digits")
    return int(digits)


def _surrogate(value: Any) -> str:
    """Returns the first lone surrogate in a value, keys included; empty where there is none."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, str):
            if found := SURROGATE.search(entry):
                return found[0]
        elif isinstance(entry, dict):
            waiting += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list):
            waiting += entry
    return ""


def _refuse(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")

"""Reads calls of tools written as JSON, from text that comes in pieces, each character once.

The reader keeps to RFC 8259 to the letter, so that what it calls complete is JSON to every other reader. It knows the
shape of calls, an object or an array of objects, but not what makes an object a call.
"""

import json
import re

DEEPEST = 100
"""Most levels of objects and arrays within one another."""
SPACE = " \t\r\n"
SPACES = re.compile(r"[ \t\r\n]+")
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
SCALAR_LETTERS = re.compile(r"[-+.0-9A-Za-z]+")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
CLOSING = {"{": "}", "[": "]"}


class JsonReader:
    """Reads one JSON object, or one array of objects.

    `objects` are those read so far: the raw JSON of each field by its key. `fields`, `key` and `pieces` are those of
    the object under way: its finished fields, the key of the field under way, and what has come of its value. Once
    `complete` or `broken`, nothing more is taken.
    """

    def __init__(self) -> None:
        self.objects: list[dict[str, str]] = []
        self.complete = self.broken = False
        self.fields: dict[str, str] = {}
        self.key: str | None = None
        self.pieces: list[str] = []
        self._stack: list[str] = []
        self._expected = "value"  # or: value or end, key, key or end, colon, comma or end
        self._within = ""  # or: string, escape, digits of an escape, scalar
        self._digits = 0  # of an escape, still to come
        self._is_key = False  # the string under way
        self._token: list[str] | None = None  # its letters, or those of a scalar, where they matter
        self._key_read = ""

    def feed(self, text: str, start: int = 0) -> int:
        """Takes text from a place on; returns the place up to which it belongs to the value."""
        at = self._begun = start  # where, in this text, the field under way goes on
        while at < len(text) and not (self.complete or self.broken):
            at = self._within_token(text, at) if self._within else self._between_tokens(text, at)
        if self.key is not None and self._begun < at:
            self.pieces.append(text[self._begun : at])
        return at

    def _within_token(self, text: str, at: int) -> int:
        letter = text[at]
        if self._within == "scalar":
            if (run := SCALAR_LETTERS.match(text, at)) is not None:
                self._keep(run[0])
                return run.end()
            self.broken = SCALAR.fullmatch("".join(self._token or ())) is None
            if not self.broken:
                self._end_value(text, at)
            return at
        if self._within == "string" and (run := PLAIN.match(text, at)) is not None:
            self._keep(run[0])
            return run.end()
        self._keep(letter)
        if self._within == "string":
            if letter == "\\":
                self._within = "escape"
            elif letter != '"':
                return self._break(at)
            elif self._is_key:
                if self._token is not None:
                    self._key_read = json.loads("".join(self._token))
                self._within, self._token, self._is_key, self._expected = "", None, False, "colon"
            else:
                self._end_value(text, at + 1)
        elif self._within == "escape":
            if letter not in '"\\/bfnrtu':
                return self._break(at)
            self._within, self._digits = ("digits", 4) if letter == "u" else ("string", 0)
        else:
            if letter not in "0123456789abcdefABCDEF":
                return self._break(at)
            self._digits -= 1
            self._within = "digits" if self._digits else "string"
        return at + 1

    def _between_tokens(self, text: str, at: int) -> int:
        if (run := SPACES.match(text, at)) is not None:
            return run.end()
        letter = text[at]
        if self._expected.endswith("end") and self._stack and letter == CLOSING[self._stack[-1]]:
            is_call = letter == "}" and self._is_at_calls
            self._stack.pop()
            if is_call:
                self.objects.append(self.fields)
                self.fields = {}
            self._end_value(text, at + 1)
            self.complete = not self._stack
        elif self._expected == "comma or end" and letter == ",":
            self._expected = "key" if self._stack[-1] == "{" else "value"
        elif self._expected == "colon" and letter == ":":
            self._expected = "value"
            if self._is_at_calls:
                self.key, self.pieces, self._begun = self._key_read, [], at + 1
        elif self._expected.startswith("key") and letter == '"':
            self._within, self._is_key, self._token = "string", True, ['"'] if self._is_at_calls else None
        elif self._expected.startswith("value"):
            return self._begin_value(letter, at)
        else:
            return self._break(at)
        return at + 1

    def _begin_value(self, letter: str, at: int) -> int:
        is_call_expected = not self._stack or self._stack == ["["]
        if letter in CLOSING and len(self._stack) < DEEPEST:
            if self._stack == ["["] and letter == "[":
                return self._break(at)
            self._stack.append(letter)
            self._expected = "key or end" if letter == "{" else "value or end"
            return at + 1
        if is_call_expected:
            return self._break(at)
        if letter == '"':
            self._within = "string"
            return at + 1
        if SCALAR_LETTERS.match(letter) is None:
            return self._break(at)
        self._within, self._token = "scalar", []
        return at

    def _end_value(self, text: str, at: int) -> None:
        """Ends a value whose last letter stands before a place; keeps it where it is a field's of a call."""
        self._within, self._token, self._expected = "", None, "comma or end"
        if self.key is not None and self._is_at_calls:
            self.fields[self.key] = "".join((*self.pieces, text[self._begun : at])).strip(SPACE)
            self.key, self.pieces = None, []

    def _keep(self, letters: str) -> None:
        if self._token is not None:
            self._token.append(letters)

    def _break(self, at: int) -> int:
        self.broken = True
        return at

    @property
    def _is_at_calls(self) -> bool:
        """Whether the innermost value under way is an object that may be a call."""
        return self._stack == ["{"] or self._stack == ["[", "{"]

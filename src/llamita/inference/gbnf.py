"""Grammars in llama.cpp's notation (GBNF) as `llguidance` reads them, in its variant of Lark's notation.

In GBNF a grammar is about characters: wherever two rules could take the same one, both are followed. `llguidance` cuts
a text into terminals first, each as long as it can be, and would let `[a-z ]*` swallow what has to follow it. So every
terminal here is a single character, and rules alone say what is repeated. Knows nothing of tokens.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAME = re.compile(r"[A-Za-z0-9_-]+")
TIMES = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
ESCAPES = {"t": "\t", "r": "\r", "n": "\n"} | {letter: letter for letter in '\\"[]-'}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
ANY = r"/[\x{0}-\x{10FFFF}]/"


def to_lark(grammar: str) -> str:
    """Returns the grammar in Lark's notation; ValueError, with the place, for one that is none."""
    return _Reader(grammar).read()


@dataclass
class _Reader:
    """A grammar, read from its begin to its end."""

    text: str
    place: int = 0
    names: dict[str, str] = field(default_factory=dict)
    """The names of rules, and what they are called in Lark's notation, which has rules in small letters."""
    used: dict[str, int] = field(default_factory=dict)
    """Where each name was used first."""

    def read(self) -> str:
        rules: dict[str, str] = {}
        self.names = {"root": "start"}
        self._skip(lines=True)
        while self.place < len(self.text):
            name = self._name("the name of a rule")
            self._skip()
            if not self.text.startswith("::=", self.place):
                raise self._fault("::= behind the name of a rule")
            self.place += 3
            self._skip(lines=True)
            rules[self._called(name)] = self._alternatives(nested=False)  # of several by one name the last counts
            if self.place < len(self.text) and self.text[self.place] not in "\r\n":
                raise self._fault("the end of a rule")
            self._skip(lines=True)
        for name, place in {"root": 0, **self.used}.items():
            if self.names[name] not in rules:
                self.place = place
                raise self._fault(f"a rule named {name}")
        return "\n".join(f"{name}: {body}" for name, body in rules.items())

    def _alternatives(self, nested: bool) -> str:
        found = [self._sequence(nested)]
        while self._next_is("|", nested):
            self._skip(lines=True)
            found.append(self._sequence(nested))
        return " | ".join(found)

    def _next_is(self, sign: str, nested: bool) -> bool:
        """Whether a sign follows, which is then behind us; it may stand at the beginning of a line."""
        before = self.place
        self._skip(lines=True)
        if self.text.startswith(sign, self.place):
            self.place += 1
            return True
        if not nested:
            self.place = before
        return False

    def _sequence(self, nested: bool) -> str:
        found: list[str] = []
        while self.place < len(self.text):
            sign = self.text[self.place]
            if sign == '"':
                found.append(self._literal())
            elif sign == "[":
                found.append(self._class())
            elif sign == ".":
                self.place += 1
                found.append(ANY)
            elif sign == "(":
                self.place += 1
                self._skip(lines=True)
                inner = self._alternatives(nested=True)
                if not self._next_is(")", nested=True):
                    raise self._fault("a closing parenthesis")
                found.append(f"({inner})")
            elif sign in "*+?{":
                if not found:
                    raise self._fault("something to repeat")
                found[-1] = self._repeated(found[-1])
            elif NAME.match(sign):
                place, name = self.place, self._name("a name")
                self.used.setdefault(name, place)
                found.append(self._called(name))
            else:
                break
            self._skip(lines=nested)
        return " ".join(found) or '""'

    def _repeated(self, item: str) -> str:
        sign = self.text[self.place]
        if sign != "{":
            self.place += 1
            return f"({item}){sign}"
        times = TIMES.match(self.text, self.place)
        if times is None:
            raise self._fault("a number of times, as in {2} or {2,5}")
        least, most = int(times[1]), int(times[3]) if times[3] else None
        if times[2] is None:
            most = least
        if most is not None and most < least:
            raise self._fault(f"at least {least} times at most")
        self.place = times.end()
        return '""' if most == 0 else f"({item}){{{least},{'' if most is None else most}}}"

    def _literal(self) -> str:
        self.place += 1
        found: list[str] = []
        while self.text[self.place : self.place + 1] != '"':
            found.append(json.dumps(self._character(), ensure_ascii=False))
        self.place += 1
        return f"({' '.join(found)})" if len(found) > 1 else found[0] if found else '""'

    def _class(self) -> str:
        self.place += 1
        negated = self.text.startswith("^", self.place)
        self.place += negated
        found = ""
        while self.text[self.place : self.place + 1] != "]":
            found += _escaped(self._character())
            if self.text.startswith("-", self.place) and self.text[self.place + 1 : self.place + 2] != "]":
                self.place += 1
                found += "-" + _escaped(self._character())
        self.place += 1
        return f"/[{'^' * negated}{found}]/"

    def _character(self) -> str:
        """The character of a literal or a class at the place, escaped or not."""
        letter = self.text[self.place : self.place + 1]
        if not letter:
            raise self._fault("the end of a literal or of a class")
        self.place += 1
        if letter != "\\":
            return letter
        kind = self.text[self.place : self.place + 1]
        if (count := HEX_DIGITS.get(kind)) is not None:
            digits = self.text[self.place + 1 : self.place + 1 + count]
            if not re.fullmatch(f"[0-9a-fA-F]{{{count}}}", digits) or not _is_character(int(digits, 16)):
                raise self._fault(f"a character's number in {count} hexadecimal digits")
            self.place += 1 + count
            return chr(int(digits, 16))
        if kind not in ESCAPES:
            raise self._fault(f"an escape that llama.cpp has: one of {' '.join([*ESCAPES, *HEX_DIGITS])}")
        self.place += 1
        return ESCAPES[kind]

    def _name(self, expected: str) -> str:
        found = NAME.match(self.text, self.place)
        if found is None:
            raise self._fault(expected)
        self.place = found.end()
        return found[0]

    def _called(self, name: str) -> str:
        if name not in self.names:
            small = "rule_" + re.sub(r"\W", "_", name).lower()
            taken = set(self.names.values())
            numbered = (f"{small}_{number}" for number in range(1, len(taken) + 2))
            self.names[name] = small if small not in taken else next(other for other in numbered if other not in taken)
        return self.names[name]

    def _skip(self, lines: bool = False) -> None:
        """Goes on behind spaces and comments, and behind ends of lines where those count for no more."""
        pattern = _SPACES[lines].match(self.text, self.place)
        assert pattern is not None
        self.place = pattern.end()

    def _fault(self, expected: str) -> ValueError:
        line = self.text.count("\n", 0, self.place) + 1
        rest = self.text[self.place : self.place + 20]
        return ValueError(f"expected {expected} in line {line}, got {rest!r}")


_SPACES: Mapping[bool, re.Pattern[str]] = {False: re.compile(r"(?:[ \t]|#[^\r\n]*)*"), True: re.compile(r"(?:\s|#.*)*")}


def _is_character(number: int) -> bool:
    return number < 0x110000 and not 0xD800 <= number < 0xE000


def _escaped(letter: str) -> str:
    """A character in a class of a regular expression, where some signs have a meaning."""
    return letter if letter.isascii() and letter.isalnum() else f"\\x{{{ord(letter):X}}}"

"""Takes a model's answer as it comes and tells its reasoning, its text and its calls of tools apart.

The parser is one generator that reads the answer from front to back and waits where it needs more of it, so what it
gives does not depend on how the text was split. It holds back only what may still begin a mark, with the white space
before it, and calls until they are whole: what turns out to be no call is given as text. Every character is read a
bounded number of times.
"""

import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamita.text.answers.forms import ARGUMENTS_MARK, CALL_ID_MARK, QUOTE, AnswerFormat
from llamita.text.answers.functions import PYTHON_WORDS, Function, functions
from llamita.text.answers.json_calls import CLOSING, DEEPEST, SCALAR, SPACE, JsonReader
from llamita.text.answers.python_calls import PythonReader

LINE_ENDS = "\r\n"
LONGEST_SPACE = 64
"""Most characters of white space that are held back, or belong to the mark that follows them."""
LONGEST_NAME = 256
ARGUMENTS_KEYS = ("arguments", "parameters")
NAME = re.compile(r"[^\s\[\]{}<>\"]+")
BARE_VALUE = re.compile(r"[-+.0-9A-Za-z]+")
NUMBER = re.compile(r":[0-9]+$")

Kind = Literal["reasoning", "text", "call", "arguments"]
Steps = Generator[None, None, bool]
"""Waits for more text at each `yield`; returns whether what it was to read is there."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    A call begins with one part of the kind `call`, whose text is the function's name; the texts of the `arguments`
    that follow, of the same `index`, are together a JSON object. `index` counts the calls of the answer from 0.
    """

    kind: Kind
    text: str
    index: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """A whole answer: the text for the reader, the reasoning before it, and the calls."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


def parse_answer(
    form: AnswerFormat,
    text: str,
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: str = "",
    parallel: bool = True,
) -> Answer:
    """Parses a whole answer; the arguments are those of `AnswerParser`."""
    parser = AnswerParser(form, tools, prompt, parallel)
    return collect([*parser.feed(text), *parser.finish()])


def collect(parts: Iterable[Part]) -> Answer:
    """Joins the parts of one answer."""
    texts: dict[Kind, list[str]] = {"reasoning": [], "text": []}
    names: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            names.append(part.text)
            arguments.append([])
        elif part.kind == "arguments":
            arguments[part.index].append(part.text)
        else:
            texts[part.kind].append(part.text)
    calls = tuple(ToolCall(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True))
    return Answer("".join(texts["text"]), "".join(texts["reasoning"]), calls)


class AnswerParser:
    """Parses one answer.

    `tools` are those of the request, in OpenAI's form; without any, what looks like a call is text. `prompt` is the
    text that the chat template wrote: where it has opened the reasoning, the answer goes on in it. Without `parallel`,
    the first call ends the answer, and the rest is dropped. With `streams_arguments`, arguments are given as they come
    rather than when the call is whole: for answers that a grammar holds to their form, since what has been given
    cannot be taken back. Raises ValueError for tools of another form, and for nothing that a model writes.
    """

    def __init__(
        self,
        form: AnswerFormat,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: str = "",
        parallel: bool = True,
        streams_arguments: bool = False,
    ) -> None:
        self._calls = form.calls if tools else None
        self._reasoning_marks = form.reasoning
        self._in_reasoning = form.begins_in_reasoning(prompt)
        self._functions = functions(tools)
        self._parallel, self._streams = parallel, streams_arguments
        self._unread, self._at, self._ended = "", 0, False
        self._region: list[str] | None = None  # all that was read of what may be a call
        self._parts: list[Part] = []
        self._begun = 0  # calls so far
        self.is_complete = False
        """True once nothing more can come of the answer: after the first call, where one is all that is allowed."""
        self._steps = self._answer()

    def feed(self, text: str) -> list[Part]:
        """Takes more of the answer's text and returns the parts that it makes certain."""
        self._unread, self._at = self._unread[self._at :] + text, 0
        return self._advance()

    def finish(self) -> list[Part]:
        """Returns the rest, now that the answer has ended."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Part]:
        if not self.is_complete:
            try:
                next(self._steps)
            except StopIteration:
                self.is_complete = True
        else:
            self._unread, self._at = "", 0
        parts, self._parts = self._parts, []
        return parts

    # --- an answer ---------------------------------------------------------------------------------------------------

    def _answer(self) -> Steps:
        if self._reasoning_marks is not None:
            opening, closing = self._reasoning_marks
            if not self._in_reasoning and (length := (yield from self._ahead(opening))):
                self._take(length)
                self._in_reasoning = True
            if self._in_reasoning:
                yield from self._skip(LINE_ENDS)
                self._take((yield from self._pass("reasoning", closing, LINE_ENDS)))
                yield from self._skip(LINE_ENDS)
        if self._calls is None:
            yield from self._pass("text", "", "")
            return True
        is_bare = self._calls.layout == "bare"
        brace = (yield from self._ahead("{")) if is_bare else 0
        while True:
            if brace:
                length = brace - 1
            elif not (length := (yield from self._pass("text", self._calls.opening, SPACE))):
                return True
            before = self._begun
            is_call = yield from self._call(length, is_marked=not brace)
            if self._begun > before and not self._parallel:
                return True
            brace = (yield from self._next_bare()) if is_bare and is_call else 0
            if is_call and not brace:
                yield from self._drop_blank_end()

    def _call(self, length: int, is_marked: bool) -> Steps:
        """Reads a call, or several, behind a mark of so many characters; gives them as text where they are none."""
        assert self._calls is not None
        self._region, before = [], self._begun
        self._take(length)
        yield from self._skip(SPACE)
        letter = yield from self._letter()
        layout = self._calls.layout
        if layout == "section":
            is_call = yield from self._section()
        elif layout == "python":
            is_call = letter == "[" and (yield from self._python())
        elif layout == "braces":
            is_call = yield from self._braced()
        elif letter in ("{", "["):
            is_call = yield from self._json(is_marked)
        elif layout == "named":
            is_call = yield from self._named()
        elif layout == "pairs":
            is_call = yield from self._pairs()
        else:
            is_call = letter == "<" and (yield from self._tagged())
        region, self._region = "".join(self._region), None
        if is_call and self._may_begin:  # where no more calls may begin, the answer is over
            self._take((yield from self._ahead(self._calls.closing)))
        elif not is_call and self._begun == before:
            self._give("text", region)
        return is_call

    def _next_bare(self) -> Generator[None, None, int]:
        """Returns how far a further bare call's brace reaches; Llama writes `;` between calls."""
        separator = self._take((yield from self._ahead(";")))
        brace = yield from self._ahead("{")
        if separator and not brace:
            self._give("text", separator)
        return brace

    def _json(self, is_marked: bool) -> Steps:
        """Reads a call as a JSON object, or an array of them."""
        reader, progress = JsonReader(), _Progress()
        while (yield from self._read(reader)) is not None:
            if self._streams:
                self._give_progress(reader, progress, is_marked)
        calls = [self._call_of(fields, is_marked) for fields in reader.objects]
        if not reader.complete or None in calls:
            return False
        for call in calls[progress.objects :]:
            if call is not None and self._may_begin:
                self._give_call(call)
        return True

    def _give_progress(self, reader: JsonReader, progress: "_Progress", is_marked: bool) -> None:
        """Gives what has come of the calls that a grammar holds to their form."""
        for fields in reader.objects[progress.objects :]:
            call = self._call_of(fields, is_marked)
            if call is not None and progress.given:
                self._give("arguments", call.arguments[progress.given :], self._begun - 1)
            elif call is not None and self._may_begin:
                self._give_call(call)
            progress.end_object()
        if reader.key not in ARGUMENTS_KEYS:
            return
        name, fresh = _name_of(reader.fields), progress.fresh(reader.pieces)
        if progress.given:
            self._give("arguments", fresh, self._begun - 1)
            progress.given += len(fresh)
        elif fresh and progress.may_begin:
            progress.may_begin = fresh.startswith("{") and name is not None
            if progress.may_begin and name is not None and self._may_begin and self._is_known(name, is_marked):
                self._give_call(ToolCall(name, fresh))
                progress.given = len(fresh)

    def _named(self) -> Steps:
        """Reads a name, perhaps an id, and the arguments as JSON."""
        name = yield from self._word()
        if length := (yield from self._ahead(CALL_ID_MARK)):
            self._take(length)
            yield from self._word()
        self._take((yield from self._ahead(ARGUMENTS_MARK)))
        return bool(name) and (yield from self._arguments(name))

    def _section(self) -> Steps:
        """Reads calls with marks of their own, up to the mark behind them all; what follows whole ones and is none is
        text."""
        assert self._calls is not None
        assert self._calls.section is not None
        assert self._region is not None
        marks, begun = self._calls.section, self._begun
        while length := (yield from self._ahead(marks.opening)):
            self._take(length)
            self._take((yield from self._ahead(marks.before_name)))
            name = ((yield from self._until(marks.separator.strip(), LONGEST_NAME)) or "").strip()
            name = NUMBER.sub("", name) if marks.is_numbered else name
            is_call = NAME.fullmatch(name) is not None and (yield from self._arguments(name))
            if not is_call:
                if self._begun > begun and not self._streams:
                    self._give("text", "".join(self._region))
                return False
            self._take((yield from self._ahead(marks.after_arguments.strip())))
            self._take((yield from self._ahead(marks.closing)))
            self._region.clear()
            if not self._may_begin:
                break
        return self._begun > begun

    def _arguments(self, name: str) -> Steps:
        """Reads the arguments of a call of this name as JSON, and gives the call."""
        yield from self._skip(SPACE)
        if (yield from self._letter()) != "{":
            return False
        reader = JsonReader()
        arguments: list[str] = []
        while (taken := (yield from self._read(reader))) is not None:
            if self._streams and arguments:
                self._give("arguments", taken, self._begun - 1)
            elif self._streams:
                self._give_call(ToolCall(name, taken))
            arguments.append(taken)
        if reader.complete and not self._streams:
            self._give_call(ToolCall(name, "".join(arguments)))
        return reader.complete

    def _python(self) -> Steps:
        """Reads a list of calls as Python writes them."""
        reader = PythonReader()
        while not reader.complete and not reader.broken and (yield from self._letter()):
            self._take(reader.feed(self._unread, self._at) - self._at)
        calls = reader.calls()
        for name, arguments in calls:
            if self._may_begin:
                self._give_call(ToolCall(name, arguments))
        return bool(calls)

    def _pairs(self) -> Steps:
        """Reads a name, and a tag for the key and for the value of each argument."""
        assert self._calls is not None
        if not (name := (yield from self._word())):
            return False
        function = self._functions.get(name, Function(name))
        arguments: dict[str, str] = {}
        while length := (yield from self._ahead("<arg_key>")):
            self._take(length)
            key = yield from self._until("</arg_key>", LONGEST_NAME)
            if key is None or not (length := (yield from self._ahead("<arg_value>"))):
                return False
            self._take(length)
            if (value := (yield from self._until("</arg_value>"))) is None:
                return False
            arguments[key] = function.json_value(key, value)
        if not (yield from self._ahead(self._calls.closing)):
            return False
        self._give_call(ToolCall(name, _object_of(arguments)))
        return True

    def _braced(self) -> Steps:
        """Reads a name and its arguments in braces, as Gemma 4 writes them."""
        if not (length := (yield from self._ahead("call:"))):
            return False
        self._take(length)
        name = yield from self._word()
        if not name or (yield from self._letter()) != "{":
            return False
        if (arguments := (yield from self._braced_value(1))) is None:
            return False
        self._give_call(ToolCall(name, arguments))
        return True

    def _braced_value(self, depth: int) -> Generator[None, None, str | None]:
        """Reads a value in the notation of Gemma 4; returns it as JSON, None for what is none."""
        if length := (yield from self._ahead(QUOTE)):
            self._take(length)
            text = yield from self._until(QUOTE)
            return None if text is None else json.dumps(text, ensure_ascii=False)
        yield from self._skip(SPACE)
        opening = yield from self._letter()
        if opening not in ("{", "["):
            return (yield from self._bare_value())
        closing, items = CLOSING[opening], list[str]()
        self._take(1)
        yield from self._skip(SPACE)
        while (letter := (yield from self._letter())) != closing:
            if items:
                if letter != ",":
                    return None
                self._take(1)
            key = ""
            if opening == "{":
                if length := (yield from self._ahead(QUOTE)):
                    self._take(length)
                    quoted = yield from self._until(QUOTE, LONGEST_NAME)
                    if quoted is None or not (length := (yield from self._ahead(":"))):
                        return None
                    self._take(length)
                else:
                    quoted = yield from self._until(":", LONGEST_NAME)
                if not (name := (quoted or "").strip()):
                    return None
                key = json.dumps(name, ensure_ascii=False) + ": "
            value = (yield from self._braced_value(depth + 1)) if depth < DEEPEST else None
            if value is None:
                return None
            items.append(key + value)
            yield from self._skip(SPACE)
        self._take(1)
        return f"{opening}{', '.join(items)}{closing}"

    def _bare_value(self) -> Generator[None, None, str | None]:
        """Reads a number, a truth value or nothing, as JSON or Python spells it."""
        word = ""
        while (yield from self._letter()) and (run := BARE_VALUE.match(self._unread, self._at)) is not None:
            word += self._take(min(len(run[0]), LONGEST_NAME + 1 - len(word)))
            if len(word) > LONGEST_NAME:
                return None
        word = PYTHON_WORDS.get(word, word)
        return word if SCALAR.fullmatch(word) else None

    def _tagged(self) -> Steps:
        """Reads a tag for the function and one for each argument."""
        calls: list[ToolCall] = []
        while length := (yield from self._ahead("<function=")):
            self._take(length)
            name = yield from self._until(">", LONGEST_NAME)
            if not name or not name.strip():
                return False
            function = self._functions.get(name.strip(), Function(name.strip()))
            arguments: dict[str, str] = {}
            while length := (yield from self._ahead("<parameter=")):
                self._take(length)
                key = yield from self._until(">", LONGEST_NAME)
                value = None if key is None else (yield from self._until("</parameter>"))
                if key is None or value is None:
                    return False
                arguments[key] = function.json_value(key, value.removeprefix("\n").removesuffix("\n"))
            if not (length := (yield from self._ahead("</function>"))):
                return False
            self._take(length)
            calls.append(ToolCall(function.name, _object_of(arguments)))
        for call in calls:
            if self._may_begin:
                self._give_call(call)
        return bool(calls)

    def _call_of(self, fields: Mapping[str, str], is_marked: bool) -> ToolCall | None:
        """Returns the call that an object is; None for one that is none.

        Without a mark before it, an object is a call only where it has arguments, and the name of a known function.
        """
        name, arguments = _name_of(fields), next((fields[key] for key in ARGUMENTS_KEYS if key in fields), "")
        if name is None or not self._is_known(name, is_marked):
            return None
        if is_marked and arguments in ("", "null"):
            arguments = "{}"
        if arguments.startswith('"'):  # an object as JSON in a JSON string
            arguments = json.loads(arguments).strip(SPACE)
            reader = JsonReader()
            if reader.feed(arguments) < len(arguments) or not reader.complete or not _is_text(arguments):
                return None
        return ToolCall(name, arguments) if arguments.startswith("{") else None

    def _is_known(self, name: str, is_marked: bool) -> bool:
        return is_marked or name in self._functions

    # --- reading -----------------------------------------------------------------------------------------------------

    def _take(self, length: int) -> str:
        """Takes so many unread characters."""
        taken = self._unread[self._at : self._at + length]
        self._at += length
        if self._region is not None and taken:
            self._region.append(taken)
        return taken

    def _letter(self) -> Generator[None, None, str]:
        """The next character, not taken; nothing at the end."""
        while self._at >= len(self._unread) and not self._ended:
            yield
        return self._unread[self._at : self._at + 1]

    def _skip(self, letters: str) -> Generator[None, None, None]:
        """Takes all of these characters that come next."""
        while (letter := (yield from self._letter())) and letter in letters:
            self._take(1)

    def _drop_blank_end(self) -> Generator[None, None, None]:
        """Takes white space that comes next where nothing follows it."""
        while len(rest := self._unread[self._at : self._at + LONGEST_SPACE + 1]) <= LONGEST_SPACE:
            if rest.strip(SPACE):
                return
            if self._ended:
                self._take(len(rest))
                return
            yield

    def _ahead(self, mark: str) -> Generator[None, None, int]:
        """How many characters a mark that comes next has, the white space before it included; 0 where none comes."""
        while mark:
            text = self._unread[self._at : self._at + LONGEST_SPACE + len(mark)]
            rest = text.lstrip(SPACE)
            space = len(text) - len(rest)
            if space <= LONGEST_SPACE and rest.startswith(mark):
                return space + len(mark)
            if self._ended or space > LONGEST_SPACE or not mark.startswith(rest):
                break
            yield
        return 0

    def _pass(self, kind: Kind, mark: str, space: str) -> Generator[None, None, int]:
        """Gives all text before a mark, or to the end where there is none.

        Returns how many characters the mark has, with the white space before it that belongs to it; 0 at the end.
        """
        while True:
            text, found = self._unread, self._unread.find(mark, self._at) if mark else -1
            end = found if found >= 0 else len(text) - _overlap(text, mark, self._at)
            end = len(text) if self._ended and found < 0 else _before_space(text, self._at, end, space)
            self._give(kind, self._take(end - self._at))
            if found >= 0:
                return found + len(mark) - end
            if self._ended:
                return 0
            yield

    def _until(self, mark: str, longest: int | None = None) -> Generator[None, None, str | None]:
        """Takes all before a mark, and the mark; None where it does not come, or not within so many characters."""
        pieces: list[str] = []
        length = 0
        while True:
            found = self._unread.find(mark, self._at)
            end = found if found >= 0 else len(self._unread) - _overlap(self._unread, mark, self._at)
            if longest is not None and length + end - self._at > longest:
                self._take(longest - length)
                return None
            length += end - self._at
            pieces.append(self._take(end - self._at))
            if found >= 0:
                self._take(len(mark))
                return "".join(pieces)
            if self._ended:
                self._take(len(self._unread) - self._at)
                return None
            yield

    def _word(self) -> Generator[None, None, str]:
        """Takes a name; an empty text where none comes, or too long a one."""
        word = ""
        while (yield from self._letter()) and (run := NAME.match(self._unread, self._at)) is not None:
            word += self._take(min(len(run[0]), LONGEST_NAME + 1 - len(word)))
            if len(word) > LONGEST_NAME:
                return ""
        return word

    def _read(self, reader: JsonReader) -> Generator[None, None, str | None]:
        """Lets a reader take what is unread, and returns what it took; None once it takes no more."""
        if reader.complete or reader.broken or not (yield from self._letter()):
            return None
        return self._take(reader.feed(self._unread, self._at) - self._at)

    # --- giving ------------------------------------------------------------------------------------------------------

    @property
    def _may_begin(self) -> bool:
        return self._parallel or not self._begun

    def _give(self, kind: Kind, text: str, index: int = 0) -> None:
        if text:
            self._parts.append(Part(kind, text, index))

    def _give_call(self, call: ToolCall) -> None:
        self._give("call", call.name, self._begun)
        self._give("arguments", call.arguments, self._begun)
        self._begun += 1


@dataclass
class _Progress:
    """What was given of calls that are still being read."""

    objects: int = 0  # whole ones of the reader
    given: int = 0  # characters of the arguments under way
    pieces: int = 0  # of the reader's field under way that were looked at
    may_begin: bool = True  # whether the field under way is an object that follows a name

    def fresh(self, pieces: Sequence[str]) -> str:
        """Returns what has come since, without the white space before a value."""
        fresh = "".join(pieces[self.pieces :])
        self.pieces = len(pieces)
        return fresh if self.given else fresh.lstrip(SPACE)

    def end_object(self) -> None:
        self.objects, self.given, self.pieces, self.may_begin = self.objects + 1, 0, 0, True


def _object_of(fields: Mapping[str, str]) -> str:
    """Returns a JSON object of values that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in fields.items()) + "}"


def _name_of(fields: Mapping[str, str]) -> str | None:
    name = json.loads(fields["name"]) if fields.get("name", "").startswith('"') else None
    return name if name and len(name) <= LONGEST_NAME and _is_text(name) else None


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON can spell halves of characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _overlap(text: str, mark: str, start: int) -> int:
    """Returns the length of the longest suffix of the text behind `start` that is a proper prefix of a mark."""
    longest = min(len(text) - start, len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)


def _before_space(text: str, start: int, end: int, space: str) -> int:
    """Returns where the white space before `end` begins, at most LONGEST_SPACE of it and none before `start`."""
    first = max(start, end - LONGEST_SPACE)
    return first + len(text[first:end].rstrip(space))

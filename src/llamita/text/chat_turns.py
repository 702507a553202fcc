"""Where in a laid-out conversation each message stands, and what of it the assistant wrote.

Marks, code points that no text has, go around what messages say; the template lays them out with the rest, and where
they come out is where the messages stand. A turn of the assistant begins where the text that a model is asked with
ends, and ends with the token that ends turns. Knows nothing of tokens or of how a template is run.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.text.chat_sandbox import TemplateError

CODE_POINTS = (*range(0xFDD0, 0xFDF0), *(plane << 16 | low for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)))
"""Unicode keeps them out of text."""
COLOURS = 8  # of marks; a message has the colour of its number, modulo this
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names that a message's reasoning has; it may also stand in its content, as <think>...</think>."""
THINK_TAG = re.compile(r"(</?think>)")
AFTER_REASONING = re.compile(r".*</think>", re.DOTALL)

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, whether to end with the beginning of an answer) to text."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """Code points that a conversation does not hold: a pair for each colour, a pair for `{% generation %}`, a tag."""

    begins: str
    ends: str
    generation: tuple[str, str]
    tag: str

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.begins}{self.ends}]")


def choose_marks(*values: Any) -> Marks:
    """Marks that none of the values has; ValueError where those hold too many of the code points."""
    spoken = json.dumps(values, ensure_ascii=False, default=str)
    free = [chr(code) for code in CODE_POINTS if chr(code) not in spoken]
    if len(free) < 2 * COLOURS + 3:
        raise ValueError("the messages hold nearly all of the code points that Unicode keeps out of text, U+FDD0 first")
    return Marks(
        "".join(free[3 : 3 + COLOURS]), "".join(free[3 + COLOURS : 3 + 2 * COLOURS]), (free[0], free[1]), free[2]
    )


# --- marks around what messages say ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What is marked: templates that compare a text with another see the marks, so that not all can be at all times."""

    everyone: bool
    """Not the assistant alone."""
    fields: bool
    """Reasoning and the names of called tools, beside contents."""


LEVELS = (Level(True, True), Level(True, False), Level(False, True), Level(False, False))


def marked(messages: Messages, marks: Marks, level: Level) -> list[dict[str, Any]]:
    """The messages with marks around what their texts say, inside of the spaces that templates trim."""
    result = []
    for number, message in enumerate(messages):
        ours = message["role"] == "assistant"
        if not (ours or level.everyone):
            result.append(dict(message))
            continue
        mark = functools.partial(_mark, begin=marks.begins[number % COLOURS], end=marks.ends[number % COLOURS])
        changed = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            changed["content"] = _mark_content(content, mark, ours)
        elif isinstance(content, list | tuple):
            changed["content"] = [{**part, "text": _mark_content(part["text"], mark, ours)} for part in content]
        if level.fields and ours:
            changed |= {name: mark(message[name]) for name in REASONING if isinstance(message.get(name), str)}
            if isinstance(message.get("tool_calls"), list | tuple):
                changed["tool_calls"] = [_mark_call(call, mark) for call in message["tool_calls"]]
        result.append(changed)
    return result


def _mark(text: str, begin: str, end: str) -> str:
    core = text.strip()
    before = len(text) - len(text.lstrip())
    return text[:before] + begin + core + end + text[before + len(core) :] if core else text


def _mark_content(text: str, mark: Callable[[str], str], ours: bool) -> str:
    """The assistant's reasoning apart from its answer: the tags between are the format's, and templates cut at them."""
    if not ours:
        return mark(text)
    return "".join(piece if place % 2 else mark(piece) for place, piece in enumerate(THINK_TAG.split(text)))


def _mark_call(call: Any, mark: Callable[[str], str]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _mark_call(call["function"], mark)}
    return {**call, "name": mark(call["name"])} if isinstance(call.get("name"), str) else call


@dataclass(frozen=True)
class Place:
    """A stretch of a text that a message said."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Found:
    """A rendered text without its marks, and what stood between them, in the order of the text."""

    text: str
    places: list[Place]


def without_marks(text: str, marks: Marks, count: int) -> Found | None:
    """The text and its places, for `count` messages; None where marks do not come in pairs."""
    pieces: list[str] = []
    places: list[Place] = []
    position = before = message = 0
    opened: int | None = None
    start = 0
    for match in marks.pattern.finditer(text):
        pieces.append(text[before : match.start()])
        position += len(pieces[-1])
        before = match.end()
        colour = marks.begins.find(match[0])
        if colour >= 0 and opened is None:
            opened, start = colour, position
        elif colour < 0 and opened == marks.ends.index(match[0]):
            # A colour stands for several messages: for the one next to the last that was met.
            message = min(range(opened, count, COLOURS), key=lambda number: (abs(number - message), -number))
            places.append(Place(message, start, position))
            opened = None
        else:
            return None
    return None if opened is not None else Found("".join([*pieces, text[before:]]), places)


def generated(text: str, marks: Marks) -> tuple[str, list[Span]] | None:
    """The text without the marks of `{% generation %}`, and what stood between them; None where they are not pairs."""
    begin, end = marks.generation
    pieces = re.split(f"([{begin}{end}])", text)
    expected = itertools.cycle((begin, end))
    if any(mark != next(expected) for mark in pieces[1::2]) or len(pieces[1::2]) % 2:
        return None
    bounds = list(itertools.accumulate(map(len, pieces[::2])))
    return "".join(pieces[::2]), list(zip(bounds[:-1:2], bounds[1::2], strict=True))


# --- turns -----------------------------------------------------------------------------------------------------------


class TurnError(ValueError):
    """What of a conversation cannot be learned from its text; one line."""


class Turns:
    """The turns of the assistant in a text that a template laid messages out as.

    `render` lays out as many messages as it is given, with the same tools. `found` is the text with the places that
    marks showed, and which marks those were; None where they change the text. `control` finds control tokens; `ends`
    are the texts that end a turn, in the order to look for them. `is_open`: the last message goes on.
    """

    def __init__(
        self,
        text: str,
        messages: Messages,
        render: Render,
        marks: Marks,
        found: tuple[Level, Found] | None,
        control: re.Pattern[str],
        ends: Sequence[str],
        is_open: bool,
    ) -> None:
        self.text, self.messages, self._render, self._marks = text, messages, render, marks
        self._level = found[0] if found else None
        self._found = found[1] if found else None
        self._control, self._ends, self._is_open = control, ends, is_open
        self._begins_after: dict[str | None, str] = {}
        """What lies between the words of a message and an answer to it, by the message's role: found once, not for each
        answer of a long conversation."""

    def span(self, number: int) -> Span:
        """What message `number`, which is the assistant's, is in the text: all that a model writes, with the token that
        ends its turn. TurnError where that cannot be told."""
        start, end = self._marked_span(number) if self._found else self._span_by_prefix(number)
        return start, len(self.text) if self._is_open and number == len(self.messages) - 1 else end

    def check(self, number: int, text: str) -> None:
        """Raises TurnError where the text of a turn lacks what the message says."""
        message = self.messages[number]
        names, said = list(called(message)), list(answers(message))
        laid: list[str] | None = None  # what marks showed: a short word may stand in a text by chance
        if self._found is not None and self._level is not None and (self._level.fields or not names):
            laid = [self.text[place.start : place.end] for place in self._found.places if place.message == number]

        def is_there(part: str) -> bool:
            return part in text if laid is None else laid.count(part) >= [*names, *said].count(part)

        if missing := [name for name in names if not is_there(name.strip())]:
            raise TurnError(
                f"message {number} calls the tool {missing[0]!r}, which the chat template leaves out; use a template "
                "that lays tool calls out"
            )
        if not names and not all(map(is_there, said)):
            raise TurnError(
                f"the chat template changes this conversation: what message {number} says is not found in its text; "
                "use another template"
            )

    def check_others(self) -> None:
        """Raises TurnError where the text lacks a message that answers would be learned without."""
        if self._found is None or self._level is None or not self._level.everyone:
            return
        there = {place.message for place in self._found.places}
        for number, message in enumerate(self.messages):
            content = message.get("content")
            parts = [part["text"] for part in content] if isinstance(content, list | tuple) else [content or ""]
            if message["role"] != "assistant" and number not in there and any(map(str.strip, parts)):
                raise TurnError(
                    f"the chat template leaves out message {number}, which has the role {message['role']!r}; give "
                    "another role, or use another template"
                )

    def _marked_span(self, number: int) -> Span:
        assert self._found is not None
        own = self._own(number, [place for place in self._found.places if place.message == number])
        others = [place for place in self._found.places if place.message != number]
        first: int | None = None
        last: int | None = None
        if own:
            first, last = own[0].start, own[-1].end
            before = [place for place in others if place.end <= first]
            behind = [place.start for place in others if place.start >= last]
        else:
            before = [place for place in others if place.message < number]
            behind = [place.start for place in others if place.message > number]
        stop = min(behind, default=len(self.text))
        start = self._start(number, max(before, key=lambda place: place.end, default=None), first, stop)
        return start, self._end_after(number, start if last is None else max(start, last), stop)

    def _own(self, number: int, places: list[Place]) -> list[Place]:
        """The places of a message, less those behind its turn: some templates repeat a call's name with its result."""
        if number == len(self.messages) - 1 or not any(called(self.messages[number])):
            return places
        alone = self._rendered(number + 1, False)
        if alone is None:
            return places
        said = iter([alone.text[place.start : place.end] for place in alone.places if place.message == number])
        return list(itertools.takewhile(lambda place: self.text[place.start : place.end] in said, places))

    def _start(self, number: int, before: Place | None, first: int | None, stop: int) -> int:
        """Where the text that an answer is asked with ends; else the message's own first place."""
        low = before.end if before else 0
        role = self.messages[number - 1]["role"] if before and before.message == number - 1 else None
        if (known := self._begins_after.get(role)) and self.text.startswith(known, low):
            return low + len(known)
        asked = self._rendered(number, True)
        if asked is not None and self.text.startswith(asked.text):
            if role is not None and asked.places and asked.places[-1].end == low:
                self._begins_after[role] = asked.text[low:]
            return len(asked.text)
        if asked is not None:
            # The template lays earlier messages out in another way when they are the last: compare what follows them.
            rest = asked.text[asked.places[-1].end :] if asked.places else asked.text
            if (asked.places[-1].message if asked.places else None) == (before.message if before else None):
                shared = common_prefix(rest, self.text[low:stop])
                if shared < len(rest):
                    shared = self._last_edge(rest[:shared])
                elif role is not None:
                    self._begins_after[role] = rest
                if shared:
                    return low + shared
        begun = self._beginning
        high = stop if first is None else first
        if begun and (place := self.text.rfind(begun, low, high)) >= 0:
            return place + len(begun)
        if first is None:
            raise TurnError(
                f"the chat template lays message {number} out so that its turn cannot be told from the rest"
            )
        return first

    def _end_after(self, number: int, last: int, stop: int) -> int:
        """The end of the turn of which nothing is said after `last`."""
        for closing in self._ends:
            if (place := self.text.find(closing, last, stop)) >= 0:
                return place + len(closing)
        alone = self._rendered(number + 1, False)
        if alone is None:
            return last
        if alone.places and alone.places[-1].message == number:
            rest = alone.text[alone.places[-1].end :]
        elif alone.text.startswith(self.text[:last]):
            rest = alone.text[last:]
        else:
            return last
        shared = common_prefix(rest, self.text[last:stop])
        closing = rest[:shared]
        end = last + (len(rest.rstrip()) if shared == len(rest) else self._closed(closing))
        if self._control.search(closing) is None and (found := self._next_control.match(self.text, end)):
            return found.end()  # the next message's, for want of one of its own
        return end

    def _span_by_prefix(self, number: int) -> Span:
        """The span where no marks can be set: the text with the turn less the one before it."""
        fault = TurnError(
            f"the chat template changes this conversation so that what message {number} says cannot be told from the "
            "rest; use another template"
        )
        try:
            asked, alone = (self._render(self.messages[: number + more], not more) for more in (0, 1))
        except TemplateError:
            raise fault from None
        start = len(asked)
        if not (alone.startswith(asked) and self.text.startswith(asked)):
            raise fault
        turn = alone[start:]
        found = [turn.rfind(closing) + len(closing) for closing in self._ends if closing in turn]
        end = start + (found[0] if found else len(turn.rstrip()))
        if not self.text.startswith(alone[:end]):
            raise fault
        return start, end

    def _rendered(self, count: int, prompt: bool) -> Found | None:
        """The first messages alone, with the marks that the whole has; None where the template refuses them."""
        assert self._level is not None
        first = self.messages[:count]
        try:
            return without_marks(self._render(marked(first, self._marks, self._level), prompt), self._marks, count)
        except TemplateError:
            return None

    @functools.cached_property
    def _beginning(self) -> str:
        """What the template begins an answer with."""
        said = [{"role": "user", "content": "a"}]
        try:
            plain, asked = (self._render(said, prompt) for prompt in (False, True))
        except TemplateError:
            return ""
        return asked.removeprefix(plain) if asked.startswith(plain) else ""

    def _last_edge(self, text: str) -> int:
        """The last place behind a control token or a space: behind it two texts may go on alike by chance."""
        ends = [match.end() for match in self._control.finditer(text)]
        ends += [match.end() for match in re.finditer(r"\s", text)]
        return max(ends, default=0)

    def _closed(self, text: str) -> int:
        """The end of the last control token in what follows a turn's last word; without one, of all but spaces."""
        ends = [match.end() for match in self._control.finditer(text)]
        return ends[-1] if ends else len(text.rstrip())

    @functools.cached_property
    def _next_control(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._control.pattern})")


def common_prefix(one: str, other: str) -> int:
    """The number of characters that two texts begin alike with."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def called(message: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tools that a message calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        inner = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            yield inner["name"]


def answers(message: Mapping[str, Any]) -> Iterator[str]:
    """What a message says between tags of reasoning, its reasoning left out, which a template may drop."""
    content = message.get("content")
    for part in [part["text"] for part in content] if isinstance(content, list | tuple) else [content or ""]:
        pieces = THINK_TAG.split(AFTER_REASONING.sub("", part, count=1))[::2]
        yield from (piece.strip() for piece in pieces if piece.strip())

"""Conversations as tokens: a chat template lays messages out as text, in which only its own control tokens are such.

The template is a Jinja program out of the model's tokenizer files, or one of `BUILT_IN`; chat_sandbox.py runs it.
What people and models wrote is found again in the rendered text by rendering a second time with marks around it, so
that a control token spelled in a message stays text, and so that training can tell what the assistant wrote. Knows
nothing of models.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.text.chat_sandbox import MAX_TEXT, TemplateError, compile_template
from llamita.text.chat_templates import BUILT_IN
from llamita.text.tokenizer import ROLES, Tokenizer

Message = Mapping[str, Any]
MARKS = range(0xFDD0, 0xFDF0)  # code points that Unicode keeps out of text
LOOP_OVER_CONTENT = re.compile(r"\{%-?\s*for\s+\w+\s+in\s+[^%]*\bcontent\b")


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as token ids.

    `assistant_mask` is true for the tokens that the assistant wrote, with the spaces that lead to them from where the
    template begins an answer, and the control token that ends its turn; None where the template changes the messages so
    that they cannot be found in its text.
    """

    tokens: tuple[int, ...]
    text: str
    assistant_mask: tuple[bool, ...] | None


@dataclass(frozen=True)
class Layout:
    """A rendered conversation, and where in it messages stand; None for both where that cannot be known."""

    text: str
    written: list[tuple[int, int]] | None
    by_assistant: list[tuple[int, int]] | None


class Chat:
    """A tokenizer with a chat template: by default its own, else a name in `BUILT_IN` or a template's source."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        if template is None:
            self._sources = dict(tokenizer.chat_templates)
            if not self._sources:
                raise ValueError(
                    f"this model has no chat template; choose one of the built-in ones: {', '.join(BUILT_IN)}"
                )
        elif template in BUILT_IN or "{" in template:
            self._sources = {"default": BUILT_IN.get(template, template)}
        else:
            raise ValueError(f"there is no chat template {template!r}; the built-in ones are {', '.join(BUILT_IN)}")
        if template == "r0" and (absent := {"<r0>", "<r1>", "<r2>"} - self._control.keys()):
            raise ValueError(f"the template r0 needs the control token {min(absent)}, which this tokenizer lacks")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

        A message is {"role": ..., "content": text, a list of {"type": "text", "text": ...}, or None}; other keys go to
        the template. `add_generation_prompt` ends with the beginning of an answer; `continue_final_message` leaves the
        last message open. Raises ValueError, in one line, for messages of another form and for what the template
        refuses.
        """
        return self._layout(messages, add_generation_prompt, continue_final_message, tools, variables, find=False).text

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> ChatTokens:
        """The conversation as token ids; the arguments are those of `render`.

        BOS is there if the template writes it, and once. Control tokens come from the template alone: one that is
        spelled in a message is encoded as the characters it is, and refused with ValueError where the template changes
        the message or it stands in a role or another field.
        """
        layout = self._layout(messages, add_generation_prompt, continue_final_message, tools, variables, find=True)
        self._refuse_control_tokens(messages, tools, variables, contents=layout.written is None)
        tokens = self._tokens(layout)
        mask = None if layout.by_assistant is None else self._mask(tokens, layout.text, layout.by_assistant)
        return ChatTokens(tuple(tokens), layout.text, mask)

    @functools.cached_property
    def end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The ends of an answer besides an end-of-sequence token: token ids, stop strings.

        The control token that the template writes after an answer, or else the text there up to a space.
        """
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": letter} for role, letter in zip(roles, "abc", strict=True)]
        layout = self._layout(messages, False, False, None, {}, find=True)
        if not layout.by_assistant:
            return (), ()
        end = layout.by_assistant[-1][1]
        if (control := self._control_after(layout.text, end)) is not None:
            return (self._control[control[1]],), ()
        found = re.match(r"\s*\S+", layout.text[end:])
        return (), ((found[0],) if found else ())

    @functools.cached_property
    def _spaces_given(self) -> int | None:
        """Counts the spaces at the end of the beginning that the template gives an answer.

        Those that follow before its text are the assistant's to write. None where answers do not begin as the template
        begins one.
        """
        messages = [{"role": role, "content": letter} for role, letter in (("user", "a"), ("assistant", "b"))]
        given = self._layout(messages[:1], True, False, None, {}, find=False).text
        whole = self._layout(messages, False, False, None, {}, find=True)
        if not whole.by_assistant or not whole.text.startswith(given) or len(given) > whole.by_assistant[-1][0]:
            return None
        return len(given) - len(given.rstrip())

    # --- laying out ---------------------------------------------------------------------------------------------

    def _layout(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        find: bool,
    ) -> Layout:
        source = self._source(tools)
        plain = normalised(messages, flat=LOOP_OVER_CONTENT.search(source) is None)
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a new message and continue_final_message goes on in the last"
            )
        marks = choose_marks(plain, tools, variables)
        render = functools.partial(
            self._run, source, tools, add_generation_prompt, marks[4] if continue_final_message else "", variables
        )
        text = render(plain)
        if find:
            found = without_marks(render([marked(message, marks) for message in plain]), marks)
            if found is not None and found.text == text:
                return found
        return Layout(text, None, None)

    def _run(
        self,
        source: str,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        tag: str,
        variables: Mapping[str, Any],
        messages: list[dict[str, Any]],
    ) -> str:
        names = {token_id: name for name, token_id in self._control.items()}
        given = {f"{role}_token": getattr(self.tokenizer, f"{role}_id") for role in ROLES}
        special = {key: names[token_id] for key, token_id in given.items() if token_id in names}
        if tag:  # marks where the last message ends; a space after it shows whether the template trims
            messages = [*messages[:-1], with_content(messages[-1], lambda text: text + tag + " ")]
        text = _compiled(source)(
            {
                **special,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            }
        )
        if not tag:
            return text
        if tag not in text:
            raise ValueError("the chat template leaves the last message out, so it cannot be continued")
        end = text.rindex(tag)
        return text[:end] if text[end + 1 : end + 2] == " " else text[:end].rstrip()

    def _source(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._sources:
                return self._sources[name]
        raise ValueError(f"this model has chat templates, but none is the default: {', '.join(sorted(self._sources))}")

    # --- tokens ---------------------------------------------------------------------------------------------------

    @property
    def _control(self) -> Mapping[str, int]:
        return self.tokenizer.codec.special_tokens

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _tokens(self, layout: Layout) -> list[int]:
        """The ids of the text, in which control tokens are those that lie wholly outside of messages."""
        inside = bytearray(len(layout.text))
        for start, end in layout.written or ():
            inside[start:end] = b"\1" * (end - start)
        pieces: list[str | int] = []
        begin = position = 0
        refused = False
        while (match := self._control_pattern.search(layout.text, position)) is not None:
            if any(inside[match.start() : match.end()]):
                refused, position = True, match.start() + 1
                continue
            pieces += [layout.text[begin : match.start()], self._control[match[0]]]
            begin = position = match.end()
        if not refused:  # what transformers does, to the letter
            return self.tokenizer.encode(layout.text, allow_special=True)
        pieces.append(layout.text[begin:])
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self.tokenizer.encode(piece)
        return ids

    def _refuse_control_tokens(
        self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any], contents: bool
    ) -> None:
        """Refuse control tokens spelled where they cannot be told from the template's own."""
        outside = [{key: value for key, value in message.items() if key != "content"} for message in messages]
        for name, value in (("a field of a message", outside), ("the tools", tools), ("a variable", dict(variables))):
            self._refuse_in(value, name, "remove it")
        if contents:
            why = "and this chat template changes the message, so that it could not be kept from acting; remove it"
            self._refuse_in([message.get("content") for message in messages], "a message", why)

    def _refuse_in(self, value: Any, where: str, what: str) -> None:
        for text in strings(value):
            if (found := self._control_pattern.search(text)) is not None:
                raise ValueError(f"{where}: a text spells the control token {found[0]}, {what}")

    def _control_after(self, text: str, position: int) -> tuple[int, str] | None:
        """The control token next after a place, spaces aside: its end and its name."""
        match = re.compile(r"\s*").match(text, position)
        found = self._control_pattern.match(text, match.end() if match else position)
        return None if found is None else (found.end(), found[0])

    def _mask(self, tokens: list[int], text: str, spans: list[tuple[int, int]]) -> tuple[bool, ...] | None:
        places = self._places(tokens, text)
        if places is None:
            return None
        written = bytearray(len(text.encode()))
        for start, end in spans:
            control = self._control_after(text, end)
            if self._spaces_given is not None:
                start = min(start, len(text[:start].rstrip()) + self._spaces_given)
            first, last = len(text[:start].encode()), len(text[: control[0] if control else end].encode())
            written[first:last] = b"\1" * (last - first)
        return tuple(any(written[start:end]) for start, end in places)

    def _places(self, tokens: list[int], text: str) -> list[tuple[int, int]] | None:
        """Returns the bytes of the text that each token stands for; None where their bytes are not the text's."""
        data = text.encode()
        names = {token_id: name.encode() for name, token_id in self._control.items()}
        places, position = [], 0
        for token_id in tokens:
            piece = names.get(token_id) or self.tokenizer.token_bytes(token_id)
            if not data.startswith(piece, position):
                piece = piece.removeprefix(b" ")  # the one that SentencePiece puts before a text
            if not data.startswith(piece, position):
                return None
            places.append((position, position + len(piece)))
            position += len(piece)
        return places if position == len(data) else None


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None, **options: Any
) -> ChatTokens:
    """`Chat(tokenizer, template).encode(messages, ...)`."""
    return Chat(tokenizer, template).encode(messages, **options)


_compiled = functools.lru_cache(maxsize=16)(compile_template)


__all__ = ["BUILT_IN", "Chat", "ChatTokens", "Message", "TemplateError", "encode_chat"]


# --- messages, and marks around what they say ------------------------------------------------------------------------
#
# The marks are code points that no text has. They go around what a message says, inside of the spaces that templates
# trim.


def choose_marks(*values: Any) -> list[str]:
    """Five marks that none of the values has: two around what others wrote, two around the assistant's, one to end."""
    spoken = json.dumps(values, ensure_ascii=False, default=str)
    marks = [chr(code) for code in MARKS if chr(code) not in spoken][:5]
    if len(marks) < 5:
        raise ValueError("the messages hold nearly all of the code points U+FDD0 to U+FDEF, which are not for text")
    return marks


def normalised(messages: Sequence[Message], flat: bool) -> list[dict[str, Any]]:
    """The messages checked, without keys that are null; `flat`: text parts joined, for templates that expect texts."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list of at least one object with role and content")
    result, length = [], 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must be an object with a role and a content, got {message!r:.100}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                    raise ValueError(f"message {index} has a part of type {kind!r}; only text parts can be read")
            if flat:
                content = "\n".join(part["text"] for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"message {index} has the content {content!r:.100}; expected a text, text parts or null")
        length += sum(map(len, strings(content)))
        if content is None and not message.get("tool_calls"):
            content = ""  # what is not there would end many templates
        kept = {**message, "content": content}
        result.append({key: value for key, value in kept.items() if value is not None})
    if length > MAX_TEXT:
        raise ValueError(f"the messages have {length} characters; at most {MAX_TEXT} are allowed")
    return result


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def with_content(message: dict[str, Any], change: Any) -> dict[str, Any]:
    """The message with its text changed, or the last of its text parts."""
    content = message.get("content")
    if isinstance(content, list | tuple) and content:
        last = {**content[-1], "text": change(content[-1]["text"])}
        return {**message, "content": [*content[:-1], last]}
    if not isinstance(content, str):
        raise ValueError("the last message has no content to continue")
    return {**message, "content": change(content)}


def marked(message: dict[str, Any], marks: Sequence[str]) -> dict[str, Any]:
    """The message with marks around what its texts say, inside of the spaces that templates trim."""
    begin, end = marks[2:4] if message["role"] == "assistant" else marks[0:2]

    def mark(text: str) -> str:
        core = text.strip()
        before = len(text) - len(text.lstrip())
        return text[:before] + begin + core + end + text[before + len(core) :] if core else text

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    if isinstance(content, list | tuple):
        return {**message, "content": [{**part, "text": mark(part["text"])} for part in content]}
    return message


def without_marks(text: str, marks: Sequence[str]) -> Layout | None:
    """The text without marks, and what stood between them; None where they do not come in pairs."""
    pieces: list[str] = []
    spans: dict[str, list[tuple[int, int]]] = {marks[1]: [], marks[3]: []}
    position, start, expected = 0, 0, ""
    for piece in re.split(f"([{''.join(marks[:4])}])", text):
        if piece not in marks[:4] or not piece:
            pieces.append(piece)
            position += len(piece)
        elif expected:
            if piece != expected:
                return None
            spans[piece].append((start, position))
            expected = ""
        elif piece in (marks[0], marks[2]):
            start, expected = position, marks[marks.index(piece) + 1]
        else:
            return None
    return None if expected else Layout("".join(pieces), spans[marks[1]] + spans[marks[3]], spans[marks[3]])

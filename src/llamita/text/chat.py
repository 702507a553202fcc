"""Conversations as tokens: a chat template lays messages out as text, in which only its own control tokens are such.

The template is a Jinja program out of the model's tokenizer files, or one of `BUILT_IN`; chat_sandbox.py runs it. Where
in the text messages stand, and which turns are the assistant's, is found by chat_turns.py: so a control token spelled
in a message stays text, and training can tell what the assistant wrote. Knows nothing of models.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamita.text import chat_turns
from llamita.text.chat_sandbox import GENERATION, MAX_TEXT, TemplateError, compile_template
from llamita.text.chat_templates import BUILT_IN
from llamita.text.chat_turns import REASONING, THINK_TAG, Found, Level, Marks, Span, TurnError, Turns
from llamita.text.tokenizer import ROLES, Tokenizer

Message = Mapping[str, Any]
LEARNED = ("weight", "train", "training", "train_on_turn", "loss")
"""Keys of a message that are for training, not for the template: 0 or false where it is not learned. The first is that
of OpenAI and Mistral; data for axolotl and ms-swift have the others."""
MASKED = "masked"
"""The same the other way round, as torchtune has it."""
TELLS_ARGUMENTS = re.compile(r"arguments\s+is\s+string\s*-?%\}(?!\s*\{\{-?\s*raise_exception)")
"""A template that takes the arguments of calls as an object and as its JSON text."""
ARGUMENTS_ADDED = re.compile(r"\[.arguments.\]\s*\+|\.arguments\s*\+")
"""A template that adds arguments to a text as they are: it takes the JSON text and no object."""
LOOP_OVER_CONTENT = re.compile(r"\{%-?\s*for\s+\w+\s+in\s+[^%]*\bcontent\b")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
MARKS_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as token ids."""

    tokens: tuple[int, ...]
    text: str
    _find: Callable[[], tuple[bool, ...]] = field(compare=False, repr=False)

    @property
    def assistant_mask(self) -> tuple[bool, ...] | None:
        """True for the tokens of the assistant's turns; None where `fault` says why they cannot be found.

        A turn is all between the beginning of an answer that the template gives and the token that ends the turn, that
        one included: text, reasoning, calls of tools. Or it is what the template marks with `{% generation %}`."""
        return self._found[0]

    @property
    def fault(self) -> str:
        """What keeps the assistant's turns from being found, in one line; empty where nothing does."""
        return self._found[1]

    @functools.cached_property
    def _found(self) -> tuple[tuple[bool, ...] | None, str]:
        try:
            return self._find(), ""
        except TurnError as fault:
            return None, str(fault)


@dataclass(frozen=True)
class Layout:
    """A rendered conversation with the messages as the template was given them, and where in it they stand.

    `found`: the marks that did not change the text, and what stood between them; None where all change it.
    """

    text: str
    messages: list[dict[str, Any]]
    marks: Marks
    found: tuple[Level, Found] | None

    @property
    def written(self) -> list[Span] | None:
        """What messages say in the text; None where that is not known of all of them."""
        if self.found is None or not self.found[0].everyone:
            return None
        return [(place.start, place.end) for place in self.found[1].places]


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
        learned_from: int = 0,
        **variables: Any,
    ) -> ChatTokens:
        """The conversation as token ids; the arguments are those of `render`.

        BOS is there if the template writes it, and once. Control tokens come from the template alone: one that is
        spelled in a message is encoded as the characters it is, and refused with ValueError where the template changes
        the message or it stands in a role or another field. The tags of reasoning in the assistant's content are the
        format's own. The mask leaves out the messages before number `learned_from`, and those that say so.
        """
        layout = self._layout(messages, add_generation_prompt, continue_final_message, tools, variables, find=True)
        self._refuse_control_tokens(layout, tools, variables)
        tokens, offsets = self._tokens(layout)
        learned = [
            message["role"] == "assistant" and number >= learned_from and is_learned(message)
            for number, message in enumerate(messages)
        ]
        arguments = (continue_final_message, tools, variables)
        return ChatTokens(tuple(tokens), layout.text, lambda: self._mask(layout, offsets, learned, *arguments))

    def reads(self, variable: str) -> bool:
        """Whether the template reads a variable such as `enable_thinking`; one of several templates is enough."""
        pattern = re.compile(rf"\b{re.escape(variable)}\b")
        return any(pattern.search(COMMENT.sub("", source)) for source in self._sources.values())

    @functools.cached_property
    def end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The ends of an answer besides an end-of-sequence token: token ids, stop strings.

        The control token that the template writes after an answer, or else the text there up to a space.
        """
        behind = self._behind_an_answer(3)
        if (control := self._control_after(behind, 0)) is not None:
            return (self._control[control[1]],), ()
        found = re.match(r"\s*\S+", behind)
        return (), ((found[0],) if found else ())

    @functools.cached_property
    def _closing(self) -> tuple[str, ...]:
        """The texts that end a turn, in the order to look for them: all control tokens there, then the first alone."""
        try:
            ids, behind = self.end_of_turn[0], self._behind_an_answer(2)
        except TemplateError:
            return ()
        names = [name for name, token_id in self._control.items() if token_id in ids]
        run = re.match(rf"\s*((?:{self._control_pattern.pattern})+)", behind)
        together = [run[1]] if run and names and run[1].startswith(names[0]) else []
        return tuple(dict.fromkeys([*together, *names]))

    def _behind_an_answer(self, turns: int) -> str:
        """What the template writes behind an answer that is one letter, in a conversation of so many turns."""
        roles = ("user", "assistant", "user")[:turns]
        forms = (str, lambda letter: [{"type": "text", "text": letter}])
        fault: TemplateError | None = None
        for tools, form in itertools.product((None, ()), forms):  # some templates for tools need a list of them
            messages = [{"role": role, "content": form(letter)} for role, letter in zip(roles, "abc", strict=False)]
            try:
                layout = self._layout(messages, False, False, tools, {}, find=True)
            except TemplateError as error:
                fault = error
                continue
            answered = [place.end for place in layout.found[1].places if place.message == 1] if layout.found else []
            if answered:
                return layout.text[answered[-1] :]
            if form is not str:
                return ""
        assert fault is not None
        raise fault

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
        source = self.source(bool(tools))
        plain = with_reasoning(normalised(messages, flat=LOOP_OVER_CONTENT.search(source) is None), source)
        plain = with_arguments(plain, COMMENT.sub("", source))
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a new message and continue_final_message goes on in the last"
            )
        marks = chat_turns.choose_marks(plain, tools, variables)
        render = functools.partial(
            self._run, source, tools, add_generation_prompt, marks.tag if continue_final_message else "", variables
        )
        text = render(plain)
        return Layout(text, plain, marks, _find_places(plain, text, marks, render) if find else None)

    def _run(
        self,
        source: str,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        tag: str,
        variables: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
    ) -> str:
        names = {token_id: name for name, token_id in self._control.items()}
        given = {f"{role}_token": getattr(self.tokenizer, f"{role}_id") for role in ROLES}
        special = {key: names[token_id] for key, token_id in given.items() if token_id in names}
        if tag:  # marks where the last message ends; a space after it shows whether the template trims
            messages = [*messages[:-1], with_content(dict(messages[-1]), lambda text: text + tag + " ")]
        text = _compiled(source)(
            {
                **special,
                "messages": messages,
                "tools": tools,
                **({"xml_tools": tools} if tools and "xml_tools" in source else {}),
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

    def source(self, with_tools: bool = False) -> str:
        """The source of the template for conversations without tools, or of that with them; ValueError for neither."""
        for name in ("tool_use", "default") if with_tools else ("default",):
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

    def _tokens(self, layout: Layout) -> tuple[list[int], list[Span]]:
        """The ids of the text, and the characters that each stands for.

        Control tokens are those that lie wholly outside of messages."""
        inside = bytearray(len(layout.text))
        for start, end in layout.written or ():
            inside[start:end] = b"\1" * (end - start)
        controls: list[re.Match[str]] = []
        position = 0
        refused = False
        while (match := self._control_pattern.search(layout.text, position)) is not None:
            if any(inside[match.start() : match.end()]):
                refused, position = True, match.start() + 1
                continue
            controls.append(match)
            position = match.end()
        if not refused:  # what transformers does, to the letter
            return self.tokenizer.encode_with_offsets(layout.text, allow_special=True)
        ids: list[int] = []
        offsets: list[Span] = []
        begin = 0
        for control in (*controls, None):
            piece, places = self.tokenizer.encode_with_offsets(layout.text[begin : control and control.start()])
            ids += piece
            offsets += [(begin + start, begin + end) for start, end in places]
            if control is not None:
                ids.append(self._control[control[0]])
                offsets.append(control.span())
                begin = control.end()
        return ids, offsets

    def _refuse_control_tokens(self, layout: Layout, tools: Any, variables: Mapping[str, Any]) -> None:
        """Refuse control tokens spelled where they cannot be told from the template's own."""
        said = {"content"}
        if layout.written is not None and layout.found is not None and layout.found[0].fields:
            said.update(REASONING)
        outside = [{key: value for key, value in message.items() if key not in said} for message in layout.messages]
        for name, value in (("a field of a message", outside), ("the tools", tools), ("a variable", dict(variables))):
            self._refuse_in(value, name, "remove it")
        if layout.written is None:
            why = "and this chat template changes the message, so that it could not be kept from acting; remove it"
            for message in layout.messages:
                texts = strings(message.get("content"))
                if message["role"] == "assistant":
                    texts = (piece for text in texts for piece in THINK_TAG.split(text)[::2])
                self._refuse_in(list(texts), "a message", why)

    def _refuse_in(self, value: Any, where: str, what: str) -> None:
        for text in strings(value):
            if (found := self._control_pattern.search(text)) is not None:
                raise ValueError(f"{where}: a text spells the control token {found[0]}, {what}")

    def _control_after(self, text: str, position: int) -> tuple[int, str] | None:
        """The control token next after a place, spaces aside: its end and its name."""
        match = re.compile(r"\s*").match(text, position)
        found = self._control_pattern.match(text, match.end() if match else position)
        return None if found is None else (found.end(), found[0])

    def _mask(
        self,
        layout: Layout,
        offsets: Sequence[Span],
        learned: Sequence[bool],
        is_open: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> tuple[bool, ...]:
        """Which tokens stand for characters of the turns that are learned; TurnError where a turn cannot be found."""
        source = self.source(bool(tools))

        def render(messages: Sequence[Message], prompt: bool, more: Mapping[str, Any] | None = None) -> str:
            return self._run(source, tools, prompt, "", {**variables, **(more or {})}, messages)

        pattern, ends = self._control_pattern, self._closing
        turns = Turns(layout.text, layout.messages, render, layout.marks, layout.found, pattern, ends, is_open)
        turns.check_others()
        if (spans := self._generated(layout, source, render)) is not None:
            ours = [number for number, message in enumerate(layout.messages) if message["role"] == "assistant"]
            left_out = [turns.span(number) for number in ours if not learned[number]]
            spans = [span for span in spans if not any(overlap(span, other) for other in left_out)]
            text = "".join(layout.text[start:stop] for start, stop in spans)
            for number in ours:
                if learned[number] and spans:
                    turns.check(number, text)
        else:
            spans = []
            for number in (number for number, is_learned in enumerate(learned) if is_learned):
                start, stop = turns.span(number)
                turns.check(number, layout.text[start:stop])
                spans.append((start, stop))
        inside = bytearray(len(layout.text) + 1)
        for start, stop in spans:
            inside[start:stop] = b"\1" * (stop - start)
        return tuple(any(inside[start : max(stop, start + 1)]) for start, stop in offsets)

    def _generated(self, layout: Layout, source: str, render: Callable[..., str]) -> list[Span] | None:
        """What the template marks as generated; None where it marks nothing, or where marks change its text."""
        if MARKS_GENERATION.search(source) is None:
            return None
        given = dict(zip(GENERATION, layout.marks.generation, strict=True))
        found = chat_turns.generated(render(layout.messages, False, given), layout.marks)
        # The text may go on with the beginning of an answer, or end before what closes a message.
        shared = None if found is None else chat_turns.common_prefix(found[0], layout.text)
        if found is None or shared is None or shared < min(len(found[0].rstrip()), len(layout.text.rstrip())):
            return None
        return [(start, min(stop, len(layout.text))) for start, stop in found[1] if start < len(layout.text)]


def overlap(one: Span, other: Span) -> bool:
    """Whether two stretches share a character."""
    return one[0] < other[1] and other[0] < one[1]


def _find_places(
    messages: Sequence[Message], text: str, marks: Marks, render: Callable[[Sequence[Message]], str]
) -> tuple[Level, Found] | None:
    """Where in a text messages stand: the most of marks that does not change it; None where all do."""
    has_fields = any(name in message for message in messages for name in (*REASONING, "tool_calls"))
    for level in chat_turns.LEVELS:
        if level.fields and not has_fields:
            continue
        try:
            found = chat_turns.without_marks(render(chat_turns.marked(messages, marks, level)), marks, len(messages))
        except TemplateError:
            continue
        if found is not None and found.text == text:
            return level, found
    return None


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None, **options: Any
) -> ChatTokens:
    """`Chat(tokenizer, template).encode(messages, ...)`."""
    return Chat(tokenizer, template).encode(messages, **options)


_compiled = functools.lru_cache(maxsize=16)(compile_template)


__all__ = ["BUILT_IN", "Chat", "ChatTokens", "Message", "TemplateError", "encode_chat"]


# --- messages ---------------------------------------------------------------------------------------------------------


def normalised(messages: Sequence[Message], flat: bool) -> list[dict[str, Any]]:
    """The messages checked, without their weights and keys that are null; `flat`: text parts joined, for templates that
    expect texts."""
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
        for name in (*LEARNED, MASKED):
            if message.get(name) not in (0, 1, None):
                meant = "1, not learned, or 0" if name == MASKED else "0, not learned, or 1"
                raise ValueError(f"message {index} has the {name} {message[name]!r:.40}; expected {meant}")
        if message.get("function_call"):
            raise ValueError(
                f"message {index} has a function_call, the older form of a call; give a list of tool_calls"
            )
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)):
            raise ValueError(f"message {index} has the tool_calls {calls!r:.60}; expected a list of objects")
        length += sum(map(len, strings(content)))
        if content is None and not message.get("tool_calls"):
            content = ""  # what is not there would end many templates
        kept = {**message, "content": content}
        result.append(
            {key: value for key, value in kept.items() if value is not None and key not in (*LEARNED, MASKED)}
        )
    if length > MAX_TEXT:
        raise ValueError(f"the messages have {length} characters; at most {MAX_TEXT} are allowed")
    return result


def is_learned(message: Message) -> bool:
    """Whether training is to learn a message, so far as the message itself says."""
    return not message.get(MASKED) and all(message.get(name) in (None, 1) for name in LEARNED)


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


def with_reasoning(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """The messages with the assistant's reasoning under the names that the template reads, where it reads another."""
    read = [name for name in REASONING if re.search(rf"""[.'"]{name}\b""", COMMENT.sub("", source))]
    if not read:
        return messages
    result = []
    for message in messages:
        given = [message[name] for name in REASONING if isinstance(message.get(name), str) and message[name]]
        if message["role"] == "assistant" and given and not any(message.get(name) for name in read):
            message = {**message, **dict.fromkeys(read, given[0])}
        result.append(message)
    return result


def with_arguments(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as the template takes them: objects, or their JSON text.

    OpenAI's data has the text, of which most templates would write the text of a text. ValueError for a text that holds
    no object."""
    if TELLS_ARGUMENTS.search(source) or not any(message.get("tool_calls") for message in messages):
        return messages
    as_text = ARGUMENTS_ADDED.search(source) is not None

    def changed(call: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"], number)}
        arguments = call.get("arguments")
        if as_text and isinstance(arguments, Mapping):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if as_text or not isinstance(arguments, str):
            return call
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            name = call.get("name")
            raise ValueError(f"message {number} calls {name!r:.60} with {arguments!r:.60}, which is no JSON object")
        return {**call, "arguments": value}

    return [
        {**message, "tool_calls": [changed(call, number) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for number, message in enumerate(messages)
    ]

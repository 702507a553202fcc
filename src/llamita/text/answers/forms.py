"""The forms in which families of models write reasoning and calls of tools, and which of them a chat template has.

A form is recognised by what the template's source writes around a call, not by a model's name: a tuned model has its
parent's template under any name. Which marks of a form are control tokens, the tokenizer says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llamita.text.chat import COMMENT, Chat

Layout = Literal["object", "list", "xml", "pairs", "named", "section", "python", "braces", "bare"]
"""`object`: a JSON object a call, each between marks. `list`: all calls in one JSON array. `xml`: tags for the function
and for each argument. `pairs`: the name, then tags for the key and the value of each argument. `named`: the name, then
the arguments as JSON. `section`: the same, each call between marks of its own (`CallForm.section`). `python`: a list of
calls as Python writes them, `[f(a="b", c=[1])]`. `braces`: the name, then arguments in braces whose keys have no
quotation marks, and whose texts stand between `QUOTE`s. `bare`: a JSON object without marks."""

ARGUMENTS_MARK, CALL_ID_MARK = "[ARGS]", "[CALL_ID]"
TAGS = ("<tool_call>", "</tool_call>")
QUOTE = '<|"|>'
SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
READS_TOOLS = re.compile(r"\b(?:xml_|custom_)?tools\b")


@dataclass(frozen=True)
class Section:
    """The marks of each call in a form whose calls stand together between marks of their own."""

    opening: str
    separator: str
    """Between the name and the arguments."""
    closing: str
    before_name: str = ""
    after_arguments: str = ""
    is_numbered: bool = False
    """Whether a colon and the call's number follow the name."""


@dataclass(frozen=True)
class CallForm:
    """A form of calls of tools."""

    name: str
    layout: Layout
    opening: str
    """The mark before a call, or before all of them; a `bare` call may do without."""
    closing: str = ""
    """The mark behind it; empty where the next mark or the end of the answer follows."""
    arguments: str = "arguments"
    """The key of the arguments in a call's JSON object."""
    several: bool = True
    """Whether the template takes more than one call in a turn."""
    writes_ids: bool = False
    """Whether an id stands between the name and the arguments of a `named` call."""
    short_ids: bool = False
    """Whether the template refuses ids that are not nine letters and digits."""
    written: tuple[str, ...] = ()
    """Patterns that the source of a template of this form has, all of them."""
    absent: tuple[str, ...] = ()
    """Patterns that such a source has not, since they are those of other forms with the same marks."""
    ends: tuple[str, ...] = ()
    """Control tokens that end an answer."""
    section: Section | None = None
    """The marks of a call of the layout `section`."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All that may stand around a call."""
        found = [self.opening, self.closing]
        if self.layout == "named":
            found += [ARGUMENTS_MARK, CALL_ID_MARK]
        if self.layout == "pairs":
            found += PAIR_TAGS
        if self.layout == "braces":
            found.append(QUOTE)
        if (section := self.section) is not None:
            found += [section.opening, section.before_name, section.separator, section.closing]
        return tuple(filter(None, found))


PAIR_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MISTRAL = r"\[TOOL_CALLS\]"
FORMS = (
    CallForm(
        "mistral-ids",
        "named",
        "[TOOL_CALLS]",
        writes_ids=True,
        short_ids=True,
        written=(MISTRAL, r"\[ARGS\]", r"\[CALL_ID\]"),
    ),
    CallForm("mistral-named", "named", "[TOOL_CALLS]", short_ids=True, written=(MISTRAL, r"\[ARGS\]")),
    CallForm("mistral", "list", "[TOOL_CALLS]", short_ids=True, written=(MISTRAL,)),
    CallForm(
        "kimi-k2",
        "section",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        written=(r"<\|tool_calls_section_begin\|>", r"<\|tool_call_argument_begin\|>", "functions"),
        section=Section(
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            before_name="functions.",
            is_numbered=True,
        ),
    ),
    CallForm(
        "deepseek-v3",
        "section",
        *SECTION,
        written=(SECTION[0], "<｜tool▁sep｜>", "```json"),
        section=Section(
            "<｜tool▁call▁begin｜>",
            "\n```json\n",
            "<｜tool▁call▁end｜>",
            before_name="function<｜tool▁sep｜>",
            after_arguments="\n```",
        ),
    ),
    CallForm(
        "deepseek-v3.1",
        "section",
        *SECTION,
        written=(SECTION[0], "<｜tool▁sep｜>"),
        section=Section("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    CallForm(
        "gemma4",
        "braces",
        "<|tool_call>",
        "<tool_call|>",
        written=(r"<\|tool_call>call:", r"<tool_call\|>", r'<\|"\|>'),
        ends=("<|tool_response>",),
    ),
    CallForm("lfm2", "python", "<|tool_call_start|>", "<|tool_call_end|>", written=(r"<\|tool_call_start\|>\[",)),
    CallForm("granite3", "list", "<|tool_call|>", written=(r"<\|tool_call\|> followed by a JSON list",)),
    CallForm("phi4-mini", "list", "functools", written=(r"functools\[\{", "arguments")),
    CallForm("glm4", "pairs", *TAGS, written=("<tool_call>", "<arg_key>", "<arg_value>")),
    CallForm("qwen3-coder", "xml", *TAGS, written=("<tool_call>", "<function=", "<parameter=")),
    CallForm("smollm2", "list", *TAGS, written=(r"<tool_call>(\\n|\s)*\[", "arguments")),
    CallForm("hermes", "object", *TAGS, written=("<tool_call>", "name", "arguments"), absent=("<arg_key>",)),
    CallForm(
        "llama3",
        "bare",
        "<|python_tag|>",
        arguments="parameters",
        several=False,
        written=(r'"parameters\\?"', "ipython"),
        ends=("<|eom_id|>", "<|eot_id|>"),
    ),
)
"""In the order in which they are looked for. `hermes` is the form of Qwen 2.5 and 3 and of SmolLM3 as well."""


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes its answers."""

    calls: CallForm | None = None
    """The form of calls of tools; None where the template knows no tools, or has a form that is not known here."""
    reasoning: tuple[str, str] | None = None
    """The marks before and behind reasoning; None where the template has none."""
    hidden: Mapping[str, int] = field(default_factory=dict)
    """Ids of those marks that are control tokens, by name. An answer's text leaves such tokens out unless they are
    among `SamplingParams.visible_token_ids`, and a grammar names them by id."""
    stop_token_ids: tuple[int, ...] = ()
    """Control tokens that end an answer, besides those of `Chat.end_of_turn`."""

    @property
    def visible_token_ids(self) -> tuple[int, ...]:
        """The control tokens whose names an `AnswerParser` must see in the text."""
        return tuple(sorted(self.hidden.values()))

    def begins_in_reasoning(self, prompt: str) -> bool:
        """Whether the template has opened the reasoning: the answer to this prompt, as text, then goes on in it."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


def answer_format(chat: Chat) -> AnswerFormat:
    """Returns the format in which a chat template has its model write answers; one without anything for a model whose
    templates are all for other ends."""
    try:
        source = COMMENT.sub("", chat.source(with_tools=True))
    except ValueError:
        return AnswerFormat()
    calls = next((form for form in FORMS if _fits(form, source)), None) if READS_TOOLS.search(source) else None
    reasoning = next((marks for marks in REASONING_MARKS if marks[1] in source), None)
    marks = [*(reasoning or ()), *(calls.marks if calls is not None else ())]
    tokenizer, special = chat.tokenizer, chat.tokenizer.codec.special_tokens
    hidden = {
        name: token_id
        for name, token_id in special.items()
        if any(name in mark for mark in marks) and not tokenizer.token_bytes(token_id)
    }
    ends = tuple(special[name] for name in (calls.ends if calls else ()) if name in special)
    return AnswerFormat(calls, reasoning, hidden, ends)


def _fits(form: CallForm, source: str) -> bool:
    has_all = all(re.search(pattern, source) for pattern in form.written)
    return has_all and not any(re.search(pattern, source) for pattern in form.absent)

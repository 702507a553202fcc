"""The forms in which families of models write reasoning and calls of tools, and which of them a chat template has.

A form is recognised by what the template's source writes around a call, not by a model's name: a tuned model has its
parent's template under any name. Which marks of a form are control tokens, the tokenizer says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llamita.text.chat import COMMENT, Chat

Layout = Literal["object", "list", "xml", "named", "bare"]
"""`object`: a JSON object a call, each between marks. `list`: all calls in one JSON array. `xml`: tags for the function
and for each argument. `named`: the name, then the arguments as JSON. `bare`: a JSON object without marks."""

ARGUMENTS_MARK, CALL_ID_MARK = "[ARGS]", "[CALL_ID]"
TAGS = ("<tool_call>", "</tool_call>")
REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
READS_TOOLS = re.compile(r"\b(?:xml_|custom_)?tools\b")


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
    marks = list(reasoning or ())
    if calls is not None:
        marks += [calls.opening, calls.closing]
        marks += [ARGUMENTS_MARK, CALL_ID_MARK] if calls.layout == "named" else []
    tokenizer, special = chat.tokenizer, chat.tokenizer.codec.special_tokens
    hidden = {mark: special[mark] for mark in marks if mark in special and not tokenizer.token_bytes(special[mark])}
    ends = tuple(special[name] for name in (calls.ends if calls else ()) if name in special)
    return AnswerFormat(calls, reasoning, hidden, ends)


def _fits(form: CallForm, source: str) -> bool:
    has_all = all(re.search(pattern, source) for pattern in form.written)
    return has_all and not any(re.search(pattern, source) for pattern in form.absent)

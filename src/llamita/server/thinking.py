"""How the fields that ask for reasoning reach a chat template: as the variables that it reads, or not at all.

Templates know `reasoning_effort` (a word) or `enable_thinking` (on or off). A field that the model's template has no
variable for is refused, for the answer would be the same with it and without.
"""

from typing import Any, Literal

from llamita.server.errors import unsupported
from llamita.text.chat import Chat

EFFORT, SWITCH = "reasoning_effort", "enable_thinking"
MARKS = ("think", "THINK")
"""A word of the tags around reasoning, `<think>` or `[THINK]`: templates without it belong to models without it."""
Thinking = Literal["enabled", "disabled", "adaptive"]


def effort_variables(chat: Chat | None, effort: str | None, field: str) -> dict[str, Any]:
    """Returns the variables for an effort. A template with a switch alone has it off for "none", and else on.

    `ApiError` that names `field` where the template reads neither.
    """
    if effort is None or chat is None:
        return {}
    if chat.reads(EFFORT):
        return {EFFORT: effort}
    if chat.reads(SWITCH):
        return {SWITCH: effort != "none"}
    if effort == "none" and not _reasons(chat):
        return {}
    raise unsupported(field, f"the chat template of this model reads neither {EFFORT} nor {SWITCH}")


def thinking_variables(chat: Chat | None, thinking: Thinking | None, field: str) -> dict[str, Any]:
    """Returns the variables that turn reasoning on or off; "adaptive" leaves it to the template.

    `ApiError` that names `field` where the template has no switch.
    """
    if thinking is None or chat is None:
        return {}
    if thinking == "adaptive" and _reasons(chat):
        return {}
    if chat.reads(SWITCH):
        return {SWITCH: thinking != "disabled"}
    if thinking == "disabled" and not _reasons(chat):
        return {}
    raise unsupported(field, f"the chat template of this model does not read {SWITCH}")


def _reasons(chat: Chat) -> bool:
    return any(chat.reads(mark) for mark in MARKS)

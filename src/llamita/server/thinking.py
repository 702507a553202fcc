"""How the fields that ask for reasoning reach a chat template: as the variables that it reads, or not at all.

Templates know `reasoning_effort` (a word) or `enable_thinking` (on or off). A field that the model's template has no
variable for is refused, for the answer would be the same with it and without.
"""

from typing import Any, Literal

from llamita.server.errors import unsupported
from llamita.server.model import ServedModel

EFFORT, SWITCH = "reasoning_effort", "enable_thinking"
Thinking = Literal["enabled", "disabled", "adaptive"]


def effort_variables(model: ServedModel, effort: str | None, field: str) -> dict[str, Any]:
    """Returns the variables for an effort. A template with a switch alone has it off for "none", and else on.

    `ApiError` that names `field` where the template reads neither; "none" is what a model without reasoning does.
    """
    if effort is None or model.chat is None:
        return {}
    if model.chat.reads(EFFORT):
        return {EFFORT: effort}
    if model.chat.reads(SWITCH):
        return {SWITCH: effort != "none"}
    if effort == "none" and model.answer_format.reasoning is None:
        return {}
    raise unsupported(field, f"the chat template of this model reads neither {EFFORT} nor {SWITCH}")


def thinking_variables(model: ServedModel, thinking: Thinking | None, field: str) -> dict[str, Any]:
    """Returns the variables that turn reasoning on or off; "adaptive" leaves it to the template.

    `ApiError` that names `field` where the template has no switch; "disabled" is what a model without reasoning does.
    """
    if thinking is None or model.chat is None:
        return {}
    reasons = model.answer_format.reasoning is not None
    if thinking == ("adaptive" if reasons else "disabled"):
        return {}
    if model.chat.reads(SWITCH):
        return {SWITCH: thinking != "disabled"}
    raise unsupported(field, f"the chat template of this model does not read {SWITCH}")

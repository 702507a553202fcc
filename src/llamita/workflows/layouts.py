"""The chat template that a run lays its texts out with: one that is named, the model's own, or none.

Knows nothing of what is learned.
"""

from dataclasses import replace
from pathlib import Path

from llamita.data.preferences import Layout
from llamita.model.config import ModelConfig
from llamita.text.chat import Chat
from llamita.text.chat_templates import template_to_learn
from llamita.workflows.finetune import Base

TEXT = "text"
"""Named in the place of a template: prompt and answer as they are, one after the other."""


def source_of(template: str) -> str:
    """A template's source or name; of a file, what it holds, so that a run can be resumed without it."""
    if template and "{" not in template and Path(template).is_file():
        return Path(template).read_text("utf-8")
    return template


def layout_of(base: Base, template: str) -> tuple[Layout, ModelConfig]:
    """The layout, the template being the tokenizer's own from then on, and the model's config with what ends an answer
    among its ends. ValueError, in one line, for a template that cannot be, and for a model that does not write."""
    refuse_what_writes_nothing(base)
    tokenizer, model = base.tokenizer, base.config
    if template == TEXT or not (template or tokenizer.chat_template):
        return Layout(tokenizer, None), model
    chat = learn(base, template) if template else Chat(tokenizer)
    return Layout(tokenizer, chat), ending_answers(model, chat)


def learn(base: Base, template: str) -> Chat:
    """The chat of a template that is to be learned, which becomes the tokenizer's own. "" is the model's, or whichever
    built-in one its tokens suffice for."""
    source = template_to_learn(base.tokenizer, template)
    if template:
        base.tokenizer.chat_templates.clear()
    base.tokenizer.chat_template = source
    return Chat(base.tokenizer)


def ending_answers(model: ModelConfig, chat: Chat) -> ModelConfig:
    """The config with what ends an answer before what ended a text already."""
    ends = tuple(dict.fromkeys((*chat.end_of_turn[0], *model.eos_token_ids)))
    return replace(model, eos_token_id=ends[0] if len(ends) == 1 else ends or None)


def refuse_what_writes_nothing(base: Base) -> None:
    """ValueError, in one line, for a model that cannot write what its tokenizer says."""
    if base.config.num_labels:
        raise ValueError(f"{base.directory} is a classifier, which writes no answers; give a language model as --model")

"""Chat templates for models that come without one, and which of them a tokenizer has the tokens for.

Templates are Jinja programs as text; what runs them is chat_sandbox.py. Knows nothing of messages.
"""

import re
from collections.abc import Mapping

from llamita.text.tokenizer import Tokenizer

BUILT_IN = {
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "r0": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<r0>' ~ message.role ~ '<r1>' ~ message.content ~ '<r2>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<r0>assistant<r1>' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ message.role | capitalize ~ ': ' ~ message.content ~ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "plain-eos": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ message.role | capitalize ~ ': ' ~ message.content }}"
        "{{ eos_token if message.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
"""Templates for models without one. `chatml` and `r0` are meant for vocabularies in which their marks are tokens;
`plain-eos` ends an answer with the token that ends a text, which nearly every vocabulary has."""

MARKS: Mapping[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>"), "r0": ("<r0>", "<r1>", "<r2>")}
"""What a built-in template needs as tokens, or reserved ones in their place."""

RESERVED = re.compile(r"<r\d+>|<\|reserved_special_token_\d+\|>|<unused\d+>")
"""Names of tokens that a vocabulary keeps for a meaning to be given later: ours, Llama 3's, Gemma's."""


def template_to_learn(tokenizer: Tokenizer, name: str = "") -> str:
    """The source of the template to tune a model with, every mark of which is a token.

    `name` is one in `BUILT_IN` or a template's source. Without one it is the model's own, else the first that the
    tokenizer has tokens for: `r0`, on reserved tokens, or `plain-eos`. ValueError where it has too few.
    """
    if not name:
        if tokenizer.chat_template is not None:
            return tokenizer.chat_template
        name = "r0" if len(_reserved(tokenizer)) >= len(MARKS["r0"]) else "plain-eos"
    if name not in BUILT_IN:
        if "{" in name:
            return name
        raise ValueError(f"there is no chat template {name!r}; the built-in ones are {', '.join(BUILT_IN)}")
    if name == "plain":
        raise ValueError(
            "the template plain does not say where an answer ends, so that no model learns it; use plain-eos"
        )
    if name == "plain-eos" and tokenizer.eos_id not in tokenizer.special_ids:
        raise ValueError(
            "the template plain-eos needs a token that ends a text, which this tokenizer lacks; train a tokenizer with "
            f"--reserved-tokens {len(MARKS['r0'])}, and a model with it"
        )
    return _on_tokens(name, tokenizer)


def _on_tokens(name: str, tokenizer: Tokenizer) -> str:
    """A built-in template, reserved tokens in the place of its marks where those are no tokens."""
    source, marks = BUILT_IN[name], MARKS.get(name, ())
    absent = [mark for mark in marks if mark not in tokenizer.codec.special_tokens]
    if not absent:
        return source
    spare = _reserved(tokenizer)
    if len(spare) < len(marks):
        raise ValueError(
            f"the template {name} needs the token {absent[0]}, which this tokenizer lacks, and it has {len(spare)} "
            f"reserved tokens for the {len(marks)} marks; use the template plain-eos, or a tokenizer trained with "
            f"--reserved-tokens {len(marks)}"
        )
    instead = dict(zip(marks, spare, strict=False))
    return re.sub("|".join(map(re.escape, marks)), lambda mark: instead[mark[0]], source)


def _reserved(tokenizer: Tokenizer) -> list[str]:
    """The reserved tokens that none of the tokenizer's templates uses, by their ids."""
    used = "".join(tokenizer.chat_templates.values())
    found = {name: token_id for name, token_id in tokenizer.codec.special_tokens.items() if RESERVED.fullmatch(name)}
    return [name for name in sorted(found, key=found.__getitem__) if name not in used]

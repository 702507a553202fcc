"""Which form of calls and reasoning a chat template has: what it writes itself is read back as what it was given."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from llamita.text.answers import AnswerFormat, answer_format, parse_answer
from llamita.text.answers.forms import FORMS
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import BUILT_IN, Chat
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.tokenizer import Tokenizer
from tests.text.answers import templates

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Look.", "parameters": {
        "type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "array"}}}}}
    for name in ("weather", "forecast")
]  # fmt: skip
ARGUMENTS = [{"town": 'Où "là"?\n2 </x>', "days": [1, {"a": None}]}, {}]

UNQUOTED = [{"town": "Où, là? </x>", "days": [1, {"a": None}]}, {}]
"""LFM2's template puts texts between quotation marks as they are: nobody could read one that has such a mark."""


def tokenizer_of(*special: str, tags: bool = True) -> Tokenizer:
    """Bytes, control tokens, and the tags as tokens that are no control tokens."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(train_bpe_from_iterator(["a"], 259).codec.spec))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if tags:
        backend.add_tokens([AddedToken(name, normalized=False) for name in TAGS])
    return Tokenizer.from_codec(HuggingFaceCodec(backend))


def published(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def source_of(name: str) -> str:
    return getattr(templates, name) if name.isupper() else published(name)


EVERY = tokenizer_of(
    *templates.CHATML_TOKENS, *templates.LLAMA_TOKENS, *templates.MISTRAL_TOKENS, *templates.SECTION_TOKENS
)
FAMILIES = {
    "qwen2_5": ("hermes", False),
    "qwen3": ("hermes", True),
    "qwen3_instruct_2507": ("hermes", False),
    "qwen3_vl": ("hermes", False),
    "SMOLLM3": ("hermes", True),
    "SMOLLM2": ("smollm2", False),
    "qwen3_5_think": ("qwen3-coder", True),
    "qwen3_6": ("qwen3-coder", True),
    "nemotron_3_nano": ("qwen3-coder", True),
    "llama3_1": ("llama3", False),
    "llama3_2": ("llama3", False),
    "MISTRAL": ("mistral", False),
    "MISTRAL_NAMED": ("mistral-named", True),
    "MISTRAL_IDS": ("mistral-ids", True),
    "glm4moe": ("glm4", True),
    "GLM47": ("glm4", False),
    "KIMI_K2": ("kimi-k2", False),
    "DEEPSEEK_V3": ("deepseek-v3", False),
    "DEEPSEEK_V31": ("deepseek-v3.1", False),
    "lfm2_2_5": ("lfm2", True),
    "gemma4": ("gemma4", True),
    "gemma4_v5": ("gemma4", True),
    "GRANITE3": ("granite3", False),
    "PHI4_MINI": ("phi4-mini", False),
    # Families whose form of calls is not known, or that have none:
    "llama3": (None, False),
    "gptoss": (None, False),
    "gemma3": (None, False),
    "phi3": (None, False),
    "deepseekv3": (None, True),
    "deepseek_r1_distill": (None, True),
    "lfm2": (None, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_template_has_its_form(name: str) -> None:
    calls, reasons = FAMILIES[name]
    found = answer_format(Chat(EVERY, source_of(name)))
    assert (found.calls.name if found.calls else None, found.reasoning is not None) == (calls, reasons)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_know_no_tools(name: str) -> None:
    tokenizer = tokenizer_of("<r0>", "<r1>", "<r2>")
    assert answer_format(Chat(tokenizer, name)) == AnswerFormat()


@pytest.mark.parametrize("name", [name for name, (calls, _) in FAMILIES.items() if calls and name != "SMOLLM3"])
def test_calls_that_a_template_writes_are_read_back(name: str) -> None:
    chat = Chat(EVERY, source_of(name))
    form = answer_format(chat)
    assert form.calls is not None
    for count in range(1, 3 if form.calls.several else 2):
        given = ARGUMENTS if name != "lfm2_2_5" else UNQUOTED
        chosen = [{"name": f["function"]["name"], "arguments": a} for f, a in zip(TOOLS, given, strict=True)][:count]
        calls = [{"type": "function", "id": "abcdefghi", "function": call} for call in chosen]
        asked = [{"role": "user", "content": "Hello"}]
        # Generation prompts with reasoning in them are not what templates write before answers of the past.
        options: dict[str, Any] = {"tools": TOOLS, "enable_thinking": False}
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        written = chat.render([*asked, said], add_generation_prompt=False, **options)
        texts = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in chosen]
        said["tool_calls"] = [{**call, "function": text} for call, text in zip(calls, texts, strict=True)]
        assert chat.render([*asked, said], add_generation_prompt=False, **options) == written
        prompt = chat.render(asked, **options)
        answer = written.removeprefix(prompt)
        for end in ("<|im_end|>\n", "<|eot_id|>", "</s>", "<|tool_response>"):
            answer = answer.removesuffix(end)
        assert len(answer) < len(written)
        found = parse_answer(form, answer.removeprefix("<think>\n\n</think>\n\n"), TOOLS)
        assert found.text == ""
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
            (call["name"], call["arguments"]) for call in chosen
        ]


def test_control_tokens_are_hidden_until_they_are_asked_for() -> None:
    special = EVERY.codec.special_tokens
    named = answer_format(Chat(EVERY, templates.MISTRAL_NAMED))
    assert named.hidden == {
        mark: special[mark] for mark in ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
    }
    assert named.visible_token_ids == tuple(sorted(named.hidden.values()))
    assert answer_format(Chat(EVERY, published("qwen3"))).hidden == {}  # its tags are tokens with a text
    tagged = tokenizer_of(*templates.CHATML_TOKENS, *TAGS, tags=False)
    assert set(answer_format(Chat(tagged, published("qwen3"))).hidden) == set(TAGS)
    plain = tokenizer_of(*templates.CHATML_TOKENS, tags=False)
    assert answer_format(Chat(plain, published("qwen3"))).hidden == {}


def test_llamas_answers_have_further_ends() -> None:
    special = EVERY.codec.special_tokens
    found = answer_format(Chat(EVERY, published("llama3_2")))
    assert found.stop_token_ids == (special["<|eom_id|>"], special["<|eot_id|>"])
    assert found.hidden == {"<|python_tag|>": special["<|python_tag|>"]}


def test_gemmas_answers_end_where_the_tools_answer_begins() -> None:
    special = EVERY.codec.special_tokens
    found = answer_format(Chat(EVERY, published("gemma4")))
    assert found.stop_token_ids == (special["<|tool_response>"],)
    names = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
    assert found.hidden == {name: special[name] for name in names}


def test_the_template_for_tools_decides() -> None:
    tokenizer = tokenizer_of(*templates.CHATML_TOKENS)
    tokenizer.chat_templates = {"default": BUILT_IN["chatml"], "tool_use": published("qwen2_5")}
    found = answer_format(Chat(tokenizer))
    assert found.calls is not None
    assert found.calls.name == "hermes"
    tokenizer.chat_templates = {"rag": published("qwen2_5")}
    assert answer_format(Chat(tokenizer)) == AnswerFormat()


def test_a_template_opens_the_reasoning_or_closes_it() -> None:
    chat = Chat(EVERY, published("qwen3_5_think"))
    form, asked = answer_format(chat), [{"role": "user", "content": "<think>"}]
    assert form.begins_in_reasoning(chat.render(asked))
    assert not form.begins_in_reasoning(chat.render(asked, enable_thinking=False))
    chat = Chat(EVERY, published("qwen3"))
    assert not answer_format(chat).begins_in_reasoning(chat.render(asked))


def test_smollm3s_template_gets_tools_under_its_own_name() -> None:
    chat = Chat(EVERY, templates.SMOLLM3)
    asked = [{"role": "user", "content": "Hello"}]
    assert "'forecast'" in chat.render(asked, tools=TOOLS)
    assert "<tools>" not in chat.render(asked)
    assert "<tools>" not in chat.render(asked, tools=[])


def test_forms_have_names_of_their_own() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)

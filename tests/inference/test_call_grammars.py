"""Answers that a grammar holds to calls of tools: random choices among the allowed tokens give calls that fit.

The parser reads what was written, and another library validates the arguments against their JSON schemas.
"""

import json
import random
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest
import tokenizers
from tokenizers import AddedToken

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.detokenizer import IncrementalDetokenizer
from llamita.inference.structured import Grammars
from llamita.text.answers import Answer, AnswerFormat, answer_format, call_grammar, parse_answer
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.tokenizer import Tokenizer
from tests.inference.test_structured import JSON_TEXT, ids_in
from tests.text.answers import templates
from tests.text.answers.test_forms import source_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "greet": {
        "type": "object",
        "properties": {
            "greeting": {"enum": ["hi", "good\nday", "</parameter>"[:-1]]},
            "who": {"$ref": "#/$defs/person"},
            "loud": {"type": "boolean"},
            "note": {"type": ["string", "null"], "maxLength": 4},
        },
        "required": ["greeting", "who"],
        "additionalProperties": False,
        "$defs": {"person": PERSON},
    },
    "greet_all": {
        "type": "object",
        "properties": {"whom": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
                       "text": {"type": "string", "minLength": 2, "maxLength": 14}},
        "required": ["whom", "text"],
        "additionalProperties": False,
    },
    "now": {},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", **({"parameters": schema} if schema else {})}}
    for name, schema in SCHEMAS.items()
]
STRICT = [
    {**tool, "function": {**tool["function"], "strict": tool["function"]["name"] == "greet_all"}} for tool in TOOLS
]
FAMILIES = ["qwen2_5", "qwen3", "SMOLLM2", "SMOLLM3", "qwen3_5_think", "llama3_2", "MISTRAL", "MISTRAL_NAMED",
            "MISTRAL_IDS", "glm4moe", "GLM47", "KIMI_K2", "DEEPSEEK_V3", "DEEPSEEK_V31", "lfm2_2_5", "GRANITE3",
            "PHI4_MINI"]  # fmt: skip
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
FORM_TEXT = '<tool_call>\n{"name": "greet", "arguments": {"}}\n</tool_call> <function=now>\n<parameter=who>\n' * 20


def tokenizer_with(special: tuple[str, ...], tags: tuple[str, ...] = TAGS) -> Tokenizer:
    spec = train_bpe_from_iterator([JSON_TEXT + FORM_TEXT], 320).codec.spec
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, normalized=False) for name in tags])
    return Tokenizer.from_codec(HuggingFaceCodec(backend))


TOKENIZERS = {
    "chatml": tokenizer_with(templates.CHATML_TOKENS),
    "tags as control tokens": tokenizer_with((*templates.CHATML_TOKENS, *TAGS), ()),
    "tags as text": tokenizer_with(templates.CHATML_TOKENS, ()),
    "llama": tokenizer_with(templates.LLAMA_TOKENS, ()),
    "mistral": tokenizer_with(templates.MISTRAL_TOKENS, ()),
    "sections": tokenizer_with((*templates.CHATML_TOKENS, *templates.SECTION_TOKENS)),
}
GRAMMARS = {name: Grammars(known, known.vocab_size + 5, [known.eos_id]) for name, known in TOKENIZERS.items()}


def vocabularies(family: str) -> list[str]:
    if family.startswith("MISTRAL"):
        return ["mistral"]
    if family in ("KIMI_K2", "DEEPSEEK_V3", "DEEPSEEK_V31", "lfm2_2_5", "GRANITE3"):
        return ["sections", "tags as text"]
    if family in ("glm4moe", "GLM47", "PHI4_MINI"):
        return ["chatml", "tags as text"]
    return ["llama"] if family.startswith("llama") else ["chatml", "tags as control tokens", "tags as text"]


CASES = [(family, vocabulary) for family in FAMILIES for vocabulary in vocabularies(family)]


def chat_of(family: str, vocabulary: str) -> tuple[Chat, AnswerFormat]:
    chat = Chat(TOKENIZERS[vocabulary], source_of(family))
    return chat, answer_format(chat)


def write(
    grammar: str, vocabulary: str, form: AnswerFormat, seed: int, most: int = 500, end: float = 0.5
) -> str | None:
    """The text of random choices among the allowed tokens; None where it has not ended after so many.

    Tokens that close something are taken more often, so that it ends."""
    tokenizer, matcher = TOKENIZERS[vocabulary], GRAMMARS[vocabulary].matcher(SamplingParams(grammar=grammar))
    chance = random.Random(seed)
    text = IncrementalDetokenizer(tokenizer, context=tokenizer.encode("Say:"), visible=form.visible_token_ids)
    written = ""
    for _ in range(most):
        if matcher.is_complete:
            return written + text.finish()
        ids = ids_in(matcher.allowed())
        assert ids
        assert max(ids) < tokenizer.vocab_size
        if tokenizer.eos_id in ids and (len(ids) == 1 or chance.random() < end):
            return written + text.finish()
        ids = [i for i in ids if i != tokenizer.eos_id]
        closing = [i for i in ids if tokenizer.spelled_bytes(i)[:1] in (b"}", b"]", b'"', b"\n", b"<", b"[")]
        token_id = chance.choice(closing if closing and chance.random() < 0.4 else ids)
        matcher.accept(token_id)
        written += text.feed(token_id)
    return None


def check_fits(answer: Answer, names: Mapping[str, Any], text: str) -> None:
    for call in answer.calls:
        schema = names[call.name] or {"type": "object", "maxProperties": 0}
        assert jsonschema_rs.is_valid(schema, json.loads(call.arguments)), text


@pytest.mark.parametrize(("family", "vocabulary"), CASES)
def test_a_required_answer_is_calls_that_fit_their_schemas(family: str, vocabulary: str) -> None:
    chat, form = chat_of(family, vocabulary)
    prompt = chat.render([{"role": "user", "content": "Hello"}], tools=TOOLS, enable_thinking=False)
    grammar = call_grammar(form, TOOLS, "required", prompt)
    texts = [write(grammar, vocabulary, form, seed) for seed in range(10)]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= 5
    seen: set[str] = set()
    for text in finished:
        answer = parse_answer(form, text, TOOLS, prompt)
        assert answer.calls, text
        assert answer.text == "", text
        check_fits(answer, SCHEMAS, text)
        seen |= {call.name for call in answer.calls}
    assert len(seen) > 1
    if form.calls is not None and form.calls.several:
        assert any(len(parse_answer(form, text, TOOLS, prompt).calls) > 1 for text in finished)


@pytest.mark.parametrize(("family", "vocabulary"), CASES)
def test_a_named_function_is_called_once_where_calls_are_not_parallel(family: str, vocabulary: str) -> None:
    _, form = chat_of(family, vocabulary)
    choice = {"type": "function", "function": {"name": "greet_all"}}
    grammar = call_grammar(form, TOOLS, choice, "", parallel=False)
    finished = [text for seed in range(6) if (text := write(grammar, vocabulary, form, seed)) is not None]
    assert finished
    for text in finished:
        answer = parse_answer(form, text, TOOLS)
        assert [call.name for call in answer.calls] == ["greet_all"], text
        check_fits(answer, SCHEMAS, text)


@pytest.mark.parametrize(("family", "vocabulary"), CASES)
def test_a_free_answer_calls_strict_functions_as_they_are(family: str, vocabulary: str) -> None:
    _, form = chat_of(family, vocabulary)
    assert call_grammar(form, TOOLS, "auto") == ""
    grammar = call_grammar(form, STRICT, "auto")
    assert form.calls is not None
    mark = TOKENIZERS[vocabulary].encode(form.calls.opening, allow_special=True)
    start = "{" if form.calls.layout == "bare" else form.calls.opening
    called = 0
    for seed in range(8):
        chance = random.Random(seed)
        matcher = GRAMMARS[vocabulary].matcher(SamplingParams(grammar=grammar))
        text = IncrementalDetokenizer(TOKENIZERS[vocabulary], visible=form.visible_token_ids)
        before = "" if form.calls.layout == "bare" else chance.choice(["", "So. ", "a <b {x} [y] "])
        ids = TOKENIZERS[vocabulary].encode(before) + ([] if form.calls.layout == "bare" else mark)
        written = "".join(map(text.feed, ids))
        for token_id in ids:
            matcher.accept(token_id)  # text may come, and then the mark
        for _ in range(500):
            ids = ids_in(matcher.allowed()) if not matcher.is_complete else []
            if not ids or TOKENIZERS[vocabulary].eos_id in ids:
                break
            closing = [i for i in ids if TOKENIZERS[vocabulary].spelled_bytes(i)[:1] in (b"}", b"]", b'"', b"\n", b"<")]
            token_id = chance.choice(closing if closing and chance.random() < 0.4 else ids)
            matcher.accept(token_id)
            written += text.feed(token_id)
        else:
            continue
        if form.calls.layout == "bare" and start not in written[:20]:
            continue
        answer = parse_answer(form, written, STRICT)
        assert answer.calls, written
        assert answer.text.strip().startswith(before.strip())  # a token may reach into the text behind the call
        called += 1
        for call in answer.calls:
            value = json.loads(call.arguments)
            assert isinstance(value, dict)
            if call.name == "greet_all":
                assert jsonschema_rs.is_valid(SCHEMAS["greet_all"], value)
    assert called or form.calls.layout == "bare"


@pytest.mark.parametrize(
    ("family", "vocabulary"), [case for case in CASES if case[0] in ("qwen3", "qwen3_5_think", "MISTRAL_NAMED")]
)
def test_reasoning_may_come_first_and_must_where_it_was_opened(family: str, vocabulary: str) -> None:
    _, form = chat_of(family, vocabulary)
    assert form.reasoning is not None
    tokenizer, (opening, closing) = TOKENIZERS[vocabulary], form.reasoning
    for prompt in ("", f"<|im_start|>assistant\n{opening}\n"):
        matcher = GRAMMARS[vocabulary].matcher(SamplingParams(grammar=call_grammar(form, TOOLS, "required", prompt)))
        said = f"{'' if prompt else opening}Hm [a] <b>.{closing}\n"
        for token_id in tokenizer.encode(said, allow_special=True):
            matcher.accept(token_id)
        call = call_grammar(form, TOOLS, "required", f"{opening}\n\n{closing}\n\n")
        rest = GRAMMARS[vocabulary].matcher(SamplingParams(grammar=call))
        one = min(ids_in(rest.allowed()))
        matcher.accept(one)  # a call, at once
        rest.accept(one)


def test_nothing_is_held_where_nothing_is_asked():
    form = chat_of("qwen3", "chatml")[1]
    assert (
        call_grammar(form, STRICT, "none")
        == call_grammar(form, [], "auto")
        == call_grammar(AnswerFormat(), TOOLS)
        == ""
    )


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        (TOOLS, "some", "tool_choice='some' is not allowed"),
        (TOOLS, {"type": "function"}, "is not allowed; give none, auto, required or"),
        (TOOLS, {"type": "function", "function": {"name": "nope"}}, "names 'nope', which is none of the tools: greet"),
        ([], "required", "there are no tools"),
        ([{"type": "web_search"}], "required", r"tools\[0\] is 'web_search'"),
        ([{"type": "function", "function": {}}], "required", r"tools\[0\] has no name"),
        ([{"type": "function", "name": "a", "parameters": 3}], "required", r"parameters=3 must be a JSON schema"),
        ([{"type": "function", "name": "a", "strict": 1}], "required", "strict=1 must be true or false"),
        ([*TOOLS, TOOLS[0]], "required", "has the name 'greet', which an earlier one has"),
        (
            [{"type": "function", "name": "a", "parameters": {"type": "array"}}],
            "required",
            "must be of the type object",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(tools: Any, choice: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call_grammar(chat_of("qwen3", "chatml")[1], tools, choice)


def test_forms_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"form of calls \(gemma4\) cannot be forced; give tool_choice auto"):
        call_grammar(chat_of("gemma4", "sections")[1], TOOLS, "required")
    schema = {"type": "object", "properties": {"a-b": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "at", "parameters": schema}}]
    with pytest.raises(ValueError, match="has the argument 'a-b', and this model writes names"):
        call_grammar(chat_of("lfm2_2_5", "sections")[1], tools, "required")
    with pytest.raises(ValueError, match="knows no calls of tools"):
        call_grammar(AnswerFormat(), TOOLS, "required")
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    tools = [{"type": "function", "function": {"name": "at", "parameters": schema}}]
    with pytest.raises(ValueError, match="the argument day of the function at has a format, which cannot be enforced"):
        call_grammar(chat_of("qwen3_5_think", "chatml")[1], tools, "required")
    schema = {"type": "object", "properties": {"a>": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "at", "parameters": schema}}]
    with pytest.raises(ValueError, match="has the argument 'a>'"):
        call_grammar(chat_of("qwen3_5_think", "chatml")[1], tools, "required")
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "at", "parameters": schema}}]
    grammar = call_grammar(chat_of("qwen3", "chatml")[1], tools, "required")
    with pytest.raises(ValueError, match=r"grammar is not supported: .*uniqueItems"):
        GRAMMARS["chatml"].matcher(SamplingParams(grammar=grammar))


def test_names_and_schemas_cannot_break_out_of_the_grammar():
    name = 'a"} "b" /c/ <[1]>\n start: "x"'
    schema = {
        "type": "object",
        "properties": {'"}\nstart: "y': {"const": '%json {}\n"'}},
        "required": ['"}\nstart: "y'],
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": {**schema, "additionalProperties": False}}}]
    form = chat_of("qwen3", "chatml")[1]
    text = write(call_grammar(form, tools, "required", "", parallel=False), "chatml", form, 3)
    assert text is not None
    (call,) = parse_answer(form, text, tools).calls
    assert call.name == name
    assert jsonschema_rs.is_valid(schema, json.loads(call.arguments))

"""Answers with calls through the whole engine: control tokens that show, ends, and grammars with random models."""

import json
from pathlib import Path

import jsonschema_rs
import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.conversation import with_answer_format, with_end_of_turn
from llamita.inference.llm import LLM
from llamita.text.answers import AnswerParser, answer_format, call_grammar, collect, parse_answer
from llamita.text.chat import Chat
from tests.inference.helpers import write_small_model
from tests.inference.test_call_grammars import SCHEMAS, TOKENIZERS, TOOLS, chat_of
from tests.inference.test_engine_text import said

ASKED = [{"role": "user", "content": "Greet them."}]
CHOICE = {"type": "function", "function": {"name": "greet_all"}}


def model(vocabulary: str, directory: Path) -> LLM:
    """A model with random weights and that tokenizer, from its directory."""
    place = write_small_model(directory / "model", TOKENIZERS[vocabulary], seed=5, max_position_embeddings=4096)
    return LLM.load(place, backend="torch", device="cpu", engine=EngineConfig(blocks=1000))


@pytest.mark.parametrize(
    ("family", "vocabulary"),
    [
        ("qwen3", "tags as control tokens"),
        ("qwen3_5_think", "chatml"),
        ("SMOLLM2", "tags as text"),
        ("llama3_2", "llama"),
        ("MISTRAL", "mistral"),
        ("MISTRAL_NAMED", "mistral"),
    ],
)
def test_forced_calls_of_a_random_model_parse_and_fit(family: str, vocabulary: str, tmp_path: Path) -> None:
    llm = model(vocabulary, tmp_path)
    assert llm.tokenizer is not None
    chat, form = Chat(llm.tokenizer, chat_of(family, vocabulary)[0].source()), chat_of(family, vocabulary)[1]
    assert answer_format(chat) == form  # the tokenizer's files keep what is a control token
    prompt = chat.encode(ASKED, tools=TOOLS, enable_thinking=False)
    grammar = call_grammar(form, TOOLS, CHOICE, prompt.text, parallel=False)
    bias = dict.fromkeys(closing(llm), 4.0) | dict.fromkeys(
        (form.hidden[mark] for mark in form.hidden if "THINK" in mark), -50
    )
    limits = {"max_tokens": 200, "grammar": grammar, "temperature": 0.7, "logit_bias": bias}
    asked = [with_answer_format(SamplingParams(seed=seed, **limits), form) for seed in range(4)]
    free = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    *found, beside = llm.generate([prompt.tokens] * 4 + ["The fox"], [*asked, free])
    finished = [generation.text for generation in found if generation.finish_reason == "stop"]
    assert finished
    for text in finished:
        answer = parse_answer(form, text, TOOLS, prompt.text)
        assert answer.text == ""
        (call,) = answer.calls
        assert call.name == "greet_all"
        assert jsonschema_rs.is_valid(SCHEMAS["greet_all"], json.loads(call.arguments))
    assert llm.generate("The fox", free).token_ids == beside.token_ids
    parser = AnswerParser(form, TOOLS, prompt.text, streams_arguments=True)
    parts = [part for event in llm.events(prompt.tokens, asked[0]) for part in parser.feed(event.text)]
    assert collect([*parts, *parser.finish()]).calls[:1] == parse_answer(form, found[0].text, TOOLS).calls[:1]


def closing(llm: LLM) -> list[int]:
    """The tokens that end a string, an object, an array or an answer, so that random texts end."""
    assert llm.tokenizer is not None
    known = [llm.tokenizer.token_bytes(i) for i in range(llm.tokenizer.vocab_size)]
    return [i for i, text in enumerate(known) if text in (b'"', b"}", b"]", b"\n", b"<")] + [llm.tokenizer.eos_id or 0]


def test_control_tokens_show_where_they_are_asked_for() -> None:
    tokenizer = TOKENIZERS["mistral"]
    text = 'Let me see.[TOOL_CALLS]now[ARGS]{"at": "🦙"}'
    ids = tokenizer.encode(text, allow_special=True)
    form = chat_of("MISTRAL_NAMED", "mistral")[1]
    assert said(tokenizer, ids).text == 'Let me see.now{"at": "🦙"}'
    shown = said(tokenizer, ids, visible_token_ids=form.visible_token_ids)
    assert shown.text == text
    parser = AnswerParser(form, TOOLS)
    parts = [part for event in shown.events for part in parser.feed(event.text)]
    answer = collect([*parts, *parser.finish()])
    assert answer.text == "Let me see."
    assert [(call.name, call.arguments) for call in answer.calls] == [("now", '{"at": "🦙"}')]
    # A token that is not among them stays hidden, and one that ends the answer too.
    (inst,) = tokenizer.encode("[INST]", allow_special=True)
    hidden = said(tokenizer, [inst, *ids, tokenizer.eos_id, *ids], visible_token_ids=form.visible_token_ids)
    assert (hidden.text, hidden.reason) == (text, "stop")


def test_a_stop_string_may_be_a_control_tokens_name() -> None:
    tokenizer = TOKENIZERS["mistral"]
    ids = tokenizer.encode("a[TOOL_CALLS]now", allow_special=True)
    visible = tuple(tokenizer.codec.special_tokens.values())
    assert said(tokenizer, ids, visible_token_ids=visible, stop=("[TOOL_CALLS]",)).text == "a"


def test_llamas_calls_end_with_either_of_its_marks() -> None:
    chat, form = chat_of("llama3_2", "llama")
    tokenizer = chat.tokenizer
    params = with_answer_format(with_end_of_turn(SamplingParams(), chat), form)
    call = '<|python_tag|>{"name": "now", "parameters": {}}'
    for end in ("<|eom_id|>", "<|eot_id|>"):
        ids = tokenizer.encode(f"{call}{end}and more", allow_special=True)
        visible, stops = params.visible_token_ids, params.stop_token_ids
        found = said(tokenizer, ids, visible_token_ids=visible, stop_token_ids=stops)
        assert (found.text, found.reason) == (call, "stop")


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    llm = model("chatml", tmp_path)
    with pytest.raises(ValueError, match="visible_token_ids has token id 9999"):
        llm.request("a", SamplingParams(visible_token_ids=(9999,)))
    with pytest.raises(ValueError, match=r"grammar is not supported: .*unknown special token"):
        llm.request("a", SamplingParams(grammar="start: <|nope|>"))

"""A published model, untouched: its tokens, its continuations and its conversation are llama.cpp's."""

import dataclasses
import io
import json

import numpy as np
import pytest

import llamita
from llamita import SamplingParams
from llamita.cli.main import main
from llamita.inference.conversation import with_answer_format
from llamita.inference.drafting import PromptLookup
from llamita.text.answers import answer_format, call_grammar, parse_answer
from llamita.text.chat import Chat
from tests.real import smollm2
from tests.text.answers import templates

ANSWERS = json.loads(smollm2.STORED.read_text())
DIFFERENCE = 2e-3  # of logits here and in llama.cpp, measured; tokens may differ where two are as near as twice that


@pytest.fixture(scope="module")
def llm():
    return llamita.load(smollm2.needed(), backend="torch", dtype="float32")


def assert_near(llm, prompt, ours, expected):
    """The same tokens, up to one at which the two best logits are too near to tell."""
    pairs = enumerate(zip(ours, expected, strict=False))
    first = next((number for number, (a, b) in pairs if a != b), min(len(ours), len(expected)))
    if len(ours) == len(expected) == first:
        return
    logits = np.sort(llm.runner.forward([[*prompt, *ours[:first]]])["logits"][0, -1])
    margin = logits[-1] - logits[-2]
    assert margin <= 2 * DIFFERENCE, f"token {first} is another, by {margin}: {llm.tokenizer.decode(ours)!r}"


def assert_greedy(llm, prompt, expected, count):
    """Returns the text of `expected`, which is what the model says too."""
    found = llm.generate(prompt, SamplingParams(max_tokens=count, temperature=0.0))
    assert_near(llm, prompt, [token for token in found.token_ids if token != smollm2.END], expected)
    return llm.tokenizer.decode(expected)


def test_texts_become_llama_cpps_tokens(llm):
    for text, expected in zip(smollm2.TEXTS, ANSWERS["tokens"], strict=True):
        assert llm.tokenizer.encode(text) == expected
        assert llm.tokenizer.decode(expected) == text
    assert not llm.tokenizer.begins_texts
    assert llm.config.tie_word_embeddings


@pytest.mark.medium
def test_texts_go_on_as_in_llama_cpp(llm):
    for prompt, expected in zip(smollm2.PROMPTS, ANSWERS["continuations"], strict=True):
        assert_greedy(llm, llm.encode(prompt), expected, 24)
    assert llm.tokenizer.decode(ANSWERS["continuations"][0]).startswith(" Paris")


def converse(llm, turns):
    chat, messages = Chat(llm.tokenizer), []
    for turn, expected in list(zip(smollm2.TURNS, ANSWERS["answers"], strict=True))[:turns]:
        messages.append({"role": "user", "content": turn})
        prompt = chat.encode(messages, add_generation_prompt=True).tokens
        text = assert_greedy(llm, prompt, expected, smollm2.ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": text})
    return messages


@pytest.mark.medium
def test_a_conversation_is_llama_cpps(llm):
    messages = converse(llm, 3)
    assert messages[1]["content"] == "The capital of France is Paris."


@pytest.mark.slow
def test_ten_turns_are_llama_cpps(llm):
    converse(llm, 10)


@pytest.mark.medium
def test_the_verbs_open_it_as_it_is(capsys, monkeypatch):
    file = str(smollm2.needed())
    assert main(["generate", file, "The capital of France is", "--max-tokens", "2", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert main(["info", file]) == 0
    assert "134,515,008" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n/quit\n"))
    # With activations rounded to bytes, as kernels over the file's own blocks have them, another word is likelier.
    assert main(["chat", file, "--temperature", "0", "--max-tokens", "12", "--dtype", "float32"]) == 0
    assert "The capital of France is Paris." in capsys.readouterr().out


@pytest.mark.medium
def test_an_answer_follows_a_schema(llm):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
        "required": ["city", "inhabitants"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": "Give the capital of France and its inhabitants as JSON."}]
    prompt = Chat(llm.tokenizer).encode(messages, add_generation_prompt=True).tokens
    params = SamplingParams(max_tokens=60, temperature=0.0, json_schema=json.dumps(schema))
    answer = json.loads(llm.generate(prompt, params).text)
    assert answer.keys() == {"city", "inhabitants"}
    assert answer["city"] == "Paris"


TOOLS = {
    "get_weather": ("The weather in a city.", {"city": "string"}),
    "add": ("Add.", {"a": "integer", "b": "integer"}),
}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("question", "call"),
    [
        ("What is the weather in Paris?", {"name": "get_weather", "arguments": {"city": "Paris"}}),
        ("What is 17 plus 25?", {"name": "add", "arguments": {"a": 17, "b": 25}}),
    ],
)
def test_a_tool_is_called(llm, question, call):
    """Its template knows no tools: they stand in the system message, and a schema holds the answer to a call."""
    tools, calls = [], []
    for name, (description, fields) in TOOLS.items():
        properties = {field: {"type": kind} for field, kind in fields.items()}
        arguments = {"type": "object", "properties": properties, "required": [*fields], "additionalProperties": False}
        tools.append({"name": name, "description": description, "parameters": arguments})
        calls.append(arguments | {"properties": {"name": {"const": name}, "arguments": arguments}})
        calls[-1]["required"] = ["name", "arguments"]
    system = "Answer with a call of one of these functions, as JSON with its name and arguments: " + json.dumps(tools)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    prompt = Chat(llm.tokenizer).encode(messages, add_generation_prompt=True).tokens
    params = SamplingParams(max_tokens=60, temperature=0.0, json_schema=json.dumps({"anyOf": calls}))
    assert json.loads(llm.generate(prompt, params).text) == call


@pytest.mark.medium
@pytest.mark.parametrize(
    ("question", "name", "arguments"),
    [
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("What is 17 plus 25?", "add", {"a": 17, "b": 25}),
    ],
)
def test_a_forced_call_has_the_familys_form(llm, question, name, arguments):
    """With the form that the model was tuned on in its system message, as a template of its own."""
    chat = Chat(llm.tokenizer, templates.SMOLLM2)
    form = answer_format(chat)
    tools = []
    for tool, (description, fields) in TOOLS.items():
        properties = {field: {"type": kind} for field, kind in fields.items()}
        schema = {"type": "object", "properties": properties, "required": [*fields], "additionalProperties": False}
        function = {"name": tool, "description": description, "parameters": schema}
        tools.append({"type": "function", "function": function})
    prompt = chat.encode([{"role": "user", "content": question}], tools=tools)
    grammar = call_grammar(form, tools, "required", prompt.text, parallel=False)
    params = with_answer_format(SamplingParams(max_tokens=60, temperature=0.0, grammar=grammar), form)
    found = llm.generate(prompt.tokens, params)
    assert found.finish_reason == "stop"
    answer = parse_answer(form, found.text, tools, prompt.text)
    assert answer.text == ""
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [(name, arguments)]
    only = call_grammar(form, tools, {"type": "function", "function": {"name": "add"}}, prompt.text, parallel=False)
    other = llm.generate(prompt.tokens, dataclasses.replace(params, grammar=only))
    (call,) = parse_answer(form, other.text, tools, prompt.text).calls
    assert call.name == "add"
    assert {type(value) for value in json.loads(call.arguments).values()} == {int}


@pytest.mark.medium
def test_sharing_preempting_and_guessing_change_no_token(llm):
    """Prompts of one long beginning: alone, then together where memory is short, then with guesses from the text."""
    chat = Chat(llm.tokenizer)
    system = {"role": "system", "content": "You answer in one short sentence. " + " ".join(smollm2.TURNS)}
    prompts = [
        chat.encode([system, {"role": "user", "content": turn}], add_generation_prompt=True).tokens
        for turn in smollm2.TURNS[:3]
    ]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    alone = [llm.generate(prompt, params) for prompt in prompts]
    assert alone[1].statistics.cached_tokens >= 64  # of the beginning that the first has read
    engine = llamita.EngineConfig(blocks=2 * -(-max(map(len, prompts)) // 16) + 1, prefix_caching=False)
    together = llamita.LLM(llm.runner, llm.tokenizer, engine=engine).generate(prompts, params)
    assert sum(found.statistics.preemptions for found in together) > 0
    guessing = llamita.LLM(llm.runner, llm.tokenizer, drafter=PromptLookup())
    guessed = [guessing.generate(prompt, params) for prompt in prompts]
    assert sum(found.statistics.accepted_tokens for found in guessed) > 0
    for others in (together, guessed):
        for prompt, found, expected in zip(prompts, others, alone, strict=True):
            assert_near(llm, prompt, found.token_ids, expected.token_ids)

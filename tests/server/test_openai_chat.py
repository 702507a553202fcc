"""Chat completions asked by OpenAI's client: texts, log-probabilities and counts are those of the engine alone."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel, Field

from llamita.backend.interface import StepResult
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.server.model import ServedModel, serve_model
from llamita.server.settings import ServerLimits
from tests.inference.hash_model import HashRunner, shape
from tests.server.clients import (
    CALLING,
    POSITIONS,
    TOOLS_TEMPLATE,
    random_model,
    scripted_model,
    serve,
    small_tokenizer,
)
from tests.server.openai_peer import Streamed, answered, async_client, client, same_scores
from tests.text.answers.test_forms import source_of

MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a fox."},
    {"role": "user", "content": "Where is the owl? 🦙"},
]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["river", "kite"]}, "times": {"enum": [1, 2, 3]}},
            "required": ["at", "times"],
            "additionalProperties": False,
        },
    },
}
REST = {"type": "function", "function": {"name": "rest", "parameters": {"type": "object", "properties": {}}}}
STRICT_TEMPLATE = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content.strip() }}
{%- if message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("an id of a call must have nine letters and digits") }}{% endif %}
{{- call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}
{% endfor %}"""
"""As Mistral's, it takes no other ids of calls; as Qwen's, it ends without a content of each message."""
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": {"temperature": 0.9, "seed": 7},
    "top_p": {"top_p": 0.4, "seed": 3},
    "penalties": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    "logit_bias": {"temperature": 0, "logit_bias": {"70": 6.5, "71": -100}},
    "top_k": {"seed": 5, "top_k": 4},
    "min_p": {"seed": 5, "min_p": 0.2},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.7},
    "stop_token_ids": {"temperature": 0, "stop_token_ids": [9], "logit_bias": {"9": 4}},
    "min_tokens": {"temperature": 0, "min_tokens": 4, "ignore_eos": True},
    "n": {"seed": 11, "n": 3},
    "regex": {"seed": 1, "regex": "[a-c]{5,9}"},
    "choices": {"seed": 2, "choices": ["red kite", "owl"]},
    "grammar": {"seed": 3, "grammar": 'root ::= "fox" ("," [0-9]){3}'},
    "json_schema": {"seed": 4, "json_schema": {"enum": ["a", 2, None]}},
}
"""Fields of a request; those that are not OpenAI's are sent as its client sends further ones."""
OPENAIS = {"temperature", "seed", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "n"}


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with serve(random_model()) as address:
        yield address


@pytest.fixture(scope="module")
def alone() -> ServedModel:
    """The same model, which no server serves."""
    return random_model()


@pytest.fixture(scope="module")
def calling() -> Iterator[str]:
    with serve(scripted_model(CALLING, TOOLS_TEMPLATE)) as address:
        yield address


@pytest.fixture(scope="module")
def tools() -> Iterator[str]:
    with serve(random_model(TOOLS_TEMPLATE)) as address:
        yield address


def sent(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as arguments of the client."""
    return {
        **{name: value for name, value in fields.items() if name in OPENAIS},
        "extra_body": {name: value for name, value in fields.items() if name not in OPENAIS},
    }


def params_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields as the engine has them."""
    found = dict(fields)
    if "logit_bias" in found:
        found["logit_bias"] = {int(key): value for key, value in found["logit_bias"].items()}
    if "json_schema" in found:
        found["json_schema"] = json.dumps(found["json_schema"])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


@pytest.mark.parametrize("fields", SAMPLED.values(), ids=SAMPLED)
def test_an_answer_is_that_of_the_engine_whole_and_streamed(
    tiny: str, alone: ServedModel, fields: dict[str, Any]
) -> None:
    create = client(tiny).chat.completions.create
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "logprobs": True, "top_logprobs": 3}
    asked |= sent(fields)
    expected = answered(alone, MESSAGES, max_tokens=16, top_logprobs=3, **params_of(fields))
    whole = create(**asked)
    streamed = Streamed(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len(whole.choices) == len(streamed.text) == len(expected.continuations) == fields.get("n", 1)
    for choice, generation in zip(whole.choices, expected.continuations, strict=True):
        assert choice.message.content == generation.text == streamed.text[choice.index]
        reason = "length" if generation.finish_reason == "length" else "stop"
        assert choice.finish_reason == reason == streamed.reason[choice.index]
        for scores in (choice.logprobs.content, streamed.scores[choice.index]):
            same_scores([score.logprob for score in scores], generation.logprobs)
            for score, token_id, top in zip(scores, generation.token_ids, generation.top_logprobs, strict=True):
                assert score.token == alone.tokenizer.piece(token_id)
                same_scores([other.logprob for other in score.top_logprobs], [value for _, value in top])
                assert [other.token for other in score.top_logprobs] == [alone.tokenizer.piece(i) for i, _ in top]
    generated = sum(len(generation.token_ids) for generation in expected.continuations)
    for usage in (whole.usage, streamed.usage):
        assert usage.prompt_tokens == expected.statistics.prompt_tokens
        assert usage.completion_tokens == generated
        assert usage.total_tokens == usage.prompt_tokens + generated


def test_the_bytes_of_tokens_are_the_text(tiny: str) -> None:
    answer = client(tiny).chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, seed=5, logprobs=True, temperature=1.5
    )
    (choice,) = answer.choices
    data = b"".join(bytes(score.bytes) for score in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == choice.message.content
    assert all(score.top_logprobs == [] for score in choice.logprobs.content)


def test_the_asynchronous_client_reads_the_same(tiny: str, alone: ServedModel) -> None:
    async def ask() -> tuple[Any, list[Any]]:
        async with async_client(tiny) as asynchronous:
            create = asynchronous.chat.completions.create
            asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
            whole, stream = await asyncio.gather(create(**asked), create(**asked, stream=True))
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(ask())
    expected = answered(alone, MESSAGES, max_tokens=20, temperature=0).text
    assert whole.choices[0].message.content == Streamed(chunks).text[0] == expected


def test_a_stop_string_ends_the_answer_before_it(tiny: str, alone: ServedModel) -> None:
    text = answered(alone, MESSAGES, max_tokens=40, temperature=0).text
    stop = text[10:13]
    create = client(tiny).chat.completions.create
    for given in (stop, [stop, "never"], ["never", stop]):
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
        (choice,) = create(**asked, stop=given).choices
        assert choice.message.content == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
        streamed = Streamed(create(**asked, stop=given, stream=True))
        assert (streamed.text[0], streamed.reason[0]) == (choice.message.content, "stop")


def test_without_a_limit_an_answer_has_the_room_of_the_context(tiny: str, alone: ServedModel) -> None:
    messages = [{"role": "user", "content": "The fox and the owl. " * 106}]
    answer = client(tiny).chat.completions.create(
        model="tiny", messages=messages, temperature=0, extra_body={"ignore_eos": True}
    )
    expected = answered(alone, messages, temperature=0, ignore_eos=True)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == len(expected.token_ids) < 100
    assert answer.usage.total_tokens == POSITIONS


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_most_tokens_count(tiny: str, name: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, name: 3}
    answer = client(tiny).chat.completions.create(**asked)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "You are a fox."}, MESSAGES[1]],
        [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "Where is the owl? 🦙"}], "name": "ann"}],
        [{"role": "system", "content": [{"type": "text", "text": "You are a fox."}]}, MESSAGES[1]],
    ],
    ids=["developer", "parts", "parts of a system message"],
)
def test_other_forms_of_the_same_messages_have_the_same_answer(tiny: str, messages: list[Any]) -> None:
    create = client(tiny).chat.completions.create
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    answer, expected = create(messages=messages, **asked), create(messages=MESSAGES, **asked)
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_an_answer_of_before_is_a_part_of_the_conversation(tiny: str, alone: ServedModel) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "By the river."}, {"role": "user", "content": "And then?"}]
    answer = client(tiny).chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == answered(alone, messages, max_tokens=20, temperature=0).text


def test_a_last_answer_can_be_continued(tiny: str, alone: ServedModel) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "By the"}]
    answer = client(tiny).chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, temperature=0, extra_body={"continue_final_message": True}
    )
    prompt = alone.chat.encode(messages, add_generation_prompt=False, continue_final_message=True).tokens
    assert answer.usage.prompt_tokens == len(prompt)
    expected = alone.llm.generate(prompt, SamplingParams(temperature=0, max_tokens=9))
    assert answer.choices[0].message.content == expected.text


# --- forms of the answer ----------------------------------------------------------------------------------------------


class Sighting(BaseModel):
    animal: Literal["fox", "owl"]
    count: Literal[1, 2, 3]
    places: list[Literal["river", "kite"]] = Field(max_length=2)


def test_an_answer_is_parsed_as_a_class_of_pydantic(tiny: str, alone: ServedModel) -> None:
    schema = json.dumps(type_to_response_format_param(Sighting)["json_schema"]["schema"])
    found = set()
    for seed in range(2):
        answer = client(tiny).chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Sighting, seed=seed, max_tokens=200
        )
        (choice,) = answer.choices
        assert choice.message.parsed == Sighting.model_validate_json(choice.message.content)
        expected = answered(alone, MESSAGES, seed=seed, max_tokens=200, json_schema=schema)
        assert choice.message.content == expected.text
        found.add(choice.message.content)
    assert len(found) > 1  # the model chooses within the form


def test_a_json_object_is_one(tiny: str, alone: ServedModel) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_tokens": 12}
    answer = client(tiny).chat.completions.create(**asked, response_format={"type": "json_object"})
    expected = answered(alone, MESSAGES, seed=3, max_tokens=12, json_schema='{"type": "object"}')
    assert answer.choices[0].message.content == expected.text
    assert expected.text.lstrip().startswith("{")
    plain = client(tiny).chat.completions.create(**asked, response_format={"type": "text"})
    assert plain.choices[0].message.content == answered(alone, MESSAGES, seed=3, max_tokens=12).text


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "look"}}, "required"], ids=str)
def test_a_call_that_is_asked_for_comes_whole_and_streamed(tools: str, choice: Any) -> None:
    chat = client(tools).chat.completions
    asked: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "tools": [LOOK, REST], "tool_choice": choice, "max_tokens": 300,
        "parallel_tool_calls": False, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }  # fmt: skip
    names = set()
    for seed in range(2):
        (whole,) = chat.create(**asked, seed=seed).choices
        (call,) = whole.message.tool_calls
        arguments = json.loads(call.function.arguments)
        names.add(call.function.name)
        if call.function.name == "look":
            assert arguments.keys() == {"at", "times"}
            assert arguments["at"] in ("river", "kite")
            assert arguments["times"] in (1, 2, 3)
        else:
            assert arguments == {}
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        with chat.stream(**asked, seed=seed) as stream:  # the client's own accumulator of pieces
            deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            (final,) = stream.get_final_completion().choices
        (streamed,) = final.message.tool_calls
        assert streamed.function.name == call.function.name
        assert streamed.function.arguments == call.function.arguments
        assert "".join(event.arguments_delta for event in deltas) == call.function.arguments
        assert (final.finish_reason, final.message.content) == ("tool_calls", None)
    assert names == {"look"} if isinstance(choice, dict) else names <= {"look", "rest"}


def test_reasoning_text_and_calls_come_apart(calling: str) -> None:
    create = client(calling).chat.completions.create
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": [{**LOOK, "function": {"name": "look", "parameters": {"type": "object"}}}, REST],
    }
    (whole,) = create(**asked).choices
    assert whole.message.reasoning_content == "Hm."
    assert whole.message.content == "I look."
    calls = [(call.type, call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls]
    assert calls == [("function", "look", {"at": "río"}), ("function", "rest", {})]
    assert whole.finish_reason == "tool_calls"
    assert len({call.id for call in whole.message.tool_calls}) == 2

    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = Streamed(chunks)
    assert (streamed.reasoning[0], streamed.text[0], streamed.reason[0]) == ("Hm.", "I look.", "tool_calls")
    assert streamed.usage.completion_tokens_details.reasoning_tokens > 0
    pieces: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for piece in choice.delta.tool_calls or ():
                pieces.setdefault(piece.index, []).append(piece)
    for call, parts in zip(whole.message.tool_calls, pieces.values(), strict=True):
        assert parts[0].id
        assert (parts[0].type, parts[0].function.name) == ("function", call.function.name)
        assert all(part.id is None and part.function.name is None for part in parts[1:])
        assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments


def test_calls_and_their_results_go_back_in(calling: str) -> None:
    create = client(calling).chat.completions.create
    asked: dict[str, Any] = {"model": "tiny", "tools": [REST, LOOK]}
    first = create(messages=MESSAGES, **asked)
    message = first.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "A kite."} for call in message.tool_calls]
    again = create(messages=[*MESSAGES, message.to_dict(), *results], **asked)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    assert again.choices[0].message.content == "I look."


def test_calls_go_back_into_a_template_that_is_strict_about_them() -> None:
    said = '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "kite"}}, {"name": "rest", "arguments": {}}]'
    with serve(scripted_model(said, STRICT_TEMPLATE)) as address:
        create = client(address).chat.completions.create
        asked: dict[str, Any] = {"model": "tiny", "tools": [REST, LOOK]}
        message = create(messages=MESSAGES, **asked).choices[0].message
        assert (message.content, [call.function.name for call in message.tool_calls]) == (None, ["look", "rest"])
        results = [{"role": "tool", "tool_call_id": call.id, "content": "A kite."} for call in message.tool_calls]
        sent = message.to_dict()
        for answer in (sent, {name: value for name, value in sent.items() if name != "content"}):
            again = create(messages=[*MESSAGES, answer, *results], **asked)
            assert again.choices[0].finish_reason == "tool_calls"


FORMS = {
    "glm4moe": "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>kite</arg_value>\n</tool_call>\n"
    "<tool_call>rest\n</tool_call>",
    "KIMI_K2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "kite"}<|tool_call_end|><|tool_call_begin|>functions.rest:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    "DEEPSEEK_V31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"at": "kite"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>rest<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "lfm2_2_5": '<|tool_call_start|>[look(at="kite"), rest()]<|tool_call_end|>',
    "gemma4": '<|tool_call>call:look{at:<|"|>kite<|"|>}<tool_call|><|tool_call>call:rest{}<tool_call|>',
}


@pytest.mark.parametrize("family", FORMS)
def test_calls_in_each_familys_form_come_whole_and_streamed_and_go_back_in(family: str) -> None:
    """DeepSeek's template wants the arguments of calls as text, the others as objects."""
    with serve(scripted_model(FORMS[family], source_of(family), positions=8192)) as address:
        chat = client(address).chat.completions
        asked: dict[str, Any] = {"model": "tiny", "tools": [REST, LOOK]}
        (whole,) = chat.create(messages=MESSAGES, **asked).choices
        with chat.stream(messages=MESSAGES, **asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        for choice in (whole, streamed):
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert calls == [("look", {"at": "kite"}), ("rest", {})]
            assert (choice.finish_reason, choice.message.content or "") == ("tool_calls", "")
        results = [{"role": "tool", "tool_call_id": call.id, "content": "Red."} for call in whole.message.tool_calls]
        again = chat.create(messages=[*MESSAGES, whole.message.to_dict(), *results], **asked)
        assert again.choices[0].finish_reason == "tool_calls"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": "0.5"}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**6}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"fox": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"response_format": {"type": "sound"}}, "response_format", "invalid_value"),
        ({"extra_body": {"mirostat": 2}}, "mirostat", "invalid_value"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": True}}, "continue_final_message",
         "invalid_value"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"json_schema": {}}}, "json_schema",
         "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "user", "content": "the fox and the owl " * 600}]}, "messages",
         "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_is_not_allowed_is_refused_by_its_name(
    tiny: str, fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).chat.completions.create(**asked, stream=stream)
    assert refused.value.param == param
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"


def test_stream_options_are_for_streams(tiny: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).chat.completions.create(model="tiny", messages=MESSAGES, stream_options={"include_usage": True})
    assert refused.value.param == "stream_options"


def test_tools_need_a_template_that_knows_them(tiny: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).chat.completions.create(model="tiny", messages=MESSAGES, tools=[REST])
    assert refused.value.param == "tools"


def test_an_unknown_model_is_not_found(tiny: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client(tiny).chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_a_key_is_asked_for() -> None:
    with serve(random_model(), api_keys=["secret"]) as address:
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
        asked["extra_body"] = {"ignore_eos": True}
        with pytest.raises(openai.AuthenticationError) as refused:
            client(address, "wrong").chat.completions.create(**asked)
        assert refused.value.code == "invalid_api_key"
        assert client(address, "secret").chat.completions.create(**asked).usage.completion_tokens == 2


def test_a_full_queue_is_a_rate_limit() -> None:
    tokenizer = small_tokenizer()
    runner = SlowRunner(shape(vocabulary=tokenizer.vocab_size, positions=POSITIONS), recorded=None)
    model = serve_model(LLM(runner, tokenizer, engine=EngineConfig(max_sequences=1)), "tiny")
    with serve(model, limits=ServerLimits(max_queued_requests=0)) as address:
        create = client(address).chat.completions.create
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
        with create(**asked, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError) as refused:
                create(**asked, max_tokens=1)
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1


class SlowRunner(HashRunner):
    def run(self, *args: Any) -> StepResult:
        time.sleep(0.05)
        return super().run(*args)

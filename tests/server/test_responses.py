"""OpenAI's Responses, asked by OpenAI's client: what they say, in which order, and what they refuse."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from llamita.backend.sampling_params import MAX_SEED
from llamita.inference.request import Statistics, TokenEvent
from llamita.server.chat_jobs import CallDelta, ChatEvent
from llamita.server.responses_input import messages_of
from llamita.server.responses_output import Output
from llamita.server.schemas.responses import ResponseObject, ResponsesRequest
from tests.server.clients import (
    CALLING,
    SAID,
    TOOLS_TEMPLATE,
    events,
    post,
    random_model,
    scripted_model,
    serve,
    small_tokenizer,
)

QUESTION = "Where is the fox?"
WRITTEN = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
"""The events of an answer that is text, those that follow themselves once."""
PRIVATE = {"id", "created_at", "completed_at"}


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def async_client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def told(response: Any, *left_out: str) -> dict[str, Any]:
    """A response without what no two have in common: ids, times, and what of the prompt was in the prefix cache; and
    without what a client adds."""
    left_out = ("id", "parsed_arguments", *left_out)
    data = response if isinstance(response, dict) else json.loads(response.to_json())
    data = {key: value for key, value in data.items() if key not in PRIVATE}
    data["output"] = [{key: value for key, value in item.items() if key not in left_out} for item in data["output"]]
    for item in data["output"]:
        if "content" in item:
            item["content"] = [
                {key: value for key, value in part.items() if key != "parsed"} for part in item["content"]
            ]
    data["usage"] = {**data["usage"], "input_tokens_details": None}
    return data


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_response_has_the_text_the_counts_and_the_settings_it_was_made_with(scripted: str) -> None:
    response = client(scripted).responses.create(
        model="tiny", input=QUESTION, instructions="Be brief.", temperature=0.5, metadata={"a": "b"}, user="u"
    )
    assert response.output_text == SAID
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert [(item.type, item.status, item.role) for item in response.output] == [("message", "completed", "assistant")]
    assert response.id.startswith("resp_")
    assert response.output[0].id.startswith("msg_")
    assert (response.model, response.object, response.store) == ("tiny", "response", False)
    assert (response.instructions, response.temperature, response.metadata) == ("Be brief.", 0.5, {"a": "b"})
    assert (response.user, response.top_p, response.truncation) == ("u", 1.0, "disabled")
    assert response.completed_at >= response.created_at
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = post(scripted, "/v1/chat/completions", messages=conversation, temperature=0.5).json()
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"] == len(small_tokenizer().encode(SAID)) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
        {"seed": MAX_SEED, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    ],
)
def test_the_text_is_that_of_chat_completions(tiny: str, settings: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Tell a story."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "By the river."},
        {"role": "user", "content": "And then?"},
    ]
    chat = post(tiny, "/v1/chat/completions", messages=messages, max_tokens=40, **settings).json()
    wanted = chat["choices"][0]["message"]["content"]
    assert wanted
    as_items = post(tiny, "/v1/responses", input=messages, max_output_tokens=40, **settings).json()
    instructed = post(
        tiny, "/v1/responses", instructions="Tell a story.", input=messages[1:], max_output_tokens=40, **settings
    ).json()
    streamed = events(post(tiny, "/v1/responses", input=messages, max_output_tokens=40, stream=True, **settings))
    for response in (as_items, instructed):
        assert response["output"][0]["content"][0]["text"] == wanted
        assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert "".join(event["delta"] for name, event in streamed if name.endswith("text.delta")) == wanted


def test_log_probabilities_are_those_of_chat_completions(tiny: str) -> None:
    asked = {"temperature": 0, "top_logprobs": 3}
    chat = post(
        tiny, "/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}], max_tokens=12, logprobs=True,
        **asked,
    ).json()  # fmt: skip
    include = {"include": ["message.output_text.logprobs"], "max_output_tokens": 12}
    response = client(tiny).responses.create(model="tiny", input=QUESTION, extra_body=None, **include, **asked)
    found = response.model_dump(mode="json")["output"][0]["content"][0]["logprobs"]
    assert found == chat["choices"][0]["logprobs"]["content"]
    assert len(found) == 12
    streamed = events(post(tiny, "/v1/responses", input=QUESTION, stream=True, **include, **asked))
    deltas = [event for name, event in streamed if name == "response.output_text.delta"]
    assert [score for event in deltas for score in event["logprobs"]] == found
    [done] = [event for name, event in streamed if name == "response.output_text.done"]
    assert done["logprobs"] == found


def test_an_answer_that_is_cut_is_incomplete(tiny: str) -> None:
    response = client(tiny).responses.create(model="tiny", input=QUESTION, max_output_tokens=4, temperature=0)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.completed_at, response.output[0].status) == (None, "incomplete")
    assert response.usage.output_tokens == 4
    streamed = events(
        post(tiny, "/v1/responses", input=QUESTION, max_output_tokens=4, temperature=0, stream=True, model="tiny")
    )
    assert [name for name, _ in streamed[-3:]] == ["response.output_item.done", "response.incomplete", ""]
    assert told(streamed[-2][1]["response"]) == told(response)


class Place(BaseModel):
    place: str


def test_an_answer_keeps_to_a_schema(tiny: str) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["river", "owl"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    response = client(tiny).responses.create(model="tiny", input=QUESTION, text={"format": form}, temperature=0)
    assert json.loads(response.output_text)["place"] in ("river", "owl")
    assert response.status == "completed"
    assert response.text.format.schema_ == schema
    chat = post(
        tiny, "/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}], temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    ).json()  # fmt: skip
    assert response.output_text == chat["choices"][0]["message"]["content"]
    anything = post(
        tiny, "/v1/responses", input=QUESTION, text={"format": {"type": "json_object"}}, max_output_tokens=3, seed=1
    ).json()
    assert anything["output"][0]["content"][0]["text"].startswith("{")


def test_the_prefix_cache_is_counted(tiny: str) -> None:
    question = "A question that nobody asked before: where did the owl and the fox sit? " * 3
    first, second = (post(tiny, "/v1/responses", input=question, max_output_tokens=2).json()["usage"] for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"]
    assert first["input_tokens_details"]["cached_tokens"] < second["input_tokens_details"]["cached_tokens"]
    assert second["input_tokens_details"]["cached_tokens"] < second["input_tokens"]


# --- streams ---------------------------------------------------------------------------------------------------------


def test_events_come_in_their_order_numbered_and_under_one_id(scripted: str) -> None:
    streamed = events(post(scripted, "/v1/responses", input=QUESTION, stream=True))
    assert streamed.pop() == ("", "[DONE]")
    assert all(name == event["type"] for name, event in streamed)
    assert [event["sequence_number"] for _, event in streamed] == list(range(len(streamed)))
    names = [name for name, _ in streamed]
    once = [name for number, name in enumerate(names) if number == 0 or names[number - 1] != name]
    assert once == WRITTEN
    deltas = [event for name, event in streamed if name == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == SAID
    assert len(deltas) > 5
    assert len({event["response"]["id"] for _, event in streamed if "response" in event}) == 1
    items = {event["item_id"] for _, event in streamed if "item_id" in event}
    assert items == {event["item"]["id"] for _, event in streamed if "item" in event}
    assert len(items) == 1
    assert {event["output_index"] for _, event in streamed if "output_index" in event} == {0}
    by_name = dict(streamed)
    created = by_name["response.created"]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert by_name["response.output_item.added"]["item"]["content"] == []
    assert by_name["response.content_part.added"]["part"]["text"] == ""
    assert by_name["response.output_text.done"]["text"] == SAID
    assert by_name["response.output_item.done"]["item"] == by_name["response.completed"]["response"]["output"][0]
    whole = post(scripted, "/v1/responses", input=QUESTION).json()
    assert told(by_name["response.completed"]["response"]) == told(whole)
    ResponseObject.model_validate(whole)
    ResponseObject.model_validate(by_name["response.completed"]["response"])


def test_the_clients_own_accumulator_gives_the_whole_response(scripted: str) -> None:
    whole = client(scripted).responses.create(model="tiny", input=QUESTION)
    with client(scripted).responses.stream(model="tiny", input=QUESTION) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert told(final) == told(whole)


async def _by_async_client(address: str) -> tuple[Any, Any, str]:
    async with async_client(address) as asking:
        whole = await asking.responses.create(model="tiny", input=QUESTION)
        async with asking.responses.stream(model="tiny", input=QUESTION) as stream:
            final = await stream.get_final_response()
        text = ""
        async for event in await asking.responses.create(model="tiny", input=QUESTION, stream=True):
            text += event.delta if event.type == "response.output_text.delta" else ""
        return whole, final, text


def test_the_asynchronous_client_reads_the_same(scripted: str) -> None:
    whole, final, text = asyncio.run(_by_async_client(scripted))
    assert told(whole) == told(final)
    assert whole.output_text == text == SAID


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    with serve(scripted_model("")) as address:
        response = post(address, "/v1/responses", input=QUESTION).json()
        streamed = events(post(address, "/v1/responses", input=QUESTION, stream=True))
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    assert [name for name, _ in streamed] == [*(name for name in WRITTEN if not name.endswith("text.delta")), ""]


def test_a_fault_in_mid_stream_is_an_error_and_a_failed_response() -> None:
    with serve(scripted_model(fails_at={4})) as address:
        streamed = events(post(address, "/v1/responses", input=QUESTION, stream=True))
        after = post(address, "/v1/responses", input=QUESTION).json()
    assert [name for name, _ in streamed[-3:]] == ["error", "response.failed", ""]
    fault, failed = streamed[-3][1], streamed[-2][1]
    assert (fault["code"], fault["error"]["code"], fault["error"]["type"]) == (
        "engine_error",
        "engine_error",
        "server_error",
    )
    assert "out of" in fault["message"] == fault["error"]["message"]
    assert failed["sequence_number"] == fault["sequence_number"] + 1
    response = failed["response"]
    assert (response["status"], response["completed_at"]) == ("failed", None)
    assert response["error"] == {"code": "server_error", "message": fault["message"]}
    written = "".join(event["delta"] for name, event in streamed if name.endswith("text.delta"))
    assert written
    assert SAID.startswith(written)
    assert response["output"][0]["content"][0]["text"] == written
    assert after["output"][0]["content"][0]["text"] == SAID


def test_the_client_raises_a_fault_in_mid_stream() -> None:
    with serve(scripted_model(fails_at={2})) as address, pytest.raises(openai.APIError, match="out of"):
        for _ in client(address).responses.create(model="tiny", input=QUESTION, stream=True):
            pass


def test_a_fault_without_a_stream_is_an_error_of_http() -> None:
    with serve(scripted_model(fails_at={2})) as address:
        answer = post(address, "/v1/responses", input=QUESTION)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"


# --- what goes in ----------------------------------------------------------------------------------------------------

CALL = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"at": "river"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "a fox"}
FUNCTION = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}


def laid_out(**body: Any) -> list[dict[str, Any]]:
    return messages_of(ResponsesRequest.model_validate(body))


def test_items_become_messages() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    said = {
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    user = {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
    second = {**CALL, "call_id": "call_2", "id": "fc_2", "status": "completed"}
    found = laid_out(
        instructions="Be brief.",
        input=[{"role": "developer", "content": "Be kind."}, user, reasoning, said, CALL, second, RESULT, user],
    )
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": {"at": "river"}}}
        for name in ("call_1", "call_2")
    ]
    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "a fox", "tool_call_id": "call_1"},
        {"role": "user", "content": QUESTION},
    ]


def test_what_is_said_after_a_call_is_a_turn_of_its_own() -> None:
    said = {"role": "assistant", "content": "Done."}
    assert [message.get("content") for message in laid_out(input=[CALL, said, said])] == ["", "Done.", "Done."]


def test_several_texts_of_a_message_stay_apart() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    [message] = laid_out(input=[{"role": "user", "content": parts}])
    assert message["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_a_conversation_with_calls_is_read_as_by_chat_completions() -> None:
    tool = {"type": "function", "function": {key: value for key, value in FUNCTION.items() if key != "type"}}
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "river"}'}}
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "a fox", "tool_call_id": "call_1"},
    ]
    with serve(random_model(TOOLS_TEMPLATE)) as address:
        chat = post(address, "/v1/chat/completions", messages=messages, tools=[tool], max_tokens=20, seed=3).json()
        response = post(
            address, "/v1/responses", input=[{"role": "user", "content": QUESTION}, CALL, RESULT], tools=[FUNCTION],
            max_output_tokens=20, seed=3,
        ).json()  # fmt: skip
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"] > 40
    assert response["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert response["tools"] == [{**FUNCTION, "strict": None}]


def test_the_output_of_a_response_goes_back_in(tiny: str) -> None:
    asking = client(tiny)
    first = asking.responses.create(model="tiny", input=QUESTION, max_output_tokens=8, temperature=0)
    conversation = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And then?"}]
    second = asking.responses.create(model="tiny", input=conversation, max_output_tokens=8, temperature=0)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    chat = post(tiny, "/v1/chat/completions", messages=messages, max_tokens=8, temperature=0).json()
    assert second.output_text == chat["choices"][0]["message"]["content"]


GRADED = "{{ reasoning_effort }} {% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "effort", "written"),
    [
        (TOOLS_TEMPLATE, "none", " <think></think>"),
        (TOOLS_TEMPLATE, "high", ""),
        (GRADED, "high", "high "),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "none", ""),
    ],
)
def test_an_effort_reaches_the_template(template: str, effort: str, written: str) -> None:
    model = random_model(template)
    assert model.chat is not None
    variables = {"reasoning_effort": ""} if template is GRADED else {}
    bare = model.chat.render([{"role": "user", "content": QUESTION}], **variables).removeprefix(" ")
    wanted = written + bare if template is GRADED else bare + written
    with serve(model) as address:
        response = post(address, "/v1/responses", input=QUESTION, reasoning={"effort": effort}, max_output_tokens=1)
    assert response.status_code == 200, response.text
    assert response.json()["reasoning"] == {"effort": effort, "summary": None}
    assert response.json()["usage"]["input_tokens"] == len(small_tokenizer().encode(wanted))


OPEN_RESPONSES = (
    "id object created_at completed_at status incomplete_details model previous_response_id instructions output error "
    "tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs "
    "temperature reasoning usage max_output_tokens max_tool_calls store background service_tier metadata "
    "safety_identifier prompt_cache_key"
)
"""What the specification of Open Responses requires of a response (schema ResponseResource, 2026-04-24)."""


@pytest.mark.parametrize(
    ("conversation", "is_streamed"),
    [
        ([("user", "Say hello in exactly 3 words.")], False),
        ([("user", "Count from 1 to 5.")], True),
        ([("system", "You are a pirate. Always respond in pirate speak."), ("user", "Say hello.")], False),
        ([("user", "My name is Alice."), ("assistant", "Hello Alice!"), ("user", "What is my name?")], False),
    ],
)
def test_the_cases_of_open_responses(scripted: str, conversation: list[tuple[str, str]], is_streamed: bool) -> None:
    items = [{"type": "message", "role": role, "content": content} for role, content in conversation]
    answer = post(scripted, "/v1/responses", model="tiny", input=items, stream=is_streamed)
    response = events(answer)[-2][1]["response"] if is_streamed else answer.json()
    assert set(OPEN_RESPONSES.split()) <= response.keys()
    assert (response["status"], bool(response["output"])) == ("completed", True)
    assert type(response["created_at"]) is type(response["completed_at"]) is int


# --- what is refused -------------------------------------------------------------------------------------------------

IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}


@pytest.mark.parametrize(
    ("fault", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 10**6, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [FUNCTION]}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [7]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [IMAGE]}, "input.0.content.0"),
        ({"input": [RESULT]}, "input"),
        ({"input": [{**CALL, "arguments": "["}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input.0.encrypted_content"),
        ({"input": "a b c d e f g h " * 300}, "input"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_its_name(scripted: str, fault: dict[str, Any], param: str) -> None:
    answer = post(scripted, "/v1/responses", **{"input": QUESTION, **fault})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert param.split(".")[0] in error["message"] or error["code"] == "context_length_exceeded"
    streamed = post(scripted, "/v1/responses", **{"input": QUESTION, "stream": True, **fault})
    if param != "stream_options":
        assert (streamed.status_code, streamed.json()) == (400, answer.json())
    assert post(scripted, "/v1/responses", input=QUESTION).json()["output"][0]["content"][0]["text"] == SAID


def test_fields_that_are_null_have_their_defaults(scripted: str) -> None:
    fields = [name for name in ResponsesRequest.model_fields if name != "input"]
    answer = post(scripted, "/v1/responses", input=QUESTION, **dict.fromkeys(fields))
    assert answer.status_code == 200, answer.text
    assert told(answer.json()) == told(post(scripted, "/v1/responses", input=QUESTION).json())


def test_no_response_is_kept(scripted: str) -> None:
    asking = client(scripted)
    response = asking.responses.create(model="tiny", input=QUESTION)
    for refused in (asking.responses.retrieve, asking.responses.delete, asking.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            refused(response.id)
    with pytest.raises(openai.NotFoundError, match="keeps no responses"):
        asking.responses.input_items.list(response.id)


def test_an_unknown_model_is_not_found(scripted: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(scripted).responses.create(model="gpt", input=QUESTION)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


# --- reasoning and calls ---------------------------------------------------------------------------------------------

REST = {"type": "function", "name": "rest", "parameters": {"type": "object", "additionalProperties": False}}


@pytest.fixture(scope="module")
def calling() -> Iterator[str]:
    with serve(scripted_model(CALLING, TOOLS_TEMPLATE)) as address:
        yield address


def test_reasoning_text_and_calls_are_items(calling: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": QUESTION, "tools": [FUNCTION, REST]}
    response = client(calling).responses.create(**asked)
    reasoning, message, look, rest = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Hm.", [])
    assert (message.type, message.content[0].text) == ("message", "I look.")
    assert (look.type, look.name, json.loads(look.arguments)) == ("function_call", "look", {"at": "río"})
    assert (rest.type, rest.name, json.loads(rest.arguments)) == ("function_call", "rest", {})
    assert look.call_id != rest.call_id
    assert {item.status for item in response.output} == {response.status} == {"completed"}
    with client(calling).responses.stream(**asked) as stream:
        final = stream.get_final_response()
    assert told(final, "call_id") == told(response, "call_id")


def test_they_are_those_of_chat_completions(calling: str) -> None:
    response = post(calling, "/v1/responses", input=QUESTION, tools=[FUNCTION, REST]).json()
    tools = [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        for tool in (FUNCTION, REST)
    ]
    messages = [{"role": "user", "content": QUESTION}]
    chat = post(calling, "/v1/chat/completions", messages=messages, tools=tools).json()
    said = chat["choices"][0]["message"]
    reasoning, message, *calls = response["output"]
    assert said["reasoning_content"] == reasoning["content"][0]["text"]
    assert said["content"] == message["content"][0]["text"]
    assert [call["function"] for call in said["tool_calls"]] == [
        {"name": call["name"], "arguments": call["arguments"]} for call in calls
    ]
    found, wanted = response["usage"], chat["usage"]
    assert (found["input_tokens"], found["output_tokens"]) == (wanted["prompt_tokens"], wanted["completion_tokens"])
    reasoned = wanted["completion_tokens_details"]["reasoning_tokens"]
    assert found["output_tokens_details"]["reasoning_tokens"] == reasoned > 0


def test_their_events_come_in_order(calling: str) -> None:
    streamed = events(post(calling, "/v1/responses", input=QUESTION, tools=[FUNCTION, REST], stream=True))
    kinds = [
        (name.removeprefix("response."), event.get("output_index")) for name, event in streamed if event != "[DONE]"
    ]
    once = [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]
    assert once == [
        ("created", None), ("in_progress", None),
        ("output_item.added", 0), ("content_part.added", 0), ("reasoning_text.delta", 0), ("reasoning_text.done", 0),
        ("content_part.done", 0), ("output_item.done", 0),
        ("output_item.added", 1), ("content_part.added", 1), ("output_text.delta", 1), ("output_text.done", 1),
        ("content_part.done", 1), ("output_item.done", 1),
        ("output_item.added", 2), ("function_call_arguments.delta", 2), ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("output_item.added", 3), ("function_call_arguments.delta", 3), ("function_call_arguments.done", 3),
        ("output_item.done", 3),
        ("completed", None),
    ]  # fmt: skip
    added = [event["item"] for name, event in streamed if name == "response.output_item.added"]
    done = [event["item"] for name, event in streamed if name == "response.output_item.done"]
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert (added[2]["name"], added[2]["call_id"], added[2]["arguments"]) == ("look", done[2]["call_id"], "")


def test_one_call_at_a_time(calling: str) -> None:
    asked = {"input": QUESTION, "tools": [FUNCTION, REST], "parallel_tool_calls": False}
    response = post(calling, "/v1/responses", **asked).json()
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert (response["status"], response["parallel_tool_calls"]) == ("completed", False)


def test_a_call_that_is_asked_for_comes() -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"enum": ["river", "owl"]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    tool = {**FUNCTION, "parameters": parameters, "strict": True}
    template = TOOLS_TEMPLATE.replace("<think></think>", "")
    with serve(random_model(template)) as address:
        for choice in ("required", {"type": "function", "name": "look"}):
            asked = {"input": QUESTION, "tools": [tool, REST], "tool_choice": choice, "parallel_tool_calls": False}
            response = post(address, "/v1/responses", **asked, temperature=0, max_output_tokens=400).json()
            call = response["output"][-1]
            assert (call["type"], response["tool_choice"]) == ("function_call", choice)
            arguments = json.loads(call["arguments"])
            assert arguments == {} if call["name"] == "rest" else arguments["at"] in ("river", "owl")
        assert call["name"] == "look"
        clash = post(address, "/v1/responses", **asked, text={"format": {"type": "json_object"}})
    assert (clash.status_code, clash.json()["error"]["param"]) == (400, "text.format")


def test_tools_that_the_template_knows_nothing_of_are_refused(scripted: str) -> None:
    answer = post(scripted, "/v1/responses", input=QUESTION, tools=[FUNCTION])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


PIECES: list[dict[str, Any]] = [
    {},
    {"reasoning": "Hm"},
    {"reasoning": "."},
    {"text": "I "},
    {"text": "look."},
    {"calls": [CallDelta(0, '{"at"', "call_a", "look")]},
    {"calls": [CallDelta(0, ": 1}"), CallDelta(1, id="call_b", name="rest")]},
    {"calls": [CallDelta(1, "{}")], "finish_reason": "tool_calls"},
]


def chat_events(pieces: list[dict[str, Any]]) -> Iterator[ChatEvent]:
    for number, piece in enumerate(pieces):
        yield ChatEvent(0, TokenEvent(1, 65 + number, -0.5, "", Statistics(1, 3)), **piece)


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    output = Output(small_tokenizer(), logprobs=True)
    told_of = [event for piece in chat_events(PIECES) for event in output.take(piece)] + output.end("completed")
    assert [(event["type"].removeprefix("response."), event["output_index"]) for event in told_of] == [
        ("output_item.added", 0), ("content_part.added", 0), ("reasoning_text.delta", 0), ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0), ("content_part.done", 0), ("output_item.done", 0),
        ("output_item.added", 1), ("content_part.added", 1), ("output_text.delta", 1), ("output_text.delta", 1),
        ("output_text.done", 1), ("content_part.done", 1), ("output_item.done", 1),
        ("output_item.added", 2), ("function_call_arguments.delta", 2), ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2), ("output_item.done", 2),
        ("output_item.added", 3), ("function_call_arguments.delta", 3), ("function_call_arguments.done", 3),
        ("output_item.done", 3),
    ]  # fmt: skip
    reasoning, message, first, second = output.items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "I look."
    assert len(message["content"][0]["logprobs"]) == 2  # those of reasoning and of calls are not the message's
    assert (first["call_id"], first["name"], first["arguments"]) == ("call_a", "look", '{"at": 1}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("call_b", "rest", "{}")
    assert {item["status"] for item in output.items} == {"completed"}


def test_openais_client_puts_text_and_calls_together_from_the_pieces() -> None:
    output = Output(small_tokenizer(), logprobs=False)
    told_of = [event for piece in chat_events(PIECES) for event in output.take(piece)] + output.end("completed")
    response = {
        "id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "model": "tiny", "output": [],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    pieced: dict[int, str] = {}
    for number, event in enumerate([{"type": "response.created", "response": response}, *told_of]):
        for read in state.handle_event(adapter.validate_python({**event, "sequence_number": number})):
            if read.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
                pieced[read.output_index] = read.snapshot
    assert pieced == {1: "I look.", 2: '{"at": 1}', 3: "{}"}


def test_a_call_that_is_cut_is_incomplete() -> None:
    output = Output(small_tokenizer(), logprobs=False)
    for piece in chat_events(PIECES[:6]):
        output.take(piece)
    output.end("incomplete")
    assert [item["status"] for item in output.items] == ["completed", "completed", "incomplete"]

"""Anthropic's Messages, asked by Anthropic's client: what they say, in which order, and what they refuse."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from llamita.inference.request import Statistics, TokenEvent
from llamita.server.chat_jobs import CallDelta, ChatEvent
from llamita.server.messages_input import messages_of
from llamita.server.messages_output import Blocks
from llamita.server.schemas.messages import CountTokensRequest, MessageObject, MessagesRequest
from llamita.server.settings import ServerLimits
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
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": QUESTION}]}
LOOK = {
    "name": "look",
    "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}
REST = {"name": "rest", "input_schema": {"type": "object", "additionalProperties": False}}
WRITTEN = [
    "message_start",
    "ping",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
]
"""The events of an answer that is text, those that follow themselves once."""


@pytest.fixture(scope="module")
def calling() -> Iterator[str]:
    with serve(scripted_model(CALLING, TOOLS_TEMPLATE)) as address:
        yield address


def client(address: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})


def told(message: Any) -> dict[str, Any]:
    """A message without its id and those of its calls, and its counts with what was cached added to what was not."""
    data = message if isinstance(message, dict) else json.loads(message.to_json())
    usage = data["usage"]
    read = sum(usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))
    left_out = ("id", "parsed_output")
    content = [{key: value for key, value in block.items() if key not in left_out} for block in data["content"]]
    kept = {key: value for key, value in data.items() if key not in ("id", "content", "usage", "stop_details")}
    return {**kept, "content": content, "read": read, "written": usage["output_tokens"]}


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_message_has_the_text_the_end_and_the_counts(scripted: str) -> None:
    message = client(scripted).messages.create(**ASKED, metadata={"user_id": "u"})
    assert [(block.type, block.text) for block in message.content] == [("text", SAID)]
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    assert message.usage.output_tokens == len(small_tokenizer().encode(SAID)) + 1
    counted = client(scripted).messages.count_tokens(model="tiny", messages=ASKED["messages"])
    assert told(message)["read"] == counted.input_tokens


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"seed": 5}, {"seed": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01}],
)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_the_text_is_that_of_chat_completions(tiny: str, settings: dict[str, Any], in_blocks: bool) -> None:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}] if in_blocks else text

    said = [("user", QUESTION), ("assistant", "By the river."), ("user", "And then?")]
    chat = post(
        tiny, "/v1/chat/completions", max_tokens=40, **settings,
        messages=[{"role": role, "content": text} for role, text in [("system", "Tell a story."), *said]],
    ).json()  # fmt: skip
    asked = {
        "system": content("Tell a story."),
        "messages": [{"role": role, "content": content(text)} for role, text in said],
        "max_tokens": 40,
        **settings,
    }
    message = post(tiny, "/v1/messages", **asked).json()
    streamed = events(post(tiny, "/v1/messages", **asked, stream=True))
    wanted = chat["choices"][0]["message"]["content"]
    assert wanted
    assert message["content"] == [{"type": "text", "text": wanted}]
    assert "".join(event["delta"]["text"] for name, event in streamed if name == "content_block_delta") == wanted
    assert told(message)["read"] == chat["usage"]["prompt_tokens"]
    assert message["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


def test_an_answer_goes_on_in_the_assistants_last_message(tiny: str) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The fox sat"}]
    chat = post(
        tiny, "/v1/chat/completions", messages=messages, max_tokens=20, seed=2, continue_final_message=True
    ).json()
    message = post(tiny, "/v1/messages", messages=messages, max_tokens=20, seed=2).json()
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert told(message)["read"] == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("stops", "reason", "stop", "text"),
    [
        (["red kite", "owl"], "stop_sequence", "owl", SAID[: SAID.index("owl")]),
        (["élève?"], "stop_sequence", "élève?", SAID[: SAID.index("élève?")]),
        (["never there"], "end_turn", None, SAID),
    ],
)
def test_a_stop_sequence_is_named(scripted: str, stops: list[str], reason: str, stop: str | None, text: str) -> None:
    message = client(scripted).messages.create(**ASKED, stop_sequences=stops)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == (reason, stop, text)
    with client(scripted).messages.stream(**ASKED, stop_sequences=stops) as stream:
        assert told(stream.get_final_message()) == told(message)


def test_the_end_of_a_turn_is_no_stop_sequence() -> None:
    with serve(scripted_model("By the river.\nUser: And now?")) as address:
        message = client(address).messages.create(**ASKED, stop_sequences=["now"])
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("end_turn", None, "By the river.")


def test_an_answer_that_is_cut_says_so(tiny: str) -> None:
    message = client(tiny).messages.create(**{**ASKED, "max_tokens": 4}, extra_body={"temperature": 0})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 4)


def test_an_answer_without_a_word_has_no_content() -> None:
    with serve(scripted_model("")) as address:
        message = client(address).messages.create(**ASKED)
        streamed = events(post(address, "/v1/messages", **ASKED, stream=True))
    assert (message.content, message.stop_reason) == ([], "end_turn")
    assert [name for name, _ in streamed] == ["message_start", "ping", "message_delta", "message_stop"]


def test_an_answer_keeps_to_a_schema(tiny: str) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["river", "owl"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = client(tiny).messages.create(**ASKED, output_config=config, extra_body={"temperature": 0})
    assert json.loads(message.content[0].text)["place"] in ("river", "owl")
    assert message.stop_reason == "end_turn"


def test_the_prefix_cache_is_counted(tiny: str) -> None:
    messages = [{"role": "user", "content": "A question that nobody asked before: where did the owl sit? " * 4}]
    counted = post(tiny, "/v1/messages/count_tokens", messages=messages).json()
    first, second = (post(tiny, "/v1/messages", messages=messages, max_tokens=2).json()["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] < second["cache_read_input_tokens"]
    for usage in (first, second):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
        assert usage["input_tokens"] > 0


# --- streams ---------------------------------------------------------------------------------------------------------


def test_events_come_in_their_order(scripted: str) -> None:
    streamed = events(post(scripted, "/v1/messages", **ASKED, stream=True))
    assert all(name == event["type"] for name, event in streamed)
    names = [name for name, _ in streamed]
    assert [name for number, name in enumerate(names) if number == 0 or names[number - 1] != name] == WRITTEN
    by_name = dict(streamed)
    start = by_name["message_start"]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert by_name["content_block_start"] == {
        "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""},
    }  # fmt: skip
    pieces = [event["delta"] for name, event in streamed if name == "content_block_delta"]
    assert {piece["type"] for piece in pieces} == {"text_delta"}
    assert "".join(piece["text"] for piece in pieces) == SAID
    assert len(pieces) > 5
    delta = by_name["message_delta"]
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    whole = post(scripted, "/v1/messages", **ASKED).json()
    MessageObject.model_validate(whole)
    assert told({**start, "content": whole["content"], **delta["delta"], "usage": delta["usage"]}) == told(whole)
    assert start["usage"]["input_tokens"] == told(whole)["read"]


def test_the_clients_own_accumulator_gives_the_whole_message(scripted: str) -> None:
    whole = client(scripted).messages.create(**ASKED)
    with client(scripted).messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert told(final) == told(whole)
    assert text == SAID


async def _by_async_client(address: str) -> tuple[Any, Any, Any]:
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0, timeout=60) as asking:
        whole = await asking.messages.create(**ASKED)
        async with asking.messages.stream(**ASKED) as stream:
            final = await stream.get_final_message()
        counted = await asking.messages.count_tokens(model="tiny", messages=ASKED["messages"])
        return whole, final, counted


def test_the_asynchronous_client_reads_the_same(scripted: str) -> None:
    whole, final, counted = asyncio.run(_by_async_client(scripted))
    assert told(whole) == told(final)
    assert told(whole)["read"] == counted.input_tokens
    assert whole.content[0].text == SAID


def test_a_fault_in_mid_stream_is_an_error() -> None:
    with serve(scripted_model(fails_at={4})) as address:
        streamed = events(post(address, "/v1/messages", **ASKED, stream=True))
        after = post(address, "/v1/messages", **ASKED).json()
    name, fault = streamed[-1]
    assert (name, fault["type"], fault["error"]["type"]) == ("error", "error", "api_error")
    assert "out of" in fault["error"]["message"]
    written = "".join(event["delta"]["text"] for name, event in streamed if name == "content_block_delta")
    assert written
    assert SAID.startswith(written)
    assert after["content"][0]["text"] == SAID


def test_the_client_raises_a_fault() -> None:
    with (
        serve(scripted_model(fails_at={2})) as address,
        pytest.raises(anthropic.APIStatusError, match="out of"),
        client(address).messages.stream(**ASKED) as stream,
    ):
        stream.until_done()
    with serve(scripted_model(fails_at={2})) as address, pytest.raises(anthropic.InternalServerError) as caught:
        client(address).messages.create(**ASKED)
    assert caught.value.body["error"]["type"] == "api_error"


# --- what goes in ----------------------------------------------------------------------------------------------------


def laid_out(**body: Any) -> list[dict[str, Any]]:
    return messages_of(CountTokensRequest.model_validate(body))


def used(number: int) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"call_{number}", "name": "look", "input": {"at": "river"}}


def result(number: int | str, content: Any = "a fox", **more: Any) -> dict[str, Any]:
    name = f"call_{number}" if isinstance(number, int) else number
    return {"type": "tool_result", "tool_use_id": name, "content": content, **more}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def test_blocks_become_messages() -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    found = laid_out(
        system=[text("Be brief."), text("Be kind.")],
        messages=[
            {"role": "user", "content": [text(QUESTION)]},
            {"role": "assistant", "content": [thinking, text("I look."), used(1), used(2), used(3)]},
            {
                "role": "user",
                "content": [
                    result(1),
                    result(2, [text("an owl")], is_error=True),
                    result(3, [text("one"), text("two")], is_error=True),
                    text("And now?"),
                ],
            },
        ],
    )
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": {"at": "river"}}}
        for number in (1, 2, 3)
    ]
    assert found == [
        {"role": "system", "content": [text("Be brief."), text("Be kind.")]},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "a fox", "tool_call_id": "call_1"},
        {"role": "tool", "content": "Error: an owl", "tool_call_id": "call_2"},
        {"role": "tool", "content": "Error: one\ntwo", "tool_call_id": "call_3"},
        {"role": "user", "content": "And now?"},
    ]


def test_turns_of_one_speaker_are_one_turn() -> None:
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")]
    found = laid_out(messages=[{"role": role, "content": said} for role, said in turns])
    assert found == [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [text("c"), text("d")]},
        {"role": "user", "content": "e"},
    ]


def test_the_content_of_a_message_goes_back_in(calling: str) -> None:
    asking = client(calling)
    first = asking.messages.create(**ASKED, tools=[LOOK, REST])
    results = [result(block.id) for block in first.content if block.type == "tool_use"]
    turns = [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    messages = [*ASKED["messages"], *turns]
    second = asking.messages.create(**{**ASKED, "messages": messages}, tools=[LOOK, REST])
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in first.content
        if block.type == "tool_use"
    ]
    chat_messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        *({"role": "tool", "content": "a fox", "tool_call_id": call["id"]} for call in calls),
    ]
    functions = [
        {"name": "look", "description": "Looks.", "parameters": LOOK["input_schema"]},
        {"name": "rest", "parameters": REST["input_schema"]},
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    chat = post(calling, "/v1/chat/completions", messages=chat_messages, tools=tools, max_tokens=200).json()
    assert told(second)["read"] == chat["usage"]["prompt_tokens"]


THINKS: list[tuple[Any, str]] = [
    ({"type": "enabled", "budget_tokens": 1024}, ""),
    ({"type": "adaptive"}, ""),
    ({"type": "disabled"}, " <think></think>"),
]


@pytest.mark.parametrize(("thinking", "written"), THINKS)
def test_thinking_reaches_the_template(thinking: dict[str, Any], written: str) -> None:
    model = random_model(TOOLS_TEMPLATE)
    assert model.chat is not None
    wanted = model.chat.render(ASKED["messages"]) + written
    with serve(model) as address:
        message = client(address).messages.create(**{**ASKED, "max_tokens": 1}, thinking=thinking)
        counted = client(address).messages.count_tokens(model="tiny", messages=ASKED["messages"], thinking=thinking)
    assert told(message)["read"] == counted.input_tokens == len(small_tokenizer().encode(wanted))


@pytest.mark.parametrize(("kind", "status"), [("enabled", 400), ("adaptive", 400), ("disabled", 200)])
def test_a_model_that_does_not_think_is_not_asked_to(scripted: str, kind: str, status: int) -> None:
    thinking = {"type": kind, **({"budget_tokens": 1024} if kind == "enabled" else {})}
    answer = post(scripted, "/v1/messages", **ASKED, thinking=thinking)
    assert answer.status_code == status
    assert status == 200 or "thinking" in answer.json()["error"]["message"]


# --- thinking and calls ----------------------------------------------------------------------------------------------


def test_thinking_text_and_calls_are_blocks(calling: str) -> None:
    asked = {**ASKED, "tools": [LOOK, REST]}
    message = client(calling).messages.create(**asked)
    thinking, said, look, rest = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Hm.", "")
    assert (said.type, said.text) == ("text", "I look.")
    assert (look.type, look.name, look.input) == ("tool_use", "look", {"at": "río"})
    assert (rest.type, rest.name, rest.input) == ("tool_use", "rest", {})
    assert look.id != rest.id
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    with client(calling).messages.stream(**asked) as stream:
        assert told(stream.get_final_message()) == told(message)


def test_their_events_come_in_order(calling: str) -> None:
    streamed = events(post(calling, "/v1/messages", **ASKED, tools=[LOOK, REST], stream=True))
    kinds = [(name, event.get("index"), event.get("delta", {}).get("type")) for name, event in streamed]
    once = [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]
    assert once == [
        ("message_start", None, None), ("ping", None, None),
        ("content_block_start", 0, None), ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"), ("content_block_stop", 0, None),
        ("content_block_start", 1, None), ("content_block_delta", 1, "text_delta"), ("content_block_stop", 1, None),
        ("content_block_start", 2, None), ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, None), ("content_block_delta", 3, "input_json_delta"),
        ("content_block_stop", 3, None),
        ("message_delta", None, None), ("message_stop", None, None),
    ]  # fmt: skip
    started = [event["content_block"] for name, event in streamed if name == "content_block_start"]
    assert started[2] == {"type": "tool_use", "id": started[2]["id"], "name": "look", "input": {}}


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, ["thinking", "text", "tool_use"]),
        ({"type": "auto"}, ["thinking", "text", "tool_use", "tool_use"]),
        ({"type": "none"}, ["thinking", "text"]),
    ],
)
def test_the_choice_of_tools(calling: str, choice: dict[str, Any], kinds: list[str]) -> None:
    message = client(calling).messages.create(**ASKED, tools=[LOOK, REST], tool_choice=choice)
    assert [block.type for block in message.content] == kinds
    assert message.stop_reason == ("tool_use" if "tool_use" in kinds else "end_turn")


def test_a_call_that_is_asked_for_comes() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"enum": ["river", "owl"]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    tools = [{**LOOK, "input_schema": schema}, REST]
    with serve(random_model(TOOLS_TEMPLATE.replace("<think></think>", ""))) as address:
        for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
            asked = {**ASKED, "max_tokens": 400, "tools": tools, "extra_body": {"temperature": 0}}
            asked["tool_choice"] = {**choice, "disable_parallel_tool_use": True}
            message = client(address).messages.create(**asked)
            [call] = message.content
            assert (call.type, message.stop_reason) == ("tool_use", "tool_use")
            assert call.input == {} if call.name == "rest" else call.input["at"] in ("river", "owl")
        assert call.name == "look"
        cut = {**asked, "max_tokens": message.usage.output_tokens - 6}
        short = client(address).messages.create(**cut)
        with client(address).messages.stream(**cut) as stream:
            final = stream.get_final_message()
    assert (short.stop_reason, [block.type for block in short.content]) == ("max_tokens", ["tool_use"])
    assert told(final) == told(short)


PIECES: list[dict[str, Any]] = [
    {"reasoning": "Hm"},
    {"reasoning": "."},
    {"text": "I "},
    {"text": "look."},
    {"calls": (CallDelta(0, '{"at"', "call_a", "look"),)},
    {"calls": (CallDelta(0, ": 1}"), CallDelta(1, id="call_b", name="rest"))},
    {"calls": (CallDelta(1, "{}"),), "finish_reason": "tool_calls"},
]


@pytest.mark.parametrize("length", range(1, len(PIECES) + 1))
def test_anthropics_client_puts_the_same_blocks_together(length: int) -> None:
    """Wherever an answer is cut, what its accumulator makes of the events is the content of the whole answer."""
    blocks = Blocks()
    token = TokenEvent(1, 65, -0.5, "", Statistics(1, 3))
    told_of = [event for piece in PIECES[:length] for event in blocks.take(ChatEvent(0, token, **piece))] + blocks.end()
    message = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 0},
    }  # fmt: skip
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    snapshot, buffers = None, {}
    for event in [{"type": "message_start", "message": message}, *told_of]:
        snapshot = accumulate_event(event=adapter.validate_python(event), current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    found = [json.loads(block.to_json()) for block in snapshot.content]
    assert found == blocks.content
    assert found


# --- what is refused -------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/fox.png"}}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "content.0"),
        ({"messages": [{"role": "user", "content": [result(1)]}]}, "call_1"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [used(1)]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a b c d e f g h " * 300}]}, "1024"),
        ({"messages": [{"role": "user", "content": [{**text("x"), "citations": [{}]}]}]}, "citations"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}, "content.0"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {}}, "context_management"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"diagnostics": {"previous_message_id": "msg_1"}}, "diagnostics"),
        ({"speed": "fast"}, "speed"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [LOOK]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "other"}, "tools": [LOOK]}, "tool_choice"),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop": "x"}, "stop"),
    ],
)
def test_what_is_not_honoured_is_refused_by_its_name(scripted: str, fault: dict[str, Any], named: str) -> None:
    asked = {key: value for key, value in {**ASKED, **fault}.items() if value is not None}
    answer = post(scripted, "/v1/messages", **asked)
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    streamed = post(scripted, "/v1/messages", **asked, stream=True)
    assert (streamed.status_code, streamed.json()) == (400, body)
    assert post(scripted, "/v1/messages", **ASKED).json()["content"][0]["text"] == SAID


def test_fields_that_are_null_have_their_defaults(scripted: str) -> None:
    fields = [name for name in MessagesRequest.model_fields if name not in ASKED]
    answer = post(scripted, "/v1/messages", **ASKED, **dict.fromkeys(fields))
    assert answer.status_code == 200, answer.text
    assert told(answer.json()) == told(post(scripted, "/v1/messages", **ASKED).json())


def test_errors_are_those_of_the_client(scripted: str) -> None:
    asking = client(scripted)
    with pytest.raises(anthropic.NotFoundError) as absent:
        asking.messages.create(**{**ASKED, "model": "claude"})
    assert absent.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as wrong:
        asking.messages.count_tokens(model="tiny", messages=[])
    assert wrong.value.body["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_in_either_header() -> None:
    with serve(scripted_model(), api_keys=["secret"]) as address:
        for options in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
            assert client(address, **options).messages.create(**ASKED).content[0].text == SAID
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client(address, api_key="wrong").messages.create(**ASKED)
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_long_silence_is_broken_by_pings() -> None:
    with serve(scripted_model("fox", delay=0.3), limits=ServerLimits(heartbeat_seconds=0.05)) as address:
        streamed = events(post(address, "/v1/messages", **ASKED, stream=True))
    names = [name for name, _ in streamed]
    assert names.count("ping") > 3
    assert [name for number, name in enumerate(names) if name != "ping" and name not in names[:number]] == [
        name for name in WRITTEN if name != "ping"
    ]

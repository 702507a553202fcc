"""Streams as they leave the server: when their head is sent, the signs of life, their end; without a server around."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.server.streaming import EventStream, TextEvent, data
from tests.server.clients import post, scripted_model, serve

Sent = list[tuple[str, bytes]]


def send_all(steps: Sequence[bytes | float], heartbeat: float = 60.0) -> list[Sent]:
    """Returns what was sent before each step (a piece, or seconds of waiting), and in the end."""
    sent: Sent = []
    seen: list[Sent] = []

    async def pieces() -> AsyncGenerator[bytes]:
        for step in steps:
            await asyncio.sleep(0 if isinstance(step, bytes) else step)
            seen.append(list(sent))
            if isinstance(step, bytes):
                yield step
        seen.append(list(sent))

    async def send(message: dict[str, object]) -> None:
        sent.append((str(message["type"]).rpartition(".")[2], bytes(message.get("body", b""))))  # type: ignore[arg-type]

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    asyncio.run(EventStream(pieces(), heartbeat)({}, receive, send))  # type: ignore[arg-type]
    return [*seen, sent]


def test_nothing_is_sent_before_the_second_piece() -> None:
    *_, before_second, after_second, after_third, whole = send_all([b"a", b"b", b"c"])
    assert before_second == []
    assert after_second == [("start", b""), ("body", b"ab")]
    assert after_third == [*after_second, ("body", b"c")]
    assert whole == [*after_third, ("body", b"")]


def test_a_stream_of_one_piece_is_sent_at_its_end() -> None:
    assert send_all([b"a"])[-1] == [("start", b""), ("body", b"a")]


def test_a_sign_of_life_takes_the_head_and_the_first_piece_with_it() -> None:
    whole = send_all([b"a", 0.2, b"b"], heartbeat=0.05)[-1]
    assert whole[:2] == [("start", b""), ("body", b"a: still working\n\n")]
    assert whole.count(("start", b"")) == 1
    assert whole[-2:] == [("body", b"b"), ("body", b"")]
    assert ("body", b": still working\n\n") in whole, "and more of them while nothing comes"


texts = st.text() | st.text('"\\\\\x00\x1f\x7f\u2028🦙{}%\n ')


@given(texts, texts)
def test_an_event_made_of_a_text_has_the_bytes_of_the_whole_written_anew(text: str, model: str) -> None:
    def value_of(text: str) -> dict[str, object]:
        return {"model": model, "choices": [{"delta": {"content": text}, "finish_reason": None}], "usage": None}

    whole = json.dumps(value_of(text), ensure_ascii=False, separators=(",", ":"))
    assert TextEvent(value_of)(text) == data(value_of(text)) == f"data: {whole}\n\n".encode()


SAID = 'The "fox"\n\u2028 {🦙} \\ % é'
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
CHOICE = {
    "/v1/chat/completions": ["index", "delta", "logprobs", "finish_reason"],
    "/v1/completions": ["index", "text", "logprobs", "finish_reason"],
}
HEAD = {
    "/v1/chat/completions": ["id", "created", "model", "system_fingerprint", "object", "choices"],
    "/v1/completions": ["id", "object", "created", "model", "system_fingerprint", "choices"],
}


@pytest.mark.parametrize("path", CHOICE)
def test_every_chunk_is_the_same_json_in_the_same_order(path: str) -> None:
    """Byte for byte what Python's JSON writes of it, whichever way a chunk was made."""
    with serve(scripted_model(SAID)) as address:
        for options in ({}, {"include_usage": True}, {"continuous_usage_stats": True}):
            for more in ({}, {"logprobs": True if "chat" in path else 1}, {"n": 2}):
                asked = CHAT if "chat" in path else {"prompt": "Hello", "max_tokens": 60}
                answer = post(address, path, **asked, **more, stream=True, stream_options=options)
                *events, done, rest = answer.content.decode().split("\n\n")
                assert (done, rest) == ("data: [DONE]", "")
                said = ["", ""]
                for event in events:
                    chunk = json.loads(event.removeprefix("data: "))
                    assert event == "data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                    if not chunk["choices"]:
                        continue
                    assert list(chunk) == HEAD[path] + (["usage"] if options else [])
                    (choice,) = chunk["choices"]
                    assert list(choice) == CHOICE[path]
                    said[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
                assert said == [SAID, SAID if more.get("n") else ""]

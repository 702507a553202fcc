"""The benchmark's client against a real server whose answers are scripted. Times are read from a clock that counts its
calls, so that records are compared exactly."""

import asyncio
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llamita.workflows.benchmark.client import Ask, Client, base_url
from llamita.workflows.benchmark.metrics import RequestRecord
from tests.workflows.benchmark import scripted_server
from tests.workflows.benchmark.scripted_server import (
    DONE,
    Reply,
    ScriptedServer,
    Seen,
    chat,
    event,
    failure,
    finished,
    usage,
)

PROMPT = [{"role": "user", "content": "Once upon a time"}]
CHAT = Ask("tiny", "chat", max_tokens=5)


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server.serving(lambda seen: failure(500, "no script")) as running:
        yield running


def record_of(
    server: ScriptedServer, reply: Reply, ask: Ask = CHAT, key: str | None = None, timeout: float = 30.0
) -> RequestRecord:
    """The record of one request that is answered so, by a clock that says 0, 1, 2, ... each time it is read."""
    server.follow(lambda seen: reply)
    return asked(server.url, ask, key, timeout)


def asked(url: str, ask: Ask = CHAT, key: str | None = None, timeout: float = 30.0) -> RequestRecord:
    ticks = itertools.count()

    async def run() -> RequestRecord:
        async with Client(url, key, timeout) as client:
            return await client.request(ask, PROMPT, 3, -1.0, lambda: float(next(ticks)))

    return asyncio.run(run())


def test_a_streamed_chat_is_recorded_chunk_by_chunk(server: ScriptedServer) -> None:
    record = record_of(server, scripted_server.answer("Hello", " there", prompt=9))
    # Read at: sending 0, the role 1, texts 2 and 3, the finish reason 4, the usage 5, [DONE] 6, the end of it all 7.
    assert record == RequestRecord(
        number=3, due=-1.0, sent=0.0, ended=6.0, text_times=(2.0, 3.0), status=200, finish_reason="length",
        prompt_tokens=9, cached_tokens=0, output_tokens=2, tokens_counted_by="usage",
    )  # fmt: skip


def test_completions_carry_their_text_elsewhere(server: ScriptedServer) -> None:
    pieces = [event(choices=[{"text": "a", "finish_reason": None}]), event(choices=[{"text": "b"}])]
    pieces += [event(choices=[{"text": "", "finish_reason": "stop"}]), DONE]
    record = record_of(server, Reply(pieces), Ask("tiny", "completions", 5))
    assert (record.text_times, record.finish_reason) == ((1.0, 2.0), "stop")
    assert (record.output_tokens, record.tokens_counted_by) == (2, "chunks")


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_reasoning_and_tool_calls_are_text_too(server: ScriptedServer, name: str) -> None:
    pieces = [event(choices=[{"delta": {name: ["x"] if name == "tool_calls" else "x"}}]), finished(), DONE]
    assert record_of(server, Reply(pieces)).text_times == (1.0,)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 10_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_stream_is_read_however_it_is_split(server: ScriptedServer, size: int, line_end: bytes) -> None:
    stream = b": wait\n\n" + chat("é") + b": still here\n\nretry: 5\n\n" + chat("雨🐦")
    stream += b"event: message\nid: 7\n" + finished() + usage(4, 2, cached=3) + b":\n\n" + DONE
    stream = stream.replace(b"\n", line_end)
    record = record_of(server, Reply([stream[start : start + size] for start in range(0, len(stream), size)]))
    assert record.error is None
    assert record.text_times == (1.0, 2.0)
    assert (record.output_tokens, record.cached_tokens, record.finish_reason) == (2, 3, "length")


def test_data_over_several_lines_is_one_event(server: ScriptedServer) -> None:
    pieces = [b'data: {"choices": [\ndata: {"delta": {"content": "x"}}]}\n\n', finished(), DONE]
    assert record_of(server, Reply(pieces)).text_times == (1.0,)


def test_a_stream_that_announces_its_end_is_whole(server: ScriptedServer) -> None:
    record = record_of(server, Reply([chat("x"), DONE]))
    assert (record.error, record.finish_reason, record.ended) == (None, None, 2.0)


def test_a_stream_without_its_mark_at_the_end_is_whole_if_it_says_why_it_ended(server: ScriptedServer) -> None:
    record = record_of(server, Reply([chat("x"), finished("stop")]))
    assert (record.error, record.ended) == (None, 3.0)


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (failure(500, "the engine\nbroke"), "http_500", "the engine broke"),
        (failure(429, "too many", retry_after="2.5"), "http_429", "too many"),
        (failure(503, "loading"), "http_503", "loading"),
        (Reply([b"<html>502</html>"], 502, "text/html"), "http_502", "<html>502</html>"),
        (Reply([chat("x")], cut=True), "cut_off", "peer closed connection"),
        (Reply([chat("x")]), "cut_off", "the stream ended before the answer did"),
        (Reply([chat("x"), event(error={"message": "out of memory"}), DONE]), "error_in_stream", "out of memory"),
        (Reply([b"data: {broken\n\n", DONE]), "malformed", "{broken"),
        (Reply([b"data: [1]\n\n", DONE]), "malformed", "[1]"),
        (Reply([event(choices=["x"]), DONE]), "malformed", "no completion"),
        (Reply([event(choices=5), DONE]), "malformed", "no completion"),
        (Reply([b"{}"], content_type="application/json"), "malformed", "application/json"),
    ],
)  # fmt: skip
def test_each_kind_of_failure_has_its_name(server: ScriptedServer, reply: Reply, kind: str, message: str) -> None:
    record = record_of(server, reply)
    assert record.error == kind
    assert message in (record.message or "")
    assert record.status == reply.status
    assert record.retry_after == (2.5 if kind == "http_429" else None)


def test_what_came_before_a_cut_is_kept(server: ScriptedServer) -> None:
    record = record_of(server, Reply([chat("x"), chat("y")], cut=True))
    assert (record.error, record.text_times, record.output_tokens) == ("cut_off", (1.0, 2.0), 2)


def test_a_server_that_says_nothing_is_given_up(server: ScriptedServer) -> None:
    record = record_of(server, Reply([chat("x"), chat("y")], pause=0.6), timeout=0.9)
    assert (record.error, record.text_times) == ("timeout", (1.0,))


def test_no_server_is_a_record_too() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        record = asked(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert (record.error, record.status) == ("connect", None)


def test_a_connection_that_closes_without_an_answer_has_its_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_at_once() -> None:
            connection, _ = listener.accept()
            connection.recv(10_000)
            connection.close()

        async def run() -> RequestRecord:
            closing = asyncio.create_task(asyncio.to_thread(close_at_once))
            async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                record = await client.request(CHAT, PROMPT, 0, 0.0, lambda: 0.0)
            await closing
            return record

        record = asyncio.run(run())
    assert (record.error, record.status) == ("no_answer", None)


def test_the_request_has_the_fields_that_were_asked_for_and_no_others(server: ScriptedServer) -> None:
    full = Ask("tiny", "completions", 9, temperature=0.0, ignore_eos=True)
    server.follow(lambda seen: scripted_server.answer("x"))
    asked(server.url + "/v1/", key="secret-key")
    asked(server.url, full)
    first, second = server.seen
    always = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    assert (first.path, second.path) == ("/v1/chat/completions", "/v1/completions")
    assert first.body == {**always, "messages": PROMPT, "max_tokens": 5}
    assert first.headers["authorization"] == "Bearer secret-key"
    assert second.body == {
        **always, "prompt": "Once upon a time", "max_tokens": 9, "temperature": 0.0, "ignore_eos": True
    }  # fmt: skip
    assert "authorization" not in second.headers


def test_a_connection_is_used_again(server: ScriptedServer) -> None:
    server.follow(lambda seen: scripted_server.answer("x"))

    async def run() -> None:
        async with Client(server.url) as client:
            for number in range(3):
                await client.request(CHAT, PROMPT, number, 0.0, lambda: 0.0)

    asyncio.run(run())
    assert len(server.seen) == 3
    assert len({seen.client for seen in server.seen}) == 1


def test_a_key_that_a_server_repeats_is_not_recorded(server: ScriptedServer) -> None:
    record = record_of(server, failure(401, "wrong key secret-key-77"), key="secret-key-77")
    assert record.message == "wrong key ***"


@pytest.mark.parametrize("key", ["", "two words", "line\nend", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="the API key is empty or has spaces") as caught:
        Client("http://127.0.0.1:1", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("https://example.org/models/v1/", "https://example.org/models"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_a_url_may_end_in_its_version(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://[x", "", "http://h?a=1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no URL of a server; expected one such as"):
        base_url(url)


def test_a_password_in_a_url_is_refused_without_showing_it(server: ScriptedServer) -> None:
    with pytest.raises(ValueError, match="holds a name or password") as caught:
        base_url("http://me:hunter2@127.0.0.1:8000")
    assert "hunter2" not in str(caught.value)


def models_of(server: ScriptedServer, script: Callable[[Seen], Reply], key: str | None = None) -> Any:
    async def run(url: str) -> list[str] | None:
        async with Client(url, key) as client:
            return await client.models()

    server.follow(script)
    return asyncio.run(run(server.url))


def test_models_are_listed_in_the_servers_order(server: ScriptedServer) -> None:
    assert models_of(server, lambda seen: scripted_server.models("b", "a")) == ["b", "a"]
    assert models_of(server, lambda seen: failure(404, "no such path")) is None


@pytest.mark.parametrize(
    ("reply", "key", "message"),
    [
        (failure(401, "no"), None, "wants an API key (401); set LLAMITA_API_KEY or give --key-file FILE"),
        (failure(401, "no"), "abc", "refuses the API key (401); check LLAMITA_API_KEY or --key-file"),
        (failure(503, "loading"), None, "answers 503 (loading); wait until the server is ready"),
        (Reply([b"hello"], content_type="text/html"), None, "expected an OpenAI-compatible server there"),
        (Reply([json.dumps({"data": [5]}).encode()]), None, "expected an OpenAI-compatible server there"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_asked_is_refused_in_one_line(
    server: ScriptedServer, reply: Reply, key: str | None, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole below
        models_of(server, lambda seen: reply, key)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

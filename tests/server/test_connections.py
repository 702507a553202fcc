"""Faults of connections and of load: whatever clients do, memory comes back and the others are answered as ever."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llamita.inference.config import EngineConfig
from llamita.server.settings import ServerLimits
from llamita.text.tokenizer import Tokenizer
from tests import forked
from tests.server.live import (
    GOOD,
    PATIENCE,
    PROMPT,
    LiveServer,
    events,
    expected_text,
    hash_model,
    read_all,
    read_until,
    request_bytes,
    streamed_text,
    wait_for,
)

LONG = 200
"""Tokens of an answer that goes on for as long as a test needs it."""
Serve = Callable[..., LiveServer]


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Any:
    """Starts a server over the hash model: `limits` as keywords, `engine` and `runner` as groups of them."""
    servers: list[LiveServer] = []

    def start(engine: EngineConfig | None = None, runner: dict[str, Any] | None = None, **limits: Any) -> LiveServer:
        server = LiveServer(hash_model(tokenizer, engine, **(runner or {})), ServerLimits(**limits))
        servers.append(server.__enter__())
        return server

    yield start
    for server in servers:
        server.__exit__()


def closed_within(connection: socket.socket, seconds: float) -> float:
    """Returns the seconds after which the other side had closed; fails after `seconds`."""
    begun = time.monotonic()
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - begun


def drip(connection: socket.socket, piece: bytes) -> None:
    """Sends a piece again and again until the other side has closed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            connection.sendall(piece)
        except ConnectionError:
            return
        time.sleep(0.05)
    pytest.fail("the server went on reading")


def reset(connection: socket.socket) -> None:
    """Closes as a client that crashed does: the other side gets RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- slow clients ----------------------------------------------------------------------------------------------------


def test_a_head_that_comes_too_slowly_is_not_waited_for(serve: Serve) -> None:
    server = serve(body_seconds=0.5)
    silent, dripping = server.connect(), server.connect()
    dripping.sendall(b"POST /v1/completions HTTP/1.1\r\n")
    drip(dripping, b"X-A: b\r\n")  # each drop comes in time, the whole does not
    closed_within(silent, PATIENCE)
    server.assert_well()
    kept = server.connect()  # the next head on a connection that was well so far
    kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_until(kept, b"ok")
    kept.sendall(b"GET /hea")
    closed_within(kept, PATIENCE)
    server.assert_well()


def test_a_body_that_comes_too_slowly_is_refused(serve: Serve) -> None:
    server = serve(body_seconds=0.5)
    connection = server.connect()
    connection.sendall(request_bytes("/v1/completions", GOOD)[:-10])
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "timeout"
    server.assert_well()


def test_a_body_that_was_refused_is_not_read_for_ever(serve: Serve) -> None:
    server = serve(body_seconds=0.5)
    connection = server.connect()
    connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n")
    read_until(connection, b"not_found")
    drip(connection, b" " * 1000)
    server.assert_well()


def test_a_body_that_turns_into_nonsense_ends_its_connection_alone(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    connection = server.connect()
    connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    read_until(connection, b"not_found")
    connection.sendall(b"no chunk\r\n")
    closed_within(connection, PATIENCE)
    server.assert_well()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_stops_reading_is_cut_off(serve: Serve) -> None:
    """Its request ends when it lags by the buffer, its connection when it has read nothing for a while."""
    server = serve(write_seconds=1.0, stream_buffer=50, runner={"delay": 0.001})
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    # Log-probabilities make much of little text: enough for all buffers on the way.
    body = {"prompt": [[5 + i] * 20 for i in range(8)], "max_tokens": LONG, "logprobs": 1, "stream": True}
    connection.sendall(request_bytes("/v1/completions", body))
    wait_for(lambda: server.serving.admission.open_requests == 1)
    engine = server.model.require_llm().engine
    wait_for(lambda: not engine.has_work)  # ended by its lag: the connection is still open
    assert server.metric("requests_finished_total", reason="length") == 0
    server.assert_idle()
    assert server.metric("requests_cancelled_total") == 1
    wait_for(lambda: not server.server.server_state.connections)
    server.assert_well()
    connection.close()


def test_a_short_answer_that_is_not_read_is_given_up_too(serve: Serve) -> None:
    """It waits whole in the server's own buffer, so that nothing is ever held back."""
    server = serve(write_seconds=1.0)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    body = {"prompt": [[5 + i] * 20 for i in range(8)], "max_tokens": 70, "logprobs": 5}
    size = len(httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=60).content)
    assert 20_000 < size < 60_000
    connection.sendall(request_bytes("/v1/completions", body))
    wait_for(lambda: server.metric("requests_finished_total", reason="length") == 16)
    wait_for(lambda: not server.server.server_state.connections)
    server.assert_well()
    connection.close()


def test_connections_are_counted(serve: Serve) -> None:
    server = serve(max_connections=5)
    server.client.close()
    held = [server.connect() for _ in range(5)]
    for connection in held:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(connection, b"ok")
    answer = read_all(server.connect())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer.lower()
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "too_many_connections"
    for connection in held:
        connection.close()
    server.client = httpx.Client(base_url=f"http://127.0.0.1:{server.port}")

    def taken() -> bool:
        try:
            return server.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(taken)
    server.assert_well()


# --- clients that go away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_a_client_that_goes_away_frees_its_memory(serve: Serve, when: str, leave: Any, stream: bool) -> None:
    engine = EngineConfig(block_size=4, blocks=400, max_sequences=1, prefill_tokens=8)
    server = serve(engine, runner={"delay": 0.002})
    ahead = None
    if when == "queued":
        ahead = server.begin(stream=True, max_tokens=LONG)
        read_until(ahead, b"data: ")
    prompt = [7] * 200 if when == "prefill" else PROMPT
    if when == "prefill":
        server.runner.gate.clear()
    connection = server.begin(prompt=prompt, max_tokens=40 if when == "prefill" else LONG, stream=stream)
    expected_open = 2 if when == "queued" else 1
    scheduler = server.model.require_llm().engine.scheduler
    if when == "queued":
        wait_for(lambda: len(scheduler.waiting) == 1)
    elif when == "prefill":
        wait_for(lambda: bool(scheduler.running))
    else:
        wait_for(lambda: any(sequence.generated > 3 for sequence in scheduler.running))
    assert server.serving.admission.open_requests == expected_open
    leave(connection)
    if when == "prefill":
        wait_for(lambda: server.serving.admission.open_requests == 0)
        server.runner.gate.set()
    if ahead is not None:
        wait_for(lambda: not scheduler.waiting)
        reset(ahead)
    server.assert_idle()
    assert server.metric("requests_cancelled_total") == (2 if when == "queued" else 1)
    assert server.metric("requests_finished_total", reason="length") == 0
    server.assert_well()


def test_a_reset_while_the_last_chunk_is_written(serve: Serve) -> None:
    server = serve()
    for length in range(1, 13):
        connection = server.begin(stream=True, max_tokens=length)
        read_until(connection, b"data: ")
        reset(connection)
    for _ in range(3):  # after the end, before it is read
        connection = server.begin(stream=True, max_tokens=2)
        server.assert_idle()
        reset(connection)
    server.assert_well()


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_burst_is_refused_at_once_and_what_is_accepted_is_right(serve: Serve) -> None:
    engine = EngineConfig(block_size=4, blocks=400, max_sequences=4)
    server = serve(engine, max_queued_requests=4)
    server.runner.gate.clear()

    def ask(number: int) -> tuple[int, float, Any, dict[str, str]]:
        begun = time.monotonic()
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            answer = client.post("/v1/completions", json={**GOOD, "prompt": f"The fox {number}"})
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected_text(
                server.model, f"The fox {number}", max_tokens=12
            )
        return answer.status_code, time.monotonic() - begun, answer.json(), dict(answer.headers)

    with ThreadPoolExecutor(80) as pool:
        answers = [pool.submit(ask, number) for number in range(80)]
        wait_for(lambda: server.metric("requests_rejected_total", reason="queue_full") == 72)
        assert server.serving.admission.open_requests == 8
        wait_for(lambda: sum(answer.done() for answer in answers) == 72)  # none had to wait for a step
        server.runner.gate.set()
        found = [answer.result() for answer in answers]
    assert sum(status == 200 for status, *_ in found) == 8
    for status, _, body, headers in found:
        if status != 200:
            assert (status, body["error"]["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
    server.assert_well()


def test_memory_is_flat_under_refused_requests(serve: Serve) -> None:
    server = serve(EngineConfig(block_size=4, blocks=400, max_sequences=1), max_queued_requests=0)
    server.runner.gate.clear()
    holding = server.begin(stream=True, max_tokens=LONG)
    wait_for(lambda: server.serving.admission.open_requests == 1)
    process = psutil.Process()

    def refuse(count: int) -> None:
        for _ in range(count):
            assert server.complete(prompt="x" * 20_000).status_code == 429

    refuse(100)
    gc.collect()
    before = process.memory_info().rss
    refuse(200)
    gc.collect()
    assert process.memory_info().rss - before < 3 << 20  # 4 MB of bodies came in
    reset(holding)
    server.runner.gate.set()
    server.assert_well()


def test_queued_prompt_tokens_are_bounded(serve: Serve) -> None:
    server = serve(max_queued_tokens=250)
    server.runner.gate.clear()
    first = server.begin(prompt=[5] * 200, max_tokens=3)
    wait_for(lambda: server.serving.admission.queued_tokens == 200)
    refused = server.complete(prompt=[6] * 100)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    second = server.begin(prompt=[6] * 20, max_tokens=3)
    wait_for(lambda: server.serving.admission.queued_tokens == 220)
    server.runner.gate.set()
    for connection in (first, second):
        assert b"HTTP/1.1 200" in read_until(connection, b"usage")
    server.assert_well()


def test_a_long_prompt_holds_chats_up_by_no_step(serve: Serve) -> None:
    engine = EngineConfig(block_size=4, blocks=400, max_sequences=4, prefill_tokens=64, mixed_prefill_tokens=8)
    server = serve(engine)
    runner, plans = server.runner, []
    runner.recorded = plans
    runner.gate.clear()
    chats = [server.begin(prompt=f"Chat {number}", stream=True, max_tokens=60) for number in range(2)]
    wait_for(lambda: server.serving.admission.open_requests == 2)
    runner.delay = 0.002
    runner.gate.set()
    for chat in chats:
        read_until(chat, b"data: ")
    long = server.begin(prompt=[9] * 200, max_tokens=2)
    assert b"HTTP/1.1 200" in read_until(long, b"usage")
    for chat in chats:
        read_until(chat, b"[DONE]")
    reading = [plan for plan in plans if any(9 in chunk.tokens and len(chunk.tokens) > 1 for chunk in plan.chunks)]
    beside = [plan for plan in reading if len(plan.chunks) == 3]
    assert len(beside) >= 10, "the prompt was not read beside the chats"
    for plan in beside:  # every chat advances at every step, which is short
        assert sorted(len(chunk.tokens) for chunk in plan.chunks)[:2] == [1, 1]
        assert max(len(chunk.tokens) for chunk in plan.chunks) <= 8
    server.assert_well()


# --- an engine that fails, or hangs ----------------------------------------------------------------------------------


def test_a_step_without_memory_ends_its_requests_alone(serve: Serve) -> None:
    server = serve(runner={"fails_at": {3}})
    failed = server.complete()
    assert failed.status_code == 500
    assert failed.json()["error"] == {
        "message": "out of memory", "type": "server_error", "param": None, "code": "engine_error",
    }  # fmt: skip
    server.assert_well()
    server.runner.fails_at = {server.runner.calls + 3}
    *_, last = events(server.complete(stream=True))
    assert last["error"]["code"] == "engine_error"
    assert server.metric("engine_errors_total") == 2
    server.assert_well()


def test_a_hung_engine_is_told_and_recovers(serve: Serve) -> None:
    server = serve(stuck_seconds=0.3, heartbeat_seconds=0.1)
    server.runner.gate.clear()
    waiting = server.begin(stream=True)
    health = lambda: server.client.get("/health")  # noqa: E731
    wait_for(lambda: health().status_code == 503)
    assert "a step of the engine has taken" in health().json()["error"]["message"]
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    server.runner.gate.set()
    text = read_until(waiting, b"[DONE]").decode()
    assert ": still working" in text
    server.assert_well()


def test_heartbeats_come_while_a_prompt_is_read(serve: Serve) -> None:
    server = serve(heartbeat_seconds=0.1)
    server.runner.gate.clear()
    connection = server.begin(stream=True)
    head = read_until(connection, b": still working\n\n")
    assert b"text/event-stream" in head
    assert b"data: " not in head
    read_until(connection, b": still working\n\n")
    server.runner.gate.set()
    rest = read_until(connection, b"[DONE]").decode()
    chunks = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected_text(server.model, PROMPT, max_tokens=12)
    server.assert_well()


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_at_its_deadline(serve: Serve, stream: bool) -> None:
    server = serve(request_seconds=0.5, runner={"delay": 0.02})
    answer = server.complete(max_tokens=LONG, stream=stream)
    if stream:
        *chunks, last = events(answer)
        assert len(chunks) > 2
    else:
        assert answer.status_code == 504
        last = answer.json()
    assert last["error"]["code"] == "deadline_exceeded"
    assert last["error"]["type"] == "timeout_error"
    server.assert_idle()
    assert server.metric("requests_rejected_total", reason="deadline") == 1
    server.runner.delay = 0
    server.assert_well()


# --- what is written down --------------------------------------------------------------------------------------------


def test_prompts_and_ids_with_control_characters_stay_out_of_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(runner={"fails_at": {20}})
    marker = "Zanzibar"
    with caplog.at_level(logging.DEBUG):
        for stream in (False, True):
            server.complete(prompt=marker, stream=stream)
            server.chat(marker, stream=stream, stop=[marker])
        server.complete(prompt=marker * 500)
        server.complete(prompt=marker, temperature=marker)
        server.post("/tokenize", {"prompt": marker})
        server.post("/v1/completions", content=marker.encode(), headers={"content-type": "application/json"})
        ids = ["good-id.1", "bad\tid", "x" * 65, 'quote"', "ünï"]
        answered = [server.client.get("/health", headers={"x-request-id": given.encode()}) for given in ids]
        control = server.connect()
        control.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x1b[31mb\r\nConnection: close\r\n\r\n"
        )
        closed_within(control, PATIENCE)
        server.client.get("/v1/" + "%0aforged")
        server.assert_idle()
        wait_for(lambda: sum("forged" in record.getMessage() for record in caplog.records) >= 1)
    assert answered[0].headers["x-request-id"] == "good-id.1"
    for answer, given in zip(answered[1:], ids[1:], strict=True):
        assert answer.headers["x-request-id"] != given
        assert answer.headers["x-request-id"].isalnum()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("llamita", "uvicorn"))]
    assert len(ours) > 10
    assert marker not in "".join(ours)
    assert not [line for line in ours if any(ord(letter) < 32 for letter in line)]
    assert any('"status": 200' in line for line in ours)


def test_metrics_are_the_sums_of_usage(serve: Serve) -> None:
    server = serve()
    totals = {"prompt_tokens": 0, "completion_tokens": 0, "cached": 0}
    reasons: dict[str, int] = {}
    asked: list[dict[str, Any]] = [
        {}, {"n": 3, "seed": 4, "temperature": 1}, {"prompt": ["The fox", "The owl", "The fox"]}, {"max_tokens": 1},
        {"stop": ["a", "e", "i", "o"], "max_tokens": 60}, {"prompt": [8] * 250, "max_tokens": 50}, {},
    ]  # fmt: skip
    for body in asked:
        whole = server.complete(**body).json()
        streamed = server.complete(**body, stream=True, stream_options={"include_usage": True})
        assert streamed.status_code == 200, (body, streamed.text)
        *chunks, usage, done = events(streamed)
        assert done == "[DONE]"
        assert usage["choices"] == []
        streamed_reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert sorted(streamed_reasons) == sorted(choice["finish_reason"] for choice in whole["choices"])
        for counts in (whole["usage"], usage["usage"]):
            assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
            totals["prompt_tokens"] += counts["prompt_tokens"]
            totals["completion_tokens"] += counts["completion_tokens"]
            totals["cached"] += counts["prompt_tokens_details"]["cached_tokens"]
        assert whole["usage"]["completion_tokens"] == usage["usage"]["completion_tokens"]
        for reason in streamed_reasons:
            reasons[reason] = reasons.get(reason, 0) + 2
    server.assert_idle()
    assert totals["cached"] > 0
    assert server.metric("prompt_tokens_total") == totals["prompt_tokens"]
    assert server.metric("generation_tokens_total") == totals["completion_tokens"]
    assert server.metric("prompt_tokens_cached_total") == totals["cached"]
    assert {reason: server.metric("requests_finished_total", reason=reason) for reason in reasons} == reasons
    continuations = sum(reasons.values())
    assert server.metric("time_to_first_token_seconds_count") == continuations
    assert server.metric("request_latency_seconds_count") == continuations
    assert server.metric("inter_token_latency_seconds_count") == totals["completion_tokens"] - continuations
    answered = partial(server.metric, "http_responses_total", path="/v1/completions", status="200")
    wait_for(lambda: answered() == 2 * len(asked), answered)  # a stream is counted once its last byte has gone
    assert server.metric("kv_cache_blocks_free") == server.metric("kv_cache_blocks")
    text = server.client.get("/metrics").text
    assert f"llamita_generation_tokens_total {float(totals['completion_tokens'])}" in text


# --- the end ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from llamita.server import run, serving
from llamita.server.app import create_app
from llamita.server.settings import ServerLimits
from tests.inference.conftest import TEXT
from tests.server.live import hash_model
from llamita.text.bpe import train_bpe_from_iterator

model = hash_model(train_bpe_from_iterator([TEXT], vocab_size=320), delay={delay})
if {hangs}:
    model.llm.runner.gate.clear()
    serving.CLOSE_SECONDS, run.GRACE_SECONDS = 0.5, 1  # less patience with it than is usual
app = create_app(model, ServerLimits(drain_seconds={drain}, heartbeat_seconds=0.2))
run.log_to_stderr("info")
sys.exit(run.serve(app, run.bind("127.0.0.1", 0), lambda address: print(os.getpid(), address, flush=True)))
"""


class Started:
    """A server in a process of its own, with its address, once it answers."""

    def __init__(
        self,
        python: str,
        environment: dict[str, str],
        delay: float = 0.0,
        drain: float = 30.0,
        hangs: bool = False,
    ) -> None:
        code = PROGRAM.format(root=str(Path(__file__).parents[2]), delay=delay, drain=drain, hangs=hangs)
        self.process = subprocess.Popen(
            [python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        number, self.address = self.process.stdout.readline().split()
        self.pid = int(number)

    def ended(self) -> tuple[int, str]:
        """Returns its exit status, and what it wrote to stderr."""
        try:
            _, errors = self.process.communicate(timeout=3 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            _, errors = self.process.communicate()
            pytest.fail(f"the server did not end: {errors[-1000:]}")
        return self.process.returncode, errors


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end_and_takes_no_more(number: signal.Signals, forked_programs: forked.Programs) -> None:
    python = sys.executable if number is signal.SIGTERM else forked_programs.find("python")
    server = Started(python, forked_programs.environment, delay=0.02)
    body = {**GOOD, "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.pid, number)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.address}/health")
        text = "\n".join(lines)
    assert text.rstrip().endswith("data: [DONE]")
    assert text.count('"finish_reason":"length"') == 1
    status, errors = server.ended()
    assert status == 0, errors
    assert "Traceback" not in errors


@pytest.mark.medium
def test_a_request_that_outlasts_the_deadline_ends_with_an_error(forked_programs: forked.Programs) -> None:
    server = Started(forked_programs.find("python"), forked_programs.environment, delay=0.05, drain=0.5)
    body = {**GOOD, "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.pid, signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "ended"
    status, errors = server.ended()
    assert status == 1
    assert "1 requests had not ended 0.5 seconds after the signal" in errors
    assert "Traceback" not in errors


@pytest.mark.medium
def test_a_hung_engine_does_not_keep_the_server_from_ending(forked_programs: forked.Programs) -> None:
    server = Started(forked_programs.find("python"), forked_programs.environment, drain=0.3, hangs=True)
    with (
        httpx.Client(base_url=server.address, timeout=60) as client,
        client.stream("POST", "/v1/completions", json={**GOOD, "stream": True}) as answer,
    ):
        os.kill(server.pid, signal.SIGTERM)
        assert '"ended"' in answer.read().decode()
    status, errors = server.ended()
    assert status == 1
    assert "a step of the engine hangs" in errors


@pytest.mark.medium
def test_a_port_in_use_and_a_missing_model_are_said_in_a_line(tmp_path: Path, forked_programs: forked.Programs) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, part in (
            ([str(tmp_path / "nothing"), "--port", "0"], "nothing"),
            ([str(tmp_path), "--port", str(port)], f"127.0.0.1:{port} cannot be bound"),
        ):
            command = [forked_programs.find("llamita"), "serve", *arguments]
            found = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False, env=forked_programs.environment
            )
            assert found.returncode == 2, found.stderr
            assert part in found.stderr
            assert len(found.stderr.strip().splitlines()) == 1, found.stderr
            assert found.stdout == ""


def test_many_clients_who_do_everything_at_once(serve: Serve) -> None:
    """Well-behaved, slow, broken and leaving clients together: each good answer is the expected one."""
    server = serve(EngineConfig(block_size=4, blocks=60, max_sequences=8), max_queued_requests=64)
    faults: list[BaseException] = []

    def good(number: int) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            for turn in range(4):
                prompt, length = f"Tell {number} {turn}", 10 + 7 * turn
                body = {"prompt": prompt, "temperature": 0, "max_tokens": length, "stream": turn % 2 == 0}
                answer = client.post("/v1/completions", json=body)
                text = streamed_text(answer) if body["stream"] else answer.json()["choices"][0]["text"]
                assert text == expected_text(server.model, prompt, max_tokens=length)

    def leaving(number: int) -> None:
        for _ in range(6):
            connection = server.begin(prompt=f"Bye {number}", stream=True, max_tokens=80)
            read_until(connection, b"data: ")
            reset(connection)

    def broken(number: int) -> None:
        for _ in range(6):
            answer = server.post("/v1/completions", content=b"{" * number, headers={"content-type": "application/json"})
            assert answer.status_code == 400

    def run(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [
        threading.Thread(target=run, args=(work, number)) for number in range(4) for work in (good, leaving, broken)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    server.assert_well()


def test_the_mailbox_of_an_event_loop_that_ended_is_left_alone(tokenizer: Tokenizer) -> None:
    """A loop that is closed while its requests run costs the next loop nothing."""
    model = hash_model(tokenizer)
    llm = model.require_llm()

    async def first_event() -> None:
        stream = llm.stream_async(PROMPT)
        await anext(stream)
        llm.runner.gate.clear()  # its step is under way when the loop is closed

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first_event())
    loop.close()
    llm.runner.gate.set()
    text = asyncio.run(llm.generate_async(PROMPT)).text
    assert isinstance(text, str)
    llm.close()

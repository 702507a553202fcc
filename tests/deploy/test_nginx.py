"""deploy/nginx.conf before servers whose answers are scripted: what is repeated at another replica, and what is not."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from llamita.workflows.benchmark.client import Ask, Client
from llamita.workflows.benchmark.metrics import RequestRecord
from tests.deploy.nginx import free_port, proxying
from tests.workflows.benchmark import scripted_server
from tests.workflows.benchmark.scripted_server import Reply, ScriptedServer, answer, chat, failure

PROMPT = [{"role": "user", "content": "Once upon a time"}]
ASK = Ask("tiny", "chat", max_tokens=5)
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def good() -> Iterator[ScriptedServer]:
    """A replica that answers."""
    with scripted_server.serving(lambda seen: answer("Hello", " there")) as server:
        yield server


@pytest.fixture(scope="module")
def bad() -> Iterator[ScriptedServer]:
    """A replica that each test gives its faults."""
    with scripted_server.serving(lambda seen: failure(500, "no script")) as server:
        yield server


@pytest.fixture
def replicas(good: ScriptedServer, bad: ScriptedServer) -> tuple[ScriptedServer, ScriptedServer]:
    good.follow(lambda seen: answer("Hello", " there"))
    bad.follow(lambda seen: failure(500, "no script"))
    return good, bad


def address(server: ScriptedServer) -> str:
    return server.url.removeprefix("http://")


def ask(url: str, count: int) -> list[RequestRecord]:
    """Asks one after the other, so that every second request goes to the replica that fails."""

    async def run() -> list[RequestRecord]:
        async with Client(url) as client:
            return [await client.request(ASK, PROMPT, number, 0.0, lambda: 0.0) for number in range(count)]

    return asyncio.run(run())


@contextlib.contextmanager
def raw_server(treat: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads a request and does with the connection what `treat` does; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        received = b""
                        while b"\r\n\r\n" not in received:
                            received += connection.recv(65536)
                        treat(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_a_replica_that_drains_is_passed_by(replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path) -> None:
    good, bad = replicas
    bad.follow(lambda seen: failure(503, "draining"))
    with proxying([address(bad), address(good)], tmp_path) as url:
        records = ask(url, 6)
    assert [record.error for record in records] == [None] * 6
    assert len(good.seen) == 6
    assert 1 <= len(bad.seen) <= 2  # after two failures it is left alone
    assert good.seen[0].body["messages"] == PROMPT


def test_a_replica_that_is_not_there_is_passed_by(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, _ = replicas
    with proxying([f"127.0.0.1:{free_port()}", address(good)], tmp_path) as url:
        assert [record.error for record in ask(url, 4)] == [None] * 4


def test_a_replica_that_dies_before_it_answers_costs_no_request(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, _ = replicas
    died = []
    with raw_server(lambda connection: died.append(1)) as dying, proxying([dying, address(good)], tmp_path) as url:
        assert [record.error for record in ask(url, 4)] == [None] * 4
    assert 1 <= len(died) <= 2
    assert len(good.seen) == 4


def test_an_answer_that_has_begun_is_not_begun_again(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, bad = replicas
    bad.follow(lambda seen: Reply([chat("Hel")], cut=True))
    good.follow(lambda seen: Reply([chat("Hel")], cut=True))
    with proxying([address(bad), address(good)], tmp_path) as url:
        (record,) = ask(url, 1)
    assert (record.status, record.error, len(record.text_times)) == (200, "cut_off", 1)
    assert len(good.seen) + len(bad.seen) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_a_replicas_own_answer_is_passed_on(
    status: int, replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, bad = replicas
    for server in (good, bad):
        server.follow(lambda seen: failure(status, "as it is", retry_after="7"))
    with proxying([address(bad), address(good)], tmp_path) as url:
        (record,) = ask(url, 1)
    assert (record.error, record.message, record.retry_after) == (f"http_{status}", "as it is", 7.0)
    assert len(good.seen) + len(bad.seen) == 1


def test_where_no_replica_answers_the_error_says_so_and_when_to_come_back(tmp_path: Path) -> None:
    with proxying([f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"], tmp_path) as url:
        response = httpx2.post(f"{url}/v1/chat/completions", json={})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "unavailable"


def test_the_first_token_passes_while_the_second_is_not_there_yet(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    """The server holds the second token back until the client has the first: a proxy that buffers would wait for it."""
    good, _ = replicas
    received = threading.Event()

    class Waiting(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield chat("first")
            assert received.wait(20), "the client never got the first token"
            yield from (chat("second"), scripted_server.finished(), scripted_server.DONE)

    good.follow(lambda seen: Reply(Waiting()))
    with (
        proxying([address(good)], tmp_path) as url,
        httpx2.stream("POST", f"{url}/v1/chat/completions", json={"stream": True}, timeout=25) as response,
    ):
        text = ""
        for piece in response.iter_text():
            text += piece
            if "first" in text:
                assert received.is_set() or "second" not in text
                received.set()
    assert "second" in text
    assert text.endswith("data: [DONE]\n\n")


def test_a_body_that_is_too_large_is_refused_before_a_replica_sees_it(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, _ = replicas
    with proxying([address(good)], tmp_path) as url:
        large = httpx2.post(f"{url}/v1/completions", content=b"x" * ((4 << 20) + 1))
        assert (large.status_code, good.seen) == (413, [])
        assert "4 MiB" in large.json()["error"]["message"]
        body = json.dumps({"prompt": "x" * ((4 << 20) - 100)}).encode()
        assert httpx2.post(f"{url}/v1/completions", content=body, timeout=30).status_code == 200
    assert len(good.seen[0].body["prompt"]) == (4 << 20) - 100


def test_name_and_id_reach_the_replica_and_metrics_do_not_leave_it(
    replicas: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    good, _ = replicas
    with proxying([address(good)], tmp_path) as url:
        httpx2.post(f"{url}/v1/completions", json={}, headers={"host": "llm.example.org", "x-request-id": "abc-1"})
        httpx2.post(f"{url}/v1/completions?secret=1", json={}, headers={"authorization": "Bearer hush"})
        assert httpx2.get(f"{url}/metrics").status_code == 404
        log = (tmp_path / "access.log").read_text()
    first, second = good.seen
    assert (first.headers["host"], first.headers["x-request-id"]) == ("llm.example.org", "abc-1")
    assert len(second.headers["x-request-id"]) == 32
    assert f"id={second.headers['x-request-id']}" in log
    assert second.headers["authorization"] == "Bearer hush"
    assert "secret" not in log
    assert "hush" not in log

"""Two real servers behind nginx, of which one is killed or restarted under load: which requests are lost, and how.

A stream's answer begins with its first token, or with the comment that keeps it alive while it waits long. Where its
replica is killed after that the stream breaks off, and the client may ask again; before that, nginx asks another
replica, and so it does with an answer in one piece until it is whole.
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from llamita.workflows.benchmark.client import Ask, Client
from llamita.workflows.benchmark.metrics import RequestRecord
from llamita.workflows.benchmark.prompts import StoryPrompts, as_text
from tests.deploy.nginx import proxying
from tests.deploy.replicas import replicas, write_model

ASK = Ask("tiny", "completions", max_tokens=120, temperature=0.0, ignore_eos=True)
CLIENTS = 6
"""Clients that stream, and as many that do not."""
ROUNDS = 3
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
prompts = StoryPrompts(20, seed=1)


class Answers(NamedTuple):
    streams: list[RequestRecord]
    whole: list[httpx2.Response]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failover") / "model"
    write_model(directory)
    return directory


async def load(url: str, disturb: Callable[[], None]) -> Answers:
    """Clients ask, each a few times; once some requests have ended and others are under way, `disturb` is called."""
    answers = Answers([], [])
    disturbed = False

    async def ask_on(place: int) -> None:
        nonlocal disturbed
        for turn in range(ROUNDS):
            number = place * ROUNDS + turn
            if place % 2:
                answers.streams.append(await stream(client, number))
            else:
                answers.whole.append(await whole(http, url, number))
            if len(answers.streams) + len(answers.whole) >= 4 and not disturbed:
                disturbed = True
                await asyncio.to_thread(disturb)

    async with Client(url, timeout=120) as client, httpx2.AsyncClient(timeout=120) as http:
        await asyncio.gather(*(ask_on(place) for place in range(2 * CLIENTS)))
    assert disturbed
    assert (len(answers.streams), len(answers.whole)) == (CLIENTS * ROUNDS, CLIENTS * ROUNDS)
    return answers


async def stream(client: Client, number: int) -> RequestRecord:
    return await client.request(ASK, prompts.messages(number), number, 0.0, lambda: 0.0)


async def whole(http: httpx2.AsyncClient, url: str, number: int) -> httpx2.Response:
    """The answer to a request that is not streamed; which one it was stands in the request."""
    body = {"prompt": as_text(prompts.messages(number)), "max_tokens": ASK.max_tokens, "temperature": 0}
    return await http.post(f"{url}/v1/completions", json={**body, "ignore_eos": True})


def assert_whole(answers: Answers) -> None:
    for response in answers.whole:
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == ASK.max_tokens
    completed = [record for record in answers.streams if record.error is None]
    assert {record.output_tokens for record in completed} == {ASK.max_tokens}


def test_a_replica_that_is_killed_takes_along_only_the_streams_that_it_was_answering(
    model: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL

    async def repeated() -> list[RequestRecord]:
        async with Client(url) as client:
            return [await stream(client, record.number) for record in lost]

    with replicas(model, 2) as (first, second), proxying([first.address, second.address], tmp_path) as url:
        answers = asyncio.run(load(url, kill))
        assert_whole(answers)
        lost = [record for record in answers.streams if record.error is not None]
        assert all((record.status, record.error) == (200, "cut_off") for record in lost)
        assert len(lost) < CLIENTS  # the others were at the other replica
        assert [record.error for record in asyncio.run(repeated())] == [None] * len(lost)
        log = (tmp_path / "access.log").read_text()
    assert "tried=502, 200" in log  # some requests were under way there, and were begun again at the other


def test_a_replica_that_is_restarted_loses_nothing(model: Path, tmp_path: Path) -> None:
    with replicas(model, 2) as (first, second), proxying([first.address, second.address], tmp_path) as url:
        statuses: list[int] = []
        answers = asyncio.run(load(url, lambda: statuses.append(first.stop(signal.SIGTERM))))
        assert second.process.poll() is None
    assert statuses == [0]
    assert [record.error for record in answers.streams] == [None] * CLIENTS * ROUNDS
    assert_whole(answers)


def test_requests_go_to_both_replicas(model: Path, tmp_path: Path) -> None:
    with replicas(model, 2) as pair, proxying([replica.address for replica in pair], tmp_path) as url:
        answers = asyncio.run(load(url, lambda: None))
        log = (tmp_path / "access.log").read_text()
    assert [record.error for record in answers.streams] == [None] * CLIENTS * ROUNDS
    assert_whole(answers)
    assert all(log.count(f"replica={replica.address} ") >= CLIENTS * ROUNDS // 2 for replica in pair)

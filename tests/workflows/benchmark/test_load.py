"""Closed and open loops on an event loop whose time is simulated, so that every moment is known exactly."""

import asyncio
import itertools
import random
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from llamita.workflows.benchmark.load import Limit, Send, arrivals, run_load
from llamita.workflows.benchmark.metrics import Load, RequestRecord


class SimulatedSelector(selectors.SelectSelector):
    """Where the event loop would wait for a timer, simulated time moves to it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += max(timeout or 0.0, 0.0)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.simulated = SimulatedSelector()
        super().__init__(self.simulated)

    def time(self) -> float:
        return self.simulated.now


def simulate(load: Load, limit: Limit, service: Callable[[int], Awaitable[str | None]], **more: Any) -> Any:
    """Runs a load over requests that take as `service` does; returns the records, and the most that ran at once."""
    under_way, most = 0, 0

    async def run() -> list[RequestRecord]:
        clock = asyncio.get_running_loop().time

        async def send(number: int, due: float) -> RequestRecord:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            sent = clock()
            error = await service(number)
            under_way -= 1
            return RequestRecord(number, due, sent, clock(), error=error, retry_after=more.get("retry_after"))

        checked: Send = send
        return await run_load(load, limit, checked, clock, seed=more.get("seed", 0))

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(run()), most


def taking(seconds: float, error: str | None = None) -> Callable[[int], Awaitable[str | None]]:
    async def service(number: int) -> str | None:
        await asyncio.sleep(seconds)
        return error

    return service


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    records, most = simulate(Load(concurrency=3), Limit(requests=10), taking(0.5))
    assert most == 3
    assert [record.number for record in records] == list(range(10))
    assert [record.due for record in records] == [0.5 * (number // 3) for number in range(10)]
    assert all(record.sent == record.due for record in records)


def test_the_next_request_goes_out_when_one_ends_and_not_when_all_have() -> None:
    lengths = [4.0, 1.0, 1.0, 1.0, 1.0]

    async def service(number: int) -> None:
        await asyncio.sleep(lengths[number])

    records, _ = simulate(Load(concurrency=2), Limit(requests=5), service)
    assert [record.due for record in records] == [0.0, 0.0, 1.0, 2.0, 3.0]


def test_a_closed_loop_sends_until_its_time_is_up_and_waits_for_what_runs() -> None:
    records, _ = simulate(Load(concurrency=2), Limit(seconds=2.0), taking(0.75))
    assert [record.due for record in records] == [0.0, 0.0, 0.75, 0.75, 1.5, 1.5]
    assert max(record.ended for record in records) == 2.25


def test_of_two_limits_the_first_that_is_reached_counts() -> None:
    assert len(simulate(Load(concurrency=1), Limit(requests=3, seconds=100.0), taking(1.0))[0]) == 3
    assert len(simulate(Load(concurrency=1), Limit(requests=100, seconds=3.0), taking(1.0))[0]) == 3


@pytest.mark.parametrize(("retry_after", "due"), [(2.0, [0.0, 2.0, 4.0]), (None, [0.0, 1.0, 2.0, 3.0, 4.0])])
def test_a_closed_loop_that_is_refused_waits_as_it_was_asked_to(retry_after: float | None, due: list[float]) -> None:
    records, _ = simulate(Load(concurrency=1), Limit(seconds=5.0), taking(0.0, "http_429"), retry_after=retry_after)
    assert [record.due for record in records] == due


def test_a_closed_loop_does_not_wait_past_its_time() -> None:
    records, _ = simulate(Load(concurrency=1), Limit(seconds=5.0), taking(0.0, "http_503"), retry_after=3600.0)
    assert [record.ended for record in records] == [0.0]


def test_an_open_loop_sends_at_its_own_moments_whether_or_not_answers_come() -> None:
    records, most = simulate(Load(rate=4.0), Limit(requests=50), taking(1000.0), seed=3)
    expected = list(itertools.islice(arrivals(4.0, 3), 50))
    assert [record.due for record in records] == expected
    np.testing.assert_allclose([record.sent for record in records], expected, rtol=1e-12)
    assert most == 50


def test_an_open_loop_ends_with_its_time() -> None:
    records, _ = simulate(Load(rate=4.0), Limit(seconds=10.0), taking(0.0), seed=5)
    assert len(records) == sum(1 for _ in itertools.takewhile(lambda moment: moment < 10.0, arrivals(4.0, 5)))
    assert records[-1].due < 10.0


def test_arrivals_are_a_poisson_process() -> None:
    moments = np.fromiter(itertools.islice(arrivals(8.0, 1), 20_000), dtype=float)
    gaps = np.diff(moments, prepend=0.0)
    assert stats.kstest(gaps, stats.expon(scale=1 / 8.0).cdf).pvalue > 0.01
    counts = np.bincount(moments.astype(int))[:-1]  # by the second: Poisson, its variance is its mean
    assert abs(counts.var() / counts.mean() - 1) < 0.1
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_arrivals_are_a_function_of_the_seed() -> None:
    random.seed(99)
    first = list(itertools.islice(arrivals(1.0, 7), 5))
    random.seed(100)
    assert list(itertools.islice(arrivals(1.0, 7), 5)) == first
    assert list(itertools.islice(arrivals(1.0, 8), 5)) != first


def test_a_bug_while_sending_ends_the_load() -> None:
    async def service(number: int) -> str | None:
        raise RuntimeError("a bug")

    for load in (Load(concurrency=2), Load(rate=1.0)):
        with pytest.raises(ExceptionGroup):
            simulate(load, Limit(requests=4), service)

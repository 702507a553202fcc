"""The two ways to put a load on a server: a closed loop and an open one. Knows nothing of HTTP.

In a closed loop so many requests are under way at every moment, and a slow server is asked less often. In an open loop
requests come at moments of their own, as people's do, and a server that cannot keep up builds a queue.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from llamita.workflows.benchmark.metrics import Load, RequestRecord

PAUSE_SECONDS = 1.0
"""What a closed loop waits after a failure for which the server named no time: it must not flood who refuses."""
LONGEST_PAUSE_SECONDS = 30.0

Clock = Callable[[], float]
"""Seconds since the load began."""
Send = Callable[[int, float], Awaitable[RequestRecord]]
"""Sends the request of a number that is due at a time, and returns its record, whatever becomes of it."""
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Limit:
    """When a load sends no more: after so many requests or seconds, whichever comes first. What runs is waited for."""

    requests: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        assert self.requests is not None or self.seconds is not None

    def reached(self, number: int, seconds: float) -> bool:
        """Returns whether the request of this number may no longer be sent at this time."""
        return (self.requests is not None and number >= self.requests) or (
            self.seconds is not None and seconds >= self.seconds
        )


async def run_load(
    load: Load, limit: Limit, send: Send, clock: Clock, seed: int = 0, sleep: Sleep = asyncio.sleep
) -> list[RequestRecord]:
    """Sends a load's requests until its limit; returns their records in the order of their numbers.

    `seed` fixes the moments of an open loop. `sleep` waits on the same time as `clock` reads.
    """
    if load.concurrency is not None:
        records = await _closed_loop(load.concurrency, limit, send, clock, sleep)
    else:
        assert load.rate is not None
        records = await _open_loop(load.rate, limit, send, clock, seed, sleep)
    return sorted(records, key=lambda record: record.number)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yields the moments of a Poisson process without end: gaps are exponential with a mean of 1 / `rate` seconds."""
    draw = random.Random(seed)
    moment = 0.0
    while True:
        moment += draw.expovariate(rate)
        yield moment


async def _closed_loop(concurrency: int, limit: Limit, send: Send, clock: Clock, sleep: Sleep) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    sent = 0

    async def ask_again_and_again() -> None:
        nonlocal sent
        while not limit.reached(sent, clock()):
            number, sent = sent, sent + 1
            record = await send(number, clock())
            records.append(record)
            if record.error is not None:
                await sleep(_pause(record, limit, clock))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(ask_again_and_again())
    return records


async def _open_loop(
    rate: float, limit: Limit, send: Send, clock: Clock, seed: int, sleep: Sleep
) -> list[RequestRecord]:
    tasks: list[asyncio.Task[RequestRecord]] = []

    async def ask(number: int, due: float) -> RequestRecord:
        return await send(number, due)

    async with asyncio.TaskGroup() as group:
        for number, due in enumerate(arrivals(rate, seed)):
            if limit.reached(number, due):
                break
            if (wait := due - clock()) > 0:
                await sleep(wait)
            tasks.append(group.create_task(ask(number, due)))
    return [task.result() for task in tasks]


def _pause(record: RequestRecord, limit: Limit, clock: Clock) -> float:
    asked = PAUSE_SECONDS if record.retry_after is None else record.retry_after
    left = LONGEST_PAUSE_SECONDS if limit.seconds is None else limit.seconds - clock()
    return max(0.0, min(asked, LONGEST_PAUSE_SECONDS, left))

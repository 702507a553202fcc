"""The engine for asyncio: events of a request as an asynchronous iterator, while a worker thread does the steps.

The event loop never waits for a step: requests go in and aborts come in through `SharedEngine`, events come back
through `call_soon_threadsafe`. Leaving an iterator, or cancelling the task that reads it, ends its request before the
engine's next step. Knows nothing of prompts or text.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from llamita.inference.request import Collector, Generation, Request, TokenEvent
from llamita.inference.shared_engine import Outcome, SharedEngine


async def follow(shared: SharedEngine, request: Request, buffer: int | None = None) -> AsyncGenerator[TokenEvent]:
    """The events of a request, of all its continuations, as they come.

    A reader more than `buffer` events behind is given up: its request ends, and reading raises RuntimeError. Without
    a limit at most the request's `n * max_tokens` events wait. Raises what the engine says where it refuses.
    """
    loop = asyncio.get_running_loop()
    outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    def take(share: Sequence[Outcome]) -> None:
        if buffer is not None and outcomes.qsize() + len(share) > buffer:
            shared.abort(request.id)
            share = [RuntimeError(f"the reader fell more than {buffer} tokens behind, so the request was ended")]
        for outcome in share:
            outcomes.put_nowait(outcome)

    def sink(share: Sequence[Outcome]) -> None:
        loop.call_soon_threadsafe(take, share)

    shared.submit(request, sink, background=True)
    try:
        remaining = request.params.n
        while remaining:
            outcome = await outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            remaining -= outcome.finish_reason is not None
            yield outcome
    finally:
        shared.abort(request.id)


async def gather(shared: SharedEngine, requests: Sequence[Request]) -> list[Generation]:
    """What was written for each request, served together. One that fails raises, and that ends the others."""

    async def whole(request: Request) -> Generation:
        collector = Collector(request.params.n)
        async with contextlib.aclosing(follow(shared, request)) as events:
            async for event in events:
                collector.feed([event])
        return collector.generation()

    tasks = [asyncio.create_task(whole(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

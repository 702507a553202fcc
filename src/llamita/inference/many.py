"""Requests followed by a thread that waits: one as it goes, or many at once, each as soon as it is finished.

Sits between the Python face (llm.py, batch.py) and the shared engine; knows requests and events, not prompts or text.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llamita.inference.request import Collector, Generation, Request, TokenEvent
from llamita.inference.shared_engine import Outcome, SharedEngine

WINDOW = 512
"""Most requests handed to the engine at once: it never runs dry, and a list of a million prompts does not fill it."""


def follow(shared: SharedEngine, request: Request) -> Iterator[TokenEvent]:
    """The events of a request, of all its continuations, as they come; closing the iterator ends the request."""
    outcomes: deque[Outcome] = deque()

    def take() -> Outcome:
        while not outcomes:
            shared.advance(lambda: bool(outcomes))
        return outcomes.popleft()

    try:
        shared.submit(request, outcomes.extend)
        yield from _until_ended(take, request.params.n)
    finally:
        shared.abort(request.id)


def follow_in_background(shared: SharedEngine, request: Request) -> Iterator[TokenEvent]:
    """`follow`, in which the worker steps: an interrupt of the waiting thread never falls into a step."""
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def sink(share: Sequence[Outcome]) -> None:
        for outcome in share:
            outcomes.put(outcome)

    try:
        shared.submit(request, sink, background=True)
        yield from _until_ended(outcomes.get, request.params.n)
    finally:
        shared.abort(request.id)


def _until_ended(take: Callable[[], Outcome], continuations: int) -> Iterator[TokenEvent]:
    """The events that `take` gives until so many continuations have ended; what it gives as an exception is raised."""
    while continuations:
        outcome = take()
        if isinstance(outcome, Exception):
            raise outcome
        continuations -= outcome.finish_reason is not None
        yield outcome


def as_finished(shared: SharedEngine, requests: Iterable[Request]) -> Iterator[tuple[int, Generation]]:
    """Each request's place and what was written for it, in the order in which they end.

    Requests are taken as the engine has room. One that fails raises, and that or closing the iterator ends the others.
    """
    for index, outcome in outcomes_as_finished(shared, requests):
        if isinstance(outcome, Exception):
            raise outcome
        yield index, outcome


def outcomes_as_finished(
    shared: SharedEngine, requests: Iterable[Request]
) -> Iterator[tuple[int, Generation | Exception]]:
    """`as_finished`, in which one that fails gives its exception and leaves the others alone."""
    ready: deque[tuple[int, list[Outcome]]] = deque()
    waiting = enumerate(requests)
    open_requests: dict[int, tuple[Request, Collector]] = {}

    def submit(index: int, request: Request) -> None:
        open_requests[index] = request, Collector(request.params.n)
        shared.submit(request, lambda outcomes: ready.append((index, list(outcomes))))

    try:
        while True:
            while len(open_requests) < WINDOW and (entry := next(waiting, None)) is not None:
                submit(*entry)
            if not open_requests:
                return
            while not ready:
                shared.advance(lambda: bool(ready))
            index, outcomes = ready.popleft()
            if index not in open_requests:  # it failed with one continuation, and this is another's
                continue
            request, collector = open_requests[index]
            finished = _take(collector, outcomes)
            if finished is not None:
                del open_requests[index]
                shared.abort(request.id)
                yield index, finished
    finally:
        for request, _ in open_requests.values():
            shared.abort(request.id)


def _take(collector: Collector, outcomes: list[Outcome]) -> Generation | Exception | None:
    """What a request came to with these outcomes: a generation, an error, or nothing yet."""
    events = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            return outcome
        events.append(outcome)
    try:
        return collector.generation() if collector.feed(events) else None
    except RuntimeError as error:
        return error


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text, or token ids) rather than a sequence of them; an empty one is of none."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def with_bar(
    finished: Iterator[tuple[int, Generation]], total: int, console: Console | None = None
) -> Iterator[tuple[int, Generation]]:
    """The same, with a bar on standard error: how many are done, tokens per second, and what time is left."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, speed="")
        tokens = 0
        for index, generation in finished:
            tokens += sum(len(each.token_ids) for each in generation.continuations)
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=1, speed=f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "")
            yield index, generation

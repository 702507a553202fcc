"""Serves one engine to many callers: threads that wait for an answer, and asyncio, which must not wait.

Only one thread at a time may step an engine. Threads that wait for events take turns at stepping it for all, and hand
each event to the request that it belongs to. Callers that must not step (an event loop, a thread that Ctrl-C may
interrupt) are served by one worker thread, while they have open requests. Knows requests and events, not prompts or
text.
"""

import asyncio
import atexit
import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from llamita.inference.engine import Engine
from llamita.inference.request import Collector, Generation, Request, TokenEvent

WINDOW = 512
"""Most requests handed to the engine at once: it never runs dry, and a list of a million prompts does not fill it."""
IDLE_SECONDS = 5.0
"""Seconds that the worker waits for work before it ends; each new worker costs PyTorch a new pool of threads."""

Outcome = TokenEvent | Exception
Sink = Callable[[Sequence[Outcome]], object]
"""Takes a request's share of a step, on the thread that stepped; it must be quick and must not block."""
T = TypeVar("T")


class _Mailbox:
    """Brings what the engine's thread hands out into an event loop, all of a step in one wake-up of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[tuple[Callable[[int, Sequence[Outcome]], None], int, Sequence[Outcome]]] = deque()
        self._woken = False

    def put(self, take: Callable[[int, Sequence[Outcome]], None], place: int, share: Sequence[Outcome]) -> None:
        """Lets the loop call `take(place, share)`; RuntimeError where the loop is closed."""
        self._letters.append((take, place, share))
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                self._letters.clear()
                raise

    def _deliver(self) -> None:
        self._woken = False  # before the letters are read: one that comes meanwhile wakes the loop again
        while self._letters:
            take, place, share = self._letters.popleft()
            take(place, share)


class Interrupt:
    """Ends the reading of events with an error; called in the event loop of the reader."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._take: Callable[[int, Sequence[Outcome]], None] | None = None

    def __call__(self, error: Exception) -> None:
        self.error = error
        if self._take is not None:
            self._take(0, [error])

    def connect(self, take: Callable[[int, Sequence[Outcome]], None]) -> None:
        self._take = take
        if self.error is not None:
            take(0, [self.error])


class Service:
    """Serves an engine to threads and to asyncio, all at once.

    Following a request submits it. Leaving the iterator, or cancelling the task that reads it, ends the request before
    the engine's next step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._stepping = False  # the thread that sets it owns the engine until it clears it
        self._orders: deque[Request | int] = deque()  # requests to add and ids of requests to abort, in order
        self._sinks: dict[int, Sink] = {}
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()  # work to do between steps, one call a step
        self._call_ids = itertools.count(-1, -1)
        self._background: set[int] = set()  # open requests, and calls, that the worker steps for
        self._worker: threading.Thread | None = None
        self._closed = False
        self._mailbox: _Mailbox | None = None  # of the event loop that asked last
        self._step_begun: float | None = None
        self.failure = ""
        """What came out of a step that the engine did not contain; its state is not to be trusted from then on."""

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the step under way has taken so far; 0 between steps. A long one is a step that hangs."""
        begun = self._step_begun
        return 0.0 if begun is None else time.monotonic() - begun

    def follow(self, request: Request, background: bool = False) -> Iterator[TokenEvent]:
        """Yields the events of a request, of all its continuations, as they come.

        `background`: the worker steps, so that an interrupt of the waiting thread never falls into a step. Raises the
        engine's error where it refuses the request.
        """
        shares: queue.SimpleQueue[Sequence[Outcome]] = queue.SimpleQueue()
        remaining = request.params.n
        try:
            self._submit(request, shares.put, background)
            while remaining:
                if not background:
                    self._step_until(lambda: not shares.empty())
                for outcome in shares.get():
                    if isinstance(outcome, Exception):
                        raise outcome
                    remaining -= outcome.finish_reason is not None
                    yield outcome
        finally:
            self._abort(request.id)

    def follow_many(self, requests: Iterable[Request]) -> Generator[tuple[int, Generation | Exception]]:
        """Yields each request's place with its generation, or its error, in the order in which they end.

        Requests are taken as the engine has room. Closing the iterator ends those that are open.
        """
        shares: queue.SimpleQueue[tuple[int, Sequence[Outcome]]] = queue.SimpleQueue()
        waiting = enumerate(requests)
        collectors: dict[int, tuple[Request, Collector]] = {}

        def submit(place: int, request: Request) -> None:
            collectors[place] = request, Collector(request.params.n)
            self._submit(request, lambda share: shares.put((place, share)))

        try:
            while True:
                while len(collectors) < WINDOW and (entry := next(waiting, None)) is not None:
                    submit(*entry)
                if not collectors:
                    return
                self._step_until(lambda: not shares.empty())
                place, share = shares.get()
                if place not in collectors:  # it failed with one continuation, and this is another's
                    continue
                request, collector = collectors[place]
                result = collector.feed(share)
                if result is not None:
                    del collectors[place]
                    self._abort(request.id)
                    yield place, result
        finally:
            for request, _ in collectors.values():
                self._abort(request.id)

    async def follow_async(self, request: Request, buffer: int | None = None) -> AsyncGenerator[TokenEvent]:
        """Yields the events of a request as they come; the event loop never waits for a step.

        The request of a reader more than `buffer` events behind ends, and reading raises RuntimeError. Without a limit,
        at most the request's `n * max_tokens` events wait.
        """
        async with contextlib.aclosing(self.follow_many_async([request], buffer)) as batches:
            async for batch in batches:
                for _, event in batch:
                    yield event

    async def follow_many_async(
        self, requests: Sequence[Request], buffer: int | None = None, interrupt: Interrupt | None = None
    ) -> AsyncGenerator[list[tuple[int, TokenEvent]]]:
        """Yields the events of several requests, each with its request's place, all that have come since the last time.

        Ends when all have ended; one that fails raises, which ends the others. `buffer` is as in `follow_async`, for
        all of them together. Calling `interrupt` with an error raises that error here, which ends all of them.
        """
        mailbox = self._mailbox_of(asyncio.get_running_loop())
        waiting: list[tuple[int, Outcome]] = []
        arrived = asyncio.Event()

        def take(place: int, share: Sequence[Outcome]) -> None:
            if buffer is not None and len(waiting) + len(share) > buffer:
                for request in requests:
                    self._abort(request.id)
                share = [RuntimeError(f"the reader fell more than {buffer} tokens behind, so the request was ended")]
            waiting.extend([(place, outcome) for outcome in share])
            arrived.set()

        def sink_of(place: int) -> Sink:
            return lambda share: mailbox.put(take, place, share)

        remaining = sum(request.params.n for request in requests)
        if interrupt is not None:
            interrupt.connect(take)
        try:
            for place, request in enumerate(requests):
                self._submit(request, sink_of(place), background=True)
            while remaining:
                await arrived.wait()
                arrived.clear()
                batch: list[tuple[int, TokenEvent]] = []
                for place, outcome in waiting:
                    if not remaining:  # all have ended: an error that came later is none of theirs
                        break
                    if isinstance(outcome, Exception):
                        if batch:
                            yield batch
                        raise outcome
                    remaining -= outcome.finish_reason is not None
                    batch.append((place, outcome))
                waiting.clear()
                yield batch
        finally:
            for request in requests:
                self._abort(request.id)

    async def gather_async(self, requests: Sequence[Request]) -> list[Generation]:
        """Returns the generation of each request, all served together. One that fails raises, which ends the others."""

        async def gather_one(request: Request) -> Generation:
            collector = Collector(request.params.n)
            async with contextlib.aclosing(self.follow_async(request)) as events:
                async for event in events:
                    result = collector.feed([event])
                    if isinstance(result, Exception):
                        raise result
                    if result is not None:
                        return result
            raise AssertionError("the last event ends the last continuation")

        tasks = [asyncio.create_task(gather_one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def call_async(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, done by the worker between two steps: nothing else uses the runner meanwhile.

        Raises what it raises. Where the caller is cancelled before its turn, it is never begun.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        number = next(self._call_ids)

        def settle(value: T | None, error: Exception | None) -> None:
            if result.done():  # its reader is gone
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # type: ignore[arg-type]

        def call() -> None:
            value, error = None, None
            try:
                value = work()
            except Exception as fault:
                error = fault
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(settle, value, error)

        with self._changed:
            self._refuse_when_closed()
            self._calls.append((number, call))
            self._wake_worker(number)
        try:
            return await result
        finally:
            with self._changed:
                self._background.discard(number)
                self._calls = deque(entry for entry in self._calls if entry[0] != number)
                self._changed.notify_all()

    def close(self, seconds: float | None = None) -> bool:
        """Ends all open requests with an error, and the worker; returns once its last step is over.

        `seconds` is how long that step may take: where it hangs, it is left alone, and False is returned.
        """
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._stepping, seconds):
                atexit.unregister(self.close)  # nor does the interpreter wait for it
                return False
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._stepping)  # another thread's, begun before it knew
            self._fail_all(RuntimeError("this model was closed while it wrote"))
        return True

    # --- the engine's turn -------------------------------------------------------------------------------------------

    def _submit(self, request: Request, sink: Sink, background: bool = False) -> None:
        """Queues a request for the engine's next step; never waits for a step to end."""
        with self._changed:
            self._refuse_when_closed()
            self._sinks[request.id] = sink
            self._orders.append(request)
            if background:
                self._wake_worker(request.id)
            self._changed.notify_all()

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _Mailbox(loop)
        return self._mailbox

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this model was closed; load it again")

    def _wake_worker(self, number: int) -> None:
        """Lets the worker step for a request or a call; starts one where there is none. Only with the lock held."""
        self._background.add(number)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="llamita-engine", daemon=True)
            self._worker.start()
            atexit.register(self.close)  # a thread within PyTorch must not be torn down with the interpreter
        self._changed.notify_all()

    def _abort(self, request_id: int) -> None:
        """Forgets a request before the next step begins, without waiting; one that is done or unknown is no error."""
        with self._changed:
            self._sinks.pop(request_id, None)
            self._background.discard(request_id)
            self._orders.append(request_id)
            if not self._stepping:
                self._carry_out_orders()
            self._changed.notify_all()

    def _step_until(self, done: Callable[[], bool]) -> None:
        """Returns once `done()` is true: steps the engine, or waits while another thread does."""
        while True:
            with self._changed:
                if done():
                    return
                if self._stepping:
                    self._changed.wait()
                    continue
                self._stepping = True
            try:
                self._step()
            finally:
                with self._changed:
                    self._stepping = False
                    self._carry_out_orders()  # an end that came during the step: there may be no further one
                    self._changed.notify_all()

    def _work(self) -> None:
        """Runs the worker: steps while background requests are open, and ends when none came for IDLE_SECONDS."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._background), IDLE_SECONDS)
                if self._closed or not self._background:
                    self._worker = None
                    atexit.unregister(self.close)
                    return
            self._step_until(lambda: self._closed or not self._background)

    def _step(self) -> None:
        """Does one step of the engine and hands out its events. Only for the thread that set `_stepping`."""
        shares: dict[int, list[TokenEvent]] = {}
        self._step_begun = time.monotonic()
        try:
            self._carry_out_calls()
            self._carry_out_orders()
            for event in self.engine.step():
                shares.setdefault(event.request_id, []).append(event)
        except Exception as error:
            # An engine contains what fails in a step; where this comes out, its state is not to be trusted further.
            self.failure = f"{type(error).__name__}: {error}"
            with self._changed:
                self._fail_all(RuntimeError(f"the engine's step failed: {self.failure}"))
            return
        finally:
            self._step_begun = None
        for request_id, events in shares.items():
            self._hand_out(request_id, events)
        if not shares:
            with self._changed:
                if not self._orders and not self.engine.has_work:
                    self._fail_all(RuntimeError("the request was dropped by a step that failed"))

    def _carry_out_calls(self) -> None:
        """Does one call, so that those under way are never held up by many."""
        with self._changed:
            if not self._calls:
                return
            number, call = self._calls.popleft()
        call()
        with self._changed:
            self._background.discard(number)

    def _carry_out_orders(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            if isinstance(order, int):
                self.engine.abort(order)
                continue
            try:
                self.engine.add(order)
            except Exception as error:
                self._hand_out(order.id, [error])

    def _fail_all(self, error: Exception) -> None:
        self._orders.clear()
        for request_id in list(self._sinks):
            with contextlib.suppress(Exception):  # it has failed already; the callers are to be told
                self.engine.abort(request_id)
            self._hand_out(request_id, [error])
            self._background.discard(request_id)

    def _hand_out(self, request_id: int, outcomes: Sequence[Outcome]) -> None:
        sink = self._sinks.get(request_id)
        if sink is None:  # aborted while the step ran
            return
        try:
            sink(outcomes)
        except Exception:  # whoever asked is gone, with its event loop
            self._sinks.pop(request_id, None)
            self._background.discard(request_id)
            self.engine.abort(request_id)

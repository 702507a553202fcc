"""What stands between an endpoint and the engine: admission, deadlines, cancellation, counting.

An endpoint says how its requests are made (which happens off the event loop, once a place is free) and reads their
events, or it asks for work on the model itself (an embedding, the labels of a text), which is done between two steps of
the engine. Knows nothing of HTTP but the errors that it raises.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from llamita.backend.sampling import NONE_LEFT
from llamita.inference.request import Request, TokenEvent
from llamita.inference.service import Interrupt
from llamita.inference.structured import BROKEN
from llamita.server.admission import Admission, DrainingError, Place, QueueFullError
from llamita.server.errors import ApiError
from llamita.server.metrics import Metrics
from llamita.server.model import ServedModel
from llamita.server.sampling import field_at_fault
from llamita.server.settings import ServerLimits

CLOSE_SECONDS = 5.0
"""Seconds that the engine's last step may take when the server ends."""
Batch = list[tuple[int, TokenEvent]]
"""Events that came at once, each with the place of its request."""
T = TypeVar("T")


class Job:
    """The requests of one call of the API, admitted together. To be closed, whatever happens."""

    def __init__(self, serving: "Serving", requests: Sequence[Request], place: Place, arrived: float) -> None:
        self.requests = requests
        self._serving, self._place, self._arrived = serving, place, arrived
        self._ended = 0

    async def events(self) -> AsyncGenerator[Batch]:
        """Yields the events of all requests as they come.

        Raises `ApiError` where the engine fails, the deadline passes, or the reader lags too far behind.
        """
        serving, metrics = self._serving, self._serving.metrics
        limits = serving.limits
        last: dict[tuple[int, int], float] = {}
        service, interrupt = serving.model.require_llm().service, Interrupt()
        batches = service.follow_many_async(self.requests, limits.stream_buffer, interrupt)
        wanted = sum(request.params.n for request in self.requests)
        try:
            async with serving.interrupting(interrupt, self._arrived), contextlib.aclosing(batches):
                async for batch in batches:
                    now = time.monotonic()
                    for place, event in batch:
                        self._count(place, event, now, last)
                        if event.finish_reason == "error":
                            raise _engine_error(event.error, self.requests[place])
                    yield batch
        except RuntimeError as error:  # a reader that lags, an engine that failed or was closed
            code = "engine_error" if serving.model.fault else "ended"
            raise ApiError(503, str(error), code=code) from None
        finally:
            if self._ended < wanted:
                metrics.cancelled.inc()

    def _count(self, place: int, event: TokenEvent, now: float, last: dict[tuple[int, int], float]) -> None:
        metrics, key = self._serving.metrics, (place, event.index)
        if not last:
            self._place.began()
        if key not in last:
            if event.index == 0:
                metrics.read_prompt(event.statistics)
            metrics.first_token.observe(now - self._arrived)
        elif event.token_id is not None:
            metrics.gap.observe(now - last[key])
        last[key] = now
        if event.finish_reason is not None:
            self._ended += 1
            metrics.ended(event.statistics, event.finish_reason)
            metrics.whole.observe(now - self._arrived)


class Serving:
    """One model with the limits within which it is asked."""

    def __init__(self, model: ServedModel, limits: ServerLimits) -> None:
        self.model, self.limits = model, limits
        engine = model.engine
        running = engine.config.max_sequences if engine is not None else 1
        self.admission = Admission(running, limits.max_queued_requests, limits.max_queued_tokens)
        self.metrics = Metrics(engine, self._waiting, lambda: self.admission.queued_tokens)
        self.hangs = False
        self._ended = False
        self._interrupts: set[Callable[[Exception], object]] = set()

    @contextlib.asynccontextmanager
    async def job(self, prepare: Callable[[], Sequence[Request]]) -> AsyncGenerator[Job]:
        """Makes the requests of a call and admits them; raises `ApiError` where they are not allowed or not now.

        `prepare` runs in a thread: it reads templates, encodes text and compiles grammars, and raises ValueError for
        what a client may not ask.
        """
        arrived = time.monotonic()
        with self.place() as place:
            requests = await self.prepared(prepare)
            with self._refusals():
                place.read_prompt(sum(len(request.prompt) for request in requests))
            yield Job(self, requests, place, arrived)

    async def work(self, prepare: Callable[[], Callable[[], T]]) -> T:
        """Returns the result of work on the model, which `prepare` returns; both as for `job`."""
        with self.place():
            call = await self.prepared(prepare)
            try:
                return await self.within_time(self.model.call(call))
            except ValueError as error:
                raise ApiError(400, _line(error)) from None

    async def prepared(self, prepare: Callable[[], T]) -> T:
        """Returns what `prepare` makes in a thread; its ValueError as an `ApiError`."""
        try:
            return await asyncio.to_thread(prepare)
        except ApiError:
            raise
        except ValueError as error:
            message = _line(error)
            raise ApiError(400, message, param=field_at_fault(message), code="invalid_value") from None

    @contextlib.asynccontextmanager
    async def interrupting(self, interrupt: Callable[[Exception], object], arrived: float) -> AsyncGenerator[None]:
        """Calls `interrupt` with the error, an `ApiError`, when a request's time is over or the server ends."""
        loop = asyncio.get_running_loop()
        left = arrived + self.limits.request_seconds - time.monotonic()
        clock = loop.call_later(left, lambda: interrupt(self._out_of_time()))
        self._interrupts.add(interrupt)
        if self._ended:
            interrupt(_server_ended())
        try:
            yield
        finally:
            clock.cancel()
            self._interrupts.discard(interrupt)

    async def within_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns the result of `work`; `ApiError` where it takes longer than a request may, or the server ends."""
        outcome = asyncio.ensure_future(work)
        fault: list[Exception] = []

        def stop(error: Exception) -> None:
            fault.append(error)
            outcome.cancel()

        try:
            async with self.interrupting(stop, time.monotonic()):
                return await outcome
        except asyncio.CancelledError:
            if fault:
                raise fault[0] from None
            raise
        finally:
            outcome.cancel()

    def _out_of_time(self) -> ApiError:
        self.metrics.rejected.labels("deadline").inc()
        message = f"the request took longer than the {self.limits.request_seconds:g} seconds that are allowed"
        return ApiError(504, message, code="deadline_exceeded")

    def end(self) -> int:
        """Ends all requests that are still open with an error; returns their number."""
        self._ended = True
        for interrupt in tuple(self._interrupts):
            interrupt(_server_ended())
        return self.admission.open_requests

    def close(self) -> None:
        """Ends the engine's thread; `hangs` says whether its last step went on for CLOSE_SECONDS and was left."""
        self.hangs = self.model.llm is not None and not self.model.llm.service.close(CLOSE_SECONDS)

    @property
    def fault(self) -> str:
        """Why requests are not answered, in a line; empty where they are."""
        model = self.model
        if model.fault:
            return f"the engine failed: {model.fault}"
        if model.seconds_in_step > self.limits.stuck_seconds:
            return f"a step of the engine has taken {model.seconds_in_step:.0f} seconds"
        return "the server is ending" if self.admission.draining else ""

    def _waiting(self) -> int:
        engine = self.model.engine
        return max(0, self.admission.open_requests - (len(engine.scheduler.running) if engine is not None else 0))

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """Takes a place for the time of the `with`; `ApiError` where there is none, or nothing is answered."""
        if self.fault:
            self.metrics.rejected.labels("unavailable").inc()
            raise ApiError(503, self.fault, code="unavailable")
        with contextlib.ExitStack() as stack:
            with self._refusals():
                place = stack.enter_context(self.admission.place())
            yield place

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except QueueFullError as full:
            self.metrics.rejected.labels("queue_full").inc()
            raise ApiError(429, str(full), code="queue_full") from None
        except DrainingError as ending:
            self.metrics.rejected.labels("draining").inc()
            raise ApiError(503, str(ending), code="draining") from None


def _server_ended() -> ApiError:
    return ApiError(503, "the server ended before the answer did", code="ended")


def _engine_error(message: str, request: Request) -> ApiError:
    """Returns the error of a continuation that the engine ended: 400 where what was asked for leaves no text."""
    if not message.startswith((BROKEN, NONE_LEFT)):
        return ApiError(500, message, code="engine_error")
    params = request.params
    asked = {"response_format": params.json_schema, "regex": params.regex, "choices": params.choices}
    param = next((name for name, value in asked.items() if value), None)
    return ApiError(400, message, param=param, code="no_continuation")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

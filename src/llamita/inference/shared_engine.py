"""One engine among many callers: threads that wait for an answer, and a worker thread for those that must not wait.

An engine is not made for threads: one at a time may step it. Here whoever waits for events steps it in turns, for
everybody, and hands each event to the request it belongs to. Callers on an event loop (async_llm.py) cannot wait, so
while they have open requests one worker thread does it for them. Knows nothing of prompts, text or asyncio.
"""

import atexit
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from llamita.inference.engine import Engine
from llamita.inference.request import Request, TokenEvent

IDLE_SECONDS = 5.0
"""How long the worker waits for more work before it ends: a thread of its own costs PyTorch a new pool of threads."""

Outcome = TokenEvent | Exception
Sink = Callable[[Sequence[Outcome]], None]
"""Takes a request's share of a step: called from whichever thread stepped, so it must be quick and must not block."""


class SharedEngine:
    """Steps an engine for requests from any thread; `submit` and `abort` never wait for a step to end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._stepping = False  # who sets it owns the engine until it is cleared
        self._orders: deque[Request | int] = deque()  # what to add, and the ids of what to abort, in order
        self._sinks: dict[int, Sink] = {}
        self._background: set[int] = set()  # open requests that the worker steps for
        self._worker: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request, sink: Sink, background: bool = False) -> None:
        """Have the engine take a request with the next step; `background`: the worker steps, not the caller."""
        with self._changed:
            if self._closed:
                raise RuntimeError("this model was closed; load it again")
            self._sinks[request.id] = sink
            self._orders.append(request)
            if background:
                self._background.add(request.id)
                if self._worker is None:
                    self._worker = threading.Thread(target=self._work, name="llamita-engine", daemon=True)
                    self._worker.start()
                    atexit.register(self.close)  # a thread within PyTorch must not be torn down with the interpreter
            self._changed.notify_all()

    def abort(self, request_id: int) -> None:
        """Forget a request, before the next step begins; one that is done or unknown is no error."""
        with self._changed:
            self._sinks.pop(request_id, None)
            self._background.discard(request_id)
            self._orders.append(request_id)
            if not self._stepping:
                self._carry_out_orders()
            self._changed.notify_all()

    def advance(self, done: Callable[[], bool]) -> None:
        """Return once `done()`, or after one step, be it of this thread or of another."""
        with self._changed:
            if done():
                return
            if self._stepping:
                self._changed.wait()
                return
            self._stepping = True
        try:
            self._step()
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    def close(self) -> None:
        """End all that is open with an error, and the worker; returns once its last step is over."""
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        with self._changed:
            while self._stepping:
                self._changed.wait()
            self._fail_all(RuntimeError("this model was closed while it wrote"))

    def _work(self) -> None:
        """The worker: steps while requests in the background are open, and ends when none came for a while."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._background), IDLE_SECONDS)
                if self._closed or not self._background:
                    self._worker = None
                    atexit.unregister(self.close)
                    return
            self.advance(lambda: self._closed or not self._background)

    def _step(self) -> None:
        """One step of the engine, its events handed out. Only for the thread that set `_stepping`."""
        shares: dict[int, list[TokenEvent]] = {}
        try:
            self._carry_out_orders()
            for event in self.engine.step():
                shares.setdefault(event.request_id, []).append(event)
        except Exception as error:
            # An engine contains what fails in a step; where this comes out, its state is not to be trusted further.
            with self._changed:
                self._fail_all(RuntimeError(f"the engine's step failed: {type(error).__name__}: {error}"))
            return
        for request_id, events in shares.items():
            self._hand_out(request_id, events)
        with self._changed:
            if not self.engine.has_work and not self._orders and not shares:
                self._fail_all(RuntimeError("the request was dropped by a step that failed"))

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

"""Bounds on connections that uvicorn itself does not have: their number, and clients that send or read too slowly.

A connection that has not sent a whole request head in time is closed, and so is one that leaves an answer unread; both
would otherwise hold a place for ever. Knows bytes and clocks, and nothing of what is asked.
"""

import asyncio
import json
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from llamita.server.errors import ApiError
from llamita.server.settings import ServerLimits


def make_protocol(limits: ServerLimits) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with the limits of a server."""

    class BoundedProtocol(H11Protocol):
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.write(_too_many(limits.max_connections))
                transport.close()
                return
            self._start(limits.body_seconds)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if self._clock is None and (before is None or before.response_complete):
                self._start(limits.body_seconds)  # of the head that begins here
            super().data_received(data)
            if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
                self._stop()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start(limits.write_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self, seconds: float) -> None:
            self._stop()
            self._clock = self.loop.call_later(seconds, self._give_up)

        def _stop(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _give_up(self) -> None:
            self._clock = None
            self.transport.abort()

    return cast(Any, BoundedProtocol)


def _too_many(most: int) -> bytes:
    error = ApiError(503, f"{most} connections are open, as many as the server takes; try again shortly")
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"retry-after: {(error.headers or {})['Retry-After']}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body

"""Bounds on connections that uvicorn itself does not have: their number, and clients that send or read too slowly.

A connection that has not sent a whole request head in time is closed, so is one that goes on sending a body that was
refused already, and so is one that leaves an answer unread; each would otherwise hold a place for ever. What is no HTTP
is answered in the form of every other error. Knows bytes and clocks, and nothing of what is asked.
"""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamita.server.errors import ApiError
from llamita.server.settings import ServerLimits


def make_protocol(limits: ServerLimits) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with the limits of a server."""

    class BoundedProtocol(H11Protocol):
        _reading: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                most = limits.max_connections
                message = f"{most} connections are open, as many as the server takes; try again shortly"
                transport.write(_response(ApiError(503, message, code="too_many_connections")))
                transport.close()
                return
            self._reading = self._abort_after(limits.body_seconds)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if self._reading is None and (before is None or before.response_complete):
                # The head of a request begins, or the rest of a body comes that was refused.
                self._reading = self._abort_after(limits.body_seconds)
            super().data_received(data)
            if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
                _cancel(self._reading)
                self._reading = None

        def pause_writing(self) -> None:
            super().pause_writing()
            _cancel(self._writing)
            self._writing = self._abort_after(limits.write_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._writing)
            self._writing = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._writing is None and self.transport.get_write_buffer_size():
                # Too little waits for writing to have been paused, and nothing more will be written.
                self._writing = self.loop.call_later(limits.write_seconds, self._abort_unread)

        def _abort_unread(self) -> None:
            self._writing = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._reading)
            _cancel(self._writing)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answers what is no HTTP, unless an answer is under way; uvicorn calls it while it handles the fault."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_response(_protocol_error(sys.exception(), limits)))
            self.transport.close()

        def _abort_after(self, seconds: float) -> asyncio.TimerHandle:
            return self.loop.call_later(seconds, self.transport.abort)

    return cast(Any, BoundedProtocol)


def _cancel(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()


def _protocol_error(fault: BaseException | None, limits: ServerLimits) -> ApiError:
    if isinstance(fault, h11.RemoteProtocolError) and fault.error_status_hint == 431:
        return ApiError(431, f"line and headers are larger than the {limits.max_header_bytes} bytes that are allowed")
    reason = str(fault).partition(":")[0]  # without the bytes at fault
    return ApiError(400, f"this is not HTTP/1.1: {reason}", code="invalid_http")


def _response(error: ApiError) -> bytes:
    """Returns an answer that ends its connection."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"{name}: {value}" for name, value in {**headers, **(error.headers or {})}.items()]
    status = HTTPStatus(error.status_code)
    return "\r\n".join([f"HTTP/1.1 {status.value} {status.phrase}", *lines, "", ""]).encode() + body

"""The gate of the server, before any endpoint: who may ask, by which name, how much, and what is written down of it.

One ASGI layer: checks the Host header (a page of another site whose name was bound to this address gets nothing), the
API key, the size of the body and the time that it takes to come; gives each request an id; writes one JSON line of each
to the log, without prompts; and answers what nobody caught with 500, its details in the log alone.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamita.server.errors import ApiError, ClientGoneError
from llamita.server.metrics import Metrics
from llamita.server.settings import ServerLimits

LOG = logging.getLogger("llamita.server")
OPEN = ("/", "/health", "/v1/health", "/favicon.ico")
"""Paths that need no API key, beside those of the page."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
PROTECTION = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """Wraps the application. `hosts`: names that clients may use beside IP addresses and localhost; "*" allows all."""

    def __init__(
        self, app: ASGIApp, limits: ServerLimits, metrics: Metrics, keys: Sequence[str], hosts: Collection[str]
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = {host.lower() for host in hosts} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, headers, path = time.monotonic(), Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                for name, value in PROTECTION.items():
                    added.setdefault(name, value)
            await send(message)

        async def refuse(error: ApiError) -> None:
            await error.response(path)(scope, receive, answer)

        try:
            self._check(headers, path)
            await self._app(scope, self._bounded(headers, receive), answer)
        except ApiError as error:  # raised before an endpoint, or by the body
            if status == 0:
                await refuse(error)
        except ClientGoneError:
            status = 499
        except OSError:  # the connection broke while it was written to
            status = status or 499
        except Exception:
            LOG.exception(json.dumps({"request_id": request_id, "path": path, "event": "unexpected error"}))
            if status:
                raise
            await refuse(ApiError(500, f"an unexpected error; the server's log has it under {request_id}"))
        finally:
            milliseconds = round(1000 * (time.monotonic() - begun), 1)
            route = scope.get("route")
            name = getattr(route, "path", "unknown")
            self._metrics.answered.labels(name, str(status)).inc()
            LOG.info(
                json.dumps(
                    {
                        "request_id": request_id, "method": scope["method"], "path": path[:200], "status": status,
                        "milliseconds": milliseconds,
                    }
                )
            )  # fmt: skip

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if "*" not in self._hosts and not self._is_ours(host):
            raise ApiError(
                421, f"this server is not {host[:100]!r}; ask it by its address, or start it with --hosts NAME"
            )
        if self._keys and path not in OPEN and not path.startswith("/page/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            key = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
            # Every key is compared, each in constant time.
            if not sum(hmac.compare_digest(digest, known) for known in self._keys):
                error = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
                raise ApiError(401, error, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if name.lower() in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Returns a `receive` that refuses a body that is too large, or that takes too long to come."""
        most = self._limits.max_body_bytes
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,20}", length):
            raise ApiError(
                400, f"the header Content-Length is {length[:40]!r}; expected a number of bytes", code="invalid_http"
            )
        too_large = ApiError(413, f"the body is larger than the {most} bytes that are allowed")
        if int(length) > most:
            raise too_large
        read = 0
        deadline = time.monotonic() + self._limits.body_seconds
        complete = False

        async def bounded() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {self._limits.body_seconds:g} seconds",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if read > most:
                    raise too_large
            return message

        return bounded

"""Routes that read their bodies strictly (json_body.py), rather than as Python's parser happens to."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from llamita.server import json_body
from llamita.server.errors import ApiError


class _StrictRequest(Request):
    async def json(self) -> Any:
        return json_body.parse(await self.body(), self.app.state.limits.max_json_depth)


class JsonRoute(APIRoute):
    """A route whose body is JSON: 415 for another type, 400 for what is no strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None:
                kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(415, f"the body must be application/json, not {kind[:80] or 'of no stated type'!r}")
            return await handle(_StrictRequest(request.scope, request.receive, request._send))

        return strict

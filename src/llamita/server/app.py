"""The application: all endpoints over one model, and the form of every error."""

import functools
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from llamita import __version__
from llamita.server import (
    chat_completions,
    completions,
    decisions,
    information,
    look_inside,
    messages,
    page_routes,
    responses,
    texts,
)
from llamita.server.description import describe
from llamita.server.errors import ApiError, ClientGoneError
from llamita.server.gate import Gate
from llamita.server.model import ServedModel
from llamita.server.serving import Serving
from llamita.server.settings import ServerLimits


def create_app(
    model: ServedModel,
    limits: ServerLimits | None = None,
    *,
    api_keys: Sequence[str] = (),
    hosts: Collection[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """Returns the ASGI application that serves a model.

    `api_keys`: one of them is needed, where there are any. `hosts`: names by which clients may ask, beside localhost
    and IP addresses; "*" allows every name. `origins`: sites whose pages may ask from a browser.
    """
    limits = limits or ServerLimits()
    serving = Serving(model, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        serving.close()

    app = FastAPI(
        title="Llamita",
        version=__version__,
        description="A small language model behind the APIs of OpenAI and Anthropic.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.limits, app.state.serving = limits, serving
    for module in (chat_completions, completions, responses, messages, texts, decisions, look_inside, information):
        app.include_router(module.router(serving))
    app.include_router(page_routes.router())
    app.openapi = functools.cache(lambda: describe(app))  # type: ignore[method-assign]
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_middleware(Gate, limits=limits, metrics=serving.metrics, keys=api_keys, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _invalid(request: Request, error: Exception) -> Response:
    """Answers a body of another form with 400 that names the first field at fault."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if [fault["loc"] for fault in faults] == [("body",)] and faults[0]["type"] == "missing":
        return ApiError(400, "the body is empty; expected a JSON object", code="invalid_json").response(
            request.url.path
        )
    # Of the forms that a field may have, the one that came closest has the longest path.
    fault = max(faults, key=lambda fault: len(fault["loc"])) if faults else {"loc": ("body",), "msg": "no body"}
    named = _field_path(fault["loc"][1:], error.body, missing=fault["type"] == "missing")
    param = named or None
    shown = f"{named}: {fault['msg']}" if named else str(fault["msg"])
    if "input" in fault and isinstance(fault["input"], str | int | float | bool):
        shown += f", got {fault['input']!r:.80}"
    return ApiError(400, " ".join(shown.split()), param=param, code="invalid_value").response(request.url.path)


def _field_path(location: Sequence[str | int], body: Any, missing: bool) -> str:
    """Returns the path of a field as it stands in the body: a location names the forms of a union beside it."""

    def walked(place: int, value: Any) -> tuple[bool, list[str]]:
        """Whether the location's last part was reached, and the parts that stand in the body."""
        if place == len(location):
            return False, []
        part, is_last = location[place], place == len(location) - 1
        skipped = walked(place + 1, value)
        if isinstance(value, dict) and (part in value or (missing and is_last)):
            reached, path = walked(place + 1, value.get(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            reached, path = walked(place + 1, value[part])
        else:
            return skipped
        # A form may have the name of a field that stands beside the one at fault.
        return max((reached or is_last, [str(part), *path]), skipped, key=lambda found: (found[0], len(found[1])))

    return ".".join(walked(0, body)[1])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response(request.url.path)
    if isinstance(error.__cause__, ApiError):  # out of the reading of the body
        return error.__cause__.response(request.url.path)
    message: dict[int, str] = {
        404: f"there is no {request.url.path[:200]!r} here",
        405: f"{request.method} is not allowed at {request.url.path[:200]!r}",
    }
    headers: dict[str, Any] = dict(error.headers or {})
    text = message.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, headers=headers).response(request.url.path)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it

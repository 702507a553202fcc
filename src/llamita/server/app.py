"""The application: all endpoints over one model, and the form of every error."""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

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
        model.close()

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
        return _answer(request, ApiError(400, "the body is empty; expected a JSON object", code="invalid_json"))
    # Of the forms that a field may have, the one that came closest has the longest path.
    fault = max(faults, key=lambda fault: len(fault["loc"])) if faults else {"loc": ("body",), "msg": "no body"}
    named = _field_path(fault["loc"][1:], error.body, missing=fault["type"] == "missing")
    param = named or None
    shown = f"{named}: {fault['msg']}" if named else str(fault["msg"])
    if "input" in fault and isinstance(fault["input"], str | int | float | bool):
        shown += f", got {fault['input']!r:.80}"
    return _answer(request, ApiError(400, " ".join(shown.split()), param=param, code="invalid_value"))


def _field_path(location: Sequence[str | int], body: Any, missing: bool) -> str:
    """Returns the path of a field as it stands in the body: a location names the forms of a union beside it."""
    path, value = [], body
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(value, dict) and (part in value or (missing and is_last)):
            path.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(str(part))
            value = value[part]
    return ".".join(path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return _answer(request, error)
    if isinstance(error.__cause__, ApiError):  # out of the reading of the body
        return _answer(request, error.__cause__)
    message: dict[int, str] = {
        404: f"there is no {request.url.path[:200]!r} here",
        405: f"{request.method} is not allowed at {request.url.path[:200]!r}",
    }
    headers: dict[str, Any] = dict(error.headers or {})
    text = message.get(error.status_code, str(error.detail))
    return _answer(request, ApiError(error.status_code, text, headers=headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _answer(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(request.url.path), error.status_code, dict(error.headers or {}))

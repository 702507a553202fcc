"""Errors as clients read them: a status and an object with message, type, param and code.

Every endpoint raises `ApiError`; `app.py` writes it in the form of the API that was asked (OpenAI's, or Anthropic's for
`/v1/messages`). Whatever else is raised is answered with 500 and logged; its text is not shown.
"""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    421: "unknown_host",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}
"""The code of an error that has none of its own."""
ANTHROPIC_TYPES = {429: "rate_limit_error", 500: "api_error", 503: "overloaded_error", 504: "api_error"}
RETRY_SECONDS = 1


class ApiError(HTTPException):
    """An error that is answered: its HTTP status, and the object of OpenAI's API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if status in (429, 503):
            headers = {"Retry-After": str(RETRY_SECONDS), **(headers or {})}
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code or CODES.get(status)

    @property
    def type(self) -> str:
        return TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """Returns the JSON of the answer, in Anthropic's form for its paths."""
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC_TYPES.get(self.status_code, self.type)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Response:
        """Returns the answer to a request of this path."""
        return JSONResponse(self.body(path), self.status_code, dict(self.headers or {}))


class ClientGoneError(Exception):
    """The client has closed its connection; there is nobody to answer."""


def bad_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Returns the error for a value of a field that is not allowed."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """Returns the error for a field that this server does not honour."""
    return ApiError(400, f"{param} is not supported here: {why}", param=param, code="unsupported_parameter")


def refuse_fields(body: object, reasons: Mapping[str, str]) -> None:
    """Raises the error for the first of these fields that a request sets; `reasons` says why it is not honoured."""
    for name, why in reasons.items():
        if getattr(body, name) is not None:
            raise unsupported(name, why)

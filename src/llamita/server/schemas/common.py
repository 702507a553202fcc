"""What the bodies of all APIs share: strict types, and refusal of a field that nobody knows."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema


def _is_off(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported here")
    return value


OFF = {"type": "boolean", "const": False}
Off = Annotated[bool, AfterValidator(_is_off), WithJsonSchema(OFF)]
"""A switch that can only be off. (`Literal[False]` takes 0 as well.)"""
Refused = Annotated[Any, WithJsonSchema({"type": "null", "description": "Refused where it is set."})]
"""A field that is known and not honoured; whoever reads it says why (`errors.refuse_fields`)."""


class Body(BaseModel):
    """A part of a request: types as they are, `"5"` is no number; an unknown field is refused by its name."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorObject(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """The body of every answer that is an error, but for /v1/messages."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": about}
    for status, about in {
        400: "A field has a value that is not allowed, or is not supported; `param` names it.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        421: "The Host header is not one of this server's.",
        429: "The queue is full; try again after `Retry-After` seconds.",
        500: "The engine failed at this request.",
        503: "The server is ending, or its engine has failed.",
        504: "The request took longer than is allowed.",
    }.items()
}

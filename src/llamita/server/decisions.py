"""POST /v1/decisions and /v1/systemone: a text and typed questions in, a probability for every option out."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from llamita.server.errors import ApiError
from llamita.server.routes import JsonRoute
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.decisions import DecisionsAnswer, DecisionsRequest, SystemOne, SystemOneRequest
from llamita.server.serving import Serving
from llamita.server.streaming import unless_gone
from llamita.workflows import decision_forms as forms
from llamita.workflows.decisions import ContextError, decide, decide_async
from llamita.workflows.questions import Decisions


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["decisions"], responses=ERRORS)

    @routes.post("/v1/decisions", response_model=DecisionsAnswer)
    async def decisions(body: DecisionsRequest, request: Request) -> Response:
        """Answers typed questions about a text, in OpenAI's form: a probability for every option, nothing generated."""
        return JSONResponse(
            await unless_gone(request, answer(serving, body, forms.parse_decisions, forms.decisions_response))
        )

    @routes.post("/v1/systemone", response_model=SystemOne)
    async def system_one(body: SystemOneRequest, request: Request) -> Response:
        """Answers typed questions about a state: a probability for every option, nothing generated."""
        return JSONResponse(
            await unless_gone(request, answer(serving, body, forms.parse_systemone, forms.systemone_response))
        )

    return routes


async def answer(
    serving: Serving,
    body: DecisionsRequest | SystemOneRequest,
    parse: Callable[[Any], forms.Asked],
    write: Callable[[str, forms.Asked, Decisions], dict[str, Any]],
) -> dict[str, Any]:
    """Returns the answer of either form."""
    model, text = serving.model, "input" if isinstance(body, DecisionsRequest) else "state"
    try:
        asked = parse(body.model_dump(exclude_unset=True))
        adapter = model.adapter_of(asked.model)
        with serving.place():
            if model.classifier is not None:
                classifier = model.classifier
                answering = model.call(lambda: decide(classifier, asked.text, asked.questions, layout=asked.layout))
            else:
                answering = decide_async(
                    model.require_llm(), asked.text, asked.questions, layout=asked.layout, adapter=adapter
                )
            found = await serving.within_time(answering)
        return write(asked.model or model.name, asked, found)
    except ContextError as error:
        raise ApiError(400, str(error), param=text, code="context_length_exceeded") from None
    except ValueError as error:
        raise ApiError(400, str(error), param=getattr(error, "param", None), code="invalid_value") from None
    except RuntimeError as error:
        raise ApiError(500, str(error), code="engine_error") from None

"""POST /v1/look_inside: what a model expects after each token of a text, and what leads there."""

import json
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from llamita.inference.inspection import MAX_TOKENS, Inspection, look_inside
from llamita.server.chat_jobs import ChatTask, encode_messages, plain_messages
from llamita.server.errors import ApiError, bad_value
from llamita.server.routes import JsonRoute
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.inside import Inside, LookInsideRequest
from llamita.server.serving import Serving
from llamita.server.streaming import unless_gone

MAX_WEIGHTS = 4_000_000
"""Attention weights of an answer: some 40 MB of JSON."""


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, responses=ERRORS)

    @routes.post("/v1/look_inside", response_model=Inside, tags=["insight"])
    async def inside(body: LookInsideRequest, request: Request) -> Response:
        """Reads a text and reports the likeliest tokens at each position, attention weights, the logit lens."""
        found = await unless_gone(request, serving.work(lambda: inside_work(serving, body)))
        text = await serving.prepared(lambda: written(found, body.model or serving.model.name))
        return Response(text, media_type="application/json")

    return routes


def inside_work(serving: Serving, body: LookInsideRequest) -> Callable[[], Inspection]:
    """Returns the work on the model that answers a request."""
    model = serving.model
    llm, adapter = model.require_llm(), model.adapter_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_value("prompt", "give one of prompt and messages")
    if body.messages is not None:
        if not body.messages:
            raise bad_value("messages", "messages is empty; give at least one message")
        task = ChatTask(plain_messages(body.messages), params=lambda room: model.defaults)
        tokens = encode_messages(model, task).tokens
    else:
        tokens = llm.encode(body.prompt or "")
    most = min(MAX_TOKENS, model.config.max_position_embeddings)
    if not 1 <= len(tokens) <= most:
        code = "context_length_exceeded" if tokens else "invalid_value"
        raise ApiError(400, f"the text has {len(tokens)} tokens; give 1 to {most}", param="prompt", code=code)
    if not all(0 <= token_id < model.config.vocab_size for token_id in tokens):
        raise bad_value("prompt", f"prompt has a token id that is not 0 to {model.config.vocab_size - 1}")

    numbers = len(set(body.attention)) * model.config.num_attention_heads * len(tokens) ** 2
    if numbers > MAX_WEIGHTS:
        raise bad_value(
            "attention",
            f"{len(set(body.attention))} layers have {numbers} attention weights over these {len(tokens)} tokens, more "
            f"than the {MAX_WEIGHTS} of an answer; ask for fewer layers, or for a shorter text",
        )
    return lambda: look_inside(
        llm.runner, llm.tokenizer, tokens, top=body.top, attention=body.attention, lens=body.lens, adapter=adapter
    )


def written(found: Inspection, name: str) -> bytes:
    """Returns the body of the answer."""
    whole = {"object": "look_inside", "model": name, **found.to_dict()}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()

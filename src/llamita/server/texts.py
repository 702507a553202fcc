"""Endpoints that read texts and generate nothing: embeddings, the labels of a classifier."""

import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from llamita.inference.embedding import embed
from llamita.server import wording
from llamita.server.completions import listed_prompts
from llamita.server.errors import ApiError, bad_value
from llamita.server.routes import JsonRoute
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.openai import ClassifyRequest, EmbeddingList, EmbeddingRequest, LabelList
from llamita.server.serving import Serving
from llamita.server.streaming import unless_gone


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, responses=ERRORS)

    @routes.post("/v1/embeddings", response_model=EmbeddingList, tags=["OpenAI"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Turns texts into vectors of length one: the model's states after the final norm, their mean or the last."""
        return JSONResponse(await unless_gone(request, serving.work(lambda: embedding_work(serving, body))))

    @routes.post("/v1/classify", response_model=LabelList, tags=["labels"])
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Labels texts with a model that has a classification head: a probability for every label."""
        return JSONResponse(await unless_gone(request, serving.work(lambda: label_work(serving, body))))

    return routes


def embedding_work(serving: Serving, body: EmbeddingRequest) -> Callable[[], dict[str, Any]]:
    """Returns the work on the model that answers a request for embeddings."""
    model = serving.model
    llm, adapter, pooling = model.require_llm(), model.adapter_of(body.model), body.pooling or model.pooling
    prompts = listed_prompts(body.input, "input")
    _check_count(len(prompts), serving)
    rows = [llm.encode(prompt) for prompt in prompts]
    context = model.config.max_position_embeddings
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if not row:
            raise bad_value("input", f"input {number} is empty; give some text")
        if len(row) > context:
            message = f"input {number} has {len(row)} tokens, and the context of this model has {context}; shorten it"
            raise ApiError(400, message, param="input", code="context_length_exceeded")
        if not isinstance(prompt, str) and not all(0 <= token_id < model.config.vocab_size for token_id in row):
            raise bad_value("input", f"input {number} has a token id that is not 0 to {model.config.vocab_size - 1}")
    tokens = sum(map(len, rows))

    def work() -> dict[str, Any]:
        vectors_nD = embed(llm.runner, rows, pooling, adapter=adapter)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(vector_D, body.encoding_format)}
                for index, vector_D in enumerate(vectors_nD)
            ],
            "model": body.model or model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "pooling": pooling,
        }

    return work


def label_work(serving: Serving, body: ClassifyRequest) -> Callable[[], dict[str, Any]]:
    """Returns the work on the model that answers a request for labels."""
    model = serving.model
    classifier = model.require_classifier()
    model.adapter_of(body.model)
    texts = [body.input] if isinstance(body.input, str) else list(body.input)
    _check_count(len(texts), serving)
    encoded = classifier.encode(texts, "input")
    tokens, names = int(sum(map(len, encoded.tokens))), list(classifier.config.labels)

    def work() -> dict[str, Any]:
        probabilities = np.exp(classifier.log_probabilities(encoded))
        return {
            "id": wording.new_id("classify-"),
            "object": "list",
            "created": int(time.time()),
            "model": body.model or model.name,
            "labels": names,
            "data": [
                {"index": index, "label": names[int(row.argmax())], "probs": row.tolist(), "num_classes": len(names)}
                for index, row in enumerate(probabilities)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return work


def _check_count(count: int, serving: Serving) -> None:
    most = serving.limits.max_inputs
    if not 1 <= count <= most:
        raise bad_value("input", f"input has {count} texts; give 1 to {most}")


def _written(vector_D: np.ndarray, form: str | None) -> list[float] | str:
    """Returns a vector as numbers, or as the base64 text of its little-endian float32 bytes."""
    if form == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector_D]

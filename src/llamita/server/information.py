"""What a client asks before and beside generating: models, health, metrics, tokens of a text and back."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from llamita.inference.inspection import piece_text
from llamita.model.sizes import count_parameters
from llamita.server import metrics
from llamita.server.chat_jobs import ChatTask, check_continuation, encode_messages, plain_messages
from llamita.server.errors import ApiError, bad_value
from llamita.server.model import DEFAULTS
from llamita.server.routes import JsonRoute
from llamita.server.schemas.common import ERRORS
from llamita.server.schemas.openai import (
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TemplateAnswer,
    TemplateRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from llamita.server.serving import Serving
from llamita.server.streaming import unless_gone
from llamita.text.chat import ChatTokens
from llamita.text.tokenizer import Tokenizer


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, responses=ERRORS)
    model = serving.model

    @routes.get("/models", include_in_schema=False, response_model=None)  # for a base URL without /v1
    @routes.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def models() -> Response:
        """Lists the model and its adapters."""
        cards = [card(serving, model.name, None), *(card(serving, name, model.name) for name in model.adapters)]
        return JSONResponse({"object": "list", "data": cards})

    @routes.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
    async def one_model(name: str) -> Response:
        """Describes one model."""
        adapter = model.adapter_of(name)
        return JSONResponse(card(serving, name, None if adapter is None else model.name))

    @routes.get("/v1/health", include_in_schema=False)
    @routes.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Says whether requests are answered: 200, or 503 with the reason."""
        if serving.fault:
            raise ApiError(503, serving.fault, code="unavailable")
        return {"status": "ok"}

    @routes.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Gives all counts and times in Prometheus's text form."""
        return Response(serving.metrics.text(), media_type=metrics.TYPE)

    @routes.post("/tokenize", response_model=TokenizeAnswer, tags=["tokens"])
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Gives the token ids of a text, or of a conversation as the chat template lays it out."""
        return JSONResponse(await unless_gone(request, serving.prepared(lambda: tokens_of(serving, body))))

    @routes.post("/apply-template", response_model=TemplateAnswer, tags=["tokens"])
    async def apply_template(body: TemplateRequest, request: Request) -> Response:
        """Gives a conversation as the text that the chat template makes of it, which /tokenize gives as tokens."""
        prompt = await unless_gone(request, serving.prepared(lambda: conversation_of(serving, body).text))
        return JSONResponse({"prompt": prompt})

    @routes.post("/detokenize", response_model=DetokenizeAnswer, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Gives the text of token ids."""
        model.adapter_of(body.model)
        tokenizer = model.require_tokenizer()
        text = await unless_gone(request, serving.prepared(lambda: tokenizer.decode(body.tokens, skip_special=False)))
        return JSONResponse({"prompt": text, "content": text})

    return routes


def card(serving: Serving, name: str, parent: str | None) -> dict[str, Any]:
    """Returns a model as /v1/models lists it."""
    model, config = serving.model, serving.model.config
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "llamita",
        "parent": parent,
        "aliases": [] if parent else list(model.aliases),
        "max_model_len": config.max_position_embeddings,
        "meta": {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "vocab_size": config.vocab_size,
            "parameters": count_parameters(config).total,
            "chat": model.is_chat_model,
            "capabilities": list(model.capabilities),
            "labels": list(config.labels) if config.num_labels else [],
            "defaults": {key: float(getattr(model.defaults, key)) for key in DEFAULTS},
        },
    }


def tokens_of(serving: Serving, body: TokenizeRequest) -> dict[str, Any]:
    """Returns the answer of /tokenize."""
    model = serving.model
    model.adapter_of(body.model)
    given = [value for value in (body.prompt, body.content, body.messages) if value is not None]
    if len(given) != 1:
        raise bad_value("prompt", "give one of prompt and messages")
    tokenizer = model.require_tokenizer()
    if body.messages is not None:
        if not body.messages:
            raise bad_value("messages", "messages is empty; give at least one message")
        tokens = list(conversation_of(serving, body).tokens)
    else:
        text = body.prompt if body.prompt is not None else body.content or ""
        asked = body.add_special if body.add_special_tokens is None else body.add_special_tokens
        begins = (tokenizer.begins_texts and body.content is None) if asked is None else asked
        tokens = list(tokenizer.encode(text, bos=bool(begins) and tokenizer.bos_id is not None))
    texts = [piece_text(tokenizer, token_id) for token_id in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": model.config.max_position_embeddings,
        "tokens": [_with_piece(tokenizer, token_id) if body.with_pieces else int(token_id) for token_id in tokens],
        "token_strs": texts,
    }


def conversation_of(serving: Serving, body: TokenizeRequest | TemplateRequest) -> ChatTokens:
    """Returns the conversation of a request as the chat template lays it out."""
    model = serving.model
    model.adapter_of(body.model)
    if isinstance(body, TemplateRequest):
        check_continuation(body)
    task = ChatTask(
        plain_messages(body.messages or ()),
        params=lambda room: model.defaults,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        variables=body.chat_template_kwargs or {},
        continue_final=isinstance(body, TemplateRequest) and bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    return encode_messages(model, task)


def _with_piece(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    """Returns a token with its text, or with its bytes where they are no text; a control token with its name."""
    data = tokenizer.spelled_bytes(token_id)
    try:
        return {"id": int(token_id), "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": int(token_id), "piece": list(data)}

"""The bodies of OpenAI's chat completions, completions, models and embeddings, and of tokenize, detokenize, classify.

A field is honoured, or it is refused; the few that only concern bookkeeping on the client's side (`user`, `metadata`,
...) change nothing here and say so. Values are checked where they are used, so that a message can say what this model
allows.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamita.server.schemas.common import Answer, Body, Off

FinishReason = Literal["stop", "length", "tool_calls"]
Bookkeeping = Field(description="Bookkeeping of the client; it changes nothing here.")


# --- messages --------------------------------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class FunctionCall(Body):
    name: str
    arguments: str
    """The arguments as JSON text."""


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, description="As answers of others have it; not read.")


class ToolMessage(Body):
    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# --- what the answer may look like -----------------------------------------------------------------------------------


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="A JSON schema, as llama.cpp has it."
    )


class JsonSchema(Body):
    name: str | None = Field(default=None, min_length=1, max_length=64, description="Of use to the client alone.")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionDefinition(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None
    continuous_usage_stats: bool | None = Field(
        default=None, description="Give the counts so far with every chunk, as vLLM does."
    )


# --- requests --------------------------------------------------------------------------------------------------------


class Sampling(Body):
    """The fields by which both kinds of completion choose tokens and end; one left out or null has the default."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    regex: str | None = Field(default=None, description="Write only what this regular expression matches as a whole.")
    choices: list[str] | None = Field(default=None, description="Write one of these texts.")
    json_schema: dict[str, Any] | None = Field(default=None, description="Write only JSON that fits this schema.")
    grammar: str | None = Field(default=None, description="Write only what this grammar allows: GBNF or Lark.")
    user: Annotated[str | None, Bookkeeping] = None


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, description="Given to a chat template that reads it.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(default=None, description="Go on in the last message.")
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: Annotated[dict[str, Any] | None, Bookkeeping] = None
    safety_identifier: Annotated[str | None, Bookkeeping] = None
    prompt_cache_key: Annotated[str | None, Bookkeeping] = None


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: None = None
    response_format: ResponseFormat | None = None


# --- answers ---------------------------------------------------------------------------------------------------------


class CachedTokens(Answer):
    cached_tokens: int


class ReasoningTokens(Answer):
    reasoning_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class Timings(Answer):
    """Seconds of the engine; rates in tokens a second. Not a part of OpenAI's API."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob] | None
    refusal: None = None


class AnsweredFunction(Answer):
    name: str
    arguments: str


class AnsweredCall(Answer):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    system_fingerprint: str


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings
    system_fingerprint: str


class ModelMeta(Answer):
    """What a client may want to know before it asks. Not a part of OpenAI's API."""

    layers: int
    heads: int
    vocab_size: int
    parameters: int
    chat: bool
    capabilities: list[str]
    labels: list[str]
    defaults: dict[str, float]


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    aliases: list[str]
    max_model_len: int
    meta: ModelMeta


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


# --- embeddings, labels, tokens --------------------------------------------------------------------------------------


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(default=None, description="A model's own width is the only one.")
    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="Over the states of all tokens, or the last token's; left out: as the server has it."
    )
    user: Annotated[str | None, Bookkeeping] = None


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PromptUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage
    pooling: Literal["mean", "last"]


class ClassifyRequest(Body):
    """The body of POST /v1/classify."""

    input: str | list[str]
    model: str | None = None
    user: Annotated[str | None, Bookkeeping] = None


class Label(Answer):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class LabelList(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Label]
    usage: PromptUsage


class TokenizeRequest(Body):
    """The body of POST /tokenize: a text, or messages as the chat template lays them out."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = Field(
        default=None, description="Another name of `prompt`, as llama.cpp has it: left to itself, without BOS."
    )
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Begin a text with BOS; left out: as generation does."
    )
    add_special: bool | None = Field(default=None, description="Another name of `add_special_tokens`, as llama.cpp's.")
    return_token_strs: bool | None = None
    with_pieces: bool | None = Field(default=None, description="Give each token with its text, as llama.cpp does.")


class TokenPiece(Answer):
    id: int
    piece: str | list[int] = Field(description="The token's text, or its bytes where they are no text.")


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None


class TemplateRequest(Body):
    """The body of POST /apply-template."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TemplateAnswer(Answer):
    prompt: str


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(Answer):
    prompt: str
    content: str

"""The bodies of OpenAI's Responses (POST /v1/responses), without stored state, in the form of Open Responses.

A field is honoured, or it is refused by its name. Those in `REFUSED` are known, so that the refusal can say why; the
few that are bookkeeping of the client are echoed and change nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema

from llamita.server.schemas.common import OFF, Answer, Body, Off, Refused
from llamita.server.schemas.openai import Bookkeeping, TokenLogprob

LOGPROBS = "message.output_text.logprobs"
STATELESS = "this server keeps no responses; send the whole conversation in input"
REFUSED = {
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "prompt": "this server keeps no prompts; send instructions and input",
    "context_management": "this server never shortens a conversation; send what the model is to read",
    "max_tool_calls": "it bounds tools that a server runs, and this one runs none",
    "prompt_cache_retention": "the prefix cache keeps what fits its memory; leave it out",
    "prompt_cache_options": "the prefix cache works by itself; leave it out",
    "moderation": "this server has no moderation",
}
Status = Literal["in_progress", "completed", "incomplete"]


# --- input -----------------------------------------------------------------------------------------------------------


class TextContent(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, description="As answers of others have it; not read.")
    logprobs: list[Any] | None = Field(default=None, description="As answers have it; not read.")


class RefusalContent(Body):
    type: Literal["refusal"]
    refusal: str


Content = Annotated[TextContent | RefusalContent, Field(discriminator="type")]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    id: str | None = None
    status: Status | None = None
    phase: None = None


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """The arguments as JSON text."""
    id: str | None = None
    status: Status | None = None


class FunctionCallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextContent]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: None = Field(default=None, description="This server reads and writes reasoning in the open.")
    status: Status | None = None


ITEMS = {
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "CallOutput",
    "reasoning": "Reasoning",
}


def _kind(item: Any) -> str | None:
    """Returns the tag of an input item; one without a type is a message. None for a type that is not known."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return ITEMS.get("message" if kind is None else kind) if isinstance(kind, str | None) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("Call")]
    | Annotated[FunctionCallOutputItem, Tag("CallOutput")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=f"an item must be an object whose type is one of {', '.join(ITEMS)}",
    ),
]


# --- request ---------------------------------------------------------------------------------------------------------


class PlainFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesFunction(Body):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ChosenFunction(Body):
    type: Literal["function"]
    name: str


class ReasoningConfig(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = Field(
        default=None, description="An answer has the reasoning itself, and no summary beside it."
    )


class ResponsesStreamOptions(Body):
    include_obfuscation: Off | None = None


class ResponsesRequest(Body):
    """The body of POST /v1/responses."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = Field(default=None, description="Not a part of OpenAI's API, as the next four.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    text: TextConfig | None = None
    tools: list[ResponsesFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    include: list[str] | None = Field(default=None, description=f"Only {LOGPROBS} can be included.")
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(default=None, description="auto is refused.")
    store: Annotated[bool, WithJsonSchema(OFF)] | None = Field(
        default=None, description="true is refused; left out, nothing is kept either."
    )
    background: Annotated[bool, WithJsonSchema(OFF)] | None = Field(default=None, description="true is refused.")
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16, description="Bookkeeping of the client; it is echoed."
    )
    user: Annotated[str | None, Bookkeeping] = None
    safety_identifier: Annotated[str | None, Bookkeeping] = None
    prompt_cache_key: Annotated[str | None, Bookkeeping] = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    context_management: Refused = None
    max_tool_calls: Refused = None
    prompt_cache_retention: Refused = None
    prompt_cache_options: Refused = None
    moderation: Refused = None


# --- answer ----------------------------------------------------------------------------------------------------------


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Answer):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Answer):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class OutputReasoningText(Answer):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Answer):
    type: Literal["reasoning"]
    id: str
    summary: list[Any]
    content: list[OutputReasoningText]
    status: Status


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponsesUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class FailedDetails(Answer):
    code: str
    message: str


class ResponseObject(Answer):
    """What is answered, and what the first and the last events of a stream carry."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: FailedDetails | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Annotated[OutputMessage | OutputCall | OutputReasoning, Field(discriminator="type")]]
    usage: ResponsesUsage | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    truncation: Literal["disabled"]
    store: Literal[False]
    background: Literal[False]
    service_tier: Literal["default"]
    previous_response_id: None
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None

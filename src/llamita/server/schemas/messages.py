"""The bodies of Anthropic's Messages: POST /v1/messages and /v1/messages/count_tokens.

A field is honoured, or it is refused by its name. `cache_control` is a hint that changes nothing: the prefix cache
works by itself, and the counts of an answer say what it found.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamita.server.schemas.common import ERRORS, Answer, Body, Off, Refused
from llamita.server.schemas.openai import Bookkeeping

REFUSED = {
    "container": "this server runs no tools of its own",
    "mcp_servers": "this server runs no tools of its own",
    "context_management": "this server never shortens a conversation; send what the model is to read",
    "diagnostics": "this server keeps no messages to compare with",
    "inference_geo": "this server is where it is",
    "user_profile_id": "this server has no profiles",
    "workspace_id": "this server has no workspaces",
}


class CacheControl(Body):
    """A hint; it changes nothing here."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


# --- messages --------------------------------------------------------------------------------------------------------


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Not read: reasoning is not signed here.")


class DirectCaller(Body):
    type: Literal["direct"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = Field(default=None, description="The model then reads `Error: ` before the result.")
    cache_control: CacheControl | None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserTurn(Body):
    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantTurn(Body):
    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemTurn(Body):
    role: Literal["system"]
    content: str | list[TextBlock]


# --- requests --------------------------------------------------------------------------------------------------------


class ClientTool(Body):
    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: Off | None = None
    eager_input_streaming: bool | None = Field(
        default=None, description="A hint; arguments are streamed as soon as they are certain."
    )
    allowed_callers: list[Literal["direct"]] | None = None


class AutoChoice(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    type: Literal["none"]


class ThinkingEnabled(Body):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1, description="A target that changes nothing here; max_tokens bounds an answer.")
    display: Literal["summarized"] | None = None


class ThinkingDisabled(Body):
    type: Literal["disabled"]


class ThinkingAdaptive(Body):
    type: Literal["adaptive"]
    display: Literal["summarized"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(Body):
    user_id: Annotated[str | None, Bookkeeping] = None


class CountTokensRequest(Body):
    """The body of POST /v1/messages/count_tokens."""

    messages: list[Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]] = Field(min_length=1)
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[ThinkingEnabled | ThinkingDisabled | ThinkingAdaptive, Field(discriminator="type")] | None = (
        None
    )
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Not a part of Anthropic's API.")
    context_management: Refused = None
    mcp_servers: Refused = None
    user_profile_id: Refused = None
    workspace_id: Refused = None


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = Field(default=None, description="Not a part of Anthropic's API, as the next two.")
    repetition_penalty: float | None = None
    seed: int | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Refused = None
    diagnostics: Refused = None
    inference_geo: Refused = None


# --- answers ---------------------------------------------------------------------------------------------------------


class AnsweredText(Answer):
    type: Literal["text"]
    text: str


class AnsweredThinking(Answer):
    type: Literal["thinking"]
    thinking: str
    signature: str


class AnsweredToolUse(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    """All that was read is `input_tokens` and the two counts of the cache together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[AnsweredText | AnsweredThinking | AnsweredToolUse, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    input_tokens: int


class MessagesFault(Answer):
    type: str
    message: str


class MessagesErrorBody(Answer):
    """The body of an answer that is an error."""

    type: Literal["error"]
    error: MessagesFault


MESSAGES_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**about, "model": MessagesErrorBody} for status, about in ERRORS.items()
}

"""The limits of a server, each with its default; `llamita serve` has a flag for each."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServerLimits:
    """What a server accepts from those who ask. ValueError names the field, its value and what is allowed."""

    max_body_bytes: int = 4 << 20
    """Most bytes of a request's body; more is answered with 413."""
    max_header_bytes: int = 32 << 10
    """Most bytes of a request's line and headers together."""
    max_json_depth: int = 64
    """Most levels of lists and objects in a body."""
    max_n: int = 16
    """Most continuations of a prompt (`n`), and most prompts of a request."""
    max_stops: int = 4
    """Most stop strings of a request."""
    max_stop_characters: int = 256
    """Most characters of a stop string."""
    max_logit_bias: int = 1024
    """Most entries of `logit_bias`."""
    max_top_logprobs: int = 20
    """Most alternatives reported for a token."""
    max_tools: int = 128
    """Most tools of a request."""
    max_inputs: int = 64
    """Most texts of a request for embeddings or labels."""
    max_queued_requests: int = 64
    """Most requests that wait while as many run as the engine does at once; more are answered with 429."""
    max_queued_tokens: int = 65536
    """Most prompt tokens of requests that have not got their first token; one request alone is always accepted."""
    max_connections: int = 512
    """Most open connections; more are answered with 503 and closed."""
    stream_buffer: int = 1024
    """Most tokens that a client may lag behind its stream; then its request ends."""
    request_seconds: float = 600.0
    """Seconds that a request may take from its arrival to its end; then it ends with an error."""
    body_seconds: float = 20.0
    """Seconds that a client may take to send a request's headers, and then its body."""
    write_seconds: float = 30.0
    """Seconds that a client may leave a part of an answer unread; then its connection is closed."""
    heartbeat_seconds: float = 5.0
    """Seconds without a token after which a stream says that it is alive."""
    idle_seconds: float = 75.0
    """Seconds that a connection without a request is kept open."""
    drain_seconds: float = 30.0
    """Seconds that requests under way have to end after SIGTERM."""
    stuck_seconds: float = 120.0
    """Seconds after which a step of the engine counts as hung, and /health answers 503."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "max_queued_requests" else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name}={value!r} is not allowed; give a whole number >= {least}")
            if field.type is float and not 0 < value < 1e9:
                raise ValueError(f"{field.name}={value!r} is not allowed; give a number of seconds above 0")

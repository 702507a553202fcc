"""The client of a benchmark: asks an OpenAI-compatible server for one streamed answer and records when what arrived."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from llamita.workflows.benchmark.metrics import RequestRecord
from llamita.workflows.benchmark.prompts import Messages, as_text

Endpoint = Literal["chat", "completions"]
PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT_SECONDS = 10.0
MOST_ERROR_BYTES = 1 << 16
MOST_MESSAGE_LETTERS = 300
REFUSALS = ("http_429", "http_503")


@dataclass(frozen=True)
class Ask:
    """What every request of a benchmark asks for."""

    model: str
    endpoint: Endpoint
    max_tokens: int
    temperature: float | None = None
    ignore_eos: bool = False

    def body(self, messages: Messages) -> dict[str, Any]:
        """Returns the JSON of a streamed request that asks for the count of its tokens too."""
        prompt = {"messages": messages} if self.endpoint == "chat" else {"prompt": as_text(messages)}
        body = {"model": self.model, **prompt, "max_tokens": self.max_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


class Client:
    """A server's address, the key for it, and the connections to it; used within `async with`.

    `url` may end in /v1. ValueError where it is no http(s) URL, or holds a name or password, which would be recorded.
    Proxies that the environment names are passed by: what is measured is the server.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0) -> None:
        self.url = base_url(url)
        self.timeout = timeout
        if key is not None and (not key.isascii() or not key.isprintable() or " " in key or not key):
            raise ValueError("the API key is empty or has spaces or letters that no key has; check how it was copied")
        self._key = key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> "Client":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def models(self) -> list[str] | None:
        """Returns the names of the models that the server lists, None where it has no list.

        ValueError, in one line, where no server answers, one that is not OpenAI-compatible, or one that wants a key.
        """
        address = f"{self.url}/v1/models"
        try:
            response = await self._http.get(address, timeout=min(CONNECT_SECONDS, self.timeout))
        except httpx2.TransportError as error:
            raise ValueError(
                f"no server answers at {self.url} ({self._said(error)}); "
                "start one with 'llamita serve MODEL', or check host and port"
            ) from None
        if response.status_code in (401, 403):
            raise ValueError(self.refused_key(response.status_code))
        if response.status_code in (404, 405):
            return None
        if response.status_code != 200:
            said = self._readable(response.content)
            raise ValueError(f"{address} answers {response.status_code} ({said}); wait until the server is ready")
        try:
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{address} has no list of models; expected an OpenAI-compatible server there") from None

    def refused_key(self, status: int) -> str:
        """Returns what to tell the user of a server that answers 401 or 403."""
        if self._key:
            return f"the server at {self.url} refuses the API key ({status}); check LLAMITA_API_KEY or --key-file"
        return f"the server at {self.url} wants an API key ({status}); set LLAMITA_API_KEY or give --key-file FILE"

    async def request(
        self, ask: Ask, messages: Messages, number: int, due: float, clock: Callable[[], float]
    ) -> RequestRecord:
        """Sends one request, reads its answer to the end, and returns its record; a failure is a record too."""
        answer = _Answer()
        sent = clock()
        try:
            async with asyncio.timeout(self.timeout):
                await self._read(ask, messages, answer, clock)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            answer.fail("timeout", f"no end within {self.timeout:g} s")
        except httpx2.SSEError as error:
            answer.fail("malformed", self._said(error))
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            answer.fail("connect", self._said(error))
        except httpx2.TransportError as error:
            answer.fail("no_answer" if answer.status is None else "cut_off", self._said(error))
        ended = clock() if answer.ended is None else answer.ended
        counted = _whole(answer.usage.get("completion_tokens"))
        details = answer.usage.get("prompt_tokens_details")
        return RequestRecord(
            number=number,
            due=due,
            sent=sent,
            ended=ended,
            text_times=tuple(answer.text_times),
            status=answer.status,
            error=answer.error,
            message=answer.message,
            finish_reason=answer.finish_reason,
            prompt_tokens=_whole(answer.usage.get("prompt_tokens")),
            cached_tokens=_whole(details.get("cached_tokens")) if isinstance(details, dict) else None,
            output_tokens=len(answer.text_times) if counted is None else counted,
            tokens_counted_by="chunks" if counted is None else "usage",
            retry_after=answer.retry_after,
            timings=answer.timings,
        )

    async def _read(self, ask: Ask, messages: Messages, answer: "_Answer", clock: Callable[[], float]) -> None:
        body = ask.body(messages)
        async with self._http.sse(f"{self.url}{PATHS[ask.endpoint]}", method="POST", json=body) as source:
            response = source.response
            answer.status = response.status_code
            if response.status_code != 200:
                answer.retry_after = _seconds(response.headers.get("retry-after"))
                answer.fail(f"http_{response.status_code}", self._readable(await _beginning(response)))
                return
            async for event in source:  # to the end of the response, so that the connection can be used again
                if event.data.strip() == "[DONE]":
                    answer.ended = clock()
                elif event.data and answer.ended is None and not answer.take(event.data, clock(), self._readable):
                    return
            if answer.finish_reason is None:
                answer.fail("cut_off", "the stream ended before the answer did")

    def _said(self, error: Exception) -> str:
        return self._harmless(str(error) or type(error).__name__)

    def _readable(self, content: bytes) -> str:
        """Returns the message in an error's body, or the body's beginning."""
        text = content.decode("utf-8", "replace")
        try:
            error = json.loads(text)
            error = error.get("error", error) if isinstance(error, dict) else error
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except ValueError:
            pass
        return self._harmless(text)

    def _harmless(self, text: str) -> str:
        """Returns a text in one line of bounded length, without the key, should the server have repeated it."""
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        return " ".join(text.split())[:MOST_MESSAGE_LETTERS]


def base_url(url: str) -> str:
    """Returns a server's address without a path; ValueError where it is no http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is no URL of a server; expected one such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds a name or password; leave it out and give a key in LLAMITA_API_KEY instead")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}".rstrip("/")


@dataclass
class _Answer:
    """What has been read of an answer so far."""

    status: int | None = None
    text_times: list[float] = field(default_factory=list)
    ended: float | None = None
    """When the end was announced; what goes wrong with the connection afterwards does no harm."""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    message: str | None = None
    retry_after: float | None = None

    def fail(self, kind: str, message: str) -> None:
        if self.ended is None:
            self.error, self.message = kind, message

    def take(self, data: str, now: float, readable: Callable[[bytes], str]) -> bool:
        """Takes in one event; returns False where the answer ends with it, in an error."""
        try:
            chunk = json.loads(data)
            if chunk.get("error") is not None:
                self.fail("error_in_stream", readable(data.encode()))
                return False
            for choice in chunk.get("choices") or []:
                if _has_text(choice):
                    self.text_times.append(now)
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        except (ValueError, AttributeError, TypeError):  # no JSON, or of another shape
            self.fail("malformed", "an event is no completion: " + readable(data[:MOST_MESSAGE_LETTERS].encode()))
            return False
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        if isinstance(chunk.get("timings"), dict):
            self.timings = {name: value for name, value in chunk["timings"].items() if isinstance(value, int | float)}
        return True


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(choice.get("text")) or any(delta.get(name) for name in names)


async def _beginning(response: httpx2.Response) -> bytes:
    found = b""
    async for piece in response.aiter_bytes():
        found += piece
        if len(found) > MOST_ERROR_BYTES:
            break
    return found[:MOST_ERROR_BYTES]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(text: str | None) -> float | None:
    """Returns the seconds of a Retry-After; None for a date, which is read as no answer."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None

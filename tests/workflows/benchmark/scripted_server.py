"""A real HTTP server for the tests of the benchmark: uvicorn around an application whose answers a test scripts."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What the server sends: a head, then the pieces with a pause before each; then it ends, or cuts the connection."""

    pieces: Sequence[bytes] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class Seen:
    """A request that came in."""

    path: str
    headers: dict[str, str]
    body: Any
    client: tuple[str, int]
    """The address and port that it came from: one for each connection."""


@dataclass
class ScriptedServer:
    """A server that runs: its address, the reply to each request, and what came in since the script was set."""

    script: Callable[[Seen], Reply]
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    most_at_once: int = 0

    def follow(self, script: Callable[[Seen], Reply]) -> None:
        """Answers by another script from now on, and forgets what came in."""
        self.script, self.seen, self.most_at_once = script, [], 0


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def chat(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def finished(reason: str = "length") -> bytes:
    return event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])


def usage(prompt: int, output: int, cached: int = 0) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event(choices=[], usage={**counts, "prompt_tokens_details": {"cached_tokens": cached}})


def answer(*texts: str, prompt: int = 7, pause: float = 0.0) -> Reply:
    """A chat's whole answer: the role, a chunk a text, the end, the counts."""
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    pieces = [role, *map(chat, texts), finished(), usage(prompt, len(texts)), DONE]
    return Reply(pieces, pause=pause)


def models(*names: str) -> Reply:
    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
    return Reply([json.dumps(listed).encode()], content_type="application/json")


def failure(status: int, message: str, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "test", "param": None, "code": None}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply([body], status, "application/json", named)


@contextlib.contextmanager
def serving(script: Callable[[Seen], Reply]) -> Iterator[ScriptedServer]:
    """Serves on a free port of the loopback interface; `script` gives the reply to each request."""
    server = ScriptedServer(script)
    under_way = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal under_way
        if scope["type"] != "http":
            return
        content, more = b"", True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        seen = Seen(scope["path"], headers, json.loads(content) if content else None, tuple(scope["client"]))
        server.seen.append(seen)
        reply = server.script(seen)
        under_way += 1
        server.most_at_once = max(server.most_at_once, under_way)
        try:
            lines = [(b"content-type", reply.content_type.encode())]
            lines += [(name.encode(), value.encode()) for name, value in reply.headers.items()]
            await send({"type": "http.response.start", "status": reply.status, "headers": lines})
            for piece in reply.pieces:
                await asyncio.sleep(reply.pause)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if reply.cut:
                raise ConnectionResetError("as the script has it")
            await send({"type": "http.response.body", "body": b""})
        finally:
            under_way -= 1

    config = uvicorn.Config(application, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        thread.join(0.01)
    server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join(10)

"""A real server in a thread, over a model whose every answer is known, and ways to ask it: well, badly and slowly."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from llamita.backend.interface import Plan, SampledToken, SampleSpec, ScheduledChunk, StepResult
from llamita.backend.sampling import NONE_LEFT
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.server import run
from llamita.server.app import create_app
from llamita.server.model import ServedModel, serve_model
from llamita.server.settings import ServerLimits
from llamita.text.tokenizer import Tokenizer
from tests.inference.hash_model import HashRunner, Memory, expected, shape

POSITIONS = 256
PATIENCE = 20.0
"""Seconds within which what happens soon has happened; no test waits so long unless it fails."""
PROMPT = "The fox gave the owl"
GOOD = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@dataclass
class PacedRunner(HashRunner):
    """A hash model that keeps to grammars, takes `delay` seconds a step, and waits at a step while `gate` is closed."""

    delay: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    at_gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.recorded = None

    def run(self, plan: Plan, memory: Memory) -> StepResult:
        self.at_gate.set()
        assert self.gate.wait(4 * PATIENCE), "nobody opened the gate"
        if self.delay:
            time.sleep(self.delay)
        return super().run(plan, memory)

    def _say(self, chunk: ScheduledChunk, sample: SampleSpec, memory: Memory) -> SampledToken:
        token = super()._say(chunk, sample, memory)
        top = ((token.token_id, token.logprob),) * min(1, sample.params.top_logprobs)
        if sample.allowed is None:
            return SampledToken(token.token_id, token.logprob, top)
        bits = np.unpackbits(sample.allowed.view(np.uint8), bitorder="little")[: self.config.vocab_size]
        bits[list(sample.banned)] = 0
        following = np.flatnonzero(np.roll(bits, -token.token_id))
        if not len(following):
            return SampledToken(0, token.logprob, error=NONE_LEFT)
        return SampledToken(int(following[0] + token.token_id) % self.config.vocab_size, token.logprob)


def hash_model(tokenizer: Tokenizer, engine: EngineConfig | None = None, **options: Any) -> ServedModel:
    """A served hash model; `options` are fields of its runner."""
    runner = PacedRunner(config=shape(vocabulary=tokenizer.vocab_size, positions=POSITIONS), **options)
    engine = engine or EngineConfig(block_size=4, blocks=400, max_sequences=8, prefill_tokens=64)
    return serve_model(LLM(runner, tokenizer, engine=engine), "hash")


def expected_text(model: ServedModel, prompt: str | Sequence[int], **params: Any) -> str:
    """What the hash model says, by definition."""
    assert model.tokenizer is not None
    chosen = SamplingParams(**{"temperature": 0.0, "seed": 1, **params})
    tokens = model.require_llm().encode(prompt)
    said = [token for token, _ in expected(tokens, chosen, model.config)]
    return b"".join(map(model.tokenizer.token_bytes, said)).decode("utf-8", "replace")


class LiveServer:
    """A server at a free port of this machine, from entering to leaving."""

    def __init__(self, model: ServedModel, limits: ServerLimits | None = None, **options: Any) -> None:
        self.model = model
        self.app = create_app(model, limits, **options)
        self.serving = self.app.state.serving
        self.listener = run.bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self._ready = threading.Event()
        self.server = run.make_server(self.app, self._ready.set)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])), daemon=True
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0)

    @property
    def runner(self) -> PacedRunner:
        runner = self.model.require_llm().runner
        assert isinstance(runner, PacedRunner)
        return runner

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        assert self._ready.wait(PATIENCE), "the server did not start"
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        if isinstance(self.model.require_llm().runner, PacedRunner):
            self.runner.gate.set()
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not end"

    # --- asking ------------------------------------------------------------------------------------------------------

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.client.post(path, **options)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {**GOOD, **body})

    def chat(self, text: str = PROMPT, **body: Any) -> httpx.Response:
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **body}
        return self.post("/v1/chat/completions", asked)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def begin(self, path: str = "/v1/completions", **body: Any) -> socket.socket:
        """Sends a request and returns its connection, with nothing read of the answer."""
        connection = self.connect()
        connection.sendall(request_bytes(path, {**GOOD, **body} if path == "/v1/completions" else body))
        return connection

    # --- watching ----------------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        engine = self.model.require_llm().engine
        return (
            self.serving.admission.open_requests == 0
            and self.serving.admission.queued_tokens == 0
            and not engine.has_work
            and engine.manager.available == engine.manager.layout.blocks
            and not self.model.require_llm().service._sinks
        )

    def assert_idle(self) -> None:
        """Fails unless soon no request is open and every block of memory is free."""
        engine = self.model.require_llm().engine
        wait_for(
            lambda: self.is_idle,
            lambda: (
                f"{self.serving.admission.open_requests} open requests, {len(engine.scheduler.running)} running, "
                f"{len(engine.scheduler.waiting)} waiting, {engine.manager.available} free blocks"
            ),
        )

    def assert_well(self) -> None:
        """Fails unless the server is idle, says that it is well, and answers as it should."""
        self.assert_idle()
        assert self.client.get("/health").json() == {"status": "ok"}
        answer = self.complete()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected_text(self.model, PROMPT, max_tokens=12)

    def metric(self, name: str, **labels: str) -> float:
        return self.serving.metrics.registry.get_sample_value(f"llamita_{name}", labels or None) or 0.0


def wait_for(condition: Callable[[], bool], about: Callable[[], str] = lambda: "it did not happen") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, about()
        time.sleep(0.005)


def request_bytes(path: str, body: Any, headers: str = "", method: str = "POST") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n{headers}\r\n"
    )
    return head.encode() + data


def read_all(connection: socket.socket) -> bytes:
    """Reads until the other side closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        part = connection.recv(1 << 16)
        assert part, f"closed before {mark!r}: {found[-500:]!r}"
        found += part
    return found


def events(answer: httpx.Response) -> Iterator[Any]:
    """The objects of a stream of server-sent events; "[DONE]" as it is."""
    for line in answer.text.splitlines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def streamed_text(answer: httpx.Response) -> str:
    """The text of a whole stream of completions, of which each chunk and the end are checked."""
    assert answer.status_code == 200, answer.text
    *chunks, last = events(answer)
    assert last == "[DONE]", answer.text[-500:]
    assert chunks[-1]["choices"][0]["finish_reason"] is not None
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)

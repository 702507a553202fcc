"""Small models behind a real server in a thread, for the clients of others."""

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from llamita.backend.interface import Plan, StepResult
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model.weights import build_model
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.server import run
from llamita.server.app import create_app
from llamita.server.model import ServedModel, serve_model
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from tests.inference.hash_model import HashRunner, Memory, shape

TEXT = (
    "The fox gave the owl a red kite. Où est l'élève? 日本語 🦙🦙 naïve, and then they sat by the river. User: 12{}"
    * 20
)
POSITIONS = 1024
SAID = "The fox gave the owl a red kite. Où est l'élève? 🦙"
"""What the scripted model says."""
TOOLS_TEMPLATE = """{% if tools %}Tools: {{ tools | tojson }}
A call: <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:
{%- if enable_thinking is defined and not enable_thinking %} <think></think>{% endif %}{% endif %}"""
"""A template in the form of Hermes and Qwen: calls between tags, reasoning that can be switched off."""
CALLING = (
    '<think>Hm.</think>I look.<tool_call>{"name": "look", "arguments": {"at": "río"}}</tool_call>'
    '<tool_call>{"name": "rest", "arguments": {}}</tool_call>'
)
"""An answer in that form."""
QUESTIONS: list[Any] = [
    {"type": "predicate", "name": "kind", "instructions": "Is the fox kind?"},
    {"type": "choice", "name": "gift", "instructions": "What was given?",
     "choices": [{"value": "kite"}, {"value": "river", "description": "water"}]},
    {"type": "score", "name": "joy", "instructions": "How glad is the owl?",
     "levels": [{"label": "sad"}, {"label": "glad"}, {"label": "overjoyed"}]},
]  # fmt: skip
"""Decisions of every kind, as they are sent."""
HTTP = httpx.Client(timeout=60, verify=False)
"""Reading the certificates of the web for every request would take longer than the requests."""


@dataclass
class PacedRunner(HashRunner):
    """A hash model that takes `delay` seconds a step."""

    delay: float = 0.0

    def run(self, plan: Plan, memory: Memory) -> StepResult:
        time.sleep(self.delay)
        return super().run(plan, memory)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_bpe_from_iterator([TEXT], vocab_size=320)


def random_model(template: str | None = None) -> ServedModel:
    """A model with random weights, in the exact mode; its answers seldom end by themselves."""
    tokenizer = small_tokenizer()
    config = ModelConfig(
        tokenizer.vocab_size, 32, 64, 2, 4, 2, POSITIONS, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    return serve_model(LLM(TorchRunner(build_model(config, seed=3), exact=True), tokenizer), "tiny", template)


def scripted_model(
    said: str = SAID, template: str | None = None, positions: int = POSITIONS, **runner: Any
) -> ServedModel:
    """A model that answers everything with a text and the end-of-sequence token; `runner`: fields of its runner."""
    tokenizer = small_tokenizer()
    script = (*tokenizer.encode(said), tokenizer.eos_id)
    config = shape(vocabulary=tokenizer.vocab_size, positions=positions)
    llm = LLM(PacedRunner(config, script=script, recorded=None, **runner), tokenizer, [tokenizer.eos_id])
    return serve_model(llm, "tiny", template)


@contextlib.contextmanager
def serve(model: ServedModel, **options: Any) -> Iterator[str]:
    """Serves a model at a free port of this machine for the time of the `with`; gives the address."""
    listener, ready = run.bind("127.0.0.1", 0), threading.Event()
    server = run.make_server(create_app(model, **options), ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    try:
        yield run.address_of(listener)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def post(address: str, path: str, **body: Any) -> httpx.Response:
    return HTTP.post(f"{address}{path}", json=body)


def events(answer: httpx.Response) -> list[tuple[str, Any]]:
    """The events of a stream, each with its name and its object; "[DONE]" as it is."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            data = fields["data"]
            found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found

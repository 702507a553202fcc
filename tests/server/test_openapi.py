"""The server's own description, /openapi.json, holds: thousands of requests made of it, good and bad, by schemathesis.

No answer may be a failure of the server (5xx), each has a documented status, content type and body, and what the
description forbids is refused. The server is called as an application, without a network.
"""

import collections
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.errors import InvalidSchema
from starlette.testclient import TestClient

from llamita.backend.torch.infer.runner import TorchRunner
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.server.app import create_app
from llamita.server.model import serve_model
from llamita.server.settings import ServerLimits
from llamita.text.tokenizer import Tokenizer
from tests.server.live import PROMPT

WANTED = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method",
)  # fmt: skip


@pytest.fixture(scope="module")
def application(tiny_runner: TorchRunner, tokenizer: Tokenizer) -> Iterator[Any]:
    """The application over a tiny model with random weights, running for the time of the tests."""
    llm = LLM(tiny_runner, tokenizer, engine=EngineConfig(block_size=4, blocks=400, max_sequences=16))
    model = serve_model(llm, "tiny")
    app = create_app(model, ServerLimits(request_seconds=60), hosts=["testserver"])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield app, client, model


def checked_cases(application: Any, count: int) -> collections.Counter[str]:
    """Asks `count` times, every operation in turn, and returns how often each status came."""
    _, client, model = application
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 8
    checks = [check for check in CHECKS.get_all() if check.__name__ in WANTED]
    assert len(checks) == len(WANTED)
    good = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    before = client.post("/v1/completions", json=good).json()["choices"]
    statuses: collections.Counter[str] = collections.Counter()
    asking = sum(bool(list(operation.body)) for operation in operations)
    for operation in operations:
        cases = cases_of(operation)

        @settings(
            max_examples=-(-count // asking) if list(operation.body) else 4,
            phases=[Phase.generate],
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def ask(case: Case) -> None:
            answer = client.request(**case.as_transport_kwargs(base_url="http://testserver"))
            statuses[f"{answer.status_code}"] += 1
            case.validate_response(answer, checks=checks)

        ask()
    assert client.post("/v1/completions", json=good).json()["choices"] == before
    engine = model.llm.engine
    assert not engine.has_work
    assert engine.manager.available == engine.manager.layout.blocks
    return statuses


@st.composite
def cases_of(draw: st.DrawFn, operation: Any) -> Case:
    """Requests that fit the description of an operation, and, where it takes a body, as many that do not."""
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if list(operation.body) else [])]
    mode = draw(st.sampled_from(modes))
    try:
        case = draw(operation.as_strategy(generation_mode=mode))
        fits = mode is GenerationMode.POSITIVE and isinstance(case.body, dict)
        if fits and isinstance(case.body.get("model"), str) and draw(st.booleans()):
            case.body["model"] = "tiny"  # any other name is answered with 404 alone
        return case
    except InvalidSchema:  # now and then, the description turned around can be fulfilled by nothing
        reject()


@pytest.mark.medium
def test_answers_keep_to_the_description(application: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    statuses = checked_cases(application, 400)
    assert statuses["200"] > 20
    assert statuses["400"] > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_answers_keep_to_the_description_twenty_thousand_times(
    application: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    statuses = checked_cases(application, 20_000)
    with capsys.disabled():
        print(f"\n{sum(statuses.values())} cases: {dict(statuses)}")


def test_null_bytes_are_text_or_refused(application: Any) -> None:
    _, client, model = application
    answer = client.post("/v1/completions", json={"prompt": "a\x00b", "max_tokens": 4, "echo": True})
    assert answer.json()["choices"][0]["text"].startswith("a\x00b")
    assert answer.json()["usage"]["prompt_tokens"] == len(model.llm.encode("a\x00b"))
    for field in ("model", "stop", "user", "regex"):
        answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, field: "\x00"})
        assert answer.status_code in (200, 400, 404), answer.text
    for path in ("/v1/models/%00", "/%00", "/v1/models/tiny%00"):
        assert client.get(path).status_code == 404


def test_the_description_says_what_each_endpoint_may_answer(application: Any) -> None:
    _, client, _ = application
    description = client.get("/openapi.json").json()
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            if path in ("/", "/favicon.ico") or path.startswith("/page"):
                continue
            answers = operation["responses"]
            assert "422" not in answers, path  # the framework's own form, which is never sent
            assert {"200", "401", "421", "500"} <= answers.keys(), (method, path)
            if method == "post":
                assert {"400", "408", "413", "415", "429", "503", "504"} <= answers.keys(), path
    assert "text/plain" in json.dumps(description["paths"]["/metrics"]["get"]["responses"]["200"])
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = description["paths"][path]["post"]["responses"]["200"]["content"]
        assert {"application/json", "text/event-stream"} == content.keys()

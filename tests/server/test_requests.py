"""Faults of requests: each is answered with its status, parameter and code, and the next good request as ever."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llamita.server.schemas.openai import ChatRequest, CompletionRequest
from llamita.text.tokenizer import Tokenizer
from tests.server.live import (
    GOOD,
    POSITIONS,
    PROMPT,
    LiveServer,
    expected_text,
    hash_model,
    read_all,
    read_until,
    request_bytes,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def server(hash_server: LiveServer) -> Iterator[LiveServer]:
    """The server, which must be as well after a test as before."""
    yield hash_server
    hash_server.assert_well()


def assert_refused(answer: httpx.Response, status: int, param: str | None, code: str | None, part: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["param"], body["error"]["code"]) == (param, code), body
    message = body["error"]["message"]
    assert part in message
    assert message
    assert "\n" not in message
    assert len(message) < 1000


DEEP = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
NOT_JSON = {
    "malformed": b'{"prompt": "The fox"',
    "empty": b"",
    "text after the end": b'{"prompt": "The fox"} x',
    "duplicate key": b'{"prompt": "The fox", "prompt": "The owl"}',
    "duplicate key inside": b'{"prompt": "The fox", "logit_bias": {"1": 1, "1": 2}}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "The fox"}'.encode("utf-16"),
    "byte-order mark": b'\xef\xbb\xbf{"prompt": "The fox"}',
    "surrogate in bytes": b'{"prompt": "\xed\xa0\x80"}',
    "surrogate escaped": b'{"prompt": "\\ud800"}',
    "surrogate at the end": b'{"prompt": "x\\udc00"}',
    "surrogate in a key": b'{"prompt": "x", "\\udfff": 1}',
    "surrogate deep inside": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83e"}]}]}',
    "NaN": b'{"prompt": "The fox", "temperature": NaN}',
    "Infinity": b'{"prompt": "The fox", "temperature": Infinity}',
    "-Infinity": b'{"prompt": "The fox", "temperature": -Infinity}',
    "1e999": b'{"prompt": "The fox", "temperature": 1e999}',
    "a number of 5000 digits": b'{"prompt": "The fox", "seed": ' + b"9" * 5000 + b"}",
    "10000 levels": DEEP,
    "10000 levels that never end": DEEP[:9000],
    "10000 levels of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "control character in a text": b'{"prompt": "a\x00b"}',
    "single quotes": b"{'prompt': 'The fox'}",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_no_strict_json_is_refused(server: LiveServer, body: bytes) -> None:
    answer = server.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    if body == b"":
        assert_refused(answer, 400, None, "invalid_json")
    else:
        assert_refused(answer, 400, None, "invalid_json", "body")


def test_a_pair_of_surrogates_is_a_character(server: LiveServer) -> None:
    body = b'{"prompt": "\\ud83e\\udd99", "max_tokens": 5, "temperature": 0}'
    answer = server.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"] == expected_text(server.model, "🦙", max_tokens=5)


FAULTS: dict[str, tuple[str, Any, str | None, str, str]] = {
    "an array as the body": (COMPLETIONS, [1], None, "invalid_value", ""),
    "a text as the body": (COMPLETIONS, "x", None, "invalid_value", ""),
    "null as the body": (COMPLETIONS, None, None, "invalid_value", ""),
    "max_tokens true": (COMPLETIONS, {"max_tokens": True}, "max_tokens", "invalid_value", "True"),
    "max_tokens a text": (COMPLETIONS, {"max_tokens": "5"}, "max_tokens", "invalid_value", "'5'"),
    "max_tokens -1": (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "invalid_value", "-1"),
    "max_tokens 0": (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "invalid_value", "0"),
    "max_tokens 1.5": (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens", "invalid_value", "1.5"),
    "chat's max_tokens true": (CHAT, {"max_tokens": True}, "max_tokens", "invalid_value", ""),
    "chat's max_tokens 0": (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value", ""),
    "chat's newer name": (
        CHAT, {"max_tokens": None, "max_completion_tokens": -5}, "max_completion_tokens", "invalid_value", "-5",
    ),
    "two limits": (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens", "invalid_value", ""),
    "no messages": (CHAT, {"messages": []}, "messages", "invalid_value", ""),
    "messages null": (CHAT, {"messages": None}, "messages", "invalid_value", ""),
    "a text as messages": (CHAT, {"messages": "hello"}, "messages", "invalid_value", ""),
    "an unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0", "invalid_value", ""),
    "no role": (CHAT, {"messages": [{"content": "x"}]}, "messages.0", "invalid_value", ""),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value", ""),
    "content null": (
        CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "invalid_value", "",
    ),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "messages.0.content.0.type", "invalid_value", "",
    ),
    "no prompt": (COMPLETIONS, {"prompt": None}, "prompt", "invalid_value", ""),
    "a number as the prompt": (COMPLETIONS, {"prompt": 5}, "prompt", "invalid_value", ""),
    "an empty list as the prompt": (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value", ""),
    "an empty prompt of ids": (COMPLETIONS, {"prompt": [[]]}, "prompt", "invalid_value", ""),
    "an empty prompt among others": (COMPLETIONS, {"prompt": [[5], []]}, "prompt", "invalid_value", ""),
    "true as a token": (COMPLETIONS, {"prompt": [True]}, "prompt.0", "invalid_value", ""),
    "a token out of range": (COMPLETIONS, {"prompt": [5, 320]}, "prompt", "invalid_value", "320"),
    "a token below 0": (COMPLETIONS, {"prompt": [5, -1]}, "prompt", "invalid_value", "-1"),
    "a token of 2^63": (COMPLETIONS, {"prompt": [2**63]}, "prompt", "invalid_value", ""),
    "too many prompts": (COMPLETIONS, {"prompt": ["x"] * 17}, "prompt", "invalid_value", "17"),
    "a prompt over the context": (
        COMPLETIONS, {"prompt": [5] * POSITIONS}, "prompt", "context_length_exceeded", f"{POSITIONS} tokens",
    ),
    "a text over the context": (
        COMPLETIONS, {"prompt": "Z" * 1000}, "prompt", "context_length_exceeded", f"has {POSITIONS}",
    ),
    "messages over the context": (
        CHAT, {"messages": [{"role": "user", "content": "Z" * 1000}]}, "messages", "context_length_exceeded",
        f"{POSITIONS}",
    ),
    "bias of a token out of range": (COMPLETIONS, {"logit_bias": {"320": 1}}, "logit_bias", "invalid_value", "320"),
    "bias of what is no token": (COMPLETIONS, {"logit_bias": {"fox": 1}}, "logit_bias", "invalid_value", "fox"),
    "bias of a negative token": (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value", "-1"),
    "bias that is a text": (COMPLETIONS, {"logit_bias": {"5": "1"}}, "logit_bias.5", "invalid_value", ""),
    "bias beyond the limit": (COMPLETIONS, {"logit_bias": {"5": 1e7}}, "logit_bias", "invalid_value", ""),
    "too many biases": (
        COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "invalid_value", "2000",
    ),
    "an empty stop": (COMPLETIONS, {"stop": ""}, "stop", "invalid_value", "0 characters"),
    "an empty stop among others": (CHAT, {"stop": ["x", ""]}, "stop", "invalid_value", "0 characters"),
    "a huge stop": (COMPLETIONS, {"stop": "x" * 1000}, "stop", "invalid_value", "1000"),
    "too many stops": (COMPLETIONS, {"stop": list("abcde")}, "stop", "invalid_value", "5"),
    "a stop token out of range": (COMPLETIONS, {"stop_token_ids": [320]}, "stop_token_ids", "invalid_value", "320"),
    "too many stop tokens": (COMPLETIONS, {"stop_token_ids": [5] * 2000}, "stop_token_ids", "invalid_value", "2000"),
    "n a million": (COMPLETIONS, {"n": 10**6}, "n", "invalid_value", "1000000"),
    "n more than runs at once": (COMPLETIONS, {"n": 9}, "n", "invalid_value", "8"),
    "n 0": (CHAT, {"n": 0}, "n", "invalid_value", "0"),
    "n times prompts": (COMPLETIONS, {"n": 5, "prompt": ["a", "b", "c", "d"]}, "n", "invalid_value", "20"),
    "top_logprobs a million": (
        CHAT, {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs", "invalid_value", "1000000",
    ),
    "top_logprobs alone": (CHAT, {"top_logprobs": 2}, "top_logprobs", "invalid_value", "logprobs"),
    "logprobs a million": (COMPLETIONS, {"logprobs": 10**6}, "logprobs", "invalid_value", "1000000"),
    "logprobs -1": (COMPLETIONS, {"logprobs": -1}, "logprobs", "invalid_value", "-1"),
    "temperature -1": (COMPLETIONS, {"temperature": -1}, "temperature", "invalid_value", "-1"),
    "temperature a text": (COMPLETIONS, {"temperature": "1"}, "temperature", "invalid_value", ""),
    "temperature true": (COMPLETIONS, {"temperature": True}, "temperature", "invalid_value", ""),
    "top_p 0": (COMPLETIONS, {"top_p": 0}, "top_p", "invalid_value", "0"),
    "top_k -1": (COMPLETIONS, {"top_k": -1}, "top_k", "invalid_value", "-1"),
    "seed -1": (COMPLETIONS, {"seed": -1}, "seed", "invalid_value", "-1"),
    "seed 2^64": (COMPLETIONS, {"seed": 2**64}, "seed", "invalid_value", ""),
    "more min_tokens than max_tokens": (COMPLETIONS, {"min_tokens": 13}, "min_tokens", "invalid_value", "13"),
    "a chat template": (CHAT, {"chat_template": "{{ 7 * 7 }}"}, "chat_template", "invalid_value", ""),
    "a chat template hidden": (
        CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "invalid_value",
        "chat_template",
    ),
    "a variable that is a field": (
        CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value", "messages",
    ),
    "a variable of our own": (
        CHAT, {"chat_template_kwargs": {"learned_from": "x"}}, "chat_template_kwargs", "invalid_value", "learned_from",
    ),
    "a variable named self": (
        CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "invalid_value", "self",
    ),
    "an unknown field": (COMPLETIONS, {"temprature": 1}, "temprature", "invalid_value", "temprature"),
    "an unknown field inside": (
        CHAT, {"messages": [{**USER[0], "colour": "red"}]}, "messages.0.colour", "invalid_value", "",
    ),
    "suffix": (COMPLETIONS, {"suffix": "x"}, "suffix", "invalid_value", ""),
    "best_of": (COMPLETIONS, {"best_of": 5}, "best_of", "invalid_value", ""),
    "stream_options without stream": (
        COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "",
    ),
    "a broken regex": (COMPLETIONS, {"regex": "("}, "regex", "invalid_value", "regex"),
    "a huge regex": (COMPLETIONS, {"regex": "a" * 5000}, "regex", "invalid_value", ""),
    "a schema of an unknown type": (
        COMPLETIONS,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "rabbit"}}}},
        "response_format", "invalid_value", "",
    ),
    "a schema that is missing": (
        CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format", "invalid_value", "",
    ),
    "an unknown format": (CHAT, {"response_format": {"type": "xml"}}, "response_format", "invalid_value", ""),
    "two grammars": (COMPLETIONS, {"regex": "a", "choices": ["b"]}, None, "invalid_value", "choices"),
    "an empty choice": (COMPLETIONS, {"choices": [""]}, "choices", "invalid_value", ""),
    "an option of grammars that is the server's": (
        COMPLETIONS, {"grammar": '%llguidance {"no_forcing": false}\nstart: /x+/ "xy"'}, "grammar", "invalid_value",
        "no_forcing",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "change", "param", "code", "part"), FAULTS.values(), ids=FAULTS.keys())
def test_a_value_that_is_not_allowed_is_named(
    server: LiveServer, path: str, change: Any, param: str | None, code: str, part: str
) -> None:
    base = GOOD if path == COMPLETIONS else {"messages": USER, "max_tokens": 12, "temperature": 0}
    body = {**base, **change} if isinstance(change, dict) else change
    content = json.dumps(body).encode()
    answer = server.post(path, content=content, headers={"content-type": "application/json"})
    assert_refused(answer, 400, param, code, part)
    if isinstance(change, dict):  # a stream is refused before it begins, in the same form
        again = server.post(path, {**body, "stream": True}) if "stream_options" not in change else answer
        assert_refused(again, 400, param, code, part)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_optional_field_that_is_null_has_its_default(server: LiveServer, path: str) -> None:
    schema = ChatRequest if path == CHAT else CompletionRequest
    optional = [name for name, field in schema.model_fields.items() if not field.is_required()]
    assert len(optional) > 20
    base: dict[str, Any] = {"seed": 5, "temperature": 1.0}
    base |= {"messages": USER, "max_completion_tokens": 8} if path == CHAT else {"prompt": PROMPT, "max_tokens": 8}

    def answered(body: dict[str, Any]) -> tuple[str, int]:
        answer = server.post(path, body)
        assert answer.status_code == 200, (body, answer.text)
        choice = answer.json()["choices"][0]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"], len(answer.json()["choices"])

    for name in optional:
        without = {key: value for key, value in base.items() if key != name}
        if name == "seed":
            without["temperature"] = 0.0
        if name == "max_completion_tokens":
            without["max_tokens"] = 8
        assert answered(without) == answered({**without, name: None}), name


def test_numbers_as_large_as_they_get_are_clamped_to_the_context(server: LiveServer) -> None:
    for most in (2**63, 10**30):
        answer = server.complete(prompt=[5] * (POSITIONS - 6), max_tokens=most).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"] == {
            "prompt_tokens": POSITIONS - 6,
            "completion_tokens": 6,
            "total_tokens": POSITIONS,
            "prompt_tokens_details": answer["usage"]["prompt_tokens_details"],
        }
        assert answer["choices"][0]["text"] == expected_text(server.model, [5] * (POSITIONS - 6), max_tokens=6)


def test_a_control_token_in_a_text_stays_text(server: LiveServer) -> None:
    text = "The </s> fox <s> said <unk>"
    tokenizer = server.model.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": text}]
    for body in ({"messages": messages}, {"prompt": text}):
        tokens = server.post("/tokenize", body).json()["tokens"]
        assert tokens.count(tokenizer.bos_id) == 1
        assert tokens[0] == tokenizer.bos_id
        assert tokenizer.eos_id not in tokens
        assert text in server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    used = server.post(CHAT, {"messages": messages, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert used == len(server.post("/tokenize", {"messages": messages}).json()["tokens"])


HOSTILE = {
    "nested counts": {"regex": "((a{0,99}){0,99}){0,99}"},
    "many alternatives": {"regex": "(" + "|".join(f"x{i}.*y" for i in range(400)) + ")*z"},
    "a long look": {"regex": ".*a.{400}b"},
    "what leaves nothing for the rest": {"grammar": 'start: /x+/ "xy"'},
    "a schema of itself": {"schema": {"$ref": "#"}},
    "a schema elsewhere": {"schema": {"$ref": "https://localhost:1/x.json"}},
    "a file": {"schema": {"$ref": "file:///etc/passwd"}},
    "a huge minimum": {"schema": {"type": "string", "minLength": 10**9}},
    "many items": {"schema": {"type": "array", "minItems": 10**7, "items": {"type": "integer"}}},
    "many choices": {"schema": {"enum": [f"{i}" * 10 for i in range(5000)]}},
    "all of all": {"schema": {"allOf": [{"anyOf": [{"type": "string", "pattern": f".*{i}.*"}]} for i in range(60)]}},
    "a hostile pattern": {"schema": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
}  # fmt: skip


@pytest.mark.parametrize("asked", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_grammar_is_bounded(server: LiveServer, asked: dict[str, Any]) -> None:
    body = dict(asked)
    if "schema" in body:
        body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": body["schema"]}}}
    begun = time.monotonic()
    answer = server.complete(max_tokens=20, **body)
    assert time.monotonic() - begun < 15
    if answer.status_code != 200:
        param = "regex" if "regex" in body else "response_format"
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["code"] in ("invalid_value", "no_continuation")


def test_a_model_is_a_name_and_never_a_path(server: LiveServer) -> None:
    for name in ("other", "/etc/passwd", "../hash", "HuggingFaceTB/SmolLM2-135M-Instruct", "", "hash\x00", "x" * 5000):
        for path, more in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": PROMPT})):
            assert_refused(server.post(path, {"model": name, **more}), 404, "model", "model_not_found", "hash")
    assert_refused(server.client.get("/v1/models/../../etc/passwd"), 404, None, "not_found")
    assert_refused(server.client.get("/v1/models/%2e%2e%2fhash"), 404, "model", "model_not_found")
    assert server.complete(model="hash").status_code == 200


# --- HTTP itself -----------------------------------------------------------------------------------------------------


def test_paths_and_methods_that_are_not_there(server: LiveServer) -> None:
    assert_refused(server.client.get("/v2/nothing"), 404, None, "not_found", "/v2/nothing")
    assert_refused(server.post("/v1/chat/completions/", {}), 404, None, "not_found")
    refused = server.client.get(CHAT)
    assert_refused(refused, 405, None, "method_not_allowed", "GET")
    assert refused.headers["allow"] == "POST"
    assert_refused(server.client.delete("/v1/models"), 405, None, "method_not_allowed", "DELETE")


def test_a_body_of_another_type_is_refused(server: LiveServer) -> None:
    content = json.dumps(GOOD).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
    ):
        answer = server.post(COMPLETIONS, content=content, headers={"content-type": kind})
        assert_refused(answer, 415, None, "unsupported_media_type", "application/json")
    connection = server.connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
    assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 415")
    accepted = server.post(COMPLETIONS, content=content, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert accepted.status_code == 200


def test_a_body_that_is_too_large_is_refused(server: LiveServer) -> None:
    most = server.serving.limits.max_body_bytes
    huge = json.dumps({**GOOD, "user": "x" * most}).encode()
    assert_refused(
        server.post(COMPLETIONS, content=huge, headers={"content-type": "application/json"}),
        413, None, "body_too_large", str(most),
    )  # fmt: skip
    connection = server.connect()  # by its length alone, before anything of it came
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 99999999999\r\n\r\n")  # fmt: skip
    assert b"body_too_large" in read_until(connection, b"body_too_large")
    connection.close()

    def parts() -> Iterator[bytes]:  # in chunks, so without a length
        for _ in range(most // 65536 + 2):
            yield b" " * 65536

    answer = server.post(COMPLETIONS, content=parts(), headers={"content-type": "application/json"})
    assert_refused(answer, 413, None, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "abc", "+5", "5, 6", "9" * 30])
def test_a_length_that_is_no_length_is_refused(server: LiveServer, length: str) -> None:
    connection = server.connect()
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n{{}}".encode()
    )
    answer = read_until(connection, b"}}")
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), answer
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] in (
        "invalid_request_error",
        "request_too_large",
    )


def test_a_length_that_lies(server: LiveServer) -> None:
    body = json.dumps(GOOD).encode()
    request = request_bytes(COMPLETIONS, body)
    claimed = request.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % (len(body) - 5))
    short = server.connect()  # says less than it sends: the rest is no request
    short.sendall(claimed + b"\r\n\r\n")
    answers = read_all(short)
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert answers.count(b"HTTP/1.1 400 ") == 2
    assert b"invalid_json" in answers
    both = server.connect()  # two lengths that differ, as in request smuggling
    both.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   "
    )
    assert read_all(both).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_is_answered_in_the_form_of_every_error(server: LiveServer) -> None:
    for sent in (
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
        b"\x16\x03\x01" + b"\0" * 300,
    ):
        connection = server.connect()
        connection.sendall(sent)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 "), sent
        error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
        assert (error["param"], error["code"]) == (None, "invalid_http")


def test_headers_that_are_too_large_are_refused(server: LiveServer) -> None:
    connection = server.connect()
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 40_000)
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431 "), answer[:200]
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "headers_too_large"


def test_a_host_that_is_not_ours_is_refused(server: LiveServer) -> None:
    for host in (
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "a b",
    ):
        answer = server.client.get("/v1/models", headers={"host": host})
        assert answer.status_code in (400, 421), host
        if answer.status_code == 421:
            assert_refused(answer, 421, None, "unknown_host")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", f"127.0.0.1:{server.port}", "[::1]:80", "10.0.0.7"):
        assert server.client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_a_page_of_another_site_gets_nothing(server: LiveServer) -> None:
    other = {"origin": "https://evil.example"}
    asked = {**other, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    preflight = server.client.options(COMPLETIONS, headers=asked)
    assert preflight.status_code == 405
    for answer in (
        preflight,
        server.client.get("/v1/models", headers=other),
        server.post(COMPLETIONS, content=json.dumps(GOOD).encode(), headers={**other, "content-type": "text/plain"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.status_code == 415  # all that a page may send without being asked about first


def test_a_site_that_is_allowed(tokenizer: Tokenizer) -> None:
    with LiveServer(hash_model(tokenizer), origins=["https://good.example"]) as server:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            answer = server.client.options(
                COMPLETIONS, headers={"origin": origin, "access-control-request-method": "POST"}
            )
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
            assert answer.headers.get("access-control-allow-origin") != "*"
        server.assert_well()


def test_a_key_is_needed_where_there_are_any(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    import hmac

    plain = hmac.compare_digest
    monkeypatch.setattr("llamita.server.gate.hmac.compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b))
    with LiveServer(hash_model(tokenizer), api_keys=["sesame", "open"]) as server:
        wrong: list[dict[str, str]] = [
            {}, {"authorization": "Bearer"}, {"authorization": "Bearer sesam"}, {"authorization": "Bearer sesame2"},
            {"authorization": "Basic sesame"}, {"authorization": "sesame"}, {"x-api-key": "nope"},
        ]  # fmt: skip
        for headers in wrong:
            answer = server.post(COMPLETIONS, GOOD, headers=headers)
            assert_refused(answer, 401, None, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert_refused(server.client.get("/metrics", headers=headers), 401, None, "invalid_api_key")
            assert_refused(server.client.get("/nothing", headers=headers), 401, None, "invalid_api_key")
        assert compared
        assert all(len(given) == len(known) == 32 for given, known in compared)  # digests: no length is told either
        before = len(compared)
        for headers in ({"authorization": "Bearer sesame"}, {"authorization": "bearer open"}, {"x-api-key": "open"}):
            assert server.post(COMPLETIONS, GOOD, headers=headers).status_code == 200
        assert len(compared) == before + 6  # every key each time, whichever fits
        assert server.client.get("/health").json() == {"status": "ok"}


def test_values_at_the_edge_of_what_is_allowed_are_computed(tiny_served: Any) -> None:
    """Over real sampling: what passes the checks never fails a step, nor its neighbours."""
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e-6}, {"temperature": 1e300}, {"top_k": 10**39}, {"top_k": 2**63}, {"top_p": 1e-300},
        {"min_p": 1.0}, {"repetition_penalty": 0.001}, {"repetition_penalty": 1000}, {"presence_penalty": 100},
        {"frequency_penalty": -100}, {"logit_bias": {"5": 1e6, "6": -1e6}}, {"seed": 2**64 - 1}, {"n": 8},
        {"logit_bias": {str(i): -1e6 for i in range(320)}}, {"logprobs": 20}, {"min_tokens": 6, "stop_token_ids": [5]},
        {"stop_token_ids": list(range(320)), "min_tokens": 2}, {"prompt": [0]}, {"echo": True, "logprobs": 3},
        {"temperature": 1e300, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"echo": True, "max_tokens": 0, "logprobs": 0},
    ]  # fmt: skip
    with LiveServer(tiny_served) as server:
        before = server.complete(max_tokens=8).json()["choices"]
        for extreme in extremes:
            answer = server.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 6, **extreme})
            allowed = (200, 400) if extreme.get("stop_token_ids", [])[1:] else (200,)
            assert answer.status_code in allowed, (extreme, answer.text)
            server.assert_idle()
        assert server.complete(max_tokens=8).json()["choices"] == before

"""What a stream of completions tells of its counts: never, in the end, or with every chunk."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.clients import events, post, random_model, serve

CHAT = {"messages": [{"role": "user", "content": "The fox"}], "max_tokens": 6, "seed": 1, "ignore_eos": True}
TEXT = {"prompt": ["The fox", "The owl gave"], "max_tokens": 6, "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve(random_model()) as address:
        yield address


def chunks(address: str, path: str, asked: dict[str, Any], **options: bool) -> list[dict[str, Any]]:
    answer = post(address, path, **asked, stream=True, stream_options=options)
    return [value for _, value in events(answer) if value != "[DONE]"]


@pytest.mark.parametrize(("path", "asked"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_counts_come_as_they_were_asked_for(address: str, path: str, asked: dict[str, Any]) -> None:
    whole = post(address, path, **asked).json()["usage"]
    assert all("usage" not in chunk for chunk in chunks(address, path, asked))
    *before, last = chunks(address, path, asked, include_usage=True)
    assert [chunk["usage"] for chunk in before] == [None] * len(before)
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in counted] == [whole[name] for name in counted]
    assert last["choices"] == []
    *all_chunks, last = chunks(address, path, asked, include_usage=True, continuous_usage_stats=True)
    so_far = [chunk["usage"]["completion_tokens"] for chunk in all_chunks]
    assert so_far == sorted(so_far)
    assert so_far[-1] == whole["completion_tokens"] == last["usage"]["completion_tokens"]
    assert all(chunk["usage"]["prompt_tokens"] <= whole["prompt_tokens"] for chunk in all_chunks)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_chunk_counts_the_tokens_that_were_given_up_to_it(address: str, path: str, n: int) -> None:
    """As load generators read it: the counts of a chunk are of all that has come, whichever chunk comes last."""
    chat = path == "/v1/chat/completions"
    asked = {**CHAT, "logprobs": True} if chat else {**TEXT, "prompt": "The fox", "logprobs": 0}
    asked |= {"max_tokens": 9, "n": n}
    whole = post(address, path, **asked).json()["usage"]
    *parts, last = chunks(address, path, asked, include_usage=True, continuous_usage_stats=True)
    given = 0
    for part in parts:
        (choice,) = part["choices"]
        scores = choice["logprobs"] or {}
        given += len(scores.get("content" if chat else "tokens") or ())
        usage = part["usage"]
        assert usage["completion_tokens"] == given
        assert usage["prompt_tokens"] == whole["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + given
    assert given == whole["completion_tokens"] == 9 * n
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], given)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_counts_with_every_chunk_need_no_last_one(address: str, path: str) -> None:
    asked = CHAT if "chat" in path else TEXT
    parts = chunks(address, path, asked, continuous_usage_stats=True)
    assert all(part["choices"] and part["usage"] for part in parts)
    assert parts[-1]["usage"]["completion_tokens"] == post(address, path, **asked).json()["usage"]["completion_tokens"]


def test_options_without_a_stream_and_unknown_ones_are_refused(address: str) -> None:
    for options in ({"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"usage": True}}):
        answer = post(address, "/v1/chat/completions", **CHAT, **options)
        assert (answer.status_code, answer.json()["error"]["param"].split(".")[0]) == (400, "stream_options")
    for off in ({"store": 0}, {"store": True}):
        answer = post(address, "/v1/chat/completions", **CHAT, **off)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")


def test_an_effort_is_refused_where_the_template_reads_none(address: str) -> None:
    answer = post(address, "/v1/chat/completions", **CHAT, reasoning_effort="high")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")

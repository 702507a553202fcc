"""Completions asked by OpenAI's client: texts, log-probabilities, echoes and offsets are those of the engine alone."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.request import Generation
from llamita.server.model import ServedModel
from tests.server.clients import random_model, serve
from tests.server.openai_peer import async_client, client, same_scores

PROMPT = "The fox gave the"
TOP = 3


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with serve(random_model()) as address:
        yield address


@pytest.fixture(scope="module")
def alone() -> ServedModel:
    return random_model()


def ids(model: ServedModel, text: str) -> list[int]:
    return list(model.require_llm().encode(text))


def joined(chunks: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            row = found.setdefault(choice.index, {"text": "", "reason": None, "logprobs": {}})
            assert row["reason"] is None, "nothing comes after the reason of the end"
            row["text"] += choice.text
            row["reason"] = choice.finish_reason
            for name, values in (choice.logprobs.to_dict() if choice.logprobs else {}).items():
                row["logprobs"].setdefault(name, []).extend(values)
    return found


def check_scores(model: ServedModel, found: dict[str, Any], prompt: Sequence[int], expected: Generation) -> None:
    """Checks tokens, their log-probabilities, the likeliest beside them and where they stand, the prompt's included."""
    tokens = [*prompt, *expected.token_ids]
    pieces = [model.tokenizer.piece(token_id) for token_id in tokens]
    assert found["tokens"] == pieces
    assert found["text_offset"] == [len("".join(pieces[:place])) for place in range(len(pieces))]
    own = [*expected.prompt_logprobs, *expected.logprobs]
    tops = [*expected.prompt_top_logprobs, *expected.top_logprobs]
    if prompt:
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        tokens = tokens[1:]
    values, likeliest = found["token_logprobs"][-len(tokens) :], found["top_logprobs"][-len(tokens) :]
    same_scores(values, own)
    for token_id, value, named, top in zip(tokens, own, likeliest, tops, strict=True):
        alternatives: dict[str, float] = {}
        for other, its in (*top, (token_id, value)):
            piece = model.tokenizer.piece(other)
            alternatives[piece] = max(its, alternatives.get(piece, its))
        assert named == pytest.approx(alternatives, abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        {"seed": 2, "n": 3},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"80": 5}},
    ],
    ids=["greedy", "seed", "n", "penalties"],
)
@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
def test_a_completion_is_that_of_the_engine_whole_and_streamed(
    tiny: str, alone: ServedModel, params: dict[str, Any], echo: bool
) -> None:
    create = client(tiny).completions.create
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "logprobs": TOP, "echo": echo}
    ours = {**params, "logit_bias": {int(key): value for key, value in params.get("logit_bias", {}).items()}}
    expected = alone.require_llm().generate(
        PROMPT, SamplingParams(max_tokens=10, top_logprobs=TOP, prompt_logprobs=echo, **ours)
    )
    whole = create(**asked, **params)
    streamed = joined(list(create(**asked, **params, stream=True)))
    assert len(whole.choices) == len(streamed) == params.get("n", 1)
    prompt = ids(alone, PROMPT) if echo else []
    for choice, generation in zip(whole.choices, expected.continuations, strict=True):
        text = PROMPT + generation.text if echo else generation.text
        assert choice.text == streamed[choice.index]["text"] == text
        assert choice.finish_reason == streamed[choice.index]["reason"] == generation.finish_reason
        check_scores(alone, choice.logprobs.to_dict(), prompt, generation)
        check_scores(alone, streamed[choice.index]["logprobs"], prompt, generation)
    assert whole.usage.prompt_tokens == len(ids(alone, PROMPT))
    assert whole.usage.completion_tokens == sum(len(generation.token_ids) for generation in expected.continuations)


def test_many_prompts_are_answered_in_their_order(tiny: str, alone: ServedModel) -> None:
    texts = ["The fox", "Où est", "User: 12"]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    create = client(tiny).completions.create
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = [generation.text for generation in alone.require_llm().generate(texts, params)]
    tokens = [ids(alone, text) for text in texts]
    for prompt in (texts, tokens):
        answer = create(prompt=prompt, **asked)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
        streamed = joined(list(create(prompt=prompt, **asked, stream=True)))
        assert [streamed[index]["text"] for index in range(3)] == expected
    assert create(prompt=tokens[1], **asked).choices[0].text == expected[1]
    assert create(prompt=texts[2], **asked).choices[0].text == expected[2]
    several = create(prompt=texts[:2], **{**asked, "temperature": 1}, seed=9, n=2).choices
    params = SamplingParams(seed=9, n=2, max_tokens=8)
    one, two = alone.require_llm().generate(texts[:2], params)
    assert [choice.text for choice in several] == [found.text for found in (*one.continuations, *two.continuations)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_alone_is_scored(tiny: str, alone: ServedModel, stream: bool) -> None:
    found = client(tiny).completions.create(
        model="tiny", prompt=ids(alone, PROMPT), max_tokens=0, echo=True, logprobs=TOP, stream=stream
    )
    if stream:
        row = joined(list(found))[0]
        text, reason, scores = row["text"], row["reason"], row["logprobs"]
    else:
        (choice,) = found.choices
        text, reason, scores = choice.text, choice.finish_reason, choice.logprobs.to_dict()
        assert found.usage.completion_tokens == 0
    assert reason == "length"
    generation = alone.require_llm().generate(
        PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=True, top_logprobs=TOP)
    )
    prompt = ids(alone, PROMPT)
    nothing = Generation("", (), (), "length", generation.statistics, (), generation.prompt_logprobs,
                         generation.prompt_top_logprobs)  # fmt: skip
    check_scores(alone, scores, prompt, nothing)
    assert text == "".join(alone.tokenizer.piece(token_id) for token_id in prompt)


def test_without_a_word_there_are_sixteen_tokens(tiny: str, alone: ServedModel) -> None:
    answer = client(tiny).completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].logprobs is None


def test_a_stop_string_ends_the_text_before_it(tiny: str, alone: ServedModel) -> None:
    text = alone.require_llm().generate(PROMPT, SamplingParams(temperature=0, max_tokens=30)).text
    stop = text[8:11]
    (choice,) = client(tiny).completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop]
    ).choices  # fmt: skip
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_the_asynchronous_client_reads_the_same(tiny: str, alone: ServedModel) -> None:
    async def ask() -> tuple[Any, list[Any]]:
        async with async_client(tiny) as asynchronous:
            create = asynchronous.completions.create
            asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            whole, stream = await asyncio.gather(create(**asked), create(**asked, stream=True))
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(ask())
    expected = alone.require_llm().generate(PROMPT, SamplingParams(temperature=0, max_tokens=12)).text
    assert whole.choices[0].text == joined(chunks)[0]["text"] == expected


def test_a_stream_ends_with_its_counts_where_asked(tiny: str, alone: ServedModel) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "Où"], "max_tokens": 4, "stream": True}
    asked["extra_body"] = {"ignore_eos": True}
    *others, last = client(tiny).completions.create(**asked, stream_options={"include_usage": True})
    assert (last.choices, [chunk.usage for chunk in others]) == ([], [None] * len(others))
    assert last.usage.prompt_tokens == len(ids(alone, PROMPT)) + len(ids(alone, "Où"))
    assert last.usage.completion_tokens == 8


def test_the_best_of_as_many_as_are_wanted_is_all_of_them(tiny: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 4, "n": 2}
    create = client(tiny).completions.create
    assert [c.text for c in create(**asked, best_of=2).choices] == [c.text for c in create(**asked).choices]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "end"}, "suffix", "invalid_value"),
        ({"best_of": 3}, "best_of", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 17}, "prompt", "invalid_value"),
        ({"prompt": "the fox and the owl " * 600}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": -1}, "logprobs", "invalid_value"),
        ({"extra_body": {"n_predict": 4}}, "n_predict", "invalid_value"),
        ({"extra_body": {"grammar": "root ::= (", "seed": 1}}, "grammar", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_allowed_is_refused_by_its_name(tiny: str, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})
    assert (refused.value.param, refused.value.code) == (param, code)


def test_an_unknown_model_is_not_found(tiny: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client(tiny).completions.create(model="davinci", prompt=PROMPT)
    assert refused.value.code == "model_not_found"

"""The exact mode over HTTP: the numbers of an answer are those that Python gets, to the bit, whatever runs beside it.

All endpoints are asked at once, so that requests of different kinds and lengths share the engine's steps; Python asks
its own copy of the model for one thing after another.
"""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamita.backend.choice import load_backend
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.inference.config import EngineConfig
from llamita.inference.inspection import look_inside
from llamita.inference.llm import LLM
from llamita.inference.request import Generation
from llamita.server.model import ServedModel, open_model, serve_model
from llamita.storage import files, model_directory
from llamita.workflows.classify import Classifier
from llamita.workflows.decisions import decide
from llamita.workflows.questions import Choice, Option, Predicate, Score
from tests.server.clients import QUESTIONS, events, post, random_model, serve, small_tokenizer
from tests.server.openai_peer import answered

TEXTS = [
    "The fox",
    "Où est l'élève?",
    "The fox gave the owl a red kite, and then they sat by the river. " * 4,
    "🦙 naïve",
    "User: 12{}",
]
TOKENS = 12
LOADED: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "auto", "threads": 1, "exact": True}
WRITTEN = {"max_tokens": TOKENS, "ignore_eos": True}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"completion {place}": (
            "/v1/completions", {**WRITTEN, "prompt": text, "temperature": 0, "logprobs": 3, "echo": True},
        )
        for place, text in enumerate(TEXTS)
    },
    **{
        f"stream {place}": (
            "/v1/completions", {**WRITTEN, "prompt": text, "temperature": 0, "logprobs": 0, "stream": True},
        )
        for place, text in enumerate(TEXTS)
    },
    **{
        f"chat {place}": (
            "/v1/chat/completions",
            {**WRITTEN, "messages": [{"role": "user", "content": text}], "seed": place, "logprobs": True,
             "top_logprobs": 3},
        )
        for place, text in enumerate(TEXTS)
    },
    "decisions": ("/v1/decisions", {"input": TEXTS[2], "questions": QUESTIONS}),
    "system one": (
        "/v1/systemone",
        {"state": TEXTS[2], "questions": {"kind": {"type": "noul", "instructions": "Is the fox kind?"}}},
    ),
    "embeddings": ("/v1/embeddings", {"input": TEXTS}),
    "last states": ("/v1/embeddings", {"input": TEXTS[1:], "pooling": "last"}),
    "look inside": ("/v1/look_inside", {"prompt": TEXTS[2], "attention": [0, 1], "lens": True}),
}  # fmt: skip
"""Paths and bodies of the requests that are sent together."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and one with a classification head, `labels`, beside it."""
    place = tmp_path_factory.mktemp("models")
    config = random_model().config
    tokenizer = small_tokenizer()
    for name, own in (
        ("tiny", config),
        ("labels", dataclasses.replace(config, num_labels=3, label_names=("sad", "glad", "calm"))),
    ):
        with files.atomic_directory(place / name) as made:
            model_directory.save_config(made, own)
            tokenizer.save(made)
            model_directory.save_tensors(made, to_host_arrays(build_model(own, seed=3)))
    return place


@pytest.fixture(scope="module")
def address(directory: Path) -> Iterator[str]:
    """The model as `llamita serve --exact` opens it."""
    engine = EngineConfig(prefill_tokens=32, block_size=4)  # prompts come in pieces beside what is being written
    with serve(open_model(directory / "tiny", adapters={}, draft="", engine=engine, **LOADED)) as address:
        yield address


@pytest.fixture(scope="module")
def alone(directory: Path) -> ServedModel:
    return serve_model(LLM.load(directory / "tiny", **LOADED), "tiny")


@pytest.fixture(scope="module")
def answers(address: str) -> dict[str, Any]:
    """What was answered to each request of ASKED, all of them sent at once, and once more in another order."""
    together = threading.Barrier(len(ASKED))

    def ask(name: str) -> Any:
        path, body = ASKED[name]
        together.wait(60)
        answer = post(address, path, **body)
        assert answer.status_code == 200, answer.text
        return [data for _, data in events(answer)] if body.get("stream") else answer.json()

    with ThreadPoolExecutor(len(ASKED)) as pool:
        first = dict(zip(ASKED, pool.map(ask, ASKED), strict=True))
        again = dict(zip(reversed(ASKED), pool.map(ask, reversed(ASKED)), strict=True))
    for name, answer in first.items():
        assert numbers(answer) == numbers(again[name]), name
    return first


def numbers(answer: Any) -> list[float]:
    """All fractions of an answer in their order, but those that tell of time."""
    if isinstance(answer, dict):
        return [n for key, value in answer.items() if key != "timings" for n in numbers(value)]
    if isinstance(answer, list):
        return [n for value in answer for n in numbers(value)]
    return [answer] if isinstance(answer, float) else []


def generated(alone: ServedModel, text: str, **params: Any) -> Generation:
    chosen = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, **params)
    return alone.require_llm().generate(text, chosen)


@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_log_probabilities_of_completions(answers: dict[str, Any], alone: ServedModel, place: int) -> None:
    expected = generated(alone, TEXTS[place], top_logprobs=3, prompt_logprobs=True)
    (choice,) = answers[f"completion {place}"]["choices"]
    scores = choice["logprobs"]
    assert choice["text"] == TEXTS[place] + expected.text
    assert scores["token_logprobs"][1:] == [*expected.prompt_logprobs, *expected.logprobs]
    tokens = [*alone.require_llm().encode(TEXTS[place])[1:], *expected.token_ids]
    tops = [*expected.prompt_top_logprobs, *expected.top_logprobs]
    own = zip(tokens, scores["token_logprobs"][1:], strict=True)
    for found, top, one in zip(scores["top_logprobs"][1:], tops, own, strict=True):
        by_text: dict[str, float] = {}
        for token_id, value in (*top, one):
            piece = small_tokenizer().piece(token_id)
            by_text[piece] = max(value, by_text.get(piece, value))  # bytes that are no character have one text
        assert found == by_text
    streamed = [chunk["choices"][0]["logprobs"] for chunk in answers[f"stream {place}"][:-1]]
    assert [value for part in streamed for value in part["token_logprobs"]] == list(expected.logprobs)


@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_log_probabilities_of_chats(answers: dict[str, Any], alone: ServedModel, place: int) -> None:
    messages = [{"role": "user", "content": TEXTS[place]}]
    expected = answered(alone, messages, max_tokens=TOKENS, top_logprobs=3, seed=place, ignore_eos=True)
    (choice,) = answers[f"chat {place}"]["choices"]
    assert choice["message"]["content"] == expected.text
    scores = choice["logprobs"]["content"]
    assert [score["logprob"] for score in scores] == list(expected.logprobs)
    found = [[other["logprob"] for other in score["top_logprobs"]] for score in scores]
    assert found == [[value for _, value in top] for top in expected.top_logprobs]


def test_probabilities_of_decisions(answers: dict[str, Any], alone: ServedModel) -> None:
    questions = (
        Predicate("Is the fox kind?"),
        Choice("What was given?", (Option("kite"), Option("river", "water"))),
        Score("How glad is the owl?", (Option("sad"), Option("glad"), Option("overjoyed"))),
    )
    expected = decide(alone.require_llm(), TEXTS[2], questions).answers
    kind, gift, joy = answers["decisions"]["answers"]
    assert kind["probability"] == expected[0].probability
    assert [option["probability"] for option in gift["probabilities"]] == list(expected[1].probabilities)
    assert [level["probability"] for level in joy["probabilities"]] == list(expected[2].probabilities)
    assert answers["system one"]["answers"]["kind"]["noul"] == expected[0].probability


def test_embeddings(answers: dict[str, Any], alone: ServedModel) -> None:
    """Texts of one request run as a batch there; here together in another order, and each alone."""
    llm = alone.require_llm()
    for name, texts, pooling in (("embeddings", TEXTS, "mean"), ("last states", TEXTS[1:], "last")):
        found = np.array([row["embedding"] for row in answers[name]["data"]], np.float32)
        assert np.array_equal(found, llm.embed(texts[::-1], pooling=pooling)[::-1])
        assert np.array_equal(found, np.concatenate([llm.embed(text, pooling=pooling) for text in texts]))


def test_what_is_seen_inside(answers: dict[str, Any], alone: ServedModel) -> None:
    llm, found = alone.require_llm(), answers["look inside"]
    tokens = llm.encode(TEXTS[2])
    expected = look_inside(llm.runner, llm.tokenizer, tokens, attention=[0, 1], lens=True).to_dict()
    assert numbers({**found, "object": "", "model": ""}) == numbers(expected)
    # What a position sees of itself does not depend on what follows it.
    prefix = look_inside(llm.runner, llm.tokenizer, tokens[:7], attention=[0], lens=True)
    whole = look_inside(llm.runner, llm.tokenizer, tokens, attention=[0], lens=True)
    assert numbers(prefix.to_dict()["next"]) == numbers(whole.to_dict()["next"][:7])


def test_probabilities_of_labels(directory: Path) -> None:
    """A classifier has no engine: texts of one request run as a batch, beside requests for one text each."""
    backend = load_backend("torch", device="cpu", threads=1)
    alone = Classifier.load(directory / "labels", backend, device="cpu", exact=True)
    expected = np.concatenate([np.exp(alone.log_probabilities(alone.encode([text]))) for text in TEXTS])
    assert np.array_equal(np.exp(alone.log_probabilities(alone.encode(TEXTS))), expected)
    inputs: list[Any] = [TEXTS, *TEXTS, TEXTS[::-1]]
    model = open_model(directory / "labels", adapters={}, draft="", engine=EngineConfig(), **LOADED)
    with serve(model) as address, ThreadPoolExecutor(len(inputs)) as pool:
        together, *single, backwards = pool.map(
            lambda texts: post(address, "/v1/classify", input=texts).json()["data"], inputs
        )
    for rows in (together, [row for (row,) in single], backwards[::-1]):
        assert [row["probs"] for row in rows] == expected.tolist()
    assert np.ptp(expected[:, 0]) > 1e-3  # the texts are told apart

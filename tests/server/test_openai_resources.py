"""Models, embeddings and decisions asked by OpenAI's client, and what other clients ask of the same model."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import lora
from llamita.backend.torch.model.weights import build_model
from llamita.inference.embedding import Pooling
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter, LoraSettings, adapter_shapes
from llamita.server.model import ServedModel, serve_model
from llamita.workflows.decisions import decide
from llamita.workflows.questions import Answer, Choice, Labels, Option, Predicate, Score
from tests.server.clients import HTTP, QUESTIONS, post, random_model, serve, small_tokenizer
from tests.server.openai_peer import async_client, client, same_scores

TEXTS = ["The fox gave the owl a red kite.", "Où est l'élève?", "🦙"]


def aliased(pooling: Pooling = "mean") -> ServedModel:
    model = random_model()
    return serve_model(model.require_llm(), "tiny", aliases=("gpt-4o-mini", "text-embedding-3-small"), pooling=pooling)


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with serve(aliased()) as address:
        yield address


@pytest.fixture(scope="module")
def alone() -> ServedModel:
    return random_model()


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_model_is_listed_and_described(tiny: str, alone: ServedModel) -> None:
    models = client(tiny).models
    (listed,) = models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("tiny", "model", "llamita")
    assert listed.max_model_len == alone.config.max_position_embeddings
    assert listed.aliases == ["gpt-4o-mini", "text-embedding-3-small"]
    assert listed.meta["vocab_size"] == alone.config.vocab_size
    assert models.retrieve("tiny") == listed
    assert models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"
    with pytest.raises(openai.NotFoundError) as refused:
        models.retrieve("../../etc/passwd")
    assert refused.value.code == "model_not_found"


def test_a_model_answers_to_its_aliases(tiny: str) -> None:
    create = client(tiny).completions.create
    asked: dict[str, Any] = {"prompt": "The fox", "max_tokens": 6, "temperature": 0}
    answers = [create(model=name, **asked) for name in ("tiny", "gpt-4o-mini")]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert [answer.model for answer in answers] == ["tiny", "gpt-4o-mini"]


def test_an_alias_is_no_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match="'tiny' is the name of the model"):
        serve_model(random_model().require_llm(), "tiny", aliases=("tiny",))


@pytest.mark.parametrize("path", ["/models", "/chat/completions", "/health"])
def test_a_base_address_without_or_with_its_version_will_do(tiny: str, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hm?"}], "max_tokens": 5, "temperature": 0}
    ask = (lambda place: HTTP.post(place, json=body)) if "chat" in path else HTTP.get
    short, whole = (ask(f"{tiny}{version}{path}").json() for version in ("", "/v1"))
    assert short.get("choices") == whole.get("choices")
    assert short.get("data") == whole.get("data")
    assert short.get("status") == whole.get("status") == ("ok" if path == "/health" else None)


def test_an_adapter_is_asked_by_its_name() -> None:
    """Each answers as a model into which it is merged, and the model itself as before."""
    tokenizer = small_tokenizer()
    config = random_model().config
    settings = {"high": LoraSettings(4, 8.0), "low": LoraSettings(3, 9.0, targets=("q_proj", "down_proj"))}
    adapters = {name: random_adapter(config, chosen, seed) for seed, (name, chosen) in enumerate(settings.items())}
    merged: dict[str, LLM] = {}
    for name in ("tiny", *adapters):
        model = build_model(config, seed=3).eval()
        if name in adapters:
            lora.merge(model, adapters[name])
        merged[name] = LLM(TorchRunner(model), tokenizer)
    runner = TorchRunner(build_model(config, seed=3).eval(), False, adapters)
    with serve(serve_model(LLM(runner, tokenizer, adapters=tuple(adapters)), "tiny")) as address:
        asked = client(address)
        assert [(card.id, card.parent) for card in asked.models.list()] == [
            ("tiny", None), ("high", "tiny"), ("low", "tiny"),
        ]  # fmt: skip
        texts = set()
        for name, alone in merged.items():
            params = SamplingParams(temperature=0, max_tokens=12, top_logprobs=1)
            expected = alone.generate(TEXTS[0], params)
            choice = asked.completions.create(
                model=name, prompt=TEXTS[0], temperature=0, max_tokens=12, logprobs=1
            ).choices[0]  # fmt: skip
            assert choice.text == expected.text
            same_scores(choice.logprobs.token_logprobs, expected.logprobs)
            (row,) = asked.embeddings.create(model=name, input=TEXTS[0]).data
            np.testing.assert_allclose(row.embedding, alone.embed(TEXTS[0])[0], atol=1e-5)
            decision = asked.decisions.create(model=name, input=TEXTS[0], questions=QUESTIONS[:1])
            (by_hand,) = decide(alone, TEXTS[0], (Predicate("Is the fox kind?"),)).answers
            assert decision.answers[0].probability == pytest.approx(by_hand.probability, abs=1e-5)
            texts.add(choice.text)
        assert len(texts) == 3


def random_adapter(config: ModelConfig, settings: LoraSettings, seed: int) -> Adapter:
    factors, random = settings.factors(config), np.random.default_rng(seed)
    shapes = adapter_shapes(config, factors)
    arrays = {n: HostArray.from_numpy(random.normal(0, 0.15, s).astype(np.float32)) for n, s in shapes.items()}
    return Adapter(config, factors, arrays)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_text_are_those_that_are_generated_after(tiny: str, alone: ServedModel) -> None:
    text = TEXTS[1] + TEXTS[2]
    own = list(alone.require_llm().encode(text))
    assert post(tiny, "/tokenize", prompt=text).json()["tokens"] == own
    plain = post(tiny, "/tokenize", content=text).json()["tokens"]  # llama.cpp's form, which adds no BOS unless asked
    assert plain == list(alone.tokenizer.encode(text))
    assert post(tiny, "/tokenize", content=text, add_special=True).json()["tokens"] == own
    assert post(tiny, "/detokenize", tokens=plain).json()["content"] == text
    pieces = post(tiny, "/tokenize", content=text, with_pieces=True).json()["tokens"]
    assert [piece["id"] for piece in pieces] == plain
    bytes_of = [bytes(p) if isinstance(p, list) else p.encode() for p in (piece["piece"] for piece in pieces)]
    assert bytes_of == [alone.tokenizer.token_bytes(token_id) for token_id in plain]
    assert b"".join(bytes_of).decode() == text


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}], ids=str)
def test_a_conversation_is_laid_out_as_text(tiny: str, alone: ServedModel, more: dict[str, bool]) -> None:
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "By the"}]
    chosen = {"add_generation_prompt": not more.get("continue_final_message"), **more}
    found = post(tiny, "/apply-template", messages=messages, **more).json()["prompt"]
    assert found == alone.chat.render(messages, **chosen)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_embeddings_are_those_of_the_model_in_both_encodings(tiny: str, alone: ServedModel, pooling: Any) -> None:
    expected = alone.require_llm().embed(TEXTS, pooling or "mean")
    create = client(tiny).embeddings.create
    asked: dict[str, Any] = {"model": "text-embedding-3-small", "extra_body": {"pooling": pooling} if pooling else {}}
    tokens = [list(alone.require_llm().encode(text)) for text in TEXTS]
    for texts in (TEXTS, tokens):
        decoded = create(input=texts, **asked)  # the client asks for base64 and decodes it
        plain = create(input=texts, encoding_format="float", **asked)
        for answer in (decoded, plain):
            vectors = np.array([row.embedding for row in answer.data])
            assert [row.index for row in answer.data] == [0, 1, 2]
            np.testing.assert_allclose(vectors, expected, atol=1e-6)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens))
        np.testing.assert_array_equal(
            np.array([row.embedding for row in decoded.data], np.float32),
            np.array([row.embedding for row in plain.data], np.float32),
        )
    raw = post(tiny, "/v1/embeddings", input=TEXTS[0], encoding_format="base64", **asked["extra_body"]).json()
    (row,) = raw["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), expected[0], atol=1e-6)


def test_a_server_may_pool_otherwise_where_nobody_says() -> None:
    model = aliased("last")
    with serve(model) as address:
        found = client(address).embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding
        np.testing.assert_allclose(found, model.require_llm().embed(TEXTS[0], "last")[0], atol=1e-6)
        answer = post(address, "/v1/embeddings", input=TEXTS[0], pooling="mean").json()
        assert answer["pooling"] == "mean"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["x"] * 65}, "input", "invalid_value"),
        ({"input": "fox and owl " * 900}, "input", "context_length_exceeded"),
        ({"input": [100000]}, "input", "invalid_value"),
        ({"input": "x", "dimensions": 8}, "dimensions", "invalid_value"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_texts_that_are_not_embedded(tiny: str, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).embeddings.create(model="tiny", **fields)
    assert (refused.value.param, refused.value.code) == (param, code)


# --- decisions --------------------------------------------------------------------------------------------------------


def asked_alone(model: ServedModel, *more: Any) -> tuple[Answer, ...]:
    questions = (
        Predicate("Is the fox kind?"),
        Choice("What was given?", (Option("kite"), Option("river", "water"))),
        Score("How glad is the owl?", (Option("sad"), Option("glad"), Option("overjoyed"))),
    )
    return decide(model.require_llm(), TEXTS[0], (*questions, *more)).answers


def test_decisions_are_those_of_the_model(tiny: str, alone: ServedModel) -> None:
    answer = client(tiny).decisions.create(model="tiny", input=TEXTS[0], questions=QUESTIONS)
    kind, gift, joy = answer.answers
    yes, two, three = (found.probabilities for found in asked_alone(alone))
    assert (kind.name, gift.name, joy.name) == ("kind", "gift", "joy")
    assert kind.probability == pytest.approx(yes[0], abs=1e-5)
    assert [option.probability for option in gift.probabilities] == pytest.approx(two, abs=1e-5)
    assert [option.value for option in gift.probabilities] == ["kite", "river"]
    assert gift.choice == ("kite", "river")[int(np.argmax(two))]
    assert [level.probability for level in joy.probabilities] == pytest.approx(three, abs=1e-5)
    assert [(level.label, level.value) for level in joy.probabilities] == [("sad", 0), ("glad", 1), ("overjoyed", 2)]
    assert joy.score == pytest.approx(three[1] + 2 * three[2], abs=1e-5)

    async def ask() -> Any:
        async with async_client(tiny) as asynchronous:
            return await asynchronous.decisions.create(model="tiny", input=TEXTS[0], questions=QUESTIONS)

    again = asyncio.run(ask()).answers
    assert again[0].probability == pytest.approx(kind.probability, abs=1e-5)
    assert again[1].choice == gift.choice
    with pytest.raises(openai.BadRequestError) as refused:
        client(tiny).decisions.create(model="tiny", input=TEXTS[0], questions=[{**QUESTIONS[1], "choices": []}])
    assert refused.value.param == "questions[0].choices"


def test_system_one_asks_the_same_questions(tiny: str, alone: ServedModel) -> None:
    body = {
        "state": TEXTS[0],
        "questions": {
            "kind": {"type": "noul", "instructions": "Is the fox kind?"},
            "about": {"type": "labels", "instructions": "It is about:", "criteria": {"kite": None, "river": None}},
        },
    }
    answers = post(tiny, "/v1/systemone", **body).json()["answers"]
    kind, *_, labels = asked_alone(alone, Labels("It is about:", (Option("kite"), Option("river"))))
    assert answers["kind"]["noul"] == pytest.approx(kind.probability, abs=1e-5)
    expected = dict(zip(("kite", "river"), labels.probabilities, strict=True))
    assert answers["about"]["probabilities"] == pytest.approx(expected, abs=1e-5)

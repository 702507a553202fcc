"""The exact mode: the logits after a text are the same bits however it came there, compared as arrays of numbers.

A request's logits are held to those of an engine that serves it alone, in one piece, without guesses.
"""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer import exact
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model.weights import build_model
from llamita.inference.drafting import DraftModel, PromptLookup
from tests.backend.torch.infer.served import Alone, Served, alone, model_of, requests

MODELS = {
    "grouped heads": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "odd widths": {"hidden_size": 36, "intermediate_size": 52, "head_dim": 6},
    "odd numbers": {"hidden_size": 37, "intermediate_size": 53, "head_dim": 10, "vocab_size": 91},
    "sliding window": {"sliding_window": 20},
    "window in later layers": {"sliding_window": 9, "full_attention_layers": 1, "query_key_value_bias": True},
    "qwen3": {"query_key_norm": True, "head_dim": 16},
    "wide": {"hidden_size": 96, "intermediate_size": 1376, "num_hidden_layers": 2},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of logits under teacher forcing on the fast path, as a share of the largest: bfloat16 has 8 bits, rounded at every
operation of three layers."""


WAYS = (
    *("together", "at random times", "chunks of 1", "chunks of 2", "chunks of 7", "chunks of 16", "chunks of 65"),
    *("little memory", "beside others", "cached", "n-grams", "n-grams, little memory"),
    *("a draft model", "a draft model, little memory", "forked", "forked, little memory", "forked and guessed"),
)


def scenarios(runner: TorchRunner, ways: Collection[str] = WAYS) -> Iterator[tuple[str, Served, Callable[[], Alone]]]:
    """Ways in which requests are served, what came of each, and what comes of its requests alone."""
    vocabulary = runner.config.vocab_size
    each, forked = requests(vocabulary), requests(vocabulary, count=4, n=3)
    short_and_long = each[3:6]
    others = requests(vocabulary, 4, seed=9000, temperature=0.7, top_p=0.8, repetition_penalty=1.3, top_logprobs=3)
    others = [dataclasses.replace(request, id=100 + request.id) for request in others]
    once_more = [dataclasses.replace(request, id=1000 + request.id) for request in each]
    draft = TorchRunner(
        build_model(dataclasses.replace(runner.config, hidden_size=16, intermediate_size=20, head_dim=4), seed=4)
    )
    expected, expected_forks = (functools.cache(lambda of=of: alone(runner, of)) for of in (each, forked))
    small = {"blocks": 70, "block_size": 3 if 0 in runner.config.attention_windows else 1}

    for way in ways:
        limits = small if "little memory" in way else {}
        if way.startswith("chunks of "):
            chunk = int(way.split()[-1])
            limits = {"prefill_tokens": chunk, "mixed_prefill_tokens": max(1, chunk // 2), "block_size": chunk % 11 + 1}
        if way == "at random times":
            yield way, Served(runner, [each[5:], each[2:5], each[:2]]), expected
        elif way == "beside others":
            yield way, Served(runner, [others, each]), expected
        elif way in ("chunks of 1", "chunks of 2"):  # a step for each chunk
            numbers = [request.id for request in short_and_long]
            of_few = {key: one for key, one in expected().items() if key[0] in numbers}
            yield way, Served(runner, [short_and_long], **limits), lambda of_few=of_few: of_few
        elif way == "cached":
            served = Served(runner, [[request] for request in (*each, *once_more)], blocks=300)
            assert sum(served.statistics[request.id, 0].cached_tokens for request in once_more) > 100
            yield way, served, lambda: expected() | {(1000 + id, i): one for (id, i), one in expected().items()}
        elif way.startswith("forked"):
            yield way, Served(runner, [forked], PromptLookup() if "guessed" in way else None, **limits), expected_forks
        elif way.startswith(("n-grams", "a draft model")):
            served = Served(runner, [each], DraftModel(draft) if "draft" in way else PromptLookup(), **limits)
            assert sum(one.drafted_tokens for one in served.statistics.values()) > 20
            yield way, served, expected
        else:
            yield way, Served(runner, [each], **limits), expected


def check_all(runner: TorchRunner, ways: Collection[str] = WAYS) -> None:
    """The same texts, and at each position the same bits as often as they were computed."""
    for way, served, expected in scenarios(runner, ways):
        for key, (text, logits) in expected().items():
            assert served.texts[key] == text, (way, key)
            found = served.logits_of(key)
            assert found.keys() == logits.keys()
            for position, (row_V,) in logits.items():
                assert all(np.array_equal(other_V, row_V) for other_V in found[position]), (way, key, position)
        if 0 in runner.config.attention_windows:  # a sequence that keeps no more than a window is rarely preempted
            assert ("memory" in way) == (served.engine.scheduler.preemptions > 0), way


OFTEN = ("odd numbers", "window in later layers")
CASES = [
    *(
        pytest.param(name, WAYS, id=name, marks=pytest.mark.medium if name in OFTEN else pytest.mark.slow)
        for name in MODELS
    ),
    pytest.param("multi-query", WAYS[::2], id="multi-query, some ways", marks=pytest.mark.medium),
    pytest.param("qwen3", WAYS[1::2], id="qwen3, the other ways", marks=pytest.mark.medium),
]


@pytest.mark.parametrize(("name", "ways"), CASES)
def test_logits_are_the_same_bits_however_a_text_came_there(name, ways):
    check_all(TorchRunner(model_of(**MODELS[name]), exact=True), ways)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
def test_logits_are_the_same_bits_with_several_threads(threads):
    """In a process of its own, which starts with so many; "wide" is split among them."""
    code = (
        f"import torch; torch.set_num_threads({threads})\n"
        "from tests.backend.torch.infer import test_exact as t\n"
        "for name in ('wide', 'odd numbers'): t.check_all(t.TorchRunner(t.model_of(**t.MODELS[name]), exact=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("dtype", "name", "ways"),
    [
        pytest.param(torch.float32, "grouped heads", WAYS, id="float32", marks=pytest.mark.medium),
        pytest.param(torch.bfloat16, "grouped heads", WAYS[::3], id="bfloat16, some ways", marks=pytest.mark.medium),
        pytest.param(torch.bfloat16, "grouped heads", WAYS, id="bfloat16", marks=pytest.mark.slow),
        *(
            pytest.param(dtype, name, WAYS, id=f"{name}, {dtype}", marks=pytest.mark.slow)
            for name in ("qwen3", "window in later layers")
            for dtype in TOLERANCE
        ),
    ],
)
def test_fast_logits_are_those_of_the_whole_text(dtype, name, ways):
    """Under teacher forcing: the text an engine wrote, run once more as a whole."""
    runner = TorchRunner(model_of(dtype, **MODELS[name]))
    for _, served, _ in scenarios(runner, ways):
        for key, text in served.texts.items():
            whole_TV = runner.forward([text])["logits"][0]
            for position, rows in served.logits_of(key).items():
                for row_V in rows:
                    difference = np.abs(row_V - whole_TV[position - 1]).max()
                    assert difference < TOLERANCE[dtype] * np.abs(whole_TV).max()


FORWARD = ("multi-query", "odd numbers", "window in later layers", "sliding window", "wide")


@pytest.mark.parametrize("name", FORWARD)
def test_a_whole_forward_gives_the_bits_of_the_engine(name, monkeypatch):
    """Alone, in a batch with whatever padding follows, and read in pieces of any length."""
    runner = TorchRunner(model_of(**MODELS[name]), exact=True)
    served = alone(runner, requests(runner.config.vocab_size)[1::2])
    texts = [text for text, _ in served.values()]
    longest = max(map(len, texts))
    padded = [[*text, *[1] * (longest - len(text))] for text in texts]
    for piece in (512, 16, 7):
        monkeypatch.setattr(exact, "TEXT_PIECE", piece)
        together = runner.forward(padded)["logits"]
        for row_TV, (text, logits) in zip(together, served.values(), strict=True):
            single_TV = runner.forward([text])["logits"][0]
            assert np.array_equal(row_TV[: len(text)], single_TV)
            assert np.array_equal(runner.forward([text], logits="last")["logits"][0], single_TV[-1:])
            for position, (row_V,) in logits.items():
                assert np.array_equal(single_TV[position - 1], row_V), position


@pytest.mark.parametrize("name", FORWARD)
def test_what_a_forward_shows_is_what_the_fast_one_shows_and_the_same_bits_in_any_batch(name):
    model = model_of(**MODELS[name])
    runner, fast = TorchRunner(model, exact=True), TorchRunner(model)
    random, layers = np.random.default_rng(3), range(runner.config.num_hidden_layers)
    rows = random.integers(0, runner.config.vocab_size, (3, 90))
    places = ["embedding", "norm", *(f"layers.{i}" for i in layers), *(f"layers.{i}.attention" for i in layers)]
    found, expected = runner.forward(rows, places), fast.forward(rows, places)
    assert found.keys() == expected.keys()
    for place in found:
        assert found[place].shape == expected[place].shape
        np.testing.assert_allclose(found[place], expected[place], rtol=0, atol=1e-4 * np.abs(expected[place]).max())
    shorter = runner.forward(rows[1:2, :41], places)
    for place, array in shorter.items():
        own = found[place][1:2, :, :41, :41] if place.endswith("attention") else found[place][1:2, :41]
        assert np.array_equal(array, own), place
    stream = found[f"layers.{layers[-1]}"]
    assert np.array_equal(runner.logit_lens(stream), found["logits"])
    assert np.array_equal(runner.logit_lens(stream[2:, 5:6])[0, 0], found["logits"][2, 5])


def test_training_the_model_changes_what_an_exact_runner_gives():
    """It runs the model's own parameters, not a copy, and leaves what is trained and how as it was."""
    model = model_of().train()
    model.model.norm.weight.requires_grad_(False)
    runner = TorchRunner(model, exact=True)
    prompt = requests(97)[3]
    before = alone(runner, [prompt])[3, 0][1]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    after = alone(runner, [prompt])[3, 0][1]
    first = len(prompt.prompt)
    np.testing.assert_array_equal(after[first][0], 2 * before[first][0])
    assert model.training
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad

"""The engine over both backends: every request gets what it gets alone, and what the other gives it, however served.

Greedy tokens are held to the margin rule: they are equal wherever the two best logits are further apart than twice the
measured difference between two ways of computing them. Draws of a seed are equal, since ties are none there.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llamita.backend.interface import Runner
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import DraftModel, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.llm import LLM
from llamita.inference.request import Request, TokenEvent
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator
from tests.backend.frameworks import NAMES, make
from tests.backend.models import save
from tests.backend.sessions import CONFIG, log_softmax

MODELS = {
    "plain": CONFIG,
    "window": dataclasses.replace(CONFIG, sliding_window=7, query_key_value_bias=True, full_attention_layers=1),
    "int4": dataclasses.replace(CONFIG, hidden_size=64, head_dim=8, intermediate_size=96, quantization="int4"),
}
BEGINNING = tuple(np.random.default_rng(0).integers(0, 97, 17).tolist())
PROMPTS = [(*BEGINNING, 5), (*BEGINNING, 9, 9, 3), (7,), tuple(range(20)), (4, 8, 15) * 5, (*BEGINNING[:12], 1)]
TOKENS = 18
ROOMY = EngineConfig(max_sequences=8, block_size=4, prefix_caching=False)

Served = dict[int, list[TokenEvent]]


def runner_of(framework, kind: str) -> Runner:
    config = MODELS[kind]
    arrays = fresh(dataclasses.replace(config, quantization=""), seed=1)
    if config.quantization:
        arrays = dict(framework.backend.quantize_arrays(config, arrays.items()))
    return framework.runner_over(config, arrays)


def fresh(config, seed: int) -> dict[str, HostArray]:
    return {name: HostArray.from_numpy(values) for name, values in initialize_parameters(config, seed)}


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runner(framework, kind: str) -> Runner:
    return runner_of(framework, kind)


def params_of(number: int) -> SamplingParams:
    """Greedy for even numbers; else drawn, by parameters of its own."""
    if number % 2 == 0:
        return SamplingParams(temperature=0, max_tokens=TOKENS, top_logprobs=2, prompt_logprobs=number == 0)
    kinds = {"top_k": 20} if number == 1 else {"top_p": 0.9, "presence_penalty": 0.5}
    return SamplingParams(seed=number, temperature=0.9, max_tokens=TOKENS, **kinds)


def serve(engine: Engine, numbers: Sequence[int] = range(len(PROMPTS))) -> Served:
    for number in numbers:
        engine.add(Request(number, PROMPTS[number], params_of(number)))
    served: Served = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None, event.error
            served[event.request_id].append(event)
    return served


@pytest.fixture(scope="module")
def alone(runner: Runner) -> Served:
    return served_alone(runner)


def served_alone(runner: Runner) -> Served:
    return {number: serve(Engine(runner, config=ROOMY), [number])[number] for number in range(len(PROMPTS))}


def assert_equal(runner: Runner, found: Served, expected: Served) -> None:
    """Tokens by the margin rule; log-probabilities are those that the model gives the whole text."""
    for number, events in found.items():
        ours, theirs = ([event.token_id for event in each] for each in (events, expected[number]))
        prompt = PROMPTS[number]
        logits_TV = runner.forward([[*prompt, *theirs]])["logits"][0, len(prompt) - 1 : -1]
        logprobs_TV = log_softmax(logits_TV)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        measured = [abs(event.logprob - logprobs_TV[i, ours[i]]) for i, event in enumerate(events[:same])]
        difference = max(measured, default=0)
        assert difference < 3e-5
        if same < len(ours):
            best, second = np.sort(logits_TV[same])[[-1, -2]]
            assert number % 2 == 0, "draws are equal"
            assert best - second <= 2 * difference, f"request {number} diverges at {same} where the margin is clear"


def test_alone_both_backends_give_the_same(kind: str) -> None:
    runners = [runner_of(make(name), kind) for name in NAMES]
    theirs, ours = map(served_alone, runners)
    assert_equal(runners[1], ours, theirs)
    scores, rival = (served[0][0].prompt_logprobs for served in (ours, theirs))
    assert len(scores) == len(PROMPTS[0]) - 1
    np.testing.assert_allclose(scores, rival, atol=3e-5)


def test_prompts_have_the_log_probabilities_of_the_whole_text(runner: Runner, alone: Served) -> None:
    expected = log_softmax(runner.forward([PROMPTS[0]])["logits"][0])[np.arange(len(PROMPTS[0]) - 1), PROMPTS[0][1:]]
    np.testing.assert_allclose(alone[0][0].prompt_logprobs, expected, atol=3e-5)


LIMITS = {
    "batched": ROOMY,
    "chunked": dataclasses.replace(ROOMY, prefill_tokens=5, mixed_prefill_tokens=3),
    "preempted": dataclasses.replace(ROOMY, blocks=15),
}


@pytest.mark.parametrize("limits", LIMITS)
def test_batched_chunked_and_preempted_are_alone(runner: Runner, alone: Served, limits: str) -> None:
    engine = Engine(runner, config=LIMITS[limits])
    assert_equal(runner, serve(engine), alone)
    assert (engine.scheduler.preemptions > 0) == (limits == "preempted")


def test_a_prefix_hit_is_the_cold_run(runner: Runner, alone: Served) -> None:
    engine = Engine(runner, config=dataclasses.replace(ROOMY, prefix_caching=True))
    cold = serve(engine)
    warm = serve(engine)
    assert_equal(runner, cold, alone)
    assert_equal(runner, warm, alone)
    assert [warm[number][-1].statistics.cached_tokens for number in (0, 3)] == [0, 16]  # 0 asks for its log-probs
    assert serve(engine, [1])[1][-1].statistics.cached_tokens == 16


@pytest.mark.parametrize("guesses", ["lookup", "itself", "another model"])
def test_guesses_change_no_token(framework, runner: Runner, alone: Served, guesses: str) -> None:
    config = dataclasses.replace(runner.config, quantization="")
    drafts = {
        "lookup": PromptLookup(),
        "itself": DraftModel(runner),
        "another model": DraftModel(framework.runner_over(config, fresh(config, seed=2))),
    }
    found = serve(Engine(runner, config=ROOMY, drafter=drafts[guesses]))
    assert_equal(runner, found, alone)
    statistics = [events[-1].statistics for events in found.values()]
    drafted, accepted = (sum(getattr(one, f"{name}_tokens") for one in statistics) for name in ("drafted", "accepted"))
    assert drafted > 0
    assert accepted > 0.9 * drafted or guesses != "itself"
    assert accepted < 0.5 * drafted or guesses != "another model"


def test_continuations_share_a_prompt_and_part(kind: str) -> None:
    params = SamplingParams(seed=4, max_tokens=9, n=4)
    texts = [
        [
            one.token_ids
            for one in LLM(runner_of(make(name), kind), engine=ROOMY).generate(BEGINNING, params).continuations
        ]
        for name in NAMES
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == 4


def test_continuations_are_those_of_requests_of_their_own(runner: Runner) -> None:
    """The i-th has the seed `seed + i`."""
    params = SamplingParams(seed=4, max_tokens=9, n=4)
    together = [one.token_ids for one in LLM(runner, engine=ROOMY).generate(BEGINNING, params).continuations]
    alone = [
        LLM(runner, engine=ROOMY).generate(BEGINNING, dataclasses.replace(params, n=1, seed=4 + i)).token_ids
        for i in range(4)
    ]
    assert together == alone


# --- text ------------------------------------------------------------

TEXT = "The fox gave the owl a red kite. Où est l'élève? naïve, and then they sat by the river. " * 20
ASKED = {
    "stop": SamplingParams(seed=1, max_tokens=60, stop=("e", "xq")),
    "choices": SamplingParams(seed=2, max_tokens=20, choices=("yes", "no", "née")),
    "regex": SamplingParams(seed=3, max_tokens=60, regex=r"[A-Z][a-z]{2,5} sat by the (river|road)\."),
    "schema": SamplingParams(
        seed=4, max_tokens=60, json_schema='{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}'
    ),
    "bias": SamplingParams(seed=5, max_tokens=15, logit_bias={40: 5.0, 41: -100.0}, repetition_penalty=1.2),
    "least": SamplingParams(seed=6, max_tokens=30, min_tokens=20, stop=("t",), min_p=0.02),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe_from_iterator([TEXT], vocab_size=300)
    config = dataclasses.replace(
        CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=96, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    directory = save(config, fresh(config, seed=3), tmp_path_factory.mktemp("models") / "tiny")
    tokenizer.save(directory)
    return directory


def texts_of(framework, directory: Path) -> list:
    """All in one batch, each as its kind asks."""
    llm = LLM.load(directory, backend=framework.name, device="cpu", engine=EngineConfig(block_size=8))
    return llm.generate(["The fox"] * len(ASKED), list(ASKED.values()))


def test_stops_and_forms_give_the_same_text_in_both_backends(directory: Path) -> None:
    ours, theirs = (texts_of(make(name), directory) for name in NAMES)
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert [one.finish_reason for one in ours] == [one.finish_reason for one in theirs]


def test_stops_and_forms_are_kept_to(framework, directory: Path) -> None:
    ours = texts_of(framework, directory)
    text = dict(zip(ASKED, (one.text for one in ours), strict=True))
    assert "e" not in text["stop"]
    assert text["choices"] in ASKED["choices"].choices
    assert re.fullmatch(ASKED["regex"].regex, text["regex"])
    assert all(isinstance(one, bool) for one in json.loads(text["schema"]))


def test_a_saved_model_is_the_model(framework, directory: Path, tmp_path: Path) -> None:
    llm = LLM.load(directory, backend=framework.name)
    llm.save(tmp_path / "copy")
    for name, array in model_directory.load_tensors(directory).items():
        assert bytes(model_directory.load_tensors(tmp_path / "copy")[name].data) == bytes(array.data), name


def test_a_classifier_gives_its_logits_and_does_not_generate(framework) -> None:
    config = dataclasses.replace(CONFIG, num_labels=3)
    runner = framework.runner_over(config, fresh(config, seed=1))
    assert runner.forward([[1, 2, 3]])["logits"].shape == (1, 3, 3)
    with pytest.raises(ValueError, match="classification head"):
        Engine(runner)

"""The engine over MLX: every request gets what it gets alone, and what PyTorch gives it, however it is served.

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

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import Runner  # noqa: E402
from llamita.backend.mlx.infer.runner import MlxRunner, load_runner, runner_over  # noqa: E402
from llamita.backend.mlx.model.weights import build_model, quantize_arrays, to_host_arrays  # noqa: E402
from llamita.backend.sampling_params import SamplingParams  # noqa: E402
from llamita.backend.torch.infer.runner import load_runner as load_torch  # noqa: E402
from llamita.backend.torch.infer.runner import runner_over as over_torch  # noqa: E402
from llamita.inference.config import EngineConfig  # noqa: E402
from llamita.inference.drafting import (  # noqa: E402
    Drafter,
    DraftModel,
    PromptLookup,
)
from llamita.inference.engine import Engine  # noqa: E402
from llamita.inference.llm import LLM  # noqa: E402
from llamita.inference.request import Request, TokenEvent  # noqa: E402
from llamita.model.config import ModelConfig  # noqa: E402
from llamita.storage import files, model_directory  # noqa: E402
from llamita.text.bpe import train_bpe_from_iterator  # noqa: E402
from tests.backend.torch.infer.test_runner import CONFIG, log_softmax  # noqa: E402

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


@pytest.fixture(scope="module", params=MODELS)
def runners(request: pytest.FixtureRequest) -> tuple[MlxRunner, Runner]:
    """Ours and PyTorch's, over the same values."""
    config = MODELS[request.param]
    arrays = to_host_arrays(build_model(dataclasses.replace(config, quantization=""), seed=1))
    if config.quantization:
        arrays = dict(quantize_arrays(config, arrays.items()))
    return runner_over(config, arrays), over_torch(config, arrays)


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
def alone(runners: tuple[MlxRunner, Runner]) -> Served:
    return served_alone(runners[0])


def served_alone(runner: Runner) -> Served:
    return {number: serve(Engine(runner, config=ROOMY), [number])[number] for number in range(len(PROMPTS))}


def assert_equal(runner: MlxRunner, found: Served, expected: Served) -> None:
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


def test_alone_is_pytorchs(runners: tuple[MlxRunner, Runner], alone: Served) -> None:
    expected = served_alone(runners[1])
    assert_equal(runners[0], alone, expected)
    scores, rival = (served[0][0].prompt_logprobs for served in (alone, expected))
    assert len(scores) == len(PROMPTS[0]) - 1
    np.testing.assert_allclose(scores, rival, atol=3e-5)


LIMITS = {
    "batched": ROOMY,
    "chunked": dataclasses.replace(ROOMY, prefill_tokens=5, mixed_prefill_tokens=3),
    "preempted": dataclasses.replace(ROOMY, blocks=15),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_batched_chunked_and_preempted_are_alone(runners: tuple[MlxRunner, Runner], alone: Served, kind: str) -> None:
    engine = Engine(runners[0], config=LIMITS[kind])
    assert_equal(runners[0], serve(engine), alone)
    assert (engine.scheduler.preemptions > 0) == (kind == "preempted")


def test_a_prefix_hit_is_the_cold_run(runners: tuple[MlxRunner, Runner], alone: Served) -> None:
    engine = Engine(runners[0], config=dataclasses.replace(ROOMY, prefix_caching=True))
    cold = serve(engine)
    warm = serve(engine)
    assert_equal(runners[0], cold, alone)
    assert_equal(runners[0], warm, alone)
    assert [warm[number][-1].statistics.cached_tokens for number in (0, 3)] == [0, 16]  # 0 asks for its log-probs
    assert serve(engine, [1])[1][-1].statistics.cached_tokens == 16


@pytest.mark.parametrize("kind", ["lookup", "itself", "another model"])
def test_guesses_change_no_token(runners: tuple[MlxRunner, Runner], alone: Served, kind: str) -> None:
    ours = runners[0]
    another = MlxRunner(build_model(dataclasses.replace(ours.config, quantization=""), seed=2))
    drafts: dict[str, Drafter] = {
        "lookup": PromptLookup(),
        "itself": DraftModel(ours),
        "another model": DraftModel(another),
    }
    found = serve(Engine(ours, config=ROOMY, drafter=drafts[kind]))
    assert_equal(ours, found, alone)
    statistics = [events[-1].statistics for events in found.values()]
    drafted, accepted = (sum(getattr(one, f"{name}_tokens") for one in statistics) for name in ("drafted", "accepted"))
    assert drafted > 0
    assert accepted > 0.9 * drafted or kind != "itself"
    assert accepted < 0.5 * drafted or kind != "another model"


def test_continuations_share_a_prompt_and_part(runners: tuple[MlxRunner, Runner]) -> None:
    params = SamplingParams(seed=4, max_tokens=9, n=4)
    texts = [
        [one.token_ids for one in LLM(runner, config=ROOMY).generate(BEGINNING, params).continuations]
        for runner in runners
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == 4


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
    with files.atomic_directory(tmp_path_factory.mktemp("models") / "tiny") as directory:
        model_directory.save_tensors(directory, to_host_arrays(build_model(config, seed=3)))
        model_directory.save_config(directory, config)
        tokenizer.save(directory)
    return directory.parent / "tiny"


def test_stops_and_forms_give_pytorchs_text(directory: Path) -> None:
    """All in one batch, each as its kind asks."""
    ours, theirs = (
        LLM.load(directory, load, EngineConfig(block_size=8)).generate(["The fox"] * len(ASKED), list(ASKED.values()))
        for load in (load_runner, lambda path: load_torch(path, device="cpu"))
    )
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert [one.finish_reason for one in ours] == [one.finish_reason for one in theirs]
    text = dict(zip(ASKED, (one.text for one in ours), strict=True))
    assert "e" not in text["stop"]
    assert text["choices"] in ASKED["choices"].choices
    assert re.fullmatch(ASKED["regex"].regex, text["regex"])
    assert all(isinstance(one, bool) for one in json.loads(text["schema"]))


def test_a_saved_model_is_the_model(directory: Path, tmp_path: Path) -> None:
    llm = LLM.load(directory, load_runner)
    llm.save(tmp_path / "copy")
    for name, array in model_directory.load_tensors(directory).items():
        assert bytes(model_directory.load_tensors(tmp_path / "copy")[name].data) == bytes(array.data), name


def test_a_classifier_gives_its_logits_and_does_not_generate() -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, num_labels=3)
    runner = MlxRunner(build_model(config, seed=1))
    assert runner.forward([[1, 2, 3]])["logits"].shape == (1, 3, 3)
    with pytest.raises(ValueError, match="classification head"):
        Engine(runner)

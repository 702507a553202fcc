"""Models of the course with a cache as runners: their logits, their caches in an engine, what they refuse."""

import dataclasses
import functools
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.own.cached import FORM, MOST_TOGETHER
from llamita.backend.torch.own.numpy_llama import NumpyLlama
from llamita.backend.torch.own.program import refuse
from llamita.backend.torch.own.runner import OwnRunner
from llamita.backend.torch.own.serving import Serving
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import DraftModel, PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.llm import LLM
from llamita.inference.request import Request
from llamita.model.config import ModelConfig
from llamita.model.rope import RopeScaling
from tests.backend import models
from tests.backend.sessions import CONFIG, Session, check_targets
from tests.backend.torch.own.programs import held_to_the_oracle, solved

OWN = OwnBackend(solved(of="serving"))
ONE_BY_ONE = OwnBackend(solved(of="serving", without=["batch"]))
NUMPY = OwnBackend(solved(of="numpy"))
BACKENDS = {"serving": OWN, "serving one by one": ONE_BY_ONE, "numpy": NUMPY}
PLAIN = {
    "plain": models.small(),
    "tied": models.small(tie_word_embeddings=True),
    "another theta and epsilon": models.small(rope_theta=300.0, rms_norm_eps=1e-3),
    "one key head": models.small(num_key_value_heads=1),
    "head size of its own": models.small(head_dim=6),
}
QWEN = {
    "four biases": models.small(attention_bias=True),
    "qwen2": models.small(**models.VARIANTS["qwen2"]),
    "qwen3": models.small(**models.VARIANTS["qwen3"]),
}
HELD = [
    *(pytest.param(OWN, config, id=f"serving, {name}") for name, config in (PLAIN | QWEN).items()),
    *(pytest.param(NUMPY, config, id=f"numpy, {name}") for name, config in PLAIN.items()),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


@pytest.mark.parametrize(("backend", "config"), HELD)
def test_logits_and_streams_are_those_of_the_oracle_in_numpy(backend: OwnBackend, config: ModelConfig) -> None:
    runner, tokens, found = held_to_the_oracle(backend, config)
    np.testing.assert_allclose(runner.forward(tokens, logits="last")["logits"], found["logits"][:, -1:], atol=1e-6)
    assert runner.forward(tokens, logits="none") == {}
    np.testing.assert_allclose(runner.logit_lens(found["layers.1"]), found["logits"], atol=1e-6)


@pytest.mark.parametrize(("backend", "config"), HELD)
def test_texts_are_the_librarys_and_weights_come_back_bit_for_bit(
    backend: OwnBackend, config: ModelConfig, tmp_path: Path
) -> None:
    arrays = models.perturbed(config)
    runner = backend.load_runner(models.save(config, arrays, tmp_path / "model"))
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=True)
    prompts = [list(range(9)), [5], list(range(30, 60))]
    library, own = (
        LLM(one, engine=EngineConfig(warm_up=False), eos_token_ids=()).generate(prompts, params)
        for one in (runner_over(config, arrays), runner)
    )
    for one, other in zip(own, library, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    found = runner.weights()
    assert list(found) == list(arrays)
    assert all(bytes(found[name].data) == bytes(array.data) for name, array in arrays.items())


# --- the engine ------------------------------------------------------------------------------------------------------

SMALL = EngineConfig(warm_up=False, max_sequences=8, block_size=4)
ENGINES = {
    "usual": SMALL,
    "prompts in chunks": dataclasses.replace(SMALL, prefill_tokens=5, mixed_prefill_tokens=3),
    "too little memory, so that sequences are put off": dataclasses.replace(SMALL, blocks=17),
    "no prefix cache": dataclasses.replace(SMALL, prefix_caching=False),
}
BEGINNING = tuple(np.random.default_rng(0).integers(0, 97, 17).tolist())
PROMPTS = [(*BEGINNING, 5), (*BEGINNING, 9, 9, 3), (7,), tuple(range(20)), (4, 8, 15) * 5, (*BEGINNING, 5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=18)
    if number % 2
    else SamplingParams(seed=number, max_tokens=22, top_p=0.9, presence_penalty=0.5)
    for number in range(len(PROMPTS))
]


@functools.cache
def of_the_library() -> list[Any]:
    """What the library gives to the requests."""
    usual = LLM(runner_over(CONFIG, models.perturbed(CONFIG)), engine=EngineConfig(warm_up=False), eos_token_ids=())
    return list(usual.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("draft", ["", "lookup", "another model"])
@every_backend
def test_requests_get_what_the_library_gives_them_however_they_are_served(
    backend: OwnBackend, draft: str, engine: EngineConfig
) -> None:
    arrays = models.perturbed(CONFIG)
    expected = of_the_library()
    drafters = {"lookup": PromptLookup(), "another model": DraftModel(runner_over(CONFIG, models.perturbed(CONFIG, 2)))}
    llm = LLM(backend.runner_over(CONFIG, arrays), engine=engine, drafter=drafters.get(draft), eos_token_ids=())
    for array in llm.engine._memory.kept.arrays:
        array.fill_(np.nan)  # as what another program has left there may be; nothing is read before it is written
    for _ in range(2):  # the second time the prefix cache knows the prompts
        found = llm.generate(PROMPTS, PARAMS)
        for one, other in zip(found, expected, strict=True):
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert (llm.engine.scheduler.preemptions > 0) == (engine.blocks > 0)
    assert (found[0].statistics.cached_tokens > 0) == engine.prefix_caching
    assert (sum(one.statistics.drafted_tokens for one in found) > 0) == bool(draft)


class Calls:
    """Shapes of the tokens that their model is called with."""

    def __init__(self, runner: OwnRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        written: Any = runner.model.written  # type: ignore[attr-defined]
        run = written.run

        def called(tokens: torch.Tensor, caches: Any) -> Any:
            self.shapes.append(tuple(tokens.shape))
            return run(tokens, caches)

        monkeypatch.setattr(written, "run", called)


@every_backend
def test_a_new_token_computes_one_position_and_sequences_run_together(
    backend: OwnBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, params = models.perturbed(CONFIG), SamplingParams(temperature=0, max_tokens=4)
    runner = backend.runner_over(CONFIG, arrays)
    calls, llm = Calls(runner, monkeypatch), LLM(runner, engine=SMALL, eos_token_ids=())
    llm.generate(range(11), params)
    assert calls.shapes == [(1, 11), (1, 1), (1, 1), (1, 1)]
    calls.shapes.clear()
    llm.generate(range(11), params)  # two blocks of it are in the prefix cache
    assert calls.shapes == [(1, 3), (1, 1), (1, 1), (1, 1)]
    calls.shapes.clear()
    llm.generate([(1, 2, 3), (4, 5, 6), (7, 8)], params)
    together = [(1, 2), (2, 3), (3, 1), (3, 1), (3, 1)]
    assert calls.shapes == (together if backend is OWN else [(1, 2), (1, 3), (1, 3), *[(1, 1)] * 9])
    calls.shapes.clear()
    guessing = LLM(runner, engine=SMALL, drafter=DraftModel(runner_over(CONFIG, arrays)), eos_token_ids=())
    guessing.generate(range(11), dataclasses.replace(params, max_tokens=6))
    assert calls.shapes == [(1, 11), (1, 5)]  # a token and four guesses, all of them right


def test_it_is_said_whether_sequences_run_together() -> None:
    arrays = models.perturbed(CONFIG)
    found = [backend.runner_over(CONFIG, arrays).kernels for backend in BACKENDS.values()]
    assert found == [
        "the course's code with its cache, sequences together",
        "the course's code with its cache, sequences one after the other (the lesson batching is not written)",
        "the course's code with its cache, sequences one after the other",
    ]


def test_sequences_that_run_together_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=MOST_TOGETHER)
    runner = OWN.runner_over(config, models.perturbed(config))
    longest = MOST_TOGETHER // 2 - 1
    session = Session(runner, 16, MOST_TOGETHER // 2)
    calls = Calls(runner, monkeypatch)
    session.run(
        *(session.chunk((number,), end - 1, number) for number, end in enumerate((longest, longest, 9, longest)))
    )
    assert calls.shapes == [(2, 1), (2, 1)]


@every_backend
def test_a_long_conversation_reads_its_earlier_turns_once(backend: OwnBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=600)
    arrays = models.perturbed(config)
    runner = backend.runner_over(config, arrays)
    llm, library = (LLM(one, engine=SMALL, eos_token_ids=()) for one in (runner, runner_over(config, arrays)))
    calls = Calls(runner, monkeypatch)
    text = list(range(20))
    for turn in range(8):
        calls.shapes.clear()
        found = llm.generate(text, SamplingParams(temperature=0, max_tokens=40))
        assert found.token_ids == library.generate(text, SamplingParams(temperature=0, max_tokens=40)).token_ids
        assert calls.shapes[0][1] < 30  # the new turn, and what of the last block was not full
        assert len(calls.shapes) == 40
        text = [*text, *found.token_ids, *range(turn, turn + 20)]
    assert len(text) > 450


@every_backend
def test_a_request_that_is_cancelled_hurts_no_other_and_leaves_nothing(backend: OwnBackend) -> None:
    runner = backend.runner_over(CONFIG, models.perturbed(CONFIG))
    params = SamplingParams(temperature=0, max_tokens=15)
    expected = [LLM(runner, engine=SMALL, eos_token_ids=()).generate(prompt, params).token_ids for prompt in PROMPTS]
    engine = Engine(runner, config=dataclasses.replace(SMALL, blocks=40), eos_token_ids=())
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(number, prompt, params))
    found: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    steps = 0
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None, event.error
            found[event.request_id].append(event.token_id)
        steps += 1
        if steps == 4:
            engine.abort(1)
            engine.abort(4)
    for number, tokens in found.items():
        assert tuple(tokens) == tuple(expected[number])[: len(tokens)]
        assert (len(tokens) == 15) == (number not in (1, 4))
    assert engine.manager.available == 40
    gc.collect()
    names = ("KvCache", "BatchKvCache", "KeyValueCache", "BlockCache", "Kept")
    assert not [one for one in gc.get_objects() if type(one).__name__ in names]


@every_backend
def test_several_continuations_of_a_prompt_share_its_blocks_and_part(backend: OwnBackend) -> None:
    arrays = models.perturbed(CONFIG)
    texts = []
    for runner in (backend.runner_over(CONFIG, arrays), runner_over(CONFIG, arrays)):
        llm = LLM(runner, engine=SMALL, eos_token_ids=())
        found = llm.generate(range(9), SamplingParams(seed=7, n=3, max_tokens=12))
        texts.append([tuple(one.token_ids) for one in found.continuations])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


@every_backend
def test_targets_of_a_prompt_are_scored(backend: OwnBackend) -> None:
    config = models.small(max_position_embeddings=400)
    check_targets(backend.runner_over(config, models.perturbed(config)))


MOVED = {
    "serving": ("kv_cache", "return self.key, self.value, ", "return self.key, self.value.roll(1, 2), "),
    "numpy": ("cache", "self.keys[:, :, :end], self.values", "self.keys[:, :, :end], np.roll(self.values, 1, 2)"),
}


@pytest.mark.parametrize("track", MOVED)
def test_their_cache_is_what_attention_reads(track: str) -> None:
    """With a cache that returns the values of other positions, the text is another."""
    arrays, params = models.perturbed(CONFIG), SamplingParams(temperature=0, max_tokens=12)
    runners = [backend.runner_over(CONFIG, arrays) for backend in (OWN, OwnBackend(solved(MOVED[track], of=track)))]
    texts = [LLM(one, engine=SMALL, eos_token_ids=()).generate([3, 4], params).token_ids for one in runners]
    assert texts[0] != texts[1]


BROKEN = {
    "serving": ("kv_cache", "self.offset += key.shape[2]\n", "self.offset"),
    "numpy": ("cache", "self.length = end\n", "self.length"),
}


@pytest.mark.parametrize("track", BROKEN)
def test_an_error_of_their_code_ends_the_requests_of_a_step_in_one_line(track: str) -> None:
    file, line, length = BROKEN[track]
    error = f"        if {length} == 8:\n            raise KeyError('eight')\n"
    broken = OwnBackend(solved((file, line, line + error), of=track))
    llm = LLM(broken.runner_over(CONFIG, models.perturbed(CONFIG)), engine=SMALL, eos_token_ids=())
    params = SamplingParams(temperature=0, max_tokens=4)
    *_, event = llm.events([1, 2, 3, 4, 5, 6], params)
    assert event.finish_reason == "error"
    assert f"failed: KeyError: 'eight' ({file}.py, line " in event.error
    assert "\n" not in event.error
    assert len(llm.generate([1, 2], params).token_ids) == 4
    assert not llm.engine.has_work


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "mlp_bias": {"mlp_bias": True},
    "sliding_window": {"sliding_window": 8},
    "rope_scaling": {"rope_scaling": RopeScaling("linear", 2.0)},
    "num_labels": {"num_labels": 3},
    "layers_without_rope": models.SWITCHES["smollm 3"],
    "norm_all_heads": models.SWITCHES["olmo 2"],
    "embedding_multiplier": models.SWITCHES["granite 3"],
    "hidden_act": models.SWITCHES["gemma 2"],
    "rope_local_base_freq": models.SWITCHES["gemma 3"],
}


@pytest.mark.parametrize("track", [Serving, NumpyLlama])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_courses_model_has_no_part_for_is_named(name: str, track: Any) -> None:
    check_refusal(name, REFUSED[name], track.held)


@pytest.mark.parametrize("name", ["attention_bias", "query_key_value_bias", "query_key_norm"])
def test_the_numpy_tracks_model_is_a_plain_llama(name: str) -> None:
    check_refusal(name, {name: True}, NumpyLlama.held)
    refuse(models.small(**{name: True}), FORM, Serving.held)


def check_refusal(name: str, switches: dict[str, Any], held: Sequence[str]) -> None:
    with pytest.raises(ValueError, match=r"^the course's model cannot hold a model with ") as refusal:
        refuse(models.small(**switches), FORM, held)
    switch = re.search(r"with (\w+)=", str(refusal.value))
    assert switch is not None
    assert switch[1] in (name, *switches)


@every_backend
def test_options_that_the_course_has_no_part_for_are_refused(backend: OwnBackend, tmp_path: Path) -> None:
    config = models.small()
    arrays = models.perturbed(config)
    place = models.save(config, arrays, tmp_path / "model")
    for options, name in (
        ({"exact": True}, "--exact"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"device": "cuda"}, "--device cuda"),
    ):
        with pytest.raises(ValueError, match=f"{name} does not go with --with"):
            backend.load_runner(place, **options)
    with pytest.raises(ValueError, match="cannot hold int8 weights"):
        refuse(dataclasses.replace(config, quantization="int8"), FORM)
    with pytest.raises(ValueError, match="--with cannot train with the course"):
        backend.build_train_step(config)
    runner = backend.load_runner(place)
    with pytest.raises(ValueError, match="the course's model does not show its attention"):
        runner.forward([[1, 2]], ("layers.0.attention",))
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        runner.forward([[1, 2]], adapter="x")

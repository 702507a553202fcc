"""A model of the course's modules as a runner: its logits, its engine, what it refuses."""

import dataclasses
import re

import numpy as np
import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.own.min_llama import FORM
from llamita.backend.torch.own.program import refuse
from llamita.evaluation.classification import label_log_probabilities
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import PromptLookup
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.model.rope import RopeScaling
from tests import reference
from tests.backend import models
from tests.backend.sessions import check_targets
from tests.backend.torch.own.programs import held_to_the_oracle, solved

OWN = OwnBackend(solved())
CONFIGS = {
    "plain": models.small(),
    "tied": models.small(tie_word_embeddings=True),
    "another theta and epsilon": models.small(rope_theta=300.0, rms_norm_eps=1e-3),
    "one key head": models.small(num_key_value_heads=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_streams_are_those_of_the_oracle_in_numpy(config: ModelConfig) -> None:
    runner, tokens, found = held_to_the_oracle(OWN, config)
    np.testing.assert_allclose(runner.forward(tokens)["logits"], found["logits"], atol=1e-6)
    np.testing.assert_allclose(runner.forward(tokens, logits="last")["logits"], found["logits"][:, -1:], atol=1e-6)
    assert runner.forward(tokens, logits="none") == {}
    np.testing.assert_allclose(runner.logit_lens(found["layers.1"]), found["logits"], atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_come_back_bit_for_bit(config: ModelConfig) -> None:
    arrays = models.perturbed(config)
    found = OWN.runner_over(config, arrays).weights()
    assert list(found) == list(arrays)
    assert all(bytes(found[name].data) == bytes(array.data) for name, array in arrays.items())


ENGINES = {
    "usual": EngineConfig(warm_up=False),
    "prompts in chunks": EngineConfig(warm_up=False, prefill_tokens=5, mixed_prefill_tokens=2, block_size=4),
    "too little memory, so that sequences are put off": EngineConfig(warm_up=False, blocks=17, block_size=4),
    "no prefix cache": EngineConfig(warm_up=False, prefix_caching=False),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("draft", [False, True], ids=["", "guesses"])
def test_an_engine_gives_the_librarys_tokens_for_texts_of_any_length(engine: EngineConfig, draft: bool) -> None:
    config = models.small(rope_theta=300.0)
    arrays = models.perturbed(config)
    generator = np.random.default_rng(4)
    prompts = [generator.integers(0, 97, length).tolist() for length in (1, 7, 19, 20, 33, 40)]
    prompts += [[*prompts[4][:30], 5], prompts[4]]  # of which the cache knows a beginning, and all
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=True)
    expected = LLM(runner_over(config, arrays), engine=EngineConfig(warm_up=False), eos_token_ids=()).generate(
        prompts, params
    )
    drafter = PromptLookup() if draft else None
    found = LLM(OWN.runner_over(config, arrays), engine=engine, drafter=drafter, eos_token_ids=()).generate(
        prompts, params
    )
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_an_attention_that_names_no_theta_turns_by_the_models() -> None:
    config = models.small(rope_theta=300.0)
    arrays = models.perturbed(config)
    named = "self.head_dim, self.max_seq_len, self.rope_theta)"
    unnamed = OwnBackend(solved(("llama", named, "self.head_dim, self.max_seq_len)")))
    tokens = np.random.default_rng(4).integers(0, 97, (2, 12))
    expected = runner_over(config, arrays).forward(tokens)["logits"]
    for backend in (OWN, unnamed):
        np.testing.assert_allclose(backend.runner_over(config, arrays).forward(tokens)["logits"], expected, atol=1e-4)


def test_several_continuations_of_a_prompt_share_its_blocks_and_part() -> None:
    config = models.small()
    arrays = models.perturbed(config)
    params = SamplingParams(seed=7, n=3, max_tokens=12)
    prompt = list(range(9))

    def texts(runner) -> list[tuple[int, ...]]:
        llm = LLM(runner, engine=EngineConfig(warm_up=False, block_size=4), eos_token_ids=())
        return [tuple(one.token_ids) for one in llm.generate(prompt, params).continuations]

    found = texts(OWN.runner_over(config, arrays))
    assert found == texts(runner_over(config, arrays))
    assert len(set(found)) == 3


def test_targets_of_a_prompt_are_scored() -> None:
    config = models.small(max_position_embeddings=400)
    check_targets(OWN.runner_over(config, models.perturbed(config)))


def test_a_classifier_labels_texts_that_hold_any_token() -> None:
    config = models.small(num_labels=3, pad_token_id=0)
    arrays = models.perturbed(config)
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 4, length) for length in (1, 2, 9, 30)]  # 0 pads, and is in most of them
    found = label_log_probabilities(OWN.runner_over(config, arrays), texts, 3)
    np.testing.assert_allclose(found, label_log_probabilities(runner_over(config, arrays), texts, 3), atol=1e-5)
    logits = OWN.runner_over(config, arrays).forward([texts[2].tolist()])["logits"]
    expected = runner_over(config, arrays).forward([texts[2].tolist()])["logits"]
    assert logits.shape == (1, 9, 3)
    np.testing.assert_allclose(logits, reference_log_softmax(expected), atol=1e-5)
    back = OWN.runner_over(config, arrays).weights()
    assert all(bytes(back[name].data) == bytes(array.data) for name, array in arrays.items())


def reference_log_softmax(x: np.ndarray) -> np.ndarray:
    return np.log(reference.softmax(x.astype(np.float64)))


REFUSED = {
    "attention_bias": {"attention_bias": True},
    "query_key_value_bias": {"query_key_value_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "query_key_norm": {"query_key_norm": True},
    "sliding_window": {"sliding_window": 8},
    "head_dim": {"head_dim": 10},
    "rope_scaling": {"rope_scaling": RopeScaling("linear", 2.0)},
    "layers_without_rope": models.SWITCHES["smollm 3"],
    "norm_all_heads": models.SWITCHES["olmo 2"],
    "embedding_multiplier": models.SWITCHES["granite 3"],
    "hidden_act": models.SWITCHES["gemma 2"],
    "rope_local_base_freq": models.SWITCHES["gemma 3"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_courses_llama_cannot_hold_is_named(name: str) -> None:
    config = models.small(**REFUSED[name])
    with pytest.raises(ValueError, match=r"^the course's Llama cannot hold a model with ") as refusal:
        refuse(config, FORM)
    switch = re.search(r"with (\w+)=", str(refusal.value))
    assert switch is not None
    assert switch[1] in (name, *REFUSED[name])


def test_what_the_course_has_no_part_for_is_refused(tmp_path) -> None:
    config = models.small()
    arrays = models.perturbed(config)
    place = models.save(config, arrays, tmp_path / "model")
    for options, name in (({"exact": True}, "--exact"), ({"dtype": "bfloat16"}, "--dtype bfloat16")):
        with pytest.raises(ValueError, match=f"{name} does not go with --with"):
            OWN.load_runner(place, **options)
    with pytest.raises(ValueError, match="cannot hold int8 weights"):
        refuse(dataclasses.replace(config, quantization="int8"), FORM)
    runner = OWN.load_runner(place)
    with pytest.raises(ValueError, match="does not show its attention"):
        runner.forward([[1, 2]], ("layers.0.attention",))
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        runner.forward([[1, 2]], adapter="x")
    with pytest.raises(ValueError, match="capture='layer' is unknown"):
        runner.forward([[1, 2]], ("layer",))


def test_an_error_of_their_code_is_one_line_that_names_the_place() -> None:
    line = "scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_dim)"
    backend = OwnBackend(solved(("llama", line, "scores = query @ key")))
    config = models.small()
    runner = backend.runner_over(config, models.perturbed(config))
    llm = LLM(runner, engine=EngineConfig(warm_up=False))
    (event,) = llm.events([1, 2, 3], SamplingParams(max_tokens=4))
    assert event.finish_reason == "error"
    assert "failed: RuntimeError:" in event.error
    assert "(llama.py, line " in event.error
    assert "\n" not in event.error


def test_a_parameter_that_the_skeleton_has_not_is_named() -> None:
    line = "self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)"
    more = f"{line}; self.scale = nn.Parameter(torch.ones(1))"
    backend = OwnBackend(solved(("llama", line, more)))
    with pytest.raises(ValueError, match="has a parameter scale that its skeleton has not"):
        backend.runner_over(models.small(), models.perturbed(models.small()))

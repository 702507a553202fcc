"""The Python face, on a small model with random weights read from disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.inference.llm import LLM
from llamita.text.tokenizer import Tokenizer
from tests.inference.helpers import Opens

FREE = SamplingParams(seed=4, max_tokens=40, ignore_eos=True)


def test_whole_text_streamed_text_and_decoded_ids_are_the_same(llm: LLM, tokenizer: Tokenizer) -> None:
    whole = llm.generate("The fox", FREE)
    assert "".join(llm.stream("The fox", FREE)) == whole.text
    prompt = tokenizer.encode("The fox", bos=True)
    assert "The fox" + whole.text == tokenizer.decode([*prompt, *whole.token_ids])
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == len(whole.logprobs) == whole.statistics.generated_tokens == 40
    assert whole.statistics.prompt_tokens == len(prompt)
    assert all(logprob < 0 for logprob in whole.logprobs)


def test_ids_say_the_same_as_text(llm: LLM, tokenizer: Tokenizer) -> None:
    from_text = llm.generate("The fox", FREE)
    from_ids = llm.generate(tokenizer.encode("The fox", bos=True), FREE)
    assert (from_ids.text, from_ids.token_ids) == (from_text.text, from_text.token_ids)


def test_a_seed_gives_one_text_and_greedy_needs_none(llm: LLM) -> None:
    texts = [llm.generate("The", SamplingParams(seed=seed, max_tokens=30)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [llm.generate("The", SamplingParams(temperature=0, max_tokens=30)) for _ in range(2)]
    assert greedy[0].token_ids == greedy[1].token_ids
    drawn = llm.generate("The", SamplingParams(max_tokens=30))
    assert llm.generate("The", SamplingParams(max_tokens=30, seed=drawn.statistics.seed)).text == drawn.text


def test_the_token_at_a_position_does_not_depend_on_where_prefill_ended(llm: LLM) -> None:
    """Going on from a text gives what going on without a pause gave: the random stream is keyed by position."""
    whole = llm.generate([1, 40, 41], FREE)
    rest = llm.generate([1, 40, 41, *whole.token_ids[:15]], SamplingParams(seed=4, max_tokens=25, ignore_eos=True))
    assert rest.token_ids == whole.token_ids[15:]


def test_an_empty_prompt_starts_from_bos(llm: LLM, tokenizer: Tokenizer) -> None:
    assert llm.encode("") == (tokenizer.bos_id,)
    assert llm.generate("", FREE).token_ids == llm.generate([tokenizer.bos_id], FREE).token_ids


def test_an_empty_prompt_without_bos_is_refused(tiny_model: Path, runner: TorchRunner, tmp_path: Path) -> None:
    Tokenizer.load(tiny_model).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    llm = LLM(runner, Tokenizer.load(tmp_path))
    with pytest.raises(ValueError, match="the prompt is empty and this model has no BOS token"):
        llm.events("")
    assert llm.generate("a", FREE).token_ids


def test_a_model_without_a_tokenizer_goes_from_ids_to_ids(tiny_model: Path, llm: LLM, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, tmp_path / name)
    bare = LLM.load(tmp_path, backend="torch", device="cpu")
    assert bare.tokenizer is None
    generation = bare.generate([1, 40, 41], FREE)
    assert (generation.text, generation.token_ids) == ("", llm.generate([1, 40, 41], FREE).token_ids)
    with pytest.raises(ValueError, match="no tokenizer beside it; give the prompt as token ids"):
        bare.generate("The")


def test_generation_config_may_name_more_end_tokens(
    tiny_model: Path, runner: TorchRunner, llm: LLM, tmp_path: Path
) -> None:
    tokens = llm.generate([1, 40, 41], FREE).token_ids
    first = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[first]]}))
    other = LLM.load(tmp_path / "model", backend=Opens(runner))
    ended = other.generate([1, 40, 41], SamplingParams(seed=4, max_tokens=40))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == tokens[: first + 1]


def test_a_saved_model_generates_as_before(tiny_model: Path, runner: TorchRunner, llm: LLM, tmp_path: Path) -> None:
    """Its ends and its defaults of sampling are in generation_config.json alone, as transformers reads it too."""
    tokens = llm.generate([1, 40, 41], FREE).token_ids
    first = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    shutil.copytree(tiny_model, tmp_path / "model")
    given = {"eos_token_id": [2, tokens[first]], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(given))
    LLM.load(tmp_path / "model", backend="torch", device="cpu").save(tmp_path / "copy")
    again = LLM.load(tmp_path / "copy", backend=Opens(runner)).generate([1, 40, 41], replace(FREE, ignore_eos=False))
    assert again.token_ids == tokens[: first + 1]
    theirs = pytest.importorskip("transformers").GenerationConfig.from_pretrained(tmp_path / "copy")
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p) == ([2, tokens[first]], 0.6, 0.9)


def test_what_cannot_be_served_is_refused_before_the_first_token(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has 200 tokens, but this model has 96 positions"):
        llm.events([5] * 200)
    with pytest.raises(ValueError, match="lone surrogate"):
        llm.stream("a\ud800b")


def test_streams_may_be_read_in_turns_or_left(llm: LLM) -> None:
    expected = [llm.generate(prompt, FREE).text for prompt in ("The fox", "by the river")]
    first, second = llm.stream("The fox", FREE), llm.stream("by the river", FREE)
    texts = ["", ""]
    for _ in range(3):
        texts[1] += next(second)
        texts[0] += next(first)
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    assert texts == expected
    left = llm.events("The fox", FREE)
    next(left)
    left.close()
    llm.events("The fox", FREE)  # never begun
    assert not llm.engine.has_work
    assert llm.generate("The fox", FREE).text == expected[0]

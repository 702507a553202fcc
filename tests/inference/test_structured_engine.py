"""Structured output through the whole engine: the form holds, its neighbours in the batch notice nothing."""

import json
import re
from pathlib import Path

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM

SCHEMA = '{"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}'
FORMS = {
    "choices": {"choices": ("yes", "no", "née")},
    "regex": {"regex": r"[A-Z][a-z]{2,5} sat by the (river|road)\."},
    "schema": {"json_schema": SCHEMA},
}


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> LLM:
    return LLM.load(tiny_model, backend="torch", exact=True, engine=EngineConfig(blocks=40, block_size=8))


def fits(form: str, text: str) -> bool:
    if form == "choices":
        return text in FORMS[form]["choices"]
    if form == "regex":
        return re.fullmatch(FORMS[form]["regex"], text) is not None
    value = json.loads(text)
    return 1 <= len(value) <= 2 and all(isinstance(one, bool) for one in value)


def test_forms_hold_in_one_batch_with_ordinary_requests(exact: LLM) -> None:
    ordinary = [SamplingParams(seed=seed, max_tokens=30, ignore_eos=True) for seed in range(4)]
    forms = [(form, SamplingParams(seed=seed, max_tokens=90, **FORMS[form])) for form in FORMS for seed in range(4)]
    alone = [exact.generate("The fox", params) for params in ordinary]
    together = exact.generate(["The fox"] * 16, [params for pair in zip(ordinary, *[iter(forms)] * 3, strict=True)
                                                 for params in (pair[0], *(one for _, one in pair[1:]))])  # fmt: skip
    assert [one.token_ids for one in together[::4]] == [one.token_ids for one in alone]
    asked = iter(forms)
    for number, generation in enumerate(together):
        if number % 4:
            form, _ = next(asked)
            assert generation.finish_reason == "stop"
            assert fits(form, generation.text), (form, generation.text)


def test_continuations_and_least_lengths_keep_the_form(exact: LLM) -> None:
    params = SamplingParams(seed=3, n=3, min_tokens=12, max_tokens=40, **FORMS["choices"])
    for one in exact.generate("The fox", params).continuations:
        assert fits("choices", one.text)
        assert one.finish_reason == "stop"


def test_a_stop_token_ends_a_text_where_its_form_may_end(exact: LLM) -> None:
    assert exact.tokenizer is not None
    bos = exact.tokenizer.bos_id
    params = SamplingParams(regex="(The fox )*sat", stop_token_ids=(bos,), logit_bias={bos: 50}, seed=1)
    found = exact.generate("The fox", params)
    assert re.fullmatch("(The fox )*sat", found.text)
    assert found.finish_reason == "stop"
    open_end = SamplingParams(regex="x+", stop_token_ids=(bos,), logit_bias={bos: 50}, seed=1)
    found = exact.generate("The fox", open_end)
    assert re.fullmatch("x+", found.text)
    assert found.token_ids[-1] == bos
    assert found.finish_reason == "stop"


def test_a_broken_form_is_refused_before_the_first_event(exact: LLM) -> None:
    for broken, message in (({"json_schema": "{"}, "json_schema is not JSON"), ({"regex": "("}, "regex is not")):
        with pytest.raises(ValueError, match=message):
            exact.events("The fox", SamplingParams(**broken))

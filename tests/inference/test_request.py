"""Sampling parameters refuse what cannot be meant, in one line that says what can."""

import json
import math
import re

import pytest

from llamita.backend.sampling_params import MAX_CONTINUATIONS, MAX_SEED, MAX_TOP_LOGPROBS, SamplingParams


def test_the_defaults_are_plain_sampling() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (1, 0, 1, 0, 1)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0, 0, {})
    assert (params.seed, params.n, params.stop, params.stop_token_ids, params.ignore_eos) == (None, 1, (), (), False)
    assert (params.min_tokens, params.top_logprobs, params.prompt_logprobs) == (0, 0, False)
    assert not params.is_constrained
    assert not params.reads_history


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, "0 (greedy) or a number >= 1e-6"),
        ("temperature", math.nan, "0 (greedy)"),
        ("temperature", math.inf, "0 (greedy)"),
        ("temperature", 1e-9, "0 (greedy)"),
        ("temperature", "1", "0 (greedy)"),
        ("temperature", True, "0 (greedy)"),
        ("temperature", None, "0 (greedy)"),
        ("top_k", -1, "a whole number >= 0"),
        ("top_k", 2.0, "a whole number >= 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0"),
        ("min_p", 1.5, "from 0"),
        ("repetition_penalty", 0, "from 0.001 to 1000"),
        ("repetition_penalty", 10**400, "from 0.001 to 1000"),
        ("presence_penalty", 101, "from -100 to 100"),
        ("presence_penalty", math.nan, "from -100 to 100"),
        ("frequency_penalty", -100.5, "from -100 to 100"),
        ("frequency_penalty", "1", "from -100 to 100"),
        ("logit_bias", {-1: 1.0}, "a whole number >= 0"),
        ("logit_bias", {"7": 1.0}, "a whole number >= 0"),
        ("logit_bias", {True: 1.0}, "a whole number >= 0"),
        ("logit_bias", {7: math.nan}, "a finite number"),
        ("logit_bias", {7: -math.inf}, "a finite number"),
        ("logit_bias", {7: "1"}, "a finite number"),
        ("seed", -1, "from 0 to 2^64 - 1"),
        ("seed", MAX_SEED + 1, "from 0 to 2^64 - 1"),
        ("seed", True, "from 0 to 2^64 - 1"),
        ("max_tokens", 0, ">= 1"),
        ("max_tokens", "5", ">= 1"),
        ("max_tokens", True, ">= 1"),
        ("n", 0, f"from 1 to {MAX_CONTINUATIONS}"),
        ("n", 10**6, f"from 1 to {MAX_CONTINUATIONS}"),
        ("n", 1.0, f"from 1 to {MAX_CONTINUATIONS}"),
        ("min_tokens", -1, "from 0 to max_tokens=256"),
        ("min_tokens", 257, "from 0 to max_tokens=256"),
        ("top_logprobs", -1, f"from 0 to {MAX_TOP_LOGPROBS}"),
        ("top_logprobs", 10**6, f"from 0 to {MAX_TOP_LOGPROBS}"),
        ("stop_token_ids", (-1,), "a whole number >= 0"),
        ("stop_token_ids", ("a",), "a whole number >= 0"),
        ("visible_token_ids", (-1,), "a whole number >= 0"),
        ("grammar", 3, "a string"),
        ("choices", "yes", "tuple of non-empty strings"),
        ("choices", ("yes", ""), "tuple of non-empty strings"),
        ("choices", ["yes"], "tuple of non-empty strings"),
        ("stop", "end", "tuple of non-empty strings"),
        ("stop", ("",), "tuple of non-empty strings"),
        ("stop", (b"x",), "tuple of non-empty strings"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        SamplingParams(**{field: value})
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"min_p": 1.0},
        {"seed": MAX_SEED},
        {"max_tokens": 2**63},
        {"stop": ("a", "b")},
        {"presence_penalty": -100, "frequency_penalty": 100},
        {"logit_bias": {0: -1e6, 5: 1e6}},
        {"n": MAX_CONTINUATIONS, "top_logprobs": MAX_TOP_LOGPROBS, "min_tokens": 256},
        {"stop_token_ids": (0, 10**9)},
        {"choices": ("yes", "no")},
    ],
)
def test_values_at_the_border_are_taken(values: dict) -> None:
    assert SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [{"regex": "a", "choices": ("b",)}, {"regex": "a", "json_schema": "{}"}, {"grammar": 'start: "a"', "regex": "a"}],
)
def test_one_form_of_the_output_can_be_asked_for(values: dict) -> None:
    assert all(SamplingParams(**{field: value}).is_constrained for field, value in values.items())
    with pytest.raises(ValueError, match=r"^more than one of json_schema, regex, choices and grammar was given"):
        SamplingParams(**values)


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_what_reads_the_history_says_so(field: str) -> None:
    assert SamplingParams(**{field: 0.5}).reads_history


# --- from JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, {}),
        ({"temperature": None, "stop": None, "seed": None}, {}),
        ({"temperature": 0, "max_tokens": 5, "seed": MAX_SEED}, {"temperature": 0, "max_tokens": 5, "seed": MAX_SEED}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": ["a", "b"], "choices": []}, {"stop": ("a", "b")}),
        ({"choices": ["yes", "no"]}, {"choices": ("yes", "no")}),
        ({"stop_token_ids": 7}, {"stop_token_ids": (7,)}),
        ({"stop_token_ids": [7, 8]}, {"stop_token_ids": (7, 8)}),
        ({"visible_token_ids": [7, 8]}, {"visible_token_ids": (7, 8)}),
        ({"grammar": "start: /a+/"}, {"grammar": "start: /a+/"}),
        ({"logit_bias": {"7": 1, "0": -2.5}}, {"logit_bias": {7: 1, 0: -2.5}}),
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"ignore_eos": True, "prompt_logprobs": False}, {"ignore_eos": True}),
    ],
)
def test_json_says_what_the_fields_say(values: dict, fields: dict) -> None:
    assert SamplingParams.from_json(json.loads(json.dumps(values))) == SamplingParams(**fields)


def test_what_json_leaves_out_is_as_in_the_defaults() -> None:
    defaults = SamplingParams(temperature=0.5, stop=("end",), max_tokens=9)
    found = SamplingParams.from_json({"stop": None, "max_tokens": 4}, defaults)
    assert found == SamplingParams(temperature=0.5, stop=("end",), max_tokens=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 1}, "there is no field 'heat'; sampling parameters are temperature, top_k"),
        ({"n\n": 1}, r"there is no field 'n\n'"),
        ({"temperature": "1"}, "temperature='1' is not allowed; give 0 (greedy)"),
        ({"temperature": [1]}, "temperature=[1] is not allowed"),
        ({"temperature": 10**400}, "is not allowed; give 0 (greedy)"),
        ({"max_tokens": 2.0}, "max_tokens=2.0 is not allowed; give a whole number >= 1"),
        ({"seed": True}, "seed=True is not allowed"),
        ({"stop": 5}, "stop=5 is not allowed; give a non-empty string, or a list of them"),
        ({"stop": ["a", ""]}, "stop=['a', ''] is not allowed"),
        ({"stop": {"a": 1}}, "stop={'a': 1} is not allowed"),
        ({"choices": [1]}, "choices=[1] is not allowed"),
        ({"stop_token_ids": "a"}, "a token id of stop_token_ids='a' is not allowed; give a whole number >= 0"),
        ({"stop_token_ids": [1, None]}, "a token id of stop_token_ids=None is not allowed"),
        ({"logit_bias": [1]}, "logit_bias=[1] is not allowed; give an object of token ids and numbers"),
        ({"logit_bias": {"-1": 1}}, "a token id of logit_bias='-1' is not allowed; give a whole number >= 0"),
        ({"logit_bias": {"9" * 5000: 1}}, "a token id of logit_bias='999"),
        ({"logit_bias": {"1": None}}, "logit_bias of 1=None is not allowed; give a finite number"),
        ({"json_schema": 5}, "json_schema=5 is not allowed; give a string"),
        ({"regex": ["a"]}, "regex=['a'] is not allowed; give a string"),
        ({"ignore_eos": "yes"}, "ignore_eos='yes' is not allowed; give true or false"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1 is not allowed; give true or false"),
        ({"regex": "a", "choices": ["b"]}, "more than one of json_schema, regex, choices and grammar"),
    ],
)
def test_what_json_may_not_say_is_named_in_one_line(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        SamplingParams.from_json(values)
    assert "\n" not in str(error.value)

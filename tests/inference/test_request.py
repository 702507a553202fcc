"""Sampling parameters refuse what cannot be meant, in one line that says what can."""

import math

import pytest

from llamita.inference.request import MAX_SEED, SamplingParams


def test_the_defaults_are_plain_sampling() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (1, 0, 1, 0, 1)
    assert (params.seed, params.stop, params.ignore_eos) == (None, (), False)


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
        ("seed", -1, "from 0 to 2^64 - 1"),
        ("seed", MAX_SEED + 1, "from 0 to 2^64 - 1"),
        ("seed", True, "from 0 to 2^64 - 1"),
        ("max_tokens", 0, ">= 1"),
        ("max_tokens", "5", ">= 1"),
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
    ],
)
def test_values_at_the_border_are_taken(values: dict) -> None:
    assert SamplingParams(**values)

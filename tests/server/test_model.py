"""What a server takes from a model's directory besides its weights."""

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.server.model import sampling_defaults


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, SamplingParams(0.6, 20, 0.9)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(0.0)),
        ({"top_k": -1, "temperature": None, "max_new_tokens": 20, "num_beams": 4}, SamplingParams()),
    ],
)
def test_the_defaults_of_a_request_are_those_of_the_model(generation, expected) -> None:
    assert sampling_defaults(generation) == expected


def test_a_default_that_is_not_allowed_is_named_with_its_file() -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json of the model: top_p=1\.2 is not allowed"):
        sampling_defaults({"top_p": 1.2})

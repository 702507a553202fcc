"""The likeliest tokens and their log-probabilities, against float64 over the same weights, by each instruction set."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels.blocked import blocked_floats
from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.head import PART, GreedyHead


def head(vocabulary: int, instructions: str, seed: int = 0):
    """Returns a weight (V, D), and the same in blocks."""
    weight_VD = torch.randn(vocabulary, 32, generator=torch.Generator().manual_seed(seed))
    return weight_VD, blocked_floats(weight_VD, instructions)


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("vocabulary", [7, 97, PART, 2 * PART + 5])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_ids_and_log_probabilities(vocabulary, rows, instructions) -> None:
    weight_VD, blocks = head(vocabulary, instructions)
    hidden_RD = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    ids, logprobs = GreedyHead(blocks)(hidden_RD)
    expected_RV = (hidden_RD.double() @ weight_VD.double().T).log_softmax(-1)
    best_R, ids_R = expected_RV.max(-1)
    assert ids == ids_R.tolist()
    np.testing.assert_allclose(logprobs, best_R, rtol=2e-6, atol=2e-6)


def test_of_equal_logits_the_first_is_taken() -> None:
    weight_VD = torch.zeros(2 * PART + 5, 32)
    weight_VD[[PART + 3, PART + 9, 2 * PART + 1]] = 1.0
    for instructions in supported():
        ids, logprobs = GreedyHead(blocked_floats(weight_VD, instructions))(torch.ones(2, 32))
        assert ids == [PART + 3] * 2
        np.testing.assert_allclose(logprobs, [-np.log(3)] * 2, rtol=1e-5)


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_have_no_probability(bad, instructions) -> None:
    weight_VD, _ = head(2 * PART + 5, instructions)
    weight_VD[PART + 7, 0] = bad
    _, logprobs = GreedyHead(blocked_floats(weight_VD, instructions))(torch.ones(2, 32))
    assert np.isnan(logprobs).all()


def test_broken_states_end_their_own_sequence_alone() -> None:
    weight_VD, _ = head(97, "portable")
    hidden_RD = torch.ones(3, 32)
    hidden_RD[1] = float("nan")
    for instructions in supported():
        _, logprobs = GreedyHead(blocked_floats(weight_VD, instructions))(hidden_RD)
        assert np.isfinite(logprobs).tolist() == [True, False, True]

"""Drawn tokens, against the largest of score + noise over all ids, by each instruction set."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.draw import PART, TokenDrawer
from llamita.backend.torch.infer.noise import GumbelNoise, stream_keys


def both(scores_RV: torch.Tensor, instructions: str, position: int = 0) -> tuple[list[int], list[int]]:
    """Returns the drawn ids, and those of the largest of all sums."""
    rows, vocabulary = scores_RV.shape
    noise, keys_R2 = (
        GumbelNoise(vocabulary),
        torch.from_numpy(stream_keys([7] * rows, range(position, position + rows))),
    )
    drawn_R1 = TokenDrawer(instructions)(scores_RV, noise.codes_V, keys_R2)
    return drawn_R1.flatten().tolist(), (noise.rows(keys_R2) + scores_RV).argmax(-1).tolist()


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 300.0])
@pytest.mark.parametrize("vocabulary", [1, 7, PART, 2 * PART + 69])
def test_the_largest_sum_wins(vocabulary, spread, instructions) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for position in range(0, 400, 40):
        scores_RV = torch.randn(40, vocabulary, dtype=torch.float64, generator=generator) * spread
        ids, expected = both(scores_RV - scores_RV.amax(-1, keepdim=True), instructions, position)
        assert ids == expected


@pytest.mark.parametrize("instructions", supported())
def test_tokens_that_may_not_come_are_never_drawn(instructions) -> None:
    scores_RV = torch.full((50, 2 * PART + 69), -torch.inf, dtype=torch.float64)
    scores_RV[:, [5, PART - 1, 2 * PART + 68]] = torch.tensor([-3.0, -1e4, 0.0], dtype=torch.float64)
    ids, expected = both(scores_RV, instructions)
    assert ids == expected
    assert {*ids} == {5, 2 * PART + 68}


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_a_token_gets_some_id_and_others_their_own(value, instructions) -> None:
    scores_RV = torch.randn(3, PART + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores_RV[1] = value
    ids, expected = both(scores_RV, instructions)
    assert [ids[0], ids[2]] == [expected[0], expected[2]]
    assert 0 <= ids[1] < PART + 5


@pytest.mark.parametrize("instructions", supported())
def test_a_row_draws_the_same_alone_and_on_any_number_of_threads(instructions) -> None:
    scores_RV = torch.randn(5, 3 * PART, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(both(scores_RV, instructions)[0])
            found.append([both(scores_RV[[row]], instructions, row)[0][0] for row in range(5)])
    finally:
        torch.set_num_threads(threads)
    assert all(ids == found[0] for ids in found)

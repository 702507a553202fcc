"""What truncation keeps of a row on a CPU, against masking and sorting all of it, which other devices do."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.few import kept_ids, reaching
from llamita.backend.torch.infer.sampling import Columns, truncate

# Multiples of 1/4: equal ones are frequent.
rows = hnp.arrays(
    np.float64, st.integers(1, 300), elements=st.integers(-40, 0).map(lambda number: number / 4) | st.just(-np.inf)
)
truncations = st.builds(
    SamplingParams,
    temperature=st.just(1.0),
    top_k=st.integers(0, 320),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
).filter(lambda params: params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def expected(scores_V: np.ndarray, params: SamplingParams) -> list[int]:
    kept_1V = truncate(torch.from_numpy(scores_V)[None], Columns([params])) > -torch.inf
    return kept_1V[0].nonzero().flatten().tolist()


def on_the_border(scores_V: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding, rather than the rule, decides how large the nucleus is."""
    among_1V = truncate(torch.from_numpy(scores_V)[None], Columns([SamplingParams(top_k=params.top_k)]))
    masses_V = among_1V[0].softmax(-1).sort(descending=True).values.cumsum(-1)
    return params.top_p < 1 and bool(((masses_V - params.top_p).abs() < 1e-9).any())


@given(rows, truncations)
def test_kept_is_what_masks_leave(scores_V, params) -> None:
    scores_V = scores_V - max(scores_V.max(), -1000.0)  # a row of tokens that may not come stays one
    assume(not on_the_border(scores_V, params))
    kept = kept_ids(scores_V, params)
    kept_finite = [token for token in kept.tolist() if scores_V[token] > -np.inf]
    assert kept_finite == expected(scores_V, params)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("size", [5000, 49152])
@pytest.mark.parametrize("top_k", [0, 40, 4000])
@pytest.mark.parametrize("top_p", [0.2, 0.95, 0.999])
def test_kept_of_a_large_vocabulary(size, spread, top_k, top_p) -> None:
    scores_V = np.random.default_rng(size).normal(size=size).astype(np.float32).astype(np.float64) * spread
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    scores_V -= scores_V.max()
    assert kept_ids(scores_V, params).tolist() == expected(scores_V, params)


def test_a_bound_is_reached_by_as_many_as_asked_for_and_not_by_many_more() -> None:
    scores_V = np.random.default_rng(1).normal(size=50_001)
    for count in (1, 40, 500, 50_001):
        found = reaching(scores_V, count)
        assert count <= len(found) <= 2 * count + 10
        assert np.delete(scores_V, found).max(initial=-np.inf) < scores_V[found].min()


def test_a_row_of_no_numbers_keeps_nothing() -> None:
    scores_V = np.full(500, np.nan)
    for params in (SamplingParams(top_k=40), SamplingParams(top_p=0.9), SamplingParams(min_p=0.1)):
        assert kept_ids(scores_V, params).size == 0

"""PyTorch's sampler beyond what both have: float64 logits, rows that share memory, blocks, and what histories cost."""

import numpy as np
import pytest
import torch

from llamita.backend.interface import SampleSpec
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer import sampling, token_counts
from llamita.backend.torch.infer.sampling import Sampler
from tests.backend.specs import SIZE, mixed_specs, spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_gets_the_same_token_alone_and_in_any_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, numbers = mixed_specs(), range(7)
    logits_RV = (torch.randn(7, SIZE, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    given_RV = logits_RV.clone()
    together = Sampler(SIZE).sample(logits_RV, specs, numbers)
    assert torch.equal(logits_RV, given_RV)  # the caller's logits are left alone
    assert together == [Sampler(SIZE).sample(logits_RV[[row]], [specs[row]], [row])[0] for row in numbers]
    sampler = Sampler(SIZE)
    assert together[::-1] == sampler.sample(logits_RV.flip(0), specs[::-1], numbers[::-1])
    assert together == sampler.sample(logits_RV, specs, numbers)  # nothing was used up
    assert together * 3 == sampler.sample(logits_RV.repeat(3, 1), specs * 3, [*numbers] * 3)
    monkeypatch.setattr(sampling, "CPU_BLOCK", SIZE)
    assert together * 3 == sampler.sample(logits_RV.repeat(3, 1), specs * 3, range(21))


def test_rows_may_share_their_logits_and_lie_anywhere_in_memory() -> None:
    wide = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(4))
    specs = [SampleSpec(SamplingParams(logit_bias={3: 1.0}), row, 9, banned=(1, 2)) for row in range(3)]
    for logits_RV in (wide[:, 0].expand(3, SIZE), wide.T, wide.double().T):
        assert Sampler(SIZE).sample(logits_RV, specs, [5] * 3) == Sampler(SIZE).sample(
            logits_RV.clone(), specs, range(3)
        )


def test_what_a_long_history_costs_is_its_new_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, history = Sampler(50), list(np.random.default_rng(3).integers(0, 50, 3000).tolist())
    moved: list[int] = []
    plain = token_counts.to_device
    monkeypatch.setattr(
        token_counts, "to_device", lambda array, device: moved.append(array.size) or plain(array, device)
    )
    params, logits_RV = SamplingParams(presence_penalty=1.0), torch.zeros(4, 50)
    for step in range(4):
        moved.clear()
        drafts = [SampleSpec(params, 1, 1, history + [7] * n, 1000) for n in range(4)]
        sampler.sample(logits_RV, drafts, [9] * 4)
        history.append(step)  # the drafts are refused, another token came
        assert sum(moved) > 3000 if step == 0 else sum(moved) < 80


def test_forgotten_sequences_give_their_memory_back() -> None:
    sampler, params = Sampler(50), SamplingParams(presence_penalty=1.0)
    for count in (64, 3, 64, 1, 0):
        specs = [SampleSpec(params, 1, 1, [row % 50, 1], 1) for row in range(count)]
        sampler.sample(torch.zeros(count, 50), specs, range(1000 + count, 1000 + 2 * count))
        rows = len(sampler._counts._table_SV)
        assert count <= rows <= 128
    sampler.sample(torch.zeros(1, 50), [spec()], [0])
    assert len(sampler._counts._table_SV) == 0

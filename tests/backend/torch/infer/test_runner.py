"""What PyTorch's runner alone has: the exact mode, and the devices it refuses."""

import dataclasses

import pytest
import torch

from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from tests.backend.frameworks import Torch
from tests.backend.models import perturbed, save
from tests.backend.sessions import CONFIG, PROMPT, Session, assert_greedy, check_targets, check_that_broken_numbers_stay


def exact_runner(**changes) -> TorchRunner:
    config = dataclasses.replace(CONFIG, **changes)
    return TorchRunner(Torch().build_model(config, perturbed(config)), exact=True)


def test_targets_get_the_log_probabilities_of_the_whole_text() -> None:
    check_targets(exact_runner(max_position_embeddings=400))


def test_numbers_that_are_none_stay_with_the_sequence_that_made_them() -> None:
    check_that_broken_numbers_stay(Torch(), exact_runner())


def test_the_exact_mode_is_refused_where_it_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"exact mode runs on a CPU in float32, not on cpu in torch\.bfloat16"):
        TorchRunner(Torch().build_model(CONFIG, perturbed(CONFIG), "bf16"), exact=True)


def test_the_exact_mode_loads_float32_whatever_is_stored(tmp_path) -> None:
    arrays = Torch().weights.to_host_arrays(Torch().build_model(CONFIG, perturbed(CONFIG), "bf16"))
    runner = load_runner(save(CONFIG, arrays, tmp_path / "model", "BF16"), exact=True)
    assert runner.exact
    assert runner.dtype == torch.float32
    assert_greedy([Session(runner).token(PROMPT, 0)], runner.forward([PROMPT])["logits"][0, -1:])


def test_devices_that_are_none_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="device='meta' is not one that this backend runs on; give auto, cpu, or cuda"):
        load_runner(save(CONFIG, perturbed(CONFIG), tmp_path / "model"), device="meta")

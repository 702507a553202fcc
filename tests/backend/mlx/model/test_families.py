"""The families of models on MLX: the logits of PyTorch's, which are held to transformers; cached too."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("transformers")

from llamita.backend.mlx.infer.runner import runner_over
from llamita.backend.mlx.train.step import build_train_step
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import runner_over as torch_runner_over
from llamita.backend.torch.model import weights
from llamita.backend.torch.train.step import build_train_step as build_torch
from llamita.data.batches import Batch
from llamita.inference.llm import LLM
from tests.backend.torch.model.test_families import NEW, made_by_transformers, tokens


@pytest.mark.parametrize("family", NEW)
def test_logits_and_texts_are_those_of_pytorch(family, tmp_path):
    _, model = made_by_transformers(family, tmp_path)
    arrays = weights.to_host_arrays(model)
    ours, theirs = runner_over(model.config, arrays), torch_runner_over(model.config, arrays)
    tokens_BT = tokens(2, 90).numpy()
    found, expected = ours.forward(tokens_BT)["logits"], theirs.forward(tokens_BT)["logits"]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=True)
    texts = [LLM(runner).generate(tokens_BT[0].tolist(), params) for runner in (ours, theirs)]
    assert texts[0].token_ids == texts[1].token_ids


@pytest.mark.parametrize("family", NEW)
def test_updates_are_those_of_pytorch(family, tmp_path):
    _, model = made_by_transformers(family, tmp_path)
    arrays = weights.to_host_arrays(model)
    row = tokens(2, 41).numpy().astype(np.int32)
    batch = Batch(row[:, :-1], row[:, 1:], None, np.arange(2))
    steps = [build(model.config, arrays, precision="fp32", device="cpu") for build in (build_train_step, build_torch)]
    ours, theirs = (step.step([batch], 1e-3) for step in steps)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    # The gradients are 2e-6 apart; MLX adds up the squares of a large matrix less exactly.
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=5e-4)

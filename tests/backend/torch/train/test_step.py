"""What PyTorch's step alone has: its conditions, and a compiled step held to one that is not."""

import pytest
import torch

from tests.backend.frameworks import Torch
from tests.backend.steps import CONFIG, batch


def make(**options):
    return Torch().train_step(CONFIG, max_grad_norm=1.0, **options)


def test_conditions():
    assert make().conditions() == {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_follows_eager_and_keeps_the_names(precision):
    eager, compiled = make(precision=precision), make(precision=precision, compile=True)
    assert compiled.weights().keys() == eager.weights().keys()
    for i in range(3):
        a, b = eager.step([batch(seed=i)], 1e-3), compiled.step([batch(seed=i)], 1e-3)
        assert b.loss == pytest.approx(a.loss, rel=1e-5 if precision == "fp32" else 1e-2)

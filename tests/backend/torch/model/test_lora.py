"""What PyTorch alone has of adapters: what a quantised product keeps for its backward pass, and compiling."""

from dataclasses import replace

import pytest
import torch

from llamita.backend.torch.model.weights import build_model
from llamita.model.lora import LoraSettings
from tests.backend.adapters import CONFIG, batch, shake
from tests.backend.frameworks import Torch


def test_what_a_quantised_product_keeps_for_its_backward_pass_is_not_the_dequantised_weight():
    config = replace(CONFIG, quantization="int4")
    model = build_model(config, seed=1).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = torch.randn(1, 3, 32, requires_grad=True)
        model.model.layers[0].mlp.gate_up_proj(hidden).sum().backward()
    assert all(t.numel() <= hidden.numel() for t in kept)
    assert hidden.grad.abs().sum() > 0


def test_products_with_quantised_weights_are_not_compiled():
    with pytest.raises(ValueError, match="are not compiled"):
        Torch().train_step(replace(CONFIG, quantization="int8"), adapter=LoraSettings(4, 8), compile=True)


@pytest.mark.slow
def test_a_compiled_step_trains_an_adapter_as_an_uncompiled_one():
    settings = LoraSettings(4, 8, targets=("all", "lm_head"))
    a, b = (shake(Torch().train_step(CONFIG, adapter=settings, compile=compiled)) for compiled in (True, False))
    for i in range(2):
        assert a.step([batch(i)], 1e-3).loss == pytest.approx(b.step([batch(i)], 1e-3).loss, rel=1e-5)

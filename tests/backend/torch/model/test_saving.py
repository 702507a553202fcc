"""RMSNorm and gates that hold less for the backward pass: the bits of PyTorch's own operations, fewer bytes held."""

import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.model import layers, saving


def gradients(function, *arrays):
    """The result and the gradients of a sum with unequal weights; the first array is used by others before and after,
    as the residual stream is."""
    leaves = [array.clone().requires_grad_() for array in arrays]
    stream = leaves[0] * 1.5
    result = function(stream, *leaves[1:])
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    ((result * weights).float().sum() + (stream * stream.detach().cos()).float().sum()).backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def held_bytes(function, *arrays):
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*(array.clone().requires_grad_() for array in arrays))
    assert result.requires_grad
    return sum(held.values())


def test_the_norm_has_the_bits_of_pytorchs_own():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 50, 64, generator=generator), torch.randn(64, generator=generator)
    ours = gradients(lambda x, weight: saving.rms_norm(x, weight, 1e-5), x, weight)
    theirs = gradients(lambda x, weight: F.rms_norm(x, (64,), weight, 1e-5), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_gate_has_the_bits_of_pytorchs_own(activation, dtype):
    gate_up = torch.randn(3, 50, 96, generator=torch.Generator().manual_seed(0)).to(dtype)

    def by_pytorch(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    ours = gradients(lambda gate_up: saving.gated(gate_up, activation), gate_up)
    theirs = gradients(by_pytorch, gate_up)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fewer_bytes_are_held():
    x, weight, gate_up = torch.randn(100, 64), torch.ones(64), torch.randn(100, 96)
    norm = held_bytes(lambda x, weight: layers.rms_norm_fused(x, weight, 1e-5), x, weight)
    assert norm <= x.nbytes + 2 * weight.nbytes + 2 * 100 * 4  # the input, the roots, the weight
    assert held_bytes(layers.gated_silu_fused, gate_up) == gate_up.nbytes


def test_without_gradients_nothing_changes():
    x, weight = torch.randn(5, 64), torch.ones(64)
    assert torch.equal(layers.rms_norm_fused(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5))
    with torch.no_grad():
        assert not saving.wanted(x.requires_grad_())

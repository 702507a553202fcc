"""8-bit products against their definition in float64, and the training that is made with them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llamita.backend.group import ParallelSettings, share
from llamita.backend.muon import MuonSettings
from llamita.backend.torch.train import fp8
from llamita.backend.torch.train.step import build_train_step
from llamita.model.lora import LoraSettings
from tests.backend.steps import CONFIG, batch, same
from tests.together import run_together

WIDE = replace(CONFIG, hidden_size=32, intermediate_size=48, head_dim=8)


def values_of(exponent_bits: int, mantissa_bits: int, largest: float) -> np.ndarray:
    """Every finite number of a format that is not negative, by its definition (arXiv:2209.05433, table 1)."""
    bias = 2 ** (exponent_bits - 1) - 1
    fractions = np.arange(2**mantissa_bits) / 2**mantissa_bits
    normal = [2.0 ** (e - bias) * (1 + fractions) for e in range(1, 2**exponent_bits)]
    every = np.concatenate([2.0 ** (1 - bias) * fractions, *normal])
    return every[every <= largest]


FORMATS = {fp8.E4M3: values_of(4, 3, 448.0), fp8.E5M2: values_of(5, 2, 57344.0)}


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The numbers of a format that are nearest to `x`; of two as near, the one whose last bit is 0."""
    values = FORMATS[dtype]
    above = np.searchsorted(values, np.abs(x)).clip(1, len(values) - 1)
    below = above - 1
    from_below, from_above = np.abs(x) - values[below], values[above] - np.abs(x)
    takes_above = (from_above < from_below) | ((from_above == from_below) & (above % 2 == 0))
    return np.sign(x) * values[np.where(takes_above, above, below)]


def emulated(x: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """A matrix after its division by a float32 scale, rounding, and multiplication by the scale again, in float64."""
    numbers = x.detach().float().numpy()
    scale = np.float32(np.abs(numbers).max()) / np.float32(FORMATS[dtype][-1])
    return rounded((numbers / scale).astype(np.float64), dtype) * float(scale)


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Numbers of very different sizes for a large `spread`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_format_has_the_numbers_of_its_definition(dtype):
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).double().numpy()
    np.testing.assert_array_equal(codes[np.isfinite(codes)], FORMATS[dtype])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_matrix_is_scaled_to_the_largest_number_and_rounded_to_the_nearest(dtype, spread):
    x = random(37, 41, spread=spread)
    found = fp8.scaled(x, dtype)
    assert found.numbers.float().abs().max() == FORMATS[dtype][-1]
    np.testing.assert_array_equal(found.numbers.double().numpy() * found.scale.double().numpy(), emulated(x, dtype))


def test_a_matrix_of_zeros_stays_one_and_what_is_not_finite_is_not_hidden():
    assert fp8.scaled(torch.zeros(16, 16), fp8.E4M3).numbers.float().abs().max() == 0
    for value in (math.nan, math.inf):
        x = torch.ones(16, 16)
        x[3, 4] = value
        found = fp8.scaled(x, fp8.E5M2)
        assert (found.numbers.float() * found.scale).isnan().any()


@pytest.mark.parametrize("rows", [(32,), (3, 7), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradients_are_those_of_the_rounded_matrices(rows, dtype):
    """Result and gradient by the input are rounded to bfloat16, that by the weight to float32."""
    x = random(*rows, 32, spread=1.5).to(dtype).requires_grad_()
    weight = random(48, 32, seed=1).requires_grad_()
    bias = random(48, seed=2).requires_grad_()
    gradient = random(*rows, 48, seed=3, spread=2.0).bfloat16()
    y = fp8.linear(x, weight, bias)
    y.backward(gradient)
    x_MI, g_MO = emulated(x.flatten(0, -2), fp8.E4M3), emulated(gradient.flatten(0, -2), fp8.E5M2)
    weight_OI = emulated(weight, fp8.E4M3)
    assert y.dtype == torch.bfloat16
    assert y.shape == (*rows, 48)

    def close(found, exact, magnitudes, rounding):
        """Within one rounding of the result, and float32's of a sum of products."""
        found = found.detach().double().numpy().reshape(exact.shape)
        assert (np.abs(found - exact) <= rounding * np.abs(exact) + 2e-6 * magnitudes).all()

    low, magnitude = 2**-8, np.abs(x_MI) @ np.abs(weight_OI).T
    product = x_MI @ weight_OI.T
    summed = product + bias.bfloat16().detach().double().numpy()
    close(y, summed, magnitude + low / 1e-6 * (np.abs(product) + np.abs(summed)), 0)
    close(x.grad, g_MO @ weight_OI, np.abs(g_MO) @ np.abs(weight_OI), low)
    close(weight.grad, g_MO.T @ x_MI, np.abs(g_MO).T @ np.abs(x_MI), 1e-6)
    assert x.grad.dtype == dtype
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad, gradient.float().reshape(-1, 48).sum(0), rtol=2e-2, atol=0.2)


def test_what_is_kept_for_the_way_back_is_8_bit():
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fp8.linear(random(32, 64).requires_grad_(), random(48, 64, seed=1).requires_grad_())
    assert sum(tensor.nbytes for tensor in kept) == 32 * 64 + 48 * 64 + 2 * 4


def losses(precision, updates, rate=3e-3, parallel=None, **options):
    step = build_train_step(WIDE, precision=precision, max_grad_norm=1.0, parallel=parallel, **options)
    found = []
    for t in range(updates):
        own = share(batch(seed=t % 3, unequal=False), step.group)
        found.append(step.step([own], rate).loss)
    return found, step


def test_only_the_matrices_of_the_blocks_are_multiplied_in_8_bits(monkeypatch):
    used = []
    multiply = fp8.linear

    def spy(x, weight, bias=None):
        used.append(tuple(weight.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(fp8, "linear", spy)
    losses("fp8", updates=1)
    assert used == [(64, 32), (32, 32), (96, 32), (32, 48)] * WIDE.num_hidden_layers


def test_a_training_learns_as_one_in_float32():
    """Three batches by heart: other losses, near at first; by the end the rounding costs a few updates."""
    exact, eight = np.array(losses("fp32", 60)[0]), np.array(losses("fp8", 60)[0])
    assert (eight != exact).all()
    assert np.abs(eight / exact - 1)[:10].max() < 0.02
    assert exact[50] < 0.25 * exact[0]
    assert exact[59] < eight[59] < exact[50]


def test_recomputed_blocks_give_the_same_bits():
    (kept, step), (again, other) = losses("fp8", 5), losses("fp8", 5, recompute="all")
    assert kept == again
    assert same(step.weights(), other.weights())


@pytest.mark.parametrize("options", [{"adapter": LoraSettings(rank=2)}, {"muon": MuonSettings()}], ids=str)
def test_adapters_and_muon_go_with_8_bit_products(options):
    found, exact = losses("fp8", 5, **options)[0], losses("fp32", 5, **options)[0]
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)


def loss_of_several(parallel):
    return losses("fp8", 10, parallel=parallel)[0]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_several_processes_train_alike(mode):
    """Not the same numbers: a scale is that of the rows, and in FSDP2 of the matrices, that stand together."""
    found = run_together(2, loss_of_several, ParallelSettings(mode))
    np.testing.assert_allclose(found, losses("fp8", 10)[0], rtol=0.01)
    assert found[-1] < 0.95 * found[0]


def refused_by_two():
    try:
        build_train_step(WIDE, precision="fp8", parallel=ParallelSettings("ddp", 2))
    except ValueError as error:
        return str(error)


def test_what_has_no_8_bit_products_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match="intermediate_size=24 must be a multiple of 16 for --precision fp8"):
        build_train_step(replace(CONFIG, head_dim=16), precision="fp8")
    with pytest.raises(ValueError, match=r"quantised \(int8\) and not for fp8; use --precision bf16"):
        fp8.check(replace(WIDE, quantization="int8"), torch.device("cpu"))
    assert run_together(2, refused_by_two) == (
        "fp8 products are not divided between processes; use --tensor-parallel 1 or --precision bf16"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match="NVIDIA A100 does not multiply 8-bit numbers"):
        fp8.check(WIDE, torch.device("cuda"))


@pytest.mark.slow
def test_compiled_they_are_the_same_to_a_few_roundings():
    plain, compiled = losses("fp8", 5)[0], losses("fp8", 5, compile=True)[0]
    np.testing.assert_allclose(compiled, plain, rtol=0.01)


@pytest.mark.gpu
def test_a_gpu_computes_what_a_processor_does():
    x, weight, gradient = random(37, 64), random(48, 64, seed=1), random(37, 48, seed=2).bfloat16()
    found = {}
    for device in ("cpu", "cuda"):
        x_, weight_ = (v.to(device, copy=True).detach().requires_grad_() for v in (x, weight))
        y = fp8.linear(x_, weight_)
        y.backward(gradient.to(device))
        found[device] = [v.detach().cpu().float() for v in (y, x_.grad, weight_.grad)]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):  # Hopper sums with 14 bits when it may
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))

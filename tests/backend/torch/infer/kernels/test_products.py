"""Products with blocked weights, against float64 over the very numbers that are stored, with each instruction set."""

import math

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels.blocked import (
    BlockedWeight,
    blocked_bytes,
    blocked_floats,
    blocked_rows,
)
from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.gguf_blocks import PACKED, SharedScales, can_hold, in_halves
from tests.storage.formats.helpers import blocks

SHAPES = [(16, 32), (50, 96), (129, 288)]
ROWS = [1, 2, 3, 6, 13]
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDED_TO_BYTES = 1.5e-2
"""The error of a product whose activations are rounded to bytes, as a share of its size: 32 numbers from a normal
distribution have a largest one of about 2.1 deviations, and a step of a 127th of it. It is 0.005 over many products; a
few may have thrice that."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def floats(kind: str, n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the same in float64."""
    weight_OI = random(n_out, n_in).to(FLOATS[kind])
    return weight_OI, weight_OI.double()


def bytes_of(form: str, n_out: int, n_in: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Values, scales and minimums in a form, and the weight in float64 that they stand for."""
    groups = random(n_out, n_in // 32, 32)
    generator = torch.Generator().manual_seed(1)
    if form == "int8 by row":
        values = torch.randint(-127, 128, (n_out, n_in), generator=generator, dtype=torch.int8)
        scales = random(n_out).abs().bfloat16()
        return (values, scales), values.double() * scales.double()[:, None]
    scales = groups.abs().amax(-1).to(torch.bfloat16 if form == "int4" else torch.float16)
    if form == "int8 by group":
        values = torch.randint(-127, 128, groups.shape, generator=generator, dtype=torch.int8)
        return (values.flatten(1), scales), (values.double() * scales.double()[..., None]).flatten(1)
    values = torch.randint(0, 16, groups.shape, generator=generator, dtype=torch.uint8)
    if form == "int4":
        return (values.flatten(1), scales), ((values.double() - 8) * scales.double()[..., None]).flatten(1)
    minimums = groups.amin(-1).half()
    weight = values.double() * scales.double()[..., None] + minimums.double()[..., None]
    return (values.flatten(1), scales, minimums), weight.flatten(1)


BYTE_FORMS = ["int8 by row", "int8 by group", "int4", "int4 with minimums"]


def blocked_of(form: str, parts: tuple[torch.Tensor, ...], instructions: str) -> BlockedWeight:
    values, scales, *minimums = parts
    if "int8" in form:
        return blocked_bytes(values, scales, 8, instructions)
    return blocked_bytes(in_halves(values), scales, 4, instructions, *minimums)


def rounded_to_bytes(x_RI: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels see them: 32 at a time, the largest becoming 127."""
    groups = x_RI.unflatten(-1, (-1, 32)).numpy()
    largest = np.abs(groups).max(-1, keepdims=True)
    factor = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), np.float32(0))
    whole = np.rint(groups * factor.astype(np.float32))
    return torch.from_numpy(whole.astype(np.float64) * (largest / np.float32(127))).flatten(1)


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_products_with_floats(instructions, kind, n_out, n_in) -> None:
    weight_OI, exact_OI = floats(kind, n_out, n_in)
    blocked = blocked_floats(weight_OI, instructions)
    for rows in ROWS:
        x_RI = random(rows, n_in, seed=rows)
        wanted = x_RI.double() @ exact_OI.T
        size = (x_RI.double().abs() @ exact_OI.abs().T).amax()
        assert (blocked.multiply(x_RI).double() - wanted).abs().amax() < 1e-6 * size


@pytest.mark.parametrize("instructions", supported())
def test_activations_are_rounded_where_the_processor_multiplies_bfloat16(instructions) -> None:
    weight_OI, exact_OI = floats("bfloat16", 50, 96)
    blocked = blocked_floats(weight_OI, instructions, rounded=True)
    x_RI = random(7, 96)
    seen = x_RI.bfloat16() if instructions == "avx512" else x_RI
    wanted = seen.double() @ exact_OI.T
    size = (seen.double().abs() @ exact_OI.abs().T).amax()
    assert (blocked.multiply(x_RI).double() - wanted).abs().amax() < 1e-6 * size


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("form", BYTE_FORMS)
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_products_with_bytes(instructions, form, n_out, n_in) -> None:
    parts, exact_OI = bytes_of(form, n_out, n_in)
    blocked = blocked_of(form, parts, instructions)
    for rows in ROWS:
        x_RI = random(rows, n_in, seed=rows)
        x_RI[0, :32] = 0  # a group of zeros has no scale
        found = blocked.multiply(x_RI).double()
        seen = rounded_to_bytes(x_RI)
        size = (seen.abs() @ exact_OI.abs().T).amax()
        assert (found - seen @ exact_OI.T).abs().amax() <= 1e-6 * size  # beyond rounding activations nothing is lost
        wanted = x_RI.double() @ exact_OI.T
        assert (found - wanted).pow(2).mean().sqrt() <= ROUNDED_TO_BYTES * wanted.pow(2).mean().sqrt() + 1e-6 * size


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("form", ["int8 by row", "int6", "int4"])
def test_the_largest_products_of_bytes_do_not_overflow(instructions, form) -> None:
    bits = int(form[3])
    low, high, middle = {8: (-127, 127, 0), 6: (0, 63, 32), 4: (0, 15, 8)}[bits]
    values = torch.full((16, 256), high, dtype=torch.int8 if bits == 8 else torch.uint8)
    values[1::2] = low
    shared = SharedScales(torch.ones(16, 1).half(), torch.ones(16, 16, dtype=torch.int8))
    scales = {8: torch.ones(16).bfloat16(), 6: shared, 4: torch.ones(16, 8).bfloat16()}[bits]
    x_RI = torch.tensor([[127.0], [-127.0]]).expand(2, 256)
    stored = in_halves(values) if bits == 4 else values
    found = blocked_bytes(stored, scales, bits, instructions).multiply(x_RI)
    assert torch.equal(found.double(), x_RI.double() @ (values.double() - middle).T)


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden_by_rounding(instructions, value) -> None:
    parts, _ = bytes_of("int4 with minimums", 50, 96)
    blocked, x_RI = blocked_of("int4 with minimums", parts, instructions), random(3, 96)
    expected = blocked.multiply(x_RI)
    x_RI[1, 40] = value
    found = blocked.multiply(x_RI)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("instructions", supported())
def test_activations_next_to_nothing_count_as_zero(instructions) -> None:
    parts, _ = bytes_of("int8 by row", 50, 96)
    blocked = blocked_of("int8 by row", parts, instructions)
    assert not blocked.multiply(torch.full((1, 96), 1e-40)).any()


@pytest.mark.parametrize("instructions", supported())
def test_blocks_hold_the_numbers_that_were_given(instructions) -> None:
    for kind in FLOATS:
        weight_OI, _ = floats(kind, 50, 96)
        blocked = blocked_floats(weight_OI, instructions)
        assert torch.equal(blocked.plain(), weight_OI)
        wanted = torch.tensor([[3, 49], [0, 17]])
        assert torch.equal(blocked.rows(wanted), weight_OI[wanted])
        assert blocked.shape == (50, 96)
        assert blocked.dtype == weight_OI.dtype
    for form in BYTE_FORMS:
        parts, exact_OI = bytes_of(form, 50, 96)
        blocked = blocked_of(form, parts, instructions)
        assert torch.equal(blocked.values(), parts[0])
        assert (blocked.plain().double() - exact_OI).abs().amax() <= 1e-7 * exact_OI.abs().amax()
        wanted = torch.tensor([[3, 49], [0, 17]])
        assert torch.equal(blocked.rows(wanted), blocked.plain()[wanted])
        with pytest.raises(IndexError):
            blocked.rows(torch.tensor([50]))  # a row of zeros that fills the block


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("kinds", [*((kind,) for kind in PACKED), ("Q4_K", "Q4_K", "Q6_K")], ids=" ".join)
def test_blocks_of_a_gguf_file_are_multiplied_as_they_are(instructions, kinds) -> None:
    n_in = 512 if "Q4_K" in kinds or "Q6_K" in kinds else 96
    parts, exact = [], []
    for number, kind in enumerate(kinds):
        of_file = gguf.GGMLQuantizationType[kind]
        rows = blocks(random(50 + 7 * number, n_in, seed=number).numpy(), of_file)
        parts.append((kind, rows))
        exact.append(torch.from_numpy(gguf.quants.dequantize(rows, of_file)))
    exact_OI = torch.cat(exact)
    blocked = blocked_rows(parts, instructions)
    assert torch.equal(blocked.plain(), exact_OI)
    wanted = torch.tensor([0, len(exact_OI) - 1, 33, 16])
    assert torch.equal(blocked.rows(wanted), exact_OI[wanted])
    for rows in (*ROWS, 17):
        x_RI = random(rows, n_in, seed=rows)
        seen = rounded_to_bytes(x_RI)
        size = (seen.abs() @ exact_OI.double().abs().T).amax()
        assert (blocked.multiply(x_RI).double() - seen @ exact_OI.double().T).abs().amax() <= 1e-6 * size


@pytest.mark.parametrize(("kind", "bits"), [("Q4_K", 4.625), ("Q6_K", 6.5625)])
def test_blocks_of_256_take_no_more_room_than_in_their_file(kind, bits) -> None:
    of_file = gguf.GGMLQuantizationType[kind]
    blocked = blocked_rows([(kind, blocks(random(32, 512).numpy(), of_file))], supported()[0])
    size, block_bytes = gguf.GGML_QUANT_SIZES[of_file]
    assert blocked.nbytes * 8 / (32 * 512) == bits <= block_bytes * 8 / size + 0.125  # a byte holds six bits of scales
    assert blocked.is_finite


def test_kinds_without_a_form_together_are_told_apart() -> None:
    assert all(can_hold({kind}) for kind in PACKED)
    assert can_hold({"Q4_K", "Q6_K"})
    assert not any(can_hold(kinds) for kinds in (set(), {""}, {"", "Q4_K"}, {"Q4_K", "Q8_0"}, {"Q5_K"}))


def test_a_row_is_the_same_bits_on_one_thread() -> None:
    weight_OI, _ = floats("float32", 129, 288)
    blocked, x_RI = blocked_floats(weight_OI, supported()[0]), random(7, 288)
    threads = torch.get_num_threads()
    found = blocked.multiply(x_RI)
    torch.set_num_threads(1)
    try:
        assert torch.equal(blocked.multiply(x_RI), found)
    finally:
        torch.set_num_threads(threads)

"""Attention with a block mask, forwards and backwards, beside attention.py under a matrix of all pairs.

On a CPU PyTorch computes FlexAttention by its definition, and refuses gradients: the fixture `with_gradients` lifts the
refusal, and the derivatives are then those that PyTorch derives from our functions of masks and scores.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from llamita.backend.torch.model import attention, flex
from llamita.backend.torch.model.weights import build_model
from llamita.backend.torch.train.step import TorchTrainStep, build_train_step
from llamita.model.config import AttentionSpec
from tests.backend.models import SWITCHES, VARIANTS, small
from tests.backend.steps import CONFIG, batch, largest_difference

BLOCK = 128


@pytest.fixture
def with_gradients(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def documents(lengths, T):
    """Segments of documents of these lengths one after another, and padding for the rest."""
    segments = torch.zeros(T, dtype=torch.int64)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[start : start + length] = number
        start += length
    return segments


LAYOUTS = {
    "one document": [300],
    "borders beside those of blocks": [127, 129, 44],
    "borders on those of blocks": [128, 128, 44],
    "many short ones": [1, 2, 3, 50, 7, 90, 100, 20],
    "padding at the end": [100, 60],
    "padding alone": [],
}


@pytest.mark.parametrize("window", [0, 1, 30, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_blocks_hold_what_a_matrix_of_all_pairs_says(layout, window):
    T = 300
    segments_BT = torch.stack([documents(LAYOUTS[layout], T), documents([77, 223], T)])
    allowed = attention.segment_mask(segments_BT)
    if window:
        allowed = allowed & attention.window_mask(T, window)
    positions = torch.arange(T)
    sees = flex.mask_function(segments_BT, window)
    found = sees(torch.arange(2)[:, None, None], torch.zeros(()), positions[:, None], positions)
    assert torch.equal(found, allowed[:, 0])

    blocks = flex.block_mask(segments_BT, T, window)
    padded = torch.nn.functional.pad(allowed, (0, -T % BLOCK, 0, -T % BLOCK))
    by_blocks = padded.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)
    assert torch.equal(blocks.to_dense().bool(), by_blocks.any((-1, -2)))
    full = torch.zeros(by_blocks.shape[:4], dtype=torch.bool)
    for row, head, query in torch.cartesian_prod(*map(torch.arange, full.shape[:3])).tolist():
        count = blocks.full_kv_num_blocks[row, head, query]
        full[row, head, query, blocks.full_kv_indices[row, head, query, :count].long()] = True
    assert torch.equal(full, by_blocks.all(-1).all(-1))


def test_blocks_of_other_documents_and_outside_the_window_are_skipped():
    one, four = documents([1024], 1024)[None], documents([256] * 4, 1024)[None]
    assert int(flex.block_mask(one, 1024).to_dense().sum()) == 8 * 9 // 2
    assert int(flex.block_mask(four, 1024).to_dense().sum()) == 4 * 3
    assert int(flex.block_mask(None, 1024, window=129).to_dense().sum()) == 8 + 7


SPECS = {
    "plain": AttentionSpec(),
    "scale": AttentionSpec(scale=0.3),
    "soft cap": AttentionSpec(soft_cap=2.0),
    "window": AttentionSpec(window=20),
    "all of them": AttentionSpec(scale=0.3, soft_cap=2.0, window=20),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.usefixtures("with_gradients")
def test_results_and_gradients_are_those_of_the_plain_form(spec, heads):
    spec, T = SPECS[spec], 150
    segments_BT = torch.stack([documents([50, 79, 10], T), documents([150], T)])
    mask = attention.segment_mask(segments_BT)
    mask = mask & attention.window_mask(T, spec.window) if spec.window else mask
    generator = torch.Generator().manual_seed(0)
    tensors = [2 * torch.randn(2, count, T, 16, generator=generator) for count in (heads[0], heads[1], heads[1])]
    gradient = torch.randn(tensors[0].shape, generator=generator)
    ours, theirs = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    found = flex.attention(*ours, flex.block_mask(segments_BT, T, spec.window), spec)
    expected = attention.attention(*theirs, mask, spec=spec)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward(gradient)
    expected.backward(gradient)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=2e-5)


MODELS = {
    "llama": small(),
    "windows in later layers": small(**VARIANTS["sliding window in later layers"]),
    "norms of heads": small(**VARIANTS["qwen3"]),
    "gemma 2": small(**SWITCHES["gemma 2"]),
}


def trained(config, attention_name, segments=True, **options):
    step = TorchTrainStep(build_model(config, None, seed=0), attention=attention_name, max_grad_norm=1.0, **options)
    losses = [step.step([batch(seed=t, segments=segments)], 1e-2).loss for t in range(2)]
    return [*losses, step.evaluate(batch(seed=9, segments=segments)).nats], step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("with_gradients")
def test_a_training_over_packed_rows_is_the_same(name):
    (ours, flexed), (theirs, masked) = (trained(MODELS[name], kind) for kind in ("flex", "masked"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert largest_difference(flexed.weights(), masked.weights()) < 1e-4  # an update moves them by 1e-2
    assert flexed.conditions()["attention"] == "flex"
    assert "attention" not in masked.conditions()


@pytest.mark.medium
@pytest.mark.usefixtures("with_gradients")
def test_it_goes_with_recomputation_and_bfloat16():
    kept, again = (trained(CONFIG, "flex", recompute=count)[0] for count in ("none", "all"))
    assert kept == again
    low, masked = (trained(MODELS["norms of heads"], kind, precision="bf16")[0] for kind in ("flex", "masked"))
    assert low == pytest.approx(masked, rel=0.01)


@pytest.mark.medium
@pytest.mark.usefixtures("with_gradients")
def test_the_whole_model_is_traced_for_a_compiler_with_its_masks_in_it():
    """As --compile traces it, forwards and backwards, but for the kernels, which come from PyTorch's definitions."""
    theirs, _ = trained(MODELS["gemma 2"], "masked")
    step = TorchTrainStep(build_model(MODELS["gemma 2"], None, seed=0), attention="flex", max_grad_norm=1.0)
    step._hidden = torch.compile(step.model.hidden, backend="aot_eager", dynamic=False, fullgraph=True)
    ours = [step.step([batch(seed=t, segments=True)], 1e-2).loss for t in range(2)]
    assert ours == pytest.approx(theirs[:2], rel=1e-5)


def test_rows_without_documents_are_computed_as_ever(monkeypatch):
    monkeypatch.setattr(flex, "attention", None)
    assert trained(CONFIG, "flex", segments=False)[0] == trained(CONFIG, "masked", segments=False)[0]


def test_what_it_cannot_do_is_refused_in_one_line():
    wide = replace(CONFIG, head_dim=16)
    with pytest.raises(ValueError, match="--attention flex has a backward pass on a CUDA device alone, not on cpu"):
        build_train_step(wide, device="cpu", attention="flex")
    flex.check(wide, "cuda")
    with pytest.raises(ValueError, match="draws no dropout; use --attention masked"):
        flex.check(replace(wide, dropout=0.1), "cuda")
    with pytest.raises(ValueError, match="head_dim=4 must be at least 16 for --attention flex"):
        flex.check(CONFIG, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_a_training_is_that_under_a_mask(name, compile):
    config = replace(MODELS[name], hidden_size=64, head_dim=16)
    found = {}
    for kind in ("flex", "masked"):
        step = build_train_step(config, device="cuda", precision="bf16", attention=kind, compile=compile)
        found[kind] = [step.step([batch(rows=4, T=300, seed=t, segments=True)], 1e-3).loss for t in range(5)]
    assert found["flex"] == pytest.approx(found["masked"], rel=0.01)

"""The planned memory beside what PyTorch holds, and what recomputation, precision and several devices change."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita.backend.torch.train.step import build_train_step
from llamita.model.presets import preset
from llamita.model.training_memory import Parallelism, Update, block_bytes, training_memory
from tests.backend.models import small

CONFIG = small(num_hidden_layers=4, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4)
CASES = {
    "multi-head": CONFIG,
    "grouped": dataclasses.replace(CONFIG, num_key_value_heads=2),
    "norms of heads": dataclasses.replace(CONFIG, query_key_norm=True),
    "norms behind": dataclasses.replace(CONFIG, norm_placement="after", query_key_norm=True, norm_all_heads=True),
}


def held_bytes(config, update):
    """Bytes of activations that autograd holds for the backward pass of all blocks, by PyTorch's hooks on them."""
    step = build_train_step(config, precision=update.precision, device="cpu", recompute=update.recomputed)
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.parameters}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        of_weight = storage.data_ptr() in weights or (tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and (
            tensor.shape[0] * tensor.shape[1] in sizes
        ))  # fmt: skip
        if not of_weight:
            held[storage.data_ptr()] = tensor
        return tensor

    sizes = {parameter.numel() for parameter in step.parameters}
    tokens = torch.from_numpy(np.zeros((update.rows, update.sequence_length), dtype=np.int64))
    hidden, _ = step.output(step.model.hidden, training=True)
    with step.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = hidden(tokens)
    assert kept.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_block_keeps_is_what_autograd_holds(case, precision):
    """The difference of models of 4 and of 2 blocks: nothing outside the blocks counts."""
    config, update = CASES[case], Update(5, 40, precision, device="cpu")
    fewer = dataclasses.replace(config, num_hidden_layers=2)
    found = (held_bytes(config, update) - held_bytes(fewer, update)) / 2
    assert block_bytes(config, update) == pytest.approx(found, rel=0.05)


def test_weights_gradients_and_moments_come_from_the_table():
    memory = training_memory(preset("stories-15m"), Update(8, 256, device="cpu"))
    assert (memory.weights, memory.all_gradients, memory.optimizer) == tuple(
        n * 15_191_712 for n in (4, 4, 8)
    )  # counted by hand in test_parameters.py
    assert memory.total > memory.weights + memory.optimizer + memory.activations > 0


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    config = small(num_hidden_layers=3)
    update = Update(2, 16)
    matrices = 3 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48)
    adamw, muon = (training_memory(config, dataclasses.replace(update, optimizer=name)) for name in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * matrices


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recomputation_rows_and_precision_move_it_the_right_way(device):
    config = preset("stories-110m")
    update = Update(8, 512, device=device)
    whole = training_memory(config, update).total
    by_recomputed = [training_memory(config, dataclasses.replace(update, recomputed=n)).total for n in range(0, 13, 3)]
    if device == "cuda":
        assert by_recomputed == sorted(by_recomputed, reverse=True)
    else:  # what the allocator cannot use comes on top of the first few
        assert by_recomputed[4] < by_recomputed[3] < by_recomputed[2] < whole
    assert by_recomputed[-1] < 0.8 * whole
    assert training_memory(config, dataclasses.replace(update, rows=4)).total < whole
    assert training_memory(config, dataclasses.replace(update, precision="fp32")).total > whole
    assert training_memory(config, dataclasses.replace(update, micro_batches=2)).total >= whole


def test_parallel_devices_divide():
    config = preset("llama-2-7b")
    alone = training_memory(config, Update(1, 1024))
    ddp = training_memory(config, Update(1, 1024, parallel=Parallelism(8, "ddp")))
    fsdp = training_memory(config, Update(1, 1024, parallel=Parallelism(8, "fsdp")))
    tensor = training_memory(config, Update(1, 1024, parallel=Parallelism(8, "ddp", 8)))
    assert ddp == alone
    assert fsdp.optimizer == alone.optimizer // 8
    assert alone.optimizer / 8 < tensor.optimizer < alone.optimizer / 7.9  # norms are on every device
    assert tensor.activations < fsdp.activations
    assert max(fsdp.total, tensor.total) < alone.total / 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the allocator is glibc's")
@pytest.mark.parametrize("name", ["many tokens", "wide, fp32"])
def test_a_process_grows_by_what_was_planned(name, monkeypatch):
    """Trains in a fresh process, as benchmarks/memory.py does for more shapes; in float32, which no processor lacks."""
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    specification = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    benchmark = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmark_of_memory", benchmark)
    specification.loader.exec_module(benchmark)
    shape = next(shape for shape in benchmark.cpu_shapes() if shape.name == name)
    found = benchmark.measured(shape, threads=1)
    assert training_memory(shape.model, shape.update).total == pytest.approx(found, rel=0.1)

"""Peak memory of training beside what `llamita plan` says it is, for models of several shapes.

    python benchmarks/memory.py [--device cpu|cuda] [--threads 1] [--shapes NAME ...]

Each shape trains in a fresh process. On a CPU that process first makes an update of a small model, so that libraries
have loaded what they need; its resident memory is then the beginning, and the most that it holds in the updates that
follow, less that beginning, is what is compared. On a GPU it is the most that PyTorch's allocator gave out
(`torch.cuda.max_memory_allocated`).
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from llamita.model.config import ModelConfig
from llamita.model.presets import preset
from llamita.model.scaling import model_at_depth
from llamita.model.training_memory import Update, training_memory

UPDATES = 3


@dataclass(frozen=True)
class Shape:
    """A model and an update of it."""

    name: str
    model: ModelConfig
    update: Update


def cpu_shapes() -> list[Shape]:
    """Of different widths, depths, vocabularies, lengths and precisions, with and without recomputation."""

    def shape(name: str, model: ModelConfig, rows: int, length: int, **more: Any) -> Shape:
        return Shape(name, model, Update(rows, length, device="cpu", **more))

    wide = preset("tiny", vocab_size=4096, hidden_size=640, intermediate_size=1728, num_attention_heads=10,
                  num_key_value_heads=10, num_hidden_layers=3, max_position_embeddings=512)  # fmt: skip
    deep = preset("tiny", vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=16)
    long = preset("tiny", vocab_size=1024, hidden_size=256, intermediate_size=704, num_attention_heads=8,
                  num_key_value_heads=2, num_hidden_layers=4, max_position_embeddings=2048)  # fmt: skip
    many_tokens = preset("tiny", vocab_size=64000, hidden_size=192, intermediate_size=512, num_hidden_layers=2)
    small = preset("tiny", vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6)
    wide_gate = preset("tiny", vocab_size=4096, hidden_size=512, intermediate_size=3072, num_hidden_layers=2)
    half = preset("tiny", vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8)
    grouped = preset("tiny", vocab_size=16000, hidden_size=768, intermediate_size=2048, num_attention_heads=12,
                     num_key_value_heads=4, num_hidden_layers=4, max_position_embeddings=1024)  # fmt: skip
    normed = preset("tiny", vocab_size=8192, hidden_size=320, intermediate_size=896, num_attention_heads=5,
                    num_key_value_heads=5, num_hidden_layers=10, query_key_norm=True)  # fmt: skip
    return [
        shape("stories-15m", preset("stories-15m"), 8, 256),
        shape("wide, fp32", wide, 4, 512, precision="fp32"),
        shape("deep, all recomputed", deep, 16, 256, recomputed=16),
        shape("long rows", long, 2, 2048, precision="fp32", recomputed=2),
        shape("many tokens", many_tokens, 16, 128, precision="fp32"),
        # Chosen after the share for the allocator had been fitted to those above.
        shape("half recomputed", half, 4, 512, recomputed=4),
        shape("three micro-batches", small, 4, 256, precision="fp32", micro_batches=3),
        shape("wide gate", wide_gate, 16, 128),
        shape("grouped heads", grouped, 2, 1024, precision="fp32"),
        shape("norms of heads", normed, 8, 256),
    ]


def gpu_shapes() -> list[Shape]:
    """The same kind of variety at the size of a GPU."""

    def shape(name: str, model: ModelConfig, rows: int, length: int, **more: Any) -> Shape:
        return Shape(name, model, Update(rows, length, device="cuda", **more))

    return [
        shape("stories-110m", preset("stories-110m"), 32, 1024),
        shape("depth 16", model_at_depth(16, 32000), 8, 2048),
        shape("depth 16, all recomputed", model_at_depth(16, 32000), 32, 2048, recomputed=16),
        shape("depth 24, half recomputed", model_at_depth(24, 50304), 8, 2048, recomputed=12),
        shape("qwen2-0.5b, fp32", preset("qwen2-0.5b"), 2, 1024, precision="fp32"),
    ]


def measured(shape: Shape, threads: int) -> int:
    """Returns the peak of a fresh process that trains the shape."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", shape.name, "--device", shape.update.device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def work(shape: Shape) -> int:
    """Returns the bytes by which training this shape makes this process grow."""
    import numpy as np
    import torch

    from llamita.backend.torch.train.step import build_train_step
    from llamita.data.batches import Batch

    def batch(rows: int, length: int, vocab_size: int) -> Batch:
        block = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
        return Batch(block[:, :-1].copy(), block[:, 1:].copy(), None, np.arange(rows))

    update = shape.update
    options: dict[str, Any] = {"precision": update.precision, "device": update.device, "max_grad_norm": 1.0}
    small = preset("tiny")
    build_train_step(small, **options).step([batch(4, 64, small.vocab_size)], 1e-3)
    before = resident("VmRSS") if update.device == "cpu" else torch.cuda.memory_allocated()
    step = build_train_step(shape.model, recompute=update.recomputed, **options)
    if update.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: building a model is another matter
    else:
        torch.cuda.reset_peak_memory_stats()
    data = batch(update.rows, update.sequence_length, shape.model.vocab_size)
    for _ in range(UPDATES):
        step.step([data] * update.micro_batches, 1e-3)
    return (resident("VmHWM") if update.device == "cpu" else torch.cuda.max_memory_allocated()) - before


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Returns the resident memory of this process in bytes, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="*", default=[], help="only those of these names")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = cpu_shapes() if options.device == "cpu" else gpu_shapes()
    if options.worker:
        print(json.dumps({"bytes": work(next(shape for shape in shapes if shape.name == options.worker))}))
        return
    table = Table(title=f"Peak memory of an update, {options.device}, in MB")
    for column in ("", "planned", "measured", "planned / measured", "at the peak"):
        table.add_column(column, justify="left" if column in ("", "at the peak") else "right")
    for shape in shapes:
        if options.shapes and shape.name not in options.shapes:
            continue
        memory = training_memory(shape.model, shape.update)
        found = measured(shape, options.threads)
        parts = {name: f"{value / 1e6:.0f}" for name, value in asdict(memory).items() if isinstance(value, int)}
        print(shape.name, parts, flush=True)
        numbers = (f"{memory.total / 1e6:.0f}", f"{found / 1e6:.0f}", f"{memory.total / found:.2f}")
        table.add_row(shape.name, *numbers, memory.moment)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

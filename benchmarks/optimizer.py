"""AdamW's step beside PyTorch's own optimisers, and Muon's share of an update, on this machine's CPU.

    python benchmarks/optimizer.py [--presets stories-15m stories-110m] [--threads 1 2]

Every contestant has a model of its own. They step in turn, forwards and backwards, so that none always comes after the
same other. "clipped" steps also scale the gradients, as after clipping to a norm: PyTorch's optimisers multiply them
first, as `clip_grad_norm_` does. Prints milliseconds (median and spread) and how many times as long each takes as
PyTorch's fused form, the median over the passes. Then, for `stories-15m` in either precision: a whole update (8 rows of
256 tokens) by AdamW and by Muon in turn, and the optimiser's part of it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llamita.backend.muon import MuonSettings
from llamita.backend.torch.model import weights
from llamita.backend.torch.train.adamw import AdamW
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import Batch
from llamita.model.presets import preset
from llamita.training.record import processor_name

LEARNING_RATE = 1e-3
SCALE = 0.999
ROWS, TOKENS = 8, 256
CONTESTANTS = {"torch, fused": {"fused": True}, "torch, foreach": {"foreach": True}, "llamita": None}


def stepping(name: str, options: dict[str, bool] | None) -> Callable[[float], None]:
    """Returns a function that makes one update of a fresh model, its gradients times a scale."""
    model = weights.build_model(preset(name))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    if options is None:
        ours = AdamW(model.fused_parameters())
        return lambda scale: ours.step(LEARNING_RATE, scale)
    theirs = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95), **options)
    gradients = [parameter.grad for parameter in model.parameters()]

    def step(scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        theirs.step()

    return step


def compare(name: str, passes: int, threads: int, console: Console) -> None:
    torch.set_num_threads(threads)
    steps = {contestant: stepping(name, options) for contestant, options in CONTESTANTS.items()}
    table = Table(title=f"AdamW on {name}, {threads} threads: one step")
    for column in ("", "ms", "spread", "x fused", "clipped: ms", "spread", "x fused"):
        table.add_column(column, justify="right" if column else "left")
    rows: dict[str, list[str]] = {contestant: [] for contestant in CONTESTANTS}
    for scale in (1.0, SCALE):
        times: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(-3, passes):
            for contestant, step in list(steps.items())[:: 1 if number % 2 else -1]:
                started = time.perf_counter()
                step(scale)
                if number >= 0:  # the first passes warm up
                    times[contestant].append(1e3 * (time.perf_counter() - started))
        for contestant, ms in times.items():
            ratio = statistics.median(a / b for a, b in zip(ms, times["torch, fused"], strict=True))
            rows[contestant] += [f"{statistics.median(ms):.1f}", f"{min(ms):.1f}-{max(ms):.1f}", f"{ratio:.2f}"]
    for contestant, row in rows.items():
        table.add_row(contestant, *row)
    console.print(table)


def shares(name: str, passes: int, threads: int, console: Console) -> None:
    """Prints the seconds of an update by either optimiser, and how much of them the optimiser takes."""
    config = preset(name)
    generator = np.random.default_rng(0)
    block = generator.integers(0, config.vocab_size, (ROWS, TOKENS + 1), dtype=np.int32)
    batch = Batch(block[:, :-1], block[:, 1:].copy(), None, np.arange(ROWS))
    table = Table(title=f"{name}, {threads} threads: one update of {ROWS} rows of {TOKENS} tokens")
    for column in ("precision", "optimiser", "update, s", "its step, s", "share", "update to AdamW's"):
        table.add_column(column, justify="right" if "s" in column else "left")
    for precision in ("fp32", "bf16"):
        steps = {
            "AdamW": build_train_step(config, precision=precision, threads=threads),
            "Muon": build_train_step(config, muon=MuonSettings(), precision=precision, threads=threads),
        }
        spent: dict[str, list[float]] = {label: [] for label in steps}
        whole: dict[str, list[float]] = {label: [] for label in steps}
        for label, step in steps.items():
            step.optimizer.step = timed(step.optimizer.step, spent[label])  # type: ignore[method-assign]
        for number in range(passes):
            for label, step in list(steps.items())[:: 1 if number % 2 else -1]:
                timed(step.step, whole[label])([batch], LEARNING_RATE)
        for label in steps:
            update, own = (statistics.median(times[label][1:]) for times in (whole, spent))  # the first warms up
            ratio = statistics.median(a / b for a, b in zip(whole[label][1:], whole["AdamW"][1:], strict=True))
            table.add_row(precision, label, f"{update:.3f}", f"{own:.3f}", f"{own / update:.1%}", f"{ratio:.2f}")
    console.print(table)


def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        times.append(time.perf_counter() - started)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["stories-15m", "stories-110m"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--passes", type=int, default=51, help="steps of each contestant")
    parser.add_argument("--updates", type=int, default=11, help="whole updates by either optimiser")
    options = parser.parse_args()
    console = Console(width=100)
    console.print(f"{processor_name()}, torch {torch.__version__}")
    for name in options.presets:
        for threads in options.threads:
            compare(name, options.passes, threads, console)
    for threads in options.threads:
        shares("stories-15m", options.updates, threads, console)


if __name__ == "__main__":
    main()

"""Training speed and memory of stories-15m (8 x 256 tokens) beside transformers, on this machine.

    python benchmarks/training.py [--preset stories-15m] [--precision auto] [--contestants llamita ...]

Each contestant trains in a process of its own and is timed in turn, pass by pass, so that whatever else the machine
does falls on all alike. Prints tokens per second (median and spread), the ratios to the first two contestants, the
share of the best matrix-multiply rate seen in the same run, and memory: by how much the process has grown, at the peak
of a training step, since it had imported its libraries.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llamita.backend.interface import Precision
from llamita.backend.torch.train.scorer import choose
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import Batch
from llamita.model.presets import preset
from llamita.model.sizes import flops_per_token

B, T = 8, 256
LEARNING_RATE = 1e-3
CONTESTANTS = ("transformers", "transformers, compiled", "llamita", "llamita, compiled")
BLOCKS_COMPILED = "llamita, blocks compiled"
"""Not compared unless asked for: each block compiled by itself, as FSDP2 has it, rather than all of them as one."""


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))


def transformers_step(name: str, compiled: bool, precision: Precision) -> Callable[[], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = preset(name)
    keys = set(LlamaConfig().to_dict()) & set(config.to_dict())
    model = LlamaForCausalLM(LlamaConfig(**{key: config.to_dict()[key] for key in keys}, use_cache=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    run = torch.compile(model) if compiled else model
    ids = tokens(config.vocab_size)[:, :T].contiguous()

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def llamita_step(name: str, compiled: bool, precision: Precision, blocks: bool = False) -> Callable[[], float]:
    config = preset(name)
    train_step = build_train_step(config, max_grad_norm=1.0, precision=precision, device="cpu", compile=compiled)
    if blocks:
        for block in train_step.model.model.layers:
            block.compile(dynamic=False)
    row = tokens(config.vocab_size).int().numpy()
    batch = Batch(row[:, :-1].copy(), row[:, 1:].copy(), None, torch.arange(B).numpy())
    return lambda: train_step.step([batch], LEARNING_RATE).loss


def work(contestant: str, name: str, steps: int, threads: int, precision: Precision, pipe: Connection) -> None:
    """A contestant's process: warm up, then time `steps` steps at each request."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if contestant.startswith("transformers"):
        from transformers import LlamaForCausalLM  # noqa: F401 - before the growth of memory begins
    before = memory_in_use("VmRSS")
    if contestant.startswith("transformers"):
        step = transformers_step(name, contestant.endswith("compiled"), precision)
    else:
        blocks = contestant == BLOCKS_COMPILED
        step = llamita_step(name, contestant.endswith("compiled") and not blocks, precision, blocks)
    started = time.perf_counter()
    losses = [step(), step()]
    warm_up = time.perf_counter() - started
    reset_peak_memory()
    pipe.send((warm_up, losses))
    while pipe.recv():
        started = time.perf_counter()
        for _ in range(steps):
            loss = step()
        pipe.send((steps * B * T / (time.perf_counter() - started), memory_in_use("VmHWM") - before, loss))


def reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("peak memory includes the warm-up: this system cannot forget it", file=sys.stderr)


def memory_in_use(field: str) -> int:
    """Returns the resident bytes of this process: now (VmRSS) or at their peak (VmHWM; without /proc, for both)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_rate(precision: Precision, size: int = 2048, seconds: float = 1.0) -> float:
    """The best rate of a product in this precision seen in `seconds`, in FLOP/s."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else None) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def compare_training(
    contestants: Sequence[str],
    name: str,
    passes: int,
    steps: int,
    threads: int,
    precision: Precision,
    console: Console,
) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for contestant in contestants:  # one warms up at a time
        pipe, theirs = context.Pipe()
        process = context.Process(target=work, args=(contestant, name, steps, threads, precision, theirs), daemon=True)
        process.start()
        processes.append(process)
        warm_up, losses = pipe.recv()
        console.print(f"{contestant}: first two steps {warm_up:.1f} s, losses {losses[0]:.2f} {losses[1]:.2f}")
        pipes[contestant] = pipe
    rates: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    memory, peaks = {}, []
    for number in range(passes):
        peaks.append(matmul_rate(precision))
        for contestant, pipe in pipes.items():
            pipe.send(True)
            rate, memory[contestant], _ = pipe.recv()
            rates[contestant].append(rate)
        console.print(f"pass {number + 1}: " + ", ".join(f"{c} {rates[c][-1]:.0f}" for c in contestants))
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    flops, peak = flops_per_token(preset(name), T), max(peaks)
    table = Table(
        title=f"{name}, {B} x {T} tokens, {precision}, {threads} threads; peak product rate {peak / 1e9:.0f} GFLOP/s"
    )
    for column in (
        "",
        "tokens/s",
        "spread",
        *(f"x {other}" for other in contestants[:2]),
        "of the peak",
        "memory grown",
    ):
        table.add_column(column, justify="right" if column else "left")
    for contestant in contestants:
        median = statistics.median(rates[contestant])
        ratios = [
            statistics.median(a / b for a, b in zip(rates[contestant], rates[other], strict=True))
            for other in contestants[:2]
        ]
        table.add_row(
            contestant,
            f"{median:.0f}",
            f"{min(rates[contestant]):.0f}-{max(rates[contestant]):.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{median * flops / peak:.0%}",
            f"{memory[contestant] / 1e9:.2f} GB",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stories-15m")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=[*CONTESTANTS, BLOCKS_COMPILED])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps in a pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where this CPU multiplies it"
    )
    options = parser.parse_args()
    _, precision = choose("cpu", options.precision, options.threads)
    console = Console(width=100)
    compare_training(
        options.contestants, options.preset, options.passes, options.steps, options.threads, precision, console
    )


if __name__ == "__main__":
    main()

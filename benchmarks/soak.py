"""Ten thousand short requests with random cancellations on a small model: all blocks come back, memory stays flat.

Random weights; requests of 1 to 60 tokens, a third of them with a common beginning, answers of 4 to 40 tokens, some in
two continuations; now and then a running or waiting request is cancelled. The pool is small enough for preemptions.
Every few hundred requests the engine runs empty and is measured. Prints what was measured and draws it.

    python benchmarks/soak.py [--requests 10000] [--picture docs/images/engine-soak.png]
"""

import argparse
import gc
import random
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model.weights import build_model
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.presets import preset

POINTS = 40
"""How often the engine is let run empty."""
LIMITS = EngineConfig(block_size=4, blocks=48, max_sequences=32, mixed_prefill_tokens=128)


@dataclass
class Record:
    """What was measured, with the requests that had come by then: at each step, and whenever the engine was empty."""

    steps: array  # requests and free blocks in turn; compact, lest it be what grows
    idle: list[tuple[int, int]]  # free blocks
    memory: list[tuple[int, float]]  # resident MiB
    cancelled: int = 0
    tokens: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/engine-soak.png"))
    arguments = parser.parse_args()
    engine = Engine(TorchRunner(build_model(preset("tiny"), seed=1).eval()), config=LIMITS)
    started = time.perf_counter()
    record = soak(engine, arguments.requests)
    seconds = time.perf_counter() - started
    blocks = engine.manager.layout.blocks
    settled = [megabytes for _, megabytes in record.memory[POINTS // 4 :]]
    print(
        f"{arguments.requests} requests, {record.tokens} tokens in {seconds:.0f} s; {record.cancelled} cancelled, "
        f"{engine.scheduler.preemptions} preemptions"
    )
    print(f"free blocks of {blocks} when idle: {sorted({free for _, free in record.idle})}")
    print(
        f"resident memory: {record.memory[0][1]:.1f} MiB at first; after a quarter of the requests from "
        f"{min(settled):.1f} to {max(settled):.1f}, {settled[-1] - settled[0]:+.1f} MiB by the end"
    )
    draw(record, blocks, arguments.picture)


def soak(engine: Engine, count: int) -> Record:
    """Serve so many requests, cancelling some; with every `count / POINTS` of them the engine runs empty."""
    order, process = random.Random(1), psutil.Process()
    record, added = Record(array("i"), [], []), 0
    beginning = tuple(order.randrange(1024) for _ in range(40))
    for point in range(1, POINTS + 1):
        while added < count * point // POINTS or engine.has_work:
            while added < count * point // POINTS and len(engine.scheduler.waiting) < 16:
                engine.add(Request(added, prompt(order, beginning), sampling(order)))
                added += 1
            record.tokens += sum(event.token_id is not None for event in engine.step())
            record.steps.extend((added, engine.manager.available))
            under_way = [*engine.scheduler.running, *engine.scheduler.waiting]
            if under_way and order.random() < 0.03:
                engine.abort(order.choice(under_way).request.id)
                record.cancelled += 1
        del under_way
        gc.collect()
        record.idle.append((added, engine.manager.available))
        record.memory.append((added, process.memory_info().rss / 2**20))
    return record


def prompt(order: random.Random, beginning: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(order.randrange(1024) for _ in range(order.randint(1, 20)))
    return beginning[: order.randint(1, 40)] + own if order.random() < 1 / 3 else own * order.randint(1, 3)


def sampling(order: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=order.choice([0.0, 1.0]),
        repetition_penalty=order.choice([1.0, 1.0, 1.2]),
        max_tokens=order.choice([4, 8, 40]),
        n=order.choice([1, 1, 1, 2]),
        ignore_eos=True,
    )


def draw(record: Record, blocks: int, path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(*zip(*record.memory, strict=True), color="#2171b5", marker="o", markersize=3)
    upper.set_ylim(0, 1.25 * max(megabytes for _, megabytes in record.memory))
    upper.set_ylabel("resident memory, MiB")
    lower.plot(record.steps[::2], record.steps[1::2], color="#9ecae1", linewidth=0.4, label="between steps")
    lower.plot(*zip(*record.idle, strict=True), color="#2171b5", marker="o", markersize=3, label="idle")
    lower.set_ylim(0, 1.25 * blocks)
    lower.set_ylabel(f"free blocks of {blocks}")
    lower.set_xlabel("requests")
    lower.legend(loc="upper right", ncols=2, frameon=False)
    figure.suptitle("Requests with random cancellations: every block comes back, memory is flat")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""The engine over MLX beside mlx-lm in one run: prefill, decoding alone, and decoding a batch; and where the time goes.

    python benchmarks/mlx_inference.py [--presets stories-15m] [--dtypes float32 bfloat16] [--passes 5] [--device auto]

On a Mac, whose GPU is MLX's default device, at sizes that matter there:

    python benchmarks/mlx_inference.py --presets llama-3.2-1b --dtypes bfloat16 --tokens 128 --prompt 1024

Random weights, greedy, no end of sequence. Passes alternate between the contestants, so that a change in the machine's
speed meets both; ratios are taken pass by pass, medians printed with their spread. The memory bandwidth is what
`mx.sum` reads at in the same passes. mlx-lm decodes a batch with its own `BatchGenerator`. On a CPU that others use as
well, `--processor-time` counts the time that this process had of it, of all threads together, in place of the clock's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
from rich.console import Console
from rich.table import Table

from llamita.backend.interface import CacheLayout, SampleSpec, ScheduledChunk
from llamita.backend.mlx.devices import choose_device
from llamita.backend.mlx.infer.runner import DTYPES, MlxRunner, load_runner
from llamita.backend.mlx.model.llama import Context
from llamita.backend.mlx.model.weights import build_model, to_host_arrays
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.presets import preset
from llamita.storage import files, model_directory

FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
READ_NUMBERS = 2**26  # float32: 256 MB, far beyond a CPU's caches
PROMPT = 32
GREEDY = SamplingParams(temperature=0)

Record = dict[str, dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["stories-15m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prefill")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu")
    parser.add_argument("--processor-time", action="store_true", help="of this process, not the clock's; for a CPU")
    arguments = parser.parse_args()
    arguments.clock = time.process_time if arguments.processor_time else time.perf_counter
    device = choose_device(arguments.device)
    mx.set_default_device(mx.Device(device))
    clock = "processor time" if arguments.processor_time else "time"
    print(f"MLX {mx.__version__} on {device.name}, mlx-lm {mlx_lm.__version__}, {clock}")
    for name in arguments.presets:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory() as directory:
                measure(name, dtype, Path(directory) / "model", arguments)


def measure(name: str, dtype: str, directory: Path, arguments: argparse.Namespace) -> None:
    clock = arguments.clock
    longest = max(arguments.prompt, PROMPT + arguments.tokens) + 8
    config = preset(name, max_position_embeddings=longest, eos_token_id=None)
    with files.atomic_directory(directory) as temporary:
        model_directory.save_tensors(temporary, to_host_arrays(build_model(config, dtype=DTYPES[dtype])))
        model_directory.save_config(temporary, config, FILE_DTYPES[dtype])
    ours, theirs = Ours(load_runner(directory, device=arguments.device), clock), Theirs(directory, clock)
    data, record = mx.ones(READ_NUMBERS), Record()
    alone, batch, prefill = (
        f"{what}, tokens/s"
        for what in ("decode alone", f"decode a batch of {arguments.batch}", f"prefill of {arguments.prompt}")
    )
    for number in range(arguments.passes + 1):  # the first warms up
        keep = record if number else Record()
        bandwidth = data.nbytes / min(seconds(lambda: mx.eval(data.sum()), clock) for _ in range(3))
        add(keep, "memory read, GB/s", "the machine", bandwidth / 1e9)
        for contestant, model in (("llamita", ours), ("mlx-lm", theirs)):
            speed = model.decode(1, arguments.tokens)
            add(keep, alone, contestant, speed)
            add(keep, "decode alone, share of memory read", contestant, speed * ours.runner.weight_bytes / bandwidth)
            add(keep, batch, contestant, model.decode(arguments.batch, arguments.tokens))
            add(keep, prefill, contestant, model.prefill(arguments.prompt))
        found = keep[batch], keep[alone]
        add(keep, "batch over alone", "llamita", found[0]["llamita"][-1] / found[1]["llamita"][-1])
        add(keep, "batch over alone", "mlx-lm", found[0]["mlx-lm"][-1] / found[1]["mlx-lm"][-1])
    show(f"{name}, {dtype}", record)
    for size in (1, arguments.batch):
        step = statistics.median(size / speed for speed in record[alone if size == 1 else batch]["llamita"])
        show_parts(ours.runner, size, step, arguments)


class Ours:
    """The engine over one runner."""

    def __init__(self, runner: MlxRunner, clock: Callable[[], float]) -> None:
        self.runner, self._clock = runner, clock

    def decode(self, batch: int, tokens: int) -> float:
        """Tokens a second of a batch of short prompts, the first token of each not counted."""
        engine = Engine(self.runner, config=EngineConfig(max_sequences=batch))
        for number in range(batch):
            engine.add(Request(number, prompt(number), SamplingParams(temperature=0, max_tokens=tokens + 1)))
        while engine.scheduler.waiting or not all(one.is_decoding for one in engine.scheduler.running):
            engine.step()
        started, count = self._clock(), 0
        while engine.has_work:
            count += len(engine.step())
        return count / (self._clock() - started)

    def prefill(self, length: int) -> float:
        """Tokens a second until the first is drawn."""
        engine = Engine(self.runner, config=EngineConfig(max_sequences=1, prefix_caching=False))
        engine.add(Request(0, prompt(0, length), SamplingParams(temperature=0, max_tokens=1)))
        return length / seconds(engine.step, self._clock)


class Theirs:
    """mlx-lm's generation over the same files."""

    def __init__(self, directory: Path, clock: Callable[[], float]) -> None:
        self.model, _ = load_model(directory)
        self._clock = clock

    def decode(self, batch: int, tokens: int) -> float:
        if batch == 1:
            steps = generate_step(mx.array(prompt(0)), self.model, max_tokens=tokens + 1)
            next(steps)
            return tokens / seconds(lambda: list(steps), self._clock)
        generator = BatchGenerator(self.model, max_tokens=tokens + 1, completion_batch_size=batch,
                                   prefill_batch_size=batch)  # fmt: skip
        generator.insert([list(prompt(number)) for number in range(batch)])
        assert len(generator.next_generated()) == batch
        return batch * tokens / seconds(lambda: self._exhaust(generator, batch * tokens), self._clock)

    def prefill(self, length: int) -> float:
        steps = generate_step(mx.array(prompt(0, length)), self.model, max_tokens=0)
        return length / seconds(lambda: list(steps), self._clock)

    def _exhaust(self, generator: BatchGenerator, expected: int) -> None:
        count = 0
        while responses := generator.next_generated():
            count += len(responses)
        assert count == expected, (count, expected)


def show_parts(runner: MlxRunner, batch: int, step: float, arguments: argparse.Namespace) -> None:
    """Where a decode step's time goes: each part evaluated by itself, medians; the rest is the host's."""
    config, model = runner.config, runner.model
    blocks = -(-(PROMPT + 1) // 16)
    memory = runner.allocate(CacheLayout(16, batch * blocks, config.attention_windows))
    tables = [
        tuple(np.arange(n * blocks, (n + 1) * blocks, dtype=np.int32) for _ in config.attention_windows)
        for n in range(batch)
    ]
    chunks = [ScheduledChunk(n, (n,), PROMPT, tables[n]) for n in range(batch)]
    specs = [SampleSpec(GREEDY, 0, PROMPT + 1)] * batch
    found: dict[str, list[float]] = {}
    for number in range(arguments.passes + 1):
        clock = Clock(found if number else {}, arguments.clock)
        use = memory.cache.step(chunks)
        context = Context(mx.array(model._frequencies), model.rope_scale, use.positions_1T, cache=use)
        x = clock("embedding", lambda: model.model.embed_tokens(mx.array([[chunk.tokens[0] for chunk in chunks]])))
        for block in model.model.layers:
            x = clock("attention", lambda b=block, x=x, c=context: x + b.self_attn(b.input_layernorm(x), c))
            x = clock("feed-forward", lambda b=block, x=x: x + b.mlp(b.post_attention_layernorm(x)))
        logits = clock("head", lambda x=x: model.logits(model.model.norm(x)))
        clock("sampling", lambda logits=logits: memory.sampler.sample(logits[0], specs, range(batch)))
        clock.close()
    parts = {name: statistics.median(values) for name, values in found.items()}
    parts["host, and what overlaps"] = step - sum(parts.values())
    line = ", ".join(f"{name} {value / step:.0%}" for name, value in parts.items())
    print(f"a step of {batch}: {step * 1e3:.1f} ms: {line}\n")


class Clock:
    """Adds up what parts of a pass take, each evaluated before the next begins."""

    def __init__(self, found: dict[str, list[float]], clock: Callable[[], float]) -> None:
        self._found, self._now, self._clock = found, dict[str, float](), clock

    def __call__(self, part: str, work: Callable[[], object]) -> mx.array:
        started = self._clock()
        result = work()
        mx.eval(result)
        self._now[part] = self._now.get(part, 0) + self._clock() - started
        return result

    def close(self) -> None:
        for part, value in self._now.items():
            self._found.setdefault(part, []).append(value)


def prompt(number: int, length: int = PROMPT) -> tuple[int, ...]:
    return tuple(np.random.default_rng(number).integers(1000, size=length).tolist())


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def add(record: Record, measurement: str, contestant: str, value: float) -> None:
    record.setdefault(measurement, {}).setdefault(contestant, []).append(value)


def show(title: str, record: Record) -> None:
    table = Table(title=f"{title}: median (lowest - highest)", title_justify="left")
    for column in ("", "", "median", "spread", "llamita / this one"):
        table.add_column(column, justify="left" if not column else "right")
    for measurement, found in record.items():
        for contestant, values in found.items():
            digits = 2 if statistics.median(values) < 20 else 0
            spread = f"{min(values):.{digits}f} - {max(values):.{digits}f}"
            ratio = ""
            if "llamita" in found and contestant != "llamita":
                ratios = [ours / theirs for ours, theirs in zip(found["llamita"], values, strict=True)]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            table.add_row(measurement, contestant, f"{statistics.median(values):.{digits}f}", spread, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

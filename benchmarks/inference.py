"""The engine beside transformers in one run: decoding alone and in batches, prefill, and a crowd of mixed requests.

    python benchmarks/inference.py [--presets stories-110m qwen2-0.5b] [--passes 5] [--dtype auto]

Random weights, greedy, no end-of-sequence token. Passes alternate between the contestants, so that a change in the
machine's speed meets all; ratios are taken pass by pass, medians printed with their spread. The memory bandwidth is
measured in the same passes. On a GPU (`--device cuda`) the crowd is 256 requests of 100 to 1024 tokens in and out.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

from llamita.backend import processor
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import DTYPES, TorchRunner, load_runner
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.presets import preset
from llamita.storage import files, model_directory

POSITIONS = 8192
READ_BYTES = 512 * 2**20  # far beyond a CPU's caches
LONG_PROMPT = 4000
GREEDY = SamplingParams(temperature=0)


@dataclass
class Record:
    """What each contestant reached in each pass, by the name of the measurement."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, measurement: str, contestant: str, value: float) -> None:
        self.values.setdefault(measurement, {}).setdefault(contestant, []).append(value)

    def ratio(self, measurement: str, contestant: str, rival: str) -> list[float]:
        found = self.values[measurement]
        return [a / b for a, b in zip(found[contestant], found[rival], strict=True)]


@dataclass(frozen=True)
class Shape:
    """How large each measurement is."""

    decode_tokens: int = 48
    batch: int = 16
    prompt: int = 512
    requests: int = 32
    shortest: int = 16
    longest: int = 192
    arrivals_seconds: float = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["stories-110m", "qwen2-0.5b"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--crowd-passes", type=int, default=2)
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bfloat16 where it is multiplied"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # a process of its own, for `memory_of`
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if arguments.device == "cuda" or processor.multiplies("bfloat16") else "float32"
    shape = Shape() if arguments.device == "cpu" else Shape(256, 256, 4096, 256, 100, 1024, 0.0)
    if arguments.memory_of:
        contestant, directory = arguments.memory_of
        print(*batch_megabytes(contestant, Path(directory), shape, arguments))
        return
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, {arguments.dtype}")
    for name in arguments.presets:
        with tempfile.TemporaryDirectory() as directory:
            measure(name, Path(directory) / "model", shape, arguments)
        gc.collect()


def measure(name: str, directory: Path, shape: Shape, arguments: argparse.Namespace) -> None:
    config = preset(name, max_position_embeddings=POSITIONS, eos_token_id=None)
    with files.atomic_directory(directory) as temporary:
        model_directory.save_tensors(temporary, to_host_arrays(build_model(config, dtype=DTYPES[arguments.dtype])))
        model_directory.save_config(temporary, config, {"float32": "F32", "bfloat16": "BF16"}[arguments.dtype])
    ours = Ours(load_runner(directory, arguments.dtype, arguments.device))
    theirs = Theirs(directory, arguments.dtype, arguments.device)
    data = torch.ones(READ_BYTES // 4, device=arguments.device)
    record = Record()
    for number in range(arguments.passes + 1):  # the first warms up
        bandwidth = max(read_bandwidth(data) for _ in range(3))
        keep = record if number else Record()
        keep.add("memory read, GB/s", "the machine", bandwidth / 1e9)
        for contestant, model in (("llamita", ours), ("transformers", theirs)):
            speed = model.decode(1, shape.decode_tokens)
            keep.add("decode alone, tokens/s", contestant, speed)
            keep.add("decode alone, share of memory read", contestant, speed * ours.bytes_per_token / bandwidth)
            speed = model.decode(shape.batch, shape.decode_tokens)
            keep.add(f"decode a batch of {shape.batch}, tokens/s", contestant, speed)
            keep.add(f"prefill of {shape.prompt}, tokens/s", contestant, model.prefill(shape.prompt))
    for contestant in ("llamita", "transformers"):
        whole, above = memory_of(contestant, directory, arguments)
        record.add(f"memory for the model and a batch of {shape.batch}, MB", contestant, whole)
        record.add("of which above the loaded model, MB", contestant, above)
    for _ in range(arguments.crowd_passes):
        prompts, outputs, arrivals = crowd(shape, config.vocab_size)
        speed, gaps = ours.serve(prompts, outputs, arrivals)
        what = f"{shape.requests} mixed requests, output tokens/s"
        record.add(what, "llamita", speed)
        record.add(what, "transformers, one batch", theirs.serve(prompts, outputs))
        record.add(what, "llamita, one by one", ours.serve_alone(prompts[::4], outputs[::4]))
        what = "time between tokens, 95th percentile / median"
        record.add(what, "llamita", percentile(gaps, 95) / percentile(gaps, 50))
        long = [*prompts[: shape.batch], tuple(np.arange(LONG_PROMPT) % config.vocab_size)]
        _, gaps = ours.serve(long, [*outputs[: shape.batch], 4], [*[0.0] * shape.batch, 1.0])
        record.add(
            f"the same while {LONG_PROMPT} tokens are read", "llamita", percentile(gaps, 95) / percentile(gaps, 50)
        )
    show(name, record)


class Ours:
    """The engine over one runner; `sampling` are the options of each token of `decode`."""

    def __init__(self, runner: TorchRunner, sampling: SamplingParams = GREEDY) -> None:
        self.runner, self.sampling = runner, sampling
        self.bytes_per_token = runner.weight_bytes
        self.engine = Engine(runner, config=EngineConfig(prefix_caching=False))

    def decode(self, batch: int, tokens: int) -> float:
        """Tokens a second of a batch of prompts of 32 tokens, the first token of each not counted."""
        engine = Engine(self.runner, config=EngineConfig(max_sequences=batch))
        for number in range(batch):
            prompt = tuple(np.random.default_rng(number).integers(1000, size=32).tolist())
            engine.add(request(number, prompt, tokens + 1, self.sampling))
        while engine.scheduler.waiting or not all(one.is_decoding for one in engine.scheduler.running):
            engine.step()
        started, count = time.perf_counter(), 0
        while engine.has_work:
            count += len(engine.step())
        return count / (time.perf_counter() - started)

    def prefill(self, length: int) -> float:
        self.engine.add(request(0, tuple((np.arange(length) % 1000).tolist()), 1))
        started = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return length / (time.perf_counter() - started)

    def serve(
        self, prompts: list[tuple[int, ...]], outputs: list[int], arrivals: list[float]
    ) -> tuple[float, list[float]]:
        """Output tokens a second of requests that come at given seconds, and the seconds between two tokens of one."""
        engine = Engine(self.runner)
        last: dict[int, float] = {}
        gaps: list[float] = []
        started, added, count = time.perf_counter(), 0, 0
        while added < len(prompts) or engine.has_work:
            now = time.perf_counter() - started
            while added < len(prompts) and (arrivals[added] <= now or not engine.has_work):
                engine.add(request(added, prompts[added], outputs[added]))
                added += 1
            for event in engine.step():
                now = time.perf_counter()
                if event.request_id in last:
                    gaps.append(now - last[event.request_id])
                last[event.request_id] = now
                count += 1
        assert count == sum(outputs)
        return count / (time.perf_counter() - started), gaps

    def serve_alone(self, prompts: list[tuple[int, ...]], outputs: list[int]) -> float:
        """Output tokens a second, one request after the other."""
        engine = Engine(self.runner, config=EngineConfig(max_sequences=1))
        for number, (prompt, count) in enumerate(zip(prompts, outputs, strict=True)):
            engine.add(request(number, prompt, count))
        started = time.perf_counter()
        while engine.has_work:
            engine.step()
        return sum(outputs) / (time.perf_counter() - started)


class Theirs:
    """transformers' generate, the prompts of a batch padded on the left."""

    def __init__(self, directory: Path, dtype: str, device: str) -> None:
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(directory, dtype=DTYPES[dtype]).eval().to(device)

    def decode(self, batch: int, tokens: int) -> float:
        rows = [tuple(np.random.default_rng(number).integers(1000, size=32).tolist()) for number in range(batch)]
        return batch * tokens / (self._seconds(rows, tokens + 1) - self._seconds(rows, 1))

    def prefill(self, length: int) -> float:
        return length / self._seconds([tuple((np.arange(length) % 1000).tolist())], 1)

    def serve(self, prompts: list[tuple[int, ...]], outputs: list[int]) -> float:
        return sum(outputs) / self._seconds(prompts, max(outputs))

    @torch.inference_mode()
    def _seconds(self, rows: list[tuple[int, ...]], tokens: int) -> float:
        longest = max(map(len, rows))
        padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self.model.device)
        seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        started = time.perf_counter()
        length = self.model.generate(
            padded, attention_mask=seen, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        ).shape[1]  # fmt: skip
        assert length == longest + tokens
        return time.perf_counter() - started


def memory_of(contestant: str, directory: Path, arguments: argparse.Namespace) -> list[float]:
    """`batch_megabytes` of a process of its own, whose allocator keeps nothing of earlier measurements."""
    words = ["--memory-of", contestant, str(directory), "--dtype", arguments.dtype, "--device", arguments.device]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()[-2:]]


def batch_megabytes(
    contestant: str, directory: Path, shape: Shape, arguments: argparse.Namespace
) -> tuple[float, float]:
    """The most memory that the model and decoding a batch take, and how much of it above the loaded model alone."""
    kind, process = (arguments.dtype, arguments.device), psutil.Process()
    _ = transformers.LlamaForCausalLM, transformers.Qwen2ForCausalLM  # imported when first named, before memory is read
    libraries = process.memory_info().rss
    model = Ours(load_runner(directory, *kind)) if contestant == "llamita" else Theirs(directory, *kind)
    model.decode(1, 2)
    loaded = process.memory_info().rss
    with PeakMemory() as peak:
        model.decode(shape.batch, shape.decode_tokens)
    return (loaded - libraries) / 1e6 + peak.megabytes, peak.megabytes


class PeakMemory:
    """The most memory this process had while the block ran, above what it had at its beginning."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.megabytes = (self._peak - self._before) / 1e6

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, self._process.memory_info().rss)


def request(number: int, prompt: tuple[int, ...], tokens: int, sampling: SamplingParams = GREEDY) -> Request:
    return Request(number, prompt, replace(sampling, max_tokens=tokens, ignore_eos=True, seed=number))


def crowd(shape: Shape, vocabulary: int) -> tuple[list[tuple[int, ...]], list[int], list[float]]:
    """Prompts, lengths of output, and times of arrival."""
    random = np.random.default_rng(0)
    lengths = random.integers(shape.shortest, shape.longest + 1, size=(2, shape.requests))
    prompts = [tuple(random.integers(vocabulary, size=int(length)).tolist()) for length in lengths[0]]
    arrivals = np.sort(random.uniform(0, shape.arrivals_seconds, shape.requests))
    return prompts, [int(count) for count in lengths[1]], arrivals.tolist()


def read_bandwidth(data: torch.Tensor) -> float:
    """Bytes a second of summing an array that no cache holds, by all threads; on a GPU of copying it."""
    if data.device.type == "cuda":
        other = torch.empty_like(data)
        torch.cuda.synchronize()
        started = time.perf_counter()
        other.copy_(data)
        torch.cuda.synchronize()
        return 2 * data.numel() * data.element_size() / (time.perf_counter() - started)
    started = time.perf_counter()
    data.sum()
    return data.numel() * data.element_size() / (time.perf_counter() - started)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


def show(name: str, record: Record) -> None:
    table = Table(title=f"{name}: median (lowest - highest)", title_justify="left")
    for column in ("", "", "median", "spread", "llamita / this one"):
        table.add_column(column, justify="left" if not column else "right")
    for measurement, found in record.values.items():
        for contestant, values in found.items():
            digits = 2 if statistics.median(values) < 20 else 0
            spread = f"{min(values):.{digits}f} - {max(values):.{digits}f}"
            ratio = ""
            if "llamita" in found and contestant != "llamita":
                ratio = f"{statistics.median(record.ratio(measurement, 'llamita', contestant)):.2f}"
            table.add_row(measurement, contestant, f"{statistics.median(values):.{digits}f}", spread, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

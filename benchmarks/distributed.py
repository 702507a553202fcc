"""Training in several processes beside training in one: the same losses, kills and other numbers of processes included.

    python benchmarks/distributed.py losses      loss curves of 1, 2 and 4 processes in every form, AdamW and Muon
    python benchmarks/distributed.py kills       a run that is killed twice and changes its number of processes twice
    python benchmarks/distributed.py speed       two processes of one thread beside one process of two
    python benchmarks/distributed.py hosts       two network namespaces, one of which loses its processes (needs root)

Everything goes through the command line, as `torchrun -m llamita train` over Meadow's stories. Prints tables, and
writes what was measured as JSON lines to --report.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from llamita.training.record import processor_name

UPDATES = 50
MODEL = ("--preset", "tiny", "--set", "hidden_size=64", "num_hidden_layers=2", "intermediate_size=172")
FORMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DDP of 2": (2, ("--parallel", "ddp")),
    "FSDP2 of 2": (2, ("--parallel", "fsdp")),
    "tensor parallel 2": (2, ("--parallel", "fsdp", "--tensor-parallel", "2")),
    "DDP of 4": (4, ("--parallel", "ddp")),
    "FSDP2 of 4": (4, ("--parallel", "fsdp")),
    "FSDP2 of 2 x tensor parallel 2": (4, ("--parallel", "fsdp", "--tensor-parallel", "2")),
}
PYTHON = (sys.executable, "-m")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


class Bench:
    """A directory with prepared data, and what was measured so far."""

    def __init__(self, directory: Path, report: Path | None) -> None:
        self.directory = directory
        self.report = report
        self.data = directory / "data"
        self.console = Console()
        run = [*PYTHON, "llamita", "prepare", "--source", "meadow", "--documents", "2000", "--output", str(self.data)]
        text = directory / "text.txt"
        text.write_text("Once there was a small story of a fox and a bird that met in the wood by the pond. " * 200)
        tokenizer = [*PYTHON, "llamita", "tokenizer", "train", str(text), "--vocab-size", "300"]
        subprocess.run([*tokenizer, "--output", str(directory / "tokenizer")], check=True, capture_output=True)
        subprocess.run([*run, "--tokenizer", str(directory / "tokenizer")], check=True, capture_output=True)

    def train(self, name: str, processes: int, *options: str, model: tuple[str, ...] = MODEL) -> list[str]:
        """Returns the command of a run in RUN/name."""
        launcher = [*PYTHON, "torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        verb = [*(launcher or PYTHON), "llamita", "train", "--output", str(self.directory / name)]
        if "--resume" in options:
            return [*verb, *options]
        fixed = ["--data", str(self.data), "--precision", "fp32", "--sample-tokens", "0", *model]
        return [*verb, *fixed, *options]

    def run(self, name: str, processes: int, *options: str) -> None:
        command = self.train(name, processes, *options)
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")

    def records(self, name: str, kind: str = "train") -> list[dict]:
        file = self.directory / name / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in self.records(name)]

    def note(self, **values: object) -> None:
        if self.report:
            with self.report.open("a") as file:
                file.write(json.dumps({"processor": processor_name(), **values}) + "\n")


def furthest(found: list[float], expected: list[float]) -> float:
    """Returns the largest relative difference of two curves; infinite where they have not the same length."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def losses(bench: Bench) -> None:
    table = Table(title=f"{UPDATES} updates in float32: the largest relative difference from one process")
    table.add_column("processes")
    optimizers = ("adamw", "muon")
    for optimizer in optimizers:
        table.add_column(optimizer, justify="right")
        bench.run(f"{optimizer} alone", 1, "--steps", str(UPDATES), "--optimizer", optimizer)
    for form, (processes, options) in FORMS.items():
        cells = []
        for optimizer in optimizers:
            name = f"{optimizer} {form}"
            bench.run(name, processes, "--steps", str(UPDATES), "--optimizer", optimizer, *options)
            difference = furthest(bench.losses(name), bench.losses(f"{optimizer} alone"))
            bench.note(what="losses", form=form, optimizer=optimizer, difference=difference)
            cells.append(f"{difference:.1e}")
        table.add_row(form, *cells)
    bench.console.print(table)


def kills(bench: Bench) -> None:
    table = Table(title=f"{UPDATES} updates, killed twice by kill -9, each time resumed otherwise")
    for column in ("optimizer", "processes", "losses: largest difference", "weights: largest difference"):
        table.add_column(column)
    saved = ("--steps", str(UPDATES), "--checkpoint-every", "5", "--keep-checkpoints", "9")
    for optimizer in ("adamw", "muon"):
        bench.run(f"{optimizer} whole", 1, *saved, "--optimizer", optimizer)
        for stages in (("FSDP2 of 2", "FSDP2 of 2 x tensor parallel 2", "DDP of 2"), ("FSDP2 of 2",) * 3):
            name = f"{optimizer} killed, {len(set(stages))} forms"
            for number, form in enumerate(stages):
                processes, options = FORMS[form]
                more = ("--resume", *options) if number else (*saved, "--optimizer", optimizer, *options)
                if number == len(stages) - 1:
                    bench.run(name, processes, *more)
                else:
                    _kill(bench, name, processes, more, step=(15, 35)[number])
            same = len(set(stages)) == 1
            reference = f"{optimizer} whole"
            if same:  # the run that was not killed, in the same form
                reference = f"{optimizer} of {stages[0]}"
                bench.run(reference, FORMS[stages[0]][0], *saved, "--optimizer", optimizer, *FORMS[stages[0]][1])
            difference = furthest(bench.losses(name), bench.losses(reference))
            weights = _weights_apart(bench.directory / name, bench.directory / reference)
            bench.note(what="kills", optimizer=optimizer, stages=stages, losses=difference, weights=weights)
            said = "0 (the same bits)" if weights == 0 else f"{weights:.1e}"
            table.add_row(optimizer, " -> ".join(stages), f"{difference:.1e}", said)
    bench.console.print(table)


def _kill(bench: Bench, name: str, processes: int, options: tuple[str, ...], step: int) -> None:
    """Begins a run, and kills all of its processes at once after an update; checkpoints are a few updates older."""
    launched = subprocess.Popen(
        bench.train(name, processes, *options), env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not any(record["step"] >= step for record in bench.records(name)):
        if launched.poll() is not None:
            raise SystemExit(f"{name}: ended before update {step}")
        time.sleep(0.05)
    for process in [*psutil.Process(launched.pid).children(recursive=True), psutil.Process(launched.pid)]:
        process.send_signal(signal.SIGKILL)
    launched.wait()


def _weights_apart(one: Path, other: Path) -> float:
    from safetensors.numpy import load_file

    arrays, others = (load_file(path / "last" / "model.safetensors") for path in (one, other))
    return max(float(abs(arrays[name] - others[name]).max()) for name in others)


def speed(bench: Bench, passes: int = 3) -> None:
    """Two processes of a thread each, and one process of two threads, in turns."""
    model = ("--preset", "stories-15m")
    options = ("--steps", "12", "--batch-size", "8", "--sequence-length", "256", "--evaluate-every", "0")
    contestants = {"one process, two threads": (1, "2"), "two processes, one thread each": (2, "1")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(passes):
        for name, (processes, threads) in contestants.items():
            run = f"speed {processes} {number}"
            command = bench.train(run, processes, *options, model=model)
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, capture_output=True)
            records = bench.records(run)[3:]
            rate = statistics.median(record["tokens_per_second"] for record in records)
            found[name].append((rate, processes * records[-1]["memory_bytes"] / 1e9))
    table = Table(title=f"stories-15m in float32 on {processor_name()}: medians of {passes} runs in turns")
    for column in ("", "tokens/s", "of one process", "GB of all processes"):
        table.add_column(column, justify="right" if column else "left")
    first = statistics.median(rate for rate, _ in found["one process, two threads"])
    for name, measured in found.items():
        rate, memory = (statistics.median(values) for values in zip(*measured, strict=True))
        table.add_row(name, f"{rate:,.0f}", f"{rate / first:.2f}", f"{memory:.2f}")
        bench.note(what="speed", contestant=name, tokens_per_second=rate, memory_gb=memory)
    bench.console.print(table)


def hosts(bench: Bench) -> None:
    """Two network namespaces joined by a cable; the second's training process is killed in the middle."""
    saved = ("--steps", str(UPDATES), "--checkpoint-every", "5", "--parallel", "fsdp")
    bench.run("alone", 1, *saved)
    ends = {"llamita-a": ("10.77.0.1", "end-a"), "llamita-b": ("10.77.0.2", "end-b")}
    for name in ends:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        first, second = ends
        cable = ["ip", "link", "add", "end-a", "netns", first, "type", "veth", "peer", "name", "end-b", "netns", second]
        subprocess.run(cable, check=True)
        launched = []
        for name, (address, device) in ends.items():
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", device], check=True)
            for link in (device, "lo"):
                subprocess.run([*inside, "link", "set", link, "up"], check=True)
        for name, (address, device) in ends.items():
            launcher = [
                *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29511", "--rdzv-id", "benchmark"),
                *("--rdzv-conf", f"is_host={int(name == first)}", "--local-addr", address, "-m"),
            ]
            plain = bench.train("hosts", 1, *saved)[len(PYTHON) :]
            command = ["ip", "netns", "exec", name, *PYTHON, *launcher, *plain]
            log = (bench.directory / f"{name}.log").open("w")
            launched.append(subprocess.Popen(command, env=ONE_THREAD | {"GLOO_SOCKET_IFNAME": device},
                                             stdout=log, stderr=subprocess.STDOUT))  # fmt: skip
        _wait(lambda: any(record["step"] >= 22 for record in bench.records("hosts")), launched, bench)
        pids = subprocess.run(["ip", "netns", "pids", second], capture_output=True, text=True, check=True).stdout
        workers = [psutil.Process(int(pid)) for pid in pids.split()]
        killed = [p for p in workers if "torch.distributed.run" not in p.cmdline() and "llamita" in p.cmdline()]
        for process in killed:
            process.kill()
        for process in launched:
            process.wait()
    finally:
        for name in ends:
            subprocess.run(["ip", "netns", "del", name], check=False)
    difference = furthest(bench.losses("hosts"), bench.losses("alone"))
    bench.note(what="hosts", killed=len(killed), difference=difference)
    bench.console.print(
        f"two hosts of one process each (FSDP2), {len(killed)} killed on the second after update 22: {UPDATES} updates "
        f"in all, the largest relative difference of a loss from one process {difference:.1e}"
    )


def _wait(ready: Callable[[], bool], launched: list[subprocess.Popen], bench: Bench) -> None:
    while not ready():
        if any(process.poll() for process in launched):
            logs = "\n".join(file.read_text()[-3000:] for file in bench.directory.glob("*.log"))
            raise SystemExit(f"a host ended too early\n{logs}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "kills", "speed", "hosts"))
    parser.add_argument("--report", type=Path, help="append what was measured to this file, a JSON object a line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        globals()[arguments.what](Bench(Path(temporary), arguments.report))


if __name__ == "__main__":
    main()

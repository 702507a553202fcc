"""A soak of the server: minutes of chats by locust, a fifth of them left before their end; nothing may be left behind.

    python benchmarks/soak_server.py --model MODEL [--minutes 10] [--users 24] [--report soak-server.json]
                                     [--picture docs/images/soak-server.png]

`llamita serve` runs in a process of its own, and so does locust with `server_users.py`. Every second the server's
memory, descriptors and gauges are read. Afterwards no request may run or wait, every block must be free, and neither
memory nor descriptors may have grown since the first quarter. Ends with status 1 where that does not hold.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from server import start_server

USERS = Path(__file__).with_name("server_users.py")
GAUGES = ("requests_running", "requests_waiting", "kv_cache_blocks", "kv_cache_blocks_free")
BLOCKS = 320
"""Blocks of the server's memory: few, so that all have been written to soon, and sequences have to make room."""
GROWTH = 1.05
"""How much more memory than at the end of the first quarter is no growth."""


@dataclass
class Sample:
    seconds: float
    memory_mib: float
    descriptors: int
    running: float
    waiting: float
    blocks: float
    free_blocks: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--report", type=Path, default=Path("soak-server.json"))
    parser.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    server, port = start_server(arguments.model, "--blocks", str(BLOCKS))
    try:
        samples, users, after = soak(server, port, arguments)
    finally:
        server.terminate()
        status = server.wait()
    faults = faults_of(samples, users, after, status)
    report = {
        "faults": faults, "users": users, "after": asdict(after), "exit_status": status,
        "samples": [asdict(sample) for sample in samples],
    }  # fmt: skip
    arguments.report.write_text(json.dumps(report, indent=1))
    if arguments.picture is not None:
        draw(samples, arguments.picture)
    quarter = samples[len(samples) // 4]
    for name, row in users.items():
        print(f"{name}: {row['requests']} requests, {row['failures']} failures")
    print(f"memory {quarter.memory_mib:.0f} MiB after a quarter, {after.memory_mib:.0f} at the end; ", end="")
    print(f"descriptors {samples[0].descriptors} at first, {after.descriptors} at the end; exit status {status}")
    print("\n".join(faults) or "nothing was left behind")
    return 1 if faults else 0


def soak(
    server: subprocess.Popen[str], port: int, arguments: Any
) -> tuple[list[Sample], dict[str, dict[str, int]], Sample]:
    """Runs locust; returns what was read of the server meanwhile, locust's counts, and what is left when it is idle."""
    process, begun = psutil.Process(server.pid), time.monotonic()
    samples = [read(process, port, begun)]
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable, "-m", "locust", "-f", str(USERS), "--headless", "--users", str(arguments.users),
            "--spawn-rate", str(arguments.users), "--run-time", f"{int(60 * arguments.minutes)}s", "--host",
            f"http://127.0.0.1:{port}", "--csv", f"{temporary}/users", "--only-summary", "--loglevel", "ERROR",
            "--exit-code-on-error", "0",
        ]  # fmt: skip
        users = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while users.poll() is None:
            time.sleep(1)
            samples.append(read(process, port, begun))
        with Path(f"{temporary}/users_stats.csv").open() as file:
            counts = {
                row["Name"]: {"requests": int(row["Request Count"]), "failures": int(row["Failure Count"])}
                for row in csv.DictReader(file)
            }
    time.sleep(2)
    return samples, counts, read(process, port, begun)


def read(process: psutil.Process, port: int, begun: float) -> Sample:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = {line.split()[0].removeprefix("llamita_"): float(line.split()[1]) for line in lines if line[:1] != "#"}
    return Sample(
        time.monotonic() - begun, process.memory_info().rss / 2**20, process.num_fds(), *(values[n] for n in GAUGES)
    )


def faults_of(samples: list[Sample], users: dict[str, dict[str, int]], after: Sample, status: int) -> list[str]:
    """Returns, a line each, what is not as it should be."""
    quarter = samples[len(samples) // 4]
    faults = [f"{name}: {row['failures']} failures" for name, row in users.items() if row["failures"]]
    if after.running or after.waiting:
        faults.append(f"{after.running:g} requests run and {after.waiting:g} wait after the end")
    if after.free_blocks != after.blocks:
        faults.append(f"{after.free_blocks:g} of {after.blocks:g} blocks are free after the end")
    if after.descriptors > samples[0].descriptors + 2:
        faults.append(f"{after.descriptors} descriptors are open after the end, {samples[0].descriptors} were at first")
    if after.memory_mib > GROWTH * quarter.memory_mib:
        faults.append(f"memory grew from {quarter.memory_mib:.0f} to {after.memory_mib:.0f} MiB")
    if status:
        faults.append(f"the server ended with status {status}")
    return faults


def draw(samples: list[Sample], path: Path) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    seconds = [sample.seconds / 60 for sample in samples]
    rows = (
        ("resident memory, MiB", [sample.memory_mib for sample in samples]),
        ("open descriptors", [sample.descriptors for sample in samples]),
        ("free blocks", [sample.free_blocks for sample in samples]),
    )
    for axes, (label, values) in zip(figure.subplots(len(rows), 1, sharex=True), rows, strict=True):
        axes.plot(seconds, values, color="#2171b5", linewidth=0.8)
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_ylabel(label)
    axes.set_xlabel("minutes")
    figure.suptitle("Streamed chats, a fifth left before their end: nothing is left behind")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

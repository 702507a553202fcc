"""Our server beside others with the same model: `llama_cpp.server` and `transformers serve`, under the same load.

    python benchmarks/servers.py --file MODEL.gguf --directory MODEL [--passes 3] [--concurrency 1 4 16] [--seconds 20]

The GGUF file is for llama.cpp and for us, the directory (`llamita convert MODEL.gguf MODEL`) for transformers, which
serves it in bfloat16; `llamita-bf16` is our server over the same directory. Servers run one at a time, each pass in
another order, and `llamita bench` measures them: chats of 100 words that are answered with at most 64 tokens, streamed.
Answers end where the model ends them, since not every server knows `ignore_eos`; what counts is tokens a second.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.table import Table

PORT = 8765
ADDRESS = f"http://127.0.0.1:{PORT}"


def commands(file: Path, directory: Path) -> dict[str, tuple[list[str], str]]:
    """Returns how each server is started, and the name by which it knows the model."""
    python, port = sys.executable, str(PORT)
    script = str(Path(python).with_name("transformers"))
    llama_cpp = ["--n_ctx", "4096", "--n_threads", "2", "--model_alias", "model", "--port", port]
    return {
        "llamita": ([python, "-m", "llamita.cli.main", "serve", str(file), "--name", "model", "--port", port], "model"),
        "llamita-bf16": (
            [python, "-m", "llamita.cli.main", "serve", str(directory), "--name", "model", "--port", port],
            "model",
        ),
        "llama_cpp.server": ([python, "-m", "llama_cpp.server", "--model", str(file), *llama_cpp], "model"),
        "transformers serve": (
            [script, "serve", str(directory), "--continuous-batching", "--port", port, "--host", "127.0.0.1"],
            str(directory),
        ),
        "transformers serve, one by one": (
            [script, "serve", str(directory), "--port", port, "--host", "127.0.0.1"],
            str(directory),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--concurrency", nargs="+", default=["1", "4", "16"])
    parser.add_argument("--seconds", default="20")
    parser.add_argument("--servers", nargs="+", help="names of those to run (default: all)")
    arguments = parser.parse_args()
    known = commands(arguments.file.resolve(), arguments.directory.resolve())
    names = arguments.servers or list(known)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(arguments.passes):
        for name in random.Random(number).sample(names, len(names)):
            command, model = known[name]
            for load in measured(name, command, model, arguments.concurrency, arguments.seconds):
                found.setdefault((name, load["concurrency"]), []).append(load)
                print(
                    f"pass {number + 1}, {name}, {load['concurrency']} at once: {load['tokens']:.1f} tokens/s",
                    flush=True,
                )
    show(found, [name for name in names if any(key[0] == name for key in found)])


def measured(name: str, command: list[str], model: str, concurrency: list[str], seconds: str) -> list[dict]:
    """Returns what `llamita bench` finds of a server that runs for this alone; empty for one that does not start."""
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            if not answers(server):
                print(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
                return []
            result = Path(temporary) / "result"
            bench = [
                sys.executable,
                "-m",
                "llamita.cli.main",
                "bench",
                ADDRESS,
                "--model",
                model,
                "--output",
                str(result),
            ]
            bench += ["--concurrency", *concurrency, "--seconds", seconds, "--ignore-eos", "off", "--temperature", "0"]
            subprocess.run(bench, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            return [simple(load) for load in json.loads((result / "summary.json").read_text())["loads"]]
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            time.sleep(1)


def simple(load: dict) -> dict:
    """Returns the figures of a load that the table shows."""
    return {
        "concurrency": load["load"]["concurrency"],
        "tokens": load["output_tokens_per_second"],
        "first": load["time_to_first_token"]["median"],
        "gap": load["inter_token_latency"]["median"],
        "failed": sum(load["errors"].values()),
    }


def answers(server: subprocess.Popen[bytes]) -> bool:
    """Waits until the server lists its models; False where it ends or takes three minutes."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{ADDRESS}/v1/models", timeout=5):
                return True
        except OSError:
            time.sleep(0.5)
    return False


def show(found: dict[tuple[str, int], list[dict]], names: list[str]) -> None:
    table = Table(title="medians of the passes")
    for title in ("server", "at once", "tokens/s", "lowest to highest", "first token, ms", "gap, ms", "failed"):
        table.add_column(title, justify="left" if title == "server" else "right")
    for name in names:
        for (other, concurrency), loads in found.items():
            if other != name:
                continue
            tokens = [load["tokens"] for load in loads]
            table.add_row(
                name,
                str(concurrency),
                f"{statistics.median(tokens):.1f}",
                f"{min(tokens):.1f} to {max(tokens):.1f}",
                f"{1000 * statistics.median(load['first'] for load in loads):.0f}",
                f"{1000 * statistics.median(load['gap'] for load in loads):.1f}",
                str(sum(load["failed"] for load in loads)),
            )
    Console().print(table)


if __name__ == "__main__":
    main()

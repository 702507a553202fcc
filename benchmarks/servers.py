"""`llamita serve` beside other servers of the same model: output tokens a second, and waits, at 1, 4 and 16 streams.

    python benchmarks/servers.py --gguf SmolLM2-135M-Instruct-Q8_0.gguf [--seconds 60] [--tokens 64] [--report FILE]

Each contestant is started at a free port, waited for, asked by `llamita bench` at each number of streams, and ended
before the next begins; all have the same threads. llama_cpp.server reads the GGUF file as it is, and answers one
request at a time. `llamita serve` runs from that file, and from the directory that `llamita convert` makes of it, which
is what `transformers serve` is given, in float32. llama_cpp.server needs llama-cpp-python[server]. A contestant that is
not installed, does not start or does not answer within its time is named with the reason.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

LLAMITA = (sys.executable, "-m", "llamita.cli.main")
STREAMS = (1, 4, 16)


@dataclass(frozen=True)
class Contestant:
    """A server of a model."""

    name: str
    command: tuple[str, ...]
    """With {port} where the port goes."""
    model: str
    """The name by which it is asked for the model."""
    health: str
    """A path that is answered with 200 as soon as it serves."""
    needs: tuple[str, ...] = ()
    """Modules without which it does not start."""
    rival: str = ""
    """The name of the one of ours that it is compared with, which reads the same weights."""


class NoAnswerError(Exception):
    """A server that does not start, or does not answer in time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="a model with a chat template")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--words", type=int, default=100, help="of each prompt")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the start, and for a load's answers")
    parser.add_argument("--only", nargs="*", default=(), help="names of contestants")
    parser.add_argument("--report", type=Path, default=Path("servers.json"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        subprocess.run([*LLAMITA, "convert", str(arguments.gguf), str(directory)], check=True)
        listed = contestants(arguments.gguf.resolve(), directory, arguments.threads)
        for contestant in listed:
            if arguments.only and contestant.name not in arguments.only:
                continue
            print(f"== {contestant.name}", flush=True)
            found[contestant.name] = []
            try:
                with running(contestant, Path(temporary), arguments) as address:
                    for streams in arguments.streams:
                        found[contestant.name].append(measured(contestant, address, streams, arguments, temporary))
            except NoAnswerError as problem:
                reasons[contestant.name] = str(problem)
                print(f"{contestant.name}: {problem}", flush=True)
    report = {
        "cores": psutil.cpu_count(),
        "load_before": load,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
    }
    report |= {"loads": found, "reasons": reasons}
    arguments.report.write_text(json.dumps(report, indent=1))
    show(found, {contestant.name: contestant.rival for contestant in listed}, reasons)


def contestants(gguf: Path, directory: Path, threads: int) -> list[Contestant]:
    """Returns the servers in the order in which they run: ours before the one that it is compared with."""
    ours = {
        name: Contestant(
            name=f"llamita serve, {name}",
            command=(
                *(*LLAMITA, "serve", str(model), "--port", "{port}", "--threads", str(threads)),
                *("--device", "cpu", "--log-level", "warning", *more),
            ),
            model=model.stem,
            health="/health",
        )
        for name, model, more in (("GGUF", gguf, ()), ("directory", directory, ("--dtype", "float32")))
    }
    lcs = (sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--port", "{port}", "--n_ctx", "4096")
    lcs += ("--n_threads", str(threads), "--n_threads_batch", str(threads), "--verbose", "false")
    lcs += ("--interrupt_requests", "false")  # else a request cuts off the one before it
    transformers = (str(Path(sys.executable).with_name("transformers")), "serve", str(directory), "--port", "{port}")
    transformers += ("--device", "cpu", "--dtype", "float32", "--log-level", "warning")
    return [
        ours["GGUF"],
        Contestant(
            name="llama_cpp.server",
            command=lcs,
            model=str(gguf),
            health="/v1/models",
            needs=("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings", "dotenv"),
            rival=ours["GGUF"].name,
        ),
        ours["directory"],
        Contestant(
            name="transformers serve",
            command=transformers,
            model=str(directory),
            health="/health",
            needs=("transformers", "fastapi", "uvicorn"),
            rival=ours["directory"].name,
        ),
    ]


@contextlib.contextmanager
def running(contestant: Contestant, directory: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the address of a server that answers; ends it, and all that it started, whatever happens."""
    missing = [name for name in contestant.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise NoAnswerError(f"not installed: {', '.join(missing)}")
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", directory / "server.log"
    command = [part.replace("{port}", str(port)) for part in contestant.command]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + arguments.limit
        while not answers(address + contestant.health):
            if server.poll() is not None or time.monotonic() > deadline:
                ended = f"ended with {server.returncode}" if server.poll() is not None else "does not answer"
                raise NoAnswerError(f"{ended}; its last words: {log.read_text(errors='replace')[-500:]!r}")
            time.sleep(0.2)
        yield address
    finally:
        end(server)


def measured(
    contestant: Contestant, address: str, streams: int, arguments: argparse.Namespace, temporary: str
) -> dict[str, Any]:
    """Returns what `llamita bench` found at so many streams; NoAnswerError where nothing was answered in time."""
    output = Path(temporary) / "bench"
    command = [*LLAMITA, "bench", address, "--model", contestant.model, "--concurrency", str(streams)]
    command += ["--seconds", str(arguments.seconds), "--timeout", str(arguments.limit), "--temperature", "0"]
    command += ["--max-tokens", str(arguments.tokens), "--prompt-words", str(arguments.words), "--warmup", "1"]
    command += ["--output", str(output), "--overwrite"]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        bench.wait(arguments.seconds + 2 * arguments.limit)  # the warm-up, and then the load
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{streams} streams were not answered within {arguments.limit:g} seconds") from None
    finally:
        end(bench)
    summary = json.loads((output / "summary.json").read_text()) if (output / "summary.json").is_file() else {}
    if not summary.get("loads") or not summary["loads"][0]["completed"]:
        errors = summary["loads"][0]["errors"] if summary.get("loads") else "see above"
        raise NoAnswerError(f"nothing was answered at {streams} streams: {errors}")
    (load,) = summary["loads"]
    (output / "summary.json").unlink()
    return load


def show(found: dict[str, list[dict[str, Any]]], rivals: dict[str, str], reasons: dict[str, str]) -> None:
    """Prints a row for each contestant and number of streams, with the ratio to the one of ours beside it."""
    table = Table(title="output tokens a second; ours / theirs is above 1 where llamita serve is faster")
    headers = (
        "",
        "streams",
        "tokens/s",
        "ours / theirs",
        "first token, ms",
        "between tokens, ms",
        "answered",
        "failed",
    )
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left")
    for name, loads in found.items():
        ours = {load["load"]["concurrency"]: load["output_tokens_per_second"] for load in found.get(rivals[name], ())}
        for load in loads:
            streams, rate = load["load"]["concurrency"], load["output_tokens_per_second"]
            ratio = f"{ours[streams] / rate:.2f}" if streams in ours and rate else ""
            waits = (load["time_to_first_token"], load["inter_token_latency"])
            medians = (f"{1000 * wait['median']:.1f}" if wait else "-" for wait in waits)
            failed = str(load["requests"] - load["completed"])
            table.add_row(name, str(streams), f"{rate:.1f}", ratio, *medians, str(load["completed"]), failed)
    console = Console(width=max(120, Console().width))
    console.print(table)
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}", markup=False)


def answers(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=5.0).status_code == 200
    except httpx2.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started: politely, then not."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is ended then, too
    main()

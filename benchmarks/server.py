"""What the server costs beside its engine: tokens a second at 16 streams, and the time to the first token of one.

    python benchmarks/server.py --model MODEL [--passes 7] [--streams 16] [--tokens 128] [--report server.json]

The engine runs in a process of its own, `llamita serve` in another, and this process is the client, over sockets that
it reads without parsing more than it must. Passes alternate between the two, with the same prompts, which no pass has
seen before; ratios and differences are taken pass by pass. The client runs on the same cores, so its share of the
processor is reported too: on a machine of few cores, it is taken from the server's engine.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WORDS = ("river", "stone", "winter", "garden", "letter", "mountain", "window", "silver", "morning", "paper", "bridge")

ENGINE = """
import json, sys, threading, time
import llamita
from llamita import SamplingParams

model = llamita.load(sys.argv[1])
engine = model.engine

def run():
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True)
        begun = time.perf_counter()
        for prompt in asked["prompts"]:
            engine.add(model.request(prompt, params))
        times = {}
        while engine.has_work:
            for event in engine.step():
                times.setdefault(event.request_id, []).append(time.perf_counter() - begun)
        print(json.dumps(list(times.values())), flush=True)

threading.Thread(target=run).start()
"""
"""Steps in a thread that is not the main one, as a server does: OpenMP waits in another way there."""


@dataclass
class Passes:
    """What one contestant reached in each pass."""

    tokens_per_second: list[float] = field(default_factory=list)
    """While all streams write: from the last first token to the first end."""
    whole_tokens_per_second: list[float] = field(default_factory=list)
    """From the requests to the last token, the reading of prompts included."""
    first_token_seconds: list[float] = field(default_factory=list)
    """Of one request alone."""
    crowd_first_token_seconds: list[float] = field(default_factory=list)
    """The median of all streams that begin together."""
    processor_seconds: list[float] = field(default_factory=list)
    main_thread_seconds: list[float] = field(default_factory=list)
    """Of these, those of the main thread: in the server the event loop, with what the kernel does for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--report", type=Path, default=Path("server.json"))
    parser.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(arguments.model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server, port = start_server(arguments.model)
    try:
        assert engine.stdin is not None
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        found = measure(engine.stdin, engine.stdout, engine.pid, server.pid, port, arguments)
    finally:
        server.terminate()
        engine.kill()
        server.wait()
    report = {
        "load_before": psutil.getloadavg(),
        "cores": psutil.cpu_count(),
        **summary(*found, arguments.streams * arguments.tokens),
    }
    arguments.report.write_text(json.dumps(report, indent=1))
    print(json.dumps(report["summary"], indent=1))
    if arguments.picture is not None:
        draw(*found[:2], arguments.picture)


def start_server(model: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """Starts `llamita serve` at a free port; returns the process and the port once it answers."""
    command = [sys.executable, "-m", "llamita.cli.main", "serve", str(model), "--port", "0", "--log-level", "warning"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "serving" in line and "http://" in line:
            return server, int(line.split("http://")[1].split(":")[1].split()[0])
    raise RuntimeError("the server did not start; run `llamita serve` by hand to see why")


def measure(
    asks: IO[str], answers: IO[str], engine_pid: int, server_pid: int, port: int, arguments: Any
) -> tuple[Passes, Passes, list[float]]:
    """Runs the passes; returns the engine's, the server's, and the client's processor seconds of each pass."""
    order, passes, client_seconds = random.Random(5), (Passes(), Passes()), []

    def by_engine(prompts: Sequence[str], tokens: int) -> list[list[float]]:
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=asks, flush=True)
        times: list[list[float]] = json.loads(answers.readline())
        return times

    def by_server(prompts: Sequence[str], tokens: int) -> list[list[float]]:
        return asyncio.run(ask_all(port, prompts, tokens))

    contestants = ((by_engine, passes[0], engine_pid), (by_server, passes[1], server_pid))
    for number in range(-1, arguments.passes):
        crowd = [prompt(order, 24) for _ in range(arguments.streams)]
        alone = [prompt(order, 24) for _ in range(5)]
        for ask, record, pid in contestants if number % 2 else contestants[::-1]:
            before, main_before, own = cpu_seconds(pid), main_thread_seconds(pid), time.process_time()
            times = ask(crowd, arguments.tokens)
            spent, own = cpu_seconds(pid) - before, time.process_time() - own
            main_spent = main_thread_seconds(pid) - main_before
            alone_first = [ask([text], 4)[0][0] for text in alone]
            if number < 0:  # the first pass warms everything up
                continue
            record.tokens_per_second.append(steady_rate(times, arguments.tokens))
            whole = arguments.streams * arguments.tokens / max(stream[-1] for stream in times)
            record.whole_tokens_per_second.append(whole)
            record.crowd_first_token_seconds.append(statistics.median(stream[0] for stream in times))
            record.first_token_seconds.append(statistics.median(alone_first))
            record.processor_seconds.append(spent)
            record.main_thread_seconds.append(main_spent)
            if ask is by_server:
                client_seconds.append(own)
    return (*passes, client_seconds)


def prompt(order: random.Random, words: int) -> str:
    return " ".join(order.choices(WORDS, k=words))


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main_thread_seconds(pid: int) -> float:
    return sum(thread.user_time + thread.system_time for thread in psutil.Process(pid).threads() if thread.id == pid)


def steady_rate(times: Sequence[Sequence[float]], tokens: int) -> float:
    """Returns the tokens a second of all streams while all of them write.

    `times`: when each piece of each stream came. A piece is a token, but for the few tokens without a text of their
    own, so a stream's pieces are counted as its tokens in proportion.
    """
    begin, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    written = sum(sum(begin < moment <= end for moment in stream) * tokens / len(stream) for stream in times)
    return written / (end - begin)


async def ask_all(port: int, prompts: Sequence[str], tokens: int) -> list[list[float]]:
    """Asks for all streams at once; returns when each of their pieces came, in seconds."""
    begun = time.perf_counter()
    return await asyncio.gather(*(ask(port, text, tokens, begun) for text in prompts))


async def ask(port: int, text: str, tokens: int, begun: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(
        {"prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    times: list[float] = []
    rest = b""
    while part := await reader.read(1 << 16):
        times += [time.perf_counter() - begun] * part.count(b"data: {")
        rest = (rest + part)[-200:]
    writer.close()
    assert b"[DONE]" in rest, rest
    return times


def summary(engine: Passes, server: Passes, client_seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    shares = [b / a for a, b in zip(engine.tokens_per_second, server.tokens_per_second, strict=True)]
    whole = [b / a for a, b in zip(engine.whole_tokens_per_second, server.whole_tokens_per_second, strict=True)]
    added = [1000 * (b - a) for a, b in zip(engine.first_token_seconds, server.first_token_seconds, strict=True)]
    crowd = [
        1000 * (b - a) for a, b in zip(engine.crowd_first_token_seconds, server.crowd_first_token_seconds, strict=True)
    ]
    return {
        "summary": {
            "engine_tokens_per_second": round(statistics.median(engine.tokens_per_second), 1),
            "server_tokens_per_second": round(statistics.median(server.tokens_per_second), 1),
            "server_share": spread(shares, 3),
            "server_share_with_prompts": spread(whole, 3),
            "added_first_token_milliseconds": spread(added, 2),
            "added_first_token_milliseconds_crowd": spread(crowd, 2),
            "engine_processor_seconds": round(statistics.median(engine.processor_seconds), 2),
            "server_processor_seconds": round(statistics.median(server.processor_seconds), 2),
            "server_event_loop_microseconds_a_token": round(
                1e6 * statistics.median(server.main_thread_seconds) / tokens, 1
            ),
            "client_processor_seconds": round(statistics.median(client_seconds), 2),
        },
        "engine": asdict(engine),
        "server": asdict(server),
    }


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def draw(engine: Passes, server: Passes, path: Path) -> None:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, passes, colour in (("engine alone", engine, "#9ecae1"), ("server", server, "#2171b5")):
        left.plot(passes.tokens_per_second, marker="o", color=colour, label=name)
        right.plot([1000 * seconds for seconds in passes.first_token_seconds], marker="o", color=colour, label=name)
    left.set_ylabel("output tokens a second, all streams")
    right.set_ylabel("ms to the first token, one stream")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pass")
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

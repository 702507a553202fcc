"""A benchmark of an OpenAI-compatible server: its options, and the course of one from the first request to the last.

Each load is warmed up first, and measured alone. What a load's requests were and how they are counted lies in load.py
and metrics.py; files and pictures of a result are made in report.py.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llamita.workflows.benchmark.client import Ask, Client, Endpoint, base_url
from llamita.workflows.benchmark.load import Limit, run_load
from llamita.workflows.benchmark.metrics import Load, LoadSummary, RequestRecord, summarize
from llamita.workflows.benchmark.prompts import FilePrompts, Prompts, StoryPrompts

DEFAULT_CONCURRENCY = (1, 4, 16)
DEFAULT_SECONDS = 30.0
PROMPTS_OF_A_LOAD = 1 << 22
"""Each load has prompts of its own, numbered from its place times this."""
WARM_UP_NUMBER = 1 << 40
"""The number of the first prompt of requests that are not counted."""
LATE_SECONDS = 0.1
"""A client that sends later than this does not keep up with the load, which is noted."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure an OpenAI-compatible server under load: times to the first token, between tokens, to the end; throughput.

    Needs no model and no framework here: it speaks to any server. The API key, where the server wants one, is read from
    the variable LLAMITA_API_KEY or from a file, and is never shown or recorded.
    """

    url: tyro.conf.Positional[str]
    """The server's address, such as http://127.0.0.1:8000."""
    model: str | None = None
    """The model to ask. Left out: the first that the server lists."""
    endpoint: Endpoint = "chat"
    """What to ask for: chat completions or plain completions."""
    concurrency: tuple[int, ...] = ()
    """So many requests under way at every moment, one load each. Left out: 1 4 16, or none where --rate is given."""
    rate: tuple[float, ...] = ()
    """So many requests a second, at the random moments of a Poisson process, one load each."""
    requests: int | None = None
    """Requests of each load."""
    seconds: float | None = None
    """Seconds in which each load sends requests; those under way are waited for. Left out: 30, or no such limit."""
    warmup: int = 2
    """Requests before each load that are not counted; at least one is sent before the first."""
    prompt_words: int = 100
    """Words of each prompt, taken from Meadow's stories."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file of prompts in place of Meadow's: one a line, or records with prompt or messages (.jsonl)."""
    max_tokens: int = 64
    """The most tokens of an answer."""
    ignore_eos: Literal["auto", "on", "off"] = "auto"
    """Ask for answers of exactly --max-tokens (ignore_eos). auto: where the server takes that."""
    temperature: float | None = None
    """The temperature to ask for. Left out: the server's own."""
    timeout: float = 600.0
    """Seconds after which a request is given up and counted as failed."""
    seed: int = 0
    """Fixes the prompts, and the moments at which requests of a rate are sent."""
    key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file that holds the API key alone; it goes before LLAMITA_API_KEY."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIRECTORY")] = None
    """A directory to write: requests.jsonl (a line a request), summary.json and benchmark.png."""
    overwrite: bool = False
    """Replace an earlier result in the output directory."""

    def __post_init__(self) -> None:
        base_url(self.url)
        for name, values, least in (
            ("--concurrency", self.concurrency, 1),
            ("--requests", (self.requests,), 1),
            ("--warmup", (self.warmup,), 0),
            ("--prompt-words", (self.prompt_words,), 1),
            ("--max-tokens", (self.max_tokens,), 1),
        ):
            for value in values:
                if value is not None and value < least:
                    raise ValueError(f"{name} {value} must be at least {least}")
        for name, numbers in (("--rate", self.rate), ("--seconds", (self.seconds,)), ("--timeout", (self.timeout,))):
            for number in numbers:
                if number is not None and not 0 < number < float("inf"):
                    raise ValueError(f"{name} {number:g} must be more than 0")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature:g} must be at least 0")
        if self.output is not None and self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{self.output} exists already; choose another name, or replace it with --overwrite")

    @property
    def loads(self) -> list[Load]:
        """The loads in their order: those of fixed concurrency, then those of fixed rate."""
        concurrency = self.concurrency or (() if self.rate else DEFAULT_CONCURRENCY)
        return [Load(concurrency=number) for number in concurrency] + [Load(rate=number) for number in self.rate]

    @property
    def limit(self) -> Limit:
        """When each load sends no more."""
        seconds = DEFAULT_SECONDS if self.requests is None and self.seconds is None else self.seconds
        return Limit(self.requests, seconds)


@dataclass
class Benchmark:
    """A benchmark that has run, or is running: what was asked of whom, and the loads that are done, in order."""

    url: str
    ask: Ask | None = None
    """None until the server has answered."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know."""
    results: list[tuple[LoadSummary, list[RequestRecord]]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """How far a load is: its place among the loads, the seconds since it began, and the requests that have ended."""

    load: Load
    place: int
    loads: int
    seconds: float
    ended: int
    output_tokens: int


async def run_benchmark(
    config: BenchmarkConfig,
    benchmark: Benchmark,
    key: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Measures a server, load after load, and adds each to `benchmark` when it is done: a benchmark that is interrupted
    keeps those before.

    `on_progress` is called when a load begins, twice a second, and when a request has ended. Raises ValueError, in one
    line, where the server cannot be measured at all; what fails later is counted.
    """
    prompts: Prompts = StoryPrompts(config.prompt_words, config.seed)
    if config.prompts is not None:
        prompts = FilePrompts(config.prompts, plain=config.endpoint == "completions")
    async with Client(config.url, key, config.timeout) as client:
        benchmark.url = client.url
        model = await _chosen_model(client, config.model)
        ask = Ask(model, config.endpoint, config.max_tokens, config.temperature, config.ignore_eos != "off")
        benchmark.ask = ask = await _accepted(client, ask, prompts, config, benchmark.notes)
        for place, load in enumerate(config.loads):
            await _warm_up(client, ask, prompts, load, config.warmup - (place == 0))
            records = await _measure(client, ask, prompts, load, place, config, on_progress)
            if not records:
                benchmark.notes.append(f"no request was due within {config.limit.seconds:g} s at {load}")
                continue
            summary = summarize(load, records)
            benchmark.results.append((summary, records))
            if summary.latest_start_seconds > LATE_SECONDS:
                benchmark.notes.append(
                    f"at {load} this client sent a request {summary.latest_start_seconds:.2f} s late: it was the limit"
                )


async def _chosen_model(client: Client, wanted: str | None) -> str:
    """Returns the model to ask; ValueError where it is not there."""
    listed = await client.models()
    if wanted is None:
        if not listed:
            raise ValueError(f"the server at {client.url} lists no models; name one with --model")
        return listed[0]
    if listed is not None and wanted not in listed:
        raise ValueError(f"the server at {client.url} has no model {wanted!r}; it has {', '.join(listed) or 'none'}")
    return wanted


async def _accepted(client: Client, ask: Ask, prompts: Prompts, config: BenchmarkConfig, notes: list[str]) -> Ask:
    """Returns the request in the form in which the server takes it; ValueError where it takes none.

    Sends the first request that is not counted, and a second without `ignore_eos` where that is refused.
    """
    messages = prompts.messages(WARM_UP_NUMBER)
    record = await client.request(ask, messages, 0, 0.0, lambda: 0.0)
    if record.error in ("http_400", "http_422") and config.ignore_eos == "auto":
        ask = replace(ask, ignore_eos=False)
        record = await client.request(ask, messages, 0, 0.0, lambda: 0.0)
        notes.append("the server takes no ignore_eos: answers end where the model ends them")
    if record.error in ("http_401", "http_403"):
        raise ValueError(client.refused_key(record.status or 0))
    if record.error is not None:
        raise ValueError(f"the first request to {client.url} failed ({record.error}): {record.message}")
    if record.tokens_counted_by == "chunks":
        notes.append("the server counts no tokens in its streams: chunks with text are counted as tokens")
    return ask


async def _warm_up(client: Client, ask: Ask, prompts: Prompts, load: Load, count: int) -> None:
    """Sends requests whose times are not kept, as many at once as the load will."""
    numbers = iter(range(count))

    async def ask_on() -> None:
        for number in numbers:
            await client.request(ask, prompts.messages(WARM_UP_NUMBER + 1 + number), number, 0.0, lambda: 0.0)

    await asyncio.gather(*(ask_on() for _ in range(min(load.concurrency or 1, count))))


async def _measure(
    client: Client,
    ask: Ask,
    prompts: Prompts,
    load: Load,
    place: int,
    config: BenchmarkConfig,
    on_progress: Callable[[Progress], None],
) -> list[RequestRecord]:
    begun = time.perf_counter()
    ended = output_tokens = 0

    def clock() -> float:
        return time.perf_counter() - begun

    def report() -> None:
        on_progress(Progress(load, place, len(config.loads), clock(), ended, output_tokens))

    async def send(number: int, due: float) -> RequestRecord:
        nonlocal ended, output_tokens
        messages = prompts.messages(place * PROMPTS_OF_A_LOAD + number)
        record = await client.request(ask, messages, number, due, clock)
        ended, output_tokens = ended + 1, output_tokens + record.output_tokens
        report()
        return record

    async def tick() -> None:
        while True:
            report()
            await asyncio.sleep(0.5)

    ticking = asyncio.create_task(tick())
    try:
        return await run_load(load, config.limit, send, clock, seed=config.seed + place)
    finally:
        ticking.cancel()

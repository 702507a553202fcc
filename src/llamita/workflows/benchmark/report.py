"""The result of a benchmark as rows for a table, and as a directory of files: requests, summary and picture."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.storage import files
from llamita.workflows.benchmark.benchmark import Benchmark, BenchmarkConfig
from llamita.workflows.benchmark.metrics import Distribution, LoadSummary, RequestRecord

LATENCIES: Mapping[str, str] = {
    "time_to_first_token": "time to first token",
    "inter_token_latency": "between tokens",
    "time_per_output_token": "per output token",
    "end_to_end_latency": "end to end",
}
"""The fields of a LoadSummary that are distributions, and how a reader sees them named."""
PERCENTILES: Mapping[str, str] = {"median": "median", "p95": "95th", "p99": "99th"}
UNRECORDED = ("key_file", "output", "overwrite")


def table_rows(summaries: Sequence[LoadSummary]) -> list[list[str]]:
    """Returns the rows of a table with a column for each load: a label, then a text for each. Latencies are in ms."""
    counts: list[tuple[str, Callable[[LoadSummary], str]]] = [
        ("requests", lambda summary: f"{summary.requests:,}"),
        ("answered in full", lambda summary: f"{summary.completed:,}"),
        ("requests/s", lambda summary: f"{summary.requests_per_second:.2f}"),
        ("output tokens/s", lambda summary: f"{summary.output_tokens_per_second:,.1f}"),
        ("prompt tokens, mean", lambda summary: _mean(summary.prompt_tokens, summary.completed)),
        ("output tokens, mean", lambda summary: _mean(summary.output_tokens, summary.completed)),
    ]
    if any(summary.cached_tokens for summary in summaries):
        counts.insert(5, ("of them cached, mean", lambda summary: _mean(summary.cached_tokens, summary.completed)))
    kinds = sorted({kind for summary in summaries for kind in summary.errors})
    rows = [[label, *map(text, summaries)] for label, text in counts]
    rows[2:2] = [[named_error(kind), *(f"{summary.errors.get(kind, 0):,}" for summary in summaries)] for kind in kinds]
    for name, label in LATENCIES.items():
        for percentile, shown in PERCENTILES.items():
            row = [f"{label}, {shown}"]
            for summary in summaries:
                found: Distribution | None = getattr(summary, name)
                row.append("-" if found is None else _milliseconds(getattr(found, percentile)))
            rows.append(row)
    return rows


def named_error(kind: str) -> str:
    """Returns the label of a kind of failure, such as `refused (429)`."""
    if kind in ("http_429", "http_503"):
        return f"refused ({kind.removeprefix('http_')})"
    return f"failed ({kind.removeprefix('http_').replace('_', ' ')})"


def write(config: BenchmarkConfig, benchmark: Benchmark, directory: Path, begun: float, interrupted: bool) -> None:
    """Writes requests.jsonl, summary.json and benchmark.png into a directory that appears whole or not at all.

    `begun` is when the benchmark began, in seconds since 1970. An earlier directory is replaced if the options say so.
    """
    summaries = [summary for summary, _ in benchmark.results]
    with files.atomic_directory(directory, overwrite=config.overwrite) as written:
        with (written / "requests.jsonl").open("w", encoding="utf-8") as file:
            for place, (_, records) in enumerate(benchmark.results):
                for record in records:
                    file.write(json.dumps(request_line(place, summaries[place], record)) + "\n")
        summary = summary_of(config, benchmark, begun, interrupted)
        (written / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        plot(summaries, f"{benchmark.ask.model if benchmark.ask else ''} at {benchmark.url}", written / "benchmark.png")


def summary_of(config: BenchmarkConfig, benchmark: Benchmark, begun: float, interrupted: bool) -> dict[str, Any]:
    """Returns what summary.json holds: the server, the options, the client's machine, and the statistics by load."""
    options = {name: value for name, value in asdict(config).items() if name not in UNRECORDED}
    options["prompts"] = str(config.prompts) if config.prompts else None
    return {
        "url": benchmark.url,
        "ask": asdict(benchmark.ask) if benchmark.ask else None,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "interrupted": interrupted,
        "options": options,
        "limit": asdict(config.limit),
        "notes": benchmark.notes,
        "client": {"llamita": __version__, "python": platform.python_version(), "cores": os.cpu_count()},
        "loads": [_plain(asdict(summary)) for summary, _ in benchmark.results],
    }


def request_line(place: int, summary: LoadSummary, record: RequestRecord) -> dict[str, Any]:
    """Returns a line of requests.jsonl: the load, all that was recorded, and the latencies that follow from it."""
    return _plain(
        {
            "load": place,
            **{name: value for name, value in asdict(summary.load).items() if value is not None},
            **asdict(record),
            "time_to_first_token": record.time_to_first_token,
            "time_per_output_token": record.time_per_output_token,
            "end_to_end_latency": record.end_to_end_latency,
        }
    )


def plot(summaries: Sequence[LoadSummary], title: str, path: Path) -> None:
    """Draws latencies by percentile, and throughput, over the loads, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).flat
    for name, label in LATENCIES.items():
        axes = next(panels)
        for number, (percentile, shown) in enumerate(PERCENTILES.items()):
            found: list[Distribution | None] = [getattr(summary, name) for summary in summaries]
            values = [math.nan if value is None else 1e3 * getattr(value, percentile) for value in found]
            _draw(axes, summaries, values, f"C{number}", shown)
        axes.set_title(label)
        axes.set_ylabel("ms")
        axes.legend(frameon=False)
    failed = any(summary.completed < summary.requests for summary in summaries)
    for label, name in (("output tokens", "output_tokens_per_second"), ("requests", "requests_per_second")):
        axes = next(panels)
        _draw(axes, summaries, [getattr(summary, name) for summary in summaries], "C3", label)
        axes.set_title(f"{label} a second" + (", answered in full" if failed else ""))
    for axes in figure.axes:
        axes.set_xticks(range(len(summaries)), [str(summary.load) for summary in summaries])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, summaries: Sequence[LoadSummary], values: Sequence[float], color: str, label: str) -> None:
    """Draws values over the loads; a line joins loads of one kind alone."""
    for is_open in (False, True):
        places = [place for place, summary in enumerate(summaries) if (summary.load.rate is not None) == is_open]
        if places:
            axes.plot(places, [values[place] for place in places], marker="o", color=color, label=label)
            label = "_nolegend_"


def _plain(value: Any) -> Any:
    """Returns a value for JSON: times to the microsecond, tuples as lists, and no NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if value == value else None
    return value


def _mean(total: int, count: int) -> str:
    return f"{total / count:.1f}" if count else "-"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 1 else 0}f}"

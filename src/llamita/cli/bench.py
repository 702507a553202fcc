"""`llamita bench`: measures a server under load; prints a table and, where asked, writes the record.

The work lies in workflows/benchmark.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from llamita.workflows.benchmark.benchmark import BenchmarkConfig

KEY_VARIABLE = "LLAMITA_API_KEY"
MOST_KEY_BYTES = 10_000


def run(config: BenchmarkConfig) -> int:

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from llamita.progress import ProgressBar
    from llamita.training import exit_status
    from llamita.workflows.benchmark import report
    from llamita.workflows.benchmark.benchmark import Benchmark, Progress, run_benchmark

    benchmark, begun, interrupted = Benchmark(config.url), time.time(), False
    key = api_key(config.key_file)
    shown = -1
    with ProgressBar("warming up", unit="tokens") as bar:

        def show(progress: Progress) -> None:
            nonlocal shown
            by_time = config.limit.requests is None
            if progress.place != shown:
                shown = progress.place
                label = f"{progress.load} (load {progress.place + 1} of {progress.loads})"
                bar.begin(label, config.limit.seconds if by_time else config.limit.requests)
            done = min(progress.seconds, config.limit.seconds or 0.0) if by_time else progress.ended
            bar.update(done, progress.output_tokens)

        try:
            asyncio.run(run_benchmark(config, benchmark, key, show))
        except KeyboardInterrupt:
            interrupted = True
    summaries = [summary for summary, _ in benchmark.results]
    if summaries:
        assert benchmark.ask is not None
        print(f"{benchmark.ask.model} at {benchmark.url}, {benchmark.ask.endpoint}, times in milliseconds")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, header in enumerate(["", *(str(summary.load) for summary in summaries)]):
            table.add_column(header, justify="right" if number else "left")
        for row in report.table_rows(summaries):
            table.add_row(*row)
        Console().print(table)
        if config.output is not None:
            report.write(config, benchmark, config.output, begun, interrupted)
            print(f"wrote {config.output}")
    for note in benchmark.notes:
        print(f"note: {note}", file=sys.stderr)
    if interrupted:
        print("interrupted; loads that were not done are left out", file=sys.stderr)
        return exit_status.INTERRUPTED
    return 0 if summaries and all(summary.completed for summary in summaries) else 1


def api_key(path: Path | None) -> str | None:
    """Returns the key in a file or, without one, in the environment; None where there is neither."""
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    with path.open("rb") as file:
        content = file.read(MOST_KEY_BYTES)
    try:
        key = content.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or len(key.split()) != 1:
        raise ValueError(f"--key-file {path} must hold an API key alone, in one line of ASCII letters")
    return key

"""`llamita generate MODEL --input ...`: a file of prompts, with a bar and figures at the end.

What is done lies in inference/batch.py.
"""

import dataclasses
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llamita.inference import batch
from llamita.inference.llm import LLM
from llamita.plan import SamplingParams


def run_batch(llm: LLM, model: Path, source: Path, output: Path, params: SamplingParams, template: str | None) -> int:
    """Do all lines of `source` that `output` lacks; 1 where one of them failed."""
    items = batch.read_items(llm, source, params, template)
    made_from = {
        "model": str(model.resolve()) if model.exists() else str(model),
        "input": batch.digest(source),
        "options": dataclasses.asdict(params) | {"template": template},
    }
    kept, outcomes = batch.run_batch(llm, items, output, made_from)
    console = Console(stderr=True)
    totals = batch.Totals()
    started = time.perf_counter()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if kept:
        print(f"{kept} of {len(items)} are in {output} already", file=sys.stderr)
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(items) - kept, speed="")
            for item, outcome in outcomes:
                batch.count(totals, item, outcome)
                speed = totals.generated_tokens / (time.perf_counter() - started)
                progress.update(task, advance=1, speed=f"{speed:,.0f} tokens/s")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    seconds = time.perf_counter() - started
    print(
        f"{totals.requests} requests, {totals.prompt_tokens} prompt tokens and {totals.generated_tokens} generated in "
        f"{seconds:.1f} s, {totals.generated_tokens / seconds:,.1f} tokens/s"
        + (f"; {totals.failed} failed" if totals.failed else ""),
        file=sys.stderr,
    )
    return 1 if totals.failed else 0

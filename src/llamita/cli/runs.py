"""`llamita runs`: prints the runs under a directory as a table, one run in full, or the differences of two runs.

workflows/runs.py reads the runs; here they become lines and tables.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from llamita.workflows.runs import Run

WIDTH_OF_FILES = 160  # columns where the output is no terminal
STATE_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red"}


@dataclass(frozen=True)
class ListConfig:
    """List the training runs under a directory with their kind, size, steps, best validation result and state."""

    directory: tyro.conf.Positional[Path] = Path("runs")
    """The directory to search, with its subdirectories."""


@dataclass(frozen=True)
class ShowConfig:
    """Show all that is known of a run: sessions, options, model, hashes, environment, results, evaluations."""

    run: tyro.conf.Positional[Path]
    """Directory of a training run."""


@dataclass(frozen=True)
class DiffConfig:
    """List every option, hash, value of the environment and final metric in which two runs differ."""

    a: tyro.conf.Positional[Path]
    """Directory of a training run."""
    b: tyro.conf.Positional[Path]
    """Directory of another training run."""


def list_runs(config: ListConfig) -> int:
    from rich.table import Table
    from rich.text import Text

    from llamita.workflows import runs

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "kind", "parameters", "steps", "best", "when", "state"):
        table.add_column(name, justify="right" if name in ("parameters", "steps") else "left", overflow="fold")
    directory, faults = config.directory, []
    for path in runs.find(directory):
        name = _text(str(path.relative_to(directory)) if path != directory else str(path))
        try:
            run = runs.open_run(path)
        except (ValueError, OSError) as error:
            table.add_row(name, *[""] * 5, Text("unreadable", style="red"))
            faults.append(_text(str(error)))
            continue
        state = Text(run.state, style=STATE_STYLES.get(run.state, "yellow"))
        steps = f"{run.steps_done}/{run.steps}" if run.steps else str(run.steps_done)
        size = f"{run.parameters:,}" if run.parameters else ""
        table.add_row(name, _text(run.kind), size, steps, _best(run), _moment(run.started or run.written), state)
    if not table.row_count:
        print(f"there are no training runs under {directory}")
        return 0
    console = _console()
    console.print(table)
    for fault in faults:
        console.print(f"note: {fault}", style="yellow")
    return 0


def show(config: ShowConfig) -> int:
    from llamita.workflows import runs

    run = config.run
    found = runs.open_run(run)
    identity, last = found.manifest["identity"], found.sessions[-1] if found.sessions else {}
    console = _console()
    steps = f"{found.steps_done} of {found.steps}" if found.steps else str(found.steps_done)
    about = {
        "kind": found.kind,
        "state": found.state,
        "steps": steps,
        "best": _best(found),
        "parameters": f"{found.parameters:,}" if found.parameters else None,
        "checkpoints": ", ".join(sorted(path.name for path in (run / "checkpoints").glob("step-*"))),
        "autopsies": ", ".join(f"step {report['step']} ({report['kind']})" for report in found.autopsies),
    }
    _section(console, str(run), {key: value for key, value in about.items() if value})
    for number, session in enumerate(found.sessions, 1):
        _section(console, f"session {number}", _session(session, found.state if session is last else None))
    _section(console, "code and environment", {**last.get("code", {}), **last.get("environment", {})})
    _section(console, "conditions", found.manifest.get("conditions"))
    _section(console, "options", found.arguments)
    _section(console, "model", identity.get("model"))
    rest = {key: value for key, value in identity.items() if key not in ("kind", "model", "training")}
    more = {key: found.manifest[key] for key in ("tokenizer", "floor", "best_measure") if key in found.manifest}
    _section(console, "data and identity", rest | more)
    metrics = found.final_metrics()
    _section(console, "results", {key: value for key, value in metrics.items() if not key.startswith("evaluation.")})
    for evaluation in found.evaluations:
        facts = {"when": _moment(evaluation.time), "command": evaluation.command, "model": evaluation.model}
        _section(console, f"evaluation {evaluation.name}", {**evaluation.metrics, **facts})
    for fault in found.faults:
        console.print(f"note: {_text(fault)}", style="yellow")
    return 0


def diff(config: DiffConfig) -> int:
    from rich.table import Table

    from llamita.workflows import runs

    found = runs.differences(runs.open_run(config.a), runs.open_run(config.b))
    if not found:
        print("the runs differ in nothing but their times")
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", _text(str(config.a)), _text(str(config.b))):
        table.add_column(name, overflow="fold")
    for key, left, right in found:
        table.add_row(_text(key), _value(left), _value(right))
    _console().print(table)
    return 0


def _session(session: Mapping[str, Any], state: str | None) -> dict[str, Any]:
    """Returns a session as names and texts; one that says `running` and is not the last was killed."""
    said = session.get("state")
    steps = [str(session[key]) for key in ("first_step", "last_step") if session.get(key) is not None]
    return {
        "began": _moment(session.get("started")),
        "ended": _moment(session.get("ended")),
        "how": state or ("killed" if said == "running" else said),
        "reason": session.get("reason"),
        "steps": " to ".join(steps),
        "command": session.get("command"),
        "directory": session.get("directory"),
        "process": session.get("process"),
    }


def _section(console: "Console", title: str, values: Mapping[str, Any] | None) -> None:
    from rich.table import Table

    from llamita.training.run_directory import flatten

    flat = {key: value for key, value in flatten(values or {}).items() if value not in (None, "")}
    if not flat:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in flat.items():
        table.add_row(f"  {_text(key)}", _value(value))
    console.print(_text(title), style="bold")
    console.print(table)


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=WIDTH_OF_FILES)


def _best(run: "Run") -> str:
    if run.best is None:
        return ""
    name, value, step = run.best
    return f"{name} {value:.4f} at {step}"


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return _text(f"{value:.6g}" if isinstance(value, float) else str(value))


def _text(text: str) -> str:
    from llamita.training.display import printable

    return printable(text)

"""A run as one HTML page that needs nothing else: what was trained, its curves, samples, evaluations, how to repeat it.

Gathers what the page says; the page itself is templates/report.html, its pictures are report_curves.py's. All text of a
run is escaped, for models write what they like. Works on a run that goes on, was killed or has no evaluation.
"""

import base64
import importlib.resources
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import llamita
from llamita.evaluation.records import DIRECTORY, EvaluationRecord, with_errors
from llamita.storage import files
from llamita.training import record
from llamita.training.autopsy import GLIMPSE, cause, layer_norms
from llamita.training.display import duration, printable
from llamita.training.run_directory import flatten
from llamita.workflows import report_curves
from llamita.workflows.runs import UNFINISHED, Run, open_run

MARK = '<meta name="generator" content="Llamita'
SAMPLES, SAMPLE_CHARACTERS, CHECKS, AUTOPSIES = 8, 3000, 16, 20  # shown at most
PICTURE_BYTES = 4_000_000
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
STATES = {
    record.RUNNING: "is going on; this page shows what was there when it was written",
    record.FINISHED: "went to its end",
    record.INTERRUPTED: "was interrupted and can go on with --resume",
    record.FAILED: "failed",
    record.KILLED: "was killed: it ended without a word. It can go on with --resume from its newest checkpoint",
    UNFINISHED: "ended before its last step; how is not recorded",
}


def write(run: Path, output: Path | None = None) -> Path:
    """Write the page of a run, RUN/report.html unless told otherwise, and return where it lies.

    An earlier page is replaced; FileExistsError where the file is something else. FileNotFoundError: there is no run.
    """
    output = output or run / "report.html"
    found = open_run(run)
    if output.is_dir():
        raise ValueError(f"{output} is a directory; --output must name the file to write")
    if output.exists() and MARK.encode() not in output.read_bytes()[:2000]:
        raise FileExistsError(f"{output} exists and is no report; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(output, page(found).encode("utf-8", "replace"))
    return output


def page(run: Run) -> str:
    """The page as text."""
    source = importlib.resources.files("llamita.workflows").joinpath("templates/report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "moment": moment, "plain": printable}
    return environment.from_string(source).render(content(run))


def content(run: Run) -> dict[str, Any]:
    """Returns the values that the template fills in."""
    identity = run.manifest["identity"]
    rest = {key: value for key, value in identity.items() if key not in ("kind", "model", "training", "rows")}
    hashes = flatten({"tokenizer": run.manifest.get("tokenizer"), **rest})
    session = run.sessions[-1] if run.sessions else {}
    return {
        "name": run.path.resolve().name,
        "version": llamita.__version__,
        "now": time.time(),
        "state": run.state,
        "state_words": STATES.get(run.state, run.state),
        "reason": session.get("reason") if run.state == record.FAILED else None,
        "words": in_words(run),
        "facts": facts(run),
        "curves": report_curves.curves(run),
        "checks": checks(run),
        "measures": [name for name in report_curves.measures(run) if any(name in _measured(c) for c in run.checks)],
        "autopsies": [autopsy_of(found) for found in run.autopsies[-AUTOPSIES:]],
        "samples": samples(run.path / "samples.txt"),
        "evaluations": [evaluation(run.path, file) for file in run.evaluations],
        "faults": run.faults,
        "sessions": sessions(run),
        "code": session.get("code") or {},
        "environment": flatten(session.get("environment") or {}),
        "conditions": run.manifest.get("conditions") or {},
        "hashes": {key: value for key, value in hashes.items() if value not in (None, "")},
        "model": flatten(identity.get("model") or {}),
        "options": flatten(run.arguments),
    }


def in_words(run: Run) -> str:
    """Returns what was trained, in a sentence or two."""
    shape = run.model
    if shape is None:
        what = "A model"
    else:
        labels = f" that tells {shape.num_labels} labels apart" if shape.num_labels else ""
        layers = f"{shape.num_hidden_layers} layer{'s' if shape.num_hidden_layers > 1 else ''}"
        what = (
            f"A Llama-family model{labels} of {run.parameters:,} parameters ({layers} of width {shape.hidden_size}, "
            f"{shape.num_attention_heads} heads, a vocabulary of {shape.vocab_size:,})"
        )
    base = run.arguments.get("model")
    how = "trained from nothing" if run.kind == "pretraining" else f"tuned ({run.kind})"
    data = run.arguments.get("data")
    source = f" from {Path(str(base)).name}" if base else ""
    read = [data] if isinstance(data, str) else data if isinstance(data, list) and run.kind == "pretraining" else []
    on = f" on {' and '.join(Path(str(place)).name for place in read)}" if read else ""
    rows = run.arguments.get("batch_size")
    updates = f"{run.steps_done:,} of {run.steps:,}" if run.steps else f"{run.steps_done:,}"
    return f"{what}, {how}{source}{on}: {updates} updates" + (f" of {rows} rows each." if rows else ".")


def facts(run: Run) -> list[tuple[str, str]]:
    """The metrics that a reader looks for first."""
    found: list[tuple[str, str]] = []
    if run.best:
        name, value, step = run.best
        found.append((f"best validation {name.replace('_', ' ')}, at step {step:,}", f"{value:.4f}"))
    if run.checks:
        last = run.checks[-1]
        shown = (("perplexity", "perplexity", ".2f"), ("bits_per_byte", "bits per byte", ".4f"))
        found += [(title, f"{last[key]:{form}}") for key, title, form in shown if last.get(key) is not None]
        floor = report_curves.floor_per_target(run)
        found += [("least possible loss, about", f"{floor:.4f}")] if floor else []  # it is that of other documents
    if run.parameters:
        found.append(("parameters", f"{run.parameters:,}"))
    if run.updates:
        seconds = sum(line.get("seconds") or 0 for line in run.updates)
        speeds = [line["tokens_per_second"] for line in run.updates if line.get("tokens_per_second")]
        memory = max(line.get("memory_bytes") or 0 for line in run.updates)
        found.append(("targets learned from", f"{sum(line.get('targets') or 0 for line in run.updates):,}"))
        found.append(("time in updates", duration(seconds)))
        found += [("tokens per second", f"{statistics.median(speeds):,.0f}")] if speeds else []
        found += [("memory at most", f"{memory / 1e9:.2f} GB")] if memory else []
    return found


def checks(run: Run) -> list[dict[str, Any]]:
    """The evaluations made while training, evenly spaced where there are many, the best and the last among them."""
    lines = run.checks
    best = max((i for i, line in enumerate(lines) if line.get("best")), default=len(lines) - 1)
    kept = sorted({*spread(len(lines), CHECKS), best}) if lines else []
    return [{**lines[i], "measures": _measured(lines[i]), "chosen": i == best} for i in kept]


def autopsy_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page says of an update that went wrong: its rows, suspects first, and the layers beside those
    of the batch before."""
    before = found["before"] or {"grad_norms": {}, "activations": {}}
    layers = []
    norms, norms_before = layer_norms(found["at"]["grad_norms"]), layer_norms(before["grad_norms"])
    layers += [("gradient norm", place, norm, norms_before.get(place)) for place, norm in norms.items()]
    for place, size in found["at"]["activations"].items():
        layers.append(("activation, root mean square", place, size, before["activations"].get(place)))
    rows = [
        row | {"texts": {name: shortened(text, row["suspect"]) for name, text in row["texts"].items()}}
        for row in found["rows"]
    ]
    return {**found, "rows": rows, "layers": layers, "cause": cause(found)}


def shortened(text: str, suspect: bool) -> str:
    most = SAMPLE_CHARACTERS if suspect else GLIMPSE
    return text[:most] + ("…" if len(text) > most else "")


def samples(file: Path) -> list[tuple[int, str]]:
    """Returns what the model wrote as it learned: (step, text), evenly spaced, the last among them."""
    if not file.is_file():
        return []
    parts = re.split(r"^=== step (\d+) ===\n", file.read_text("utf-8", "replace"), flags=re.MULTILINE)[1:]
    pairs = [(int(step[:12]), text.strip("\n")) for step, text in zip(parts[::2], parts[1::2], strict=True)]
    chosen = [pairs[i] for i in spread(len(pairs), SAMPLES)]
    return [(step, text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")) for step, text in chosen]


def evaluation(run: Path, found: EvaluationRecord) -> dict[str, Any]:
    """A record with its standard errors beside what they belong to, its pictures as data."""
    pictures = [(name, picture(run / DIRECTORY, name)) for name in found.pictures]
    return {"record": found, "rows": with_errors(found.metrics), "pictures": pictures}


def picture(directory: Path, name: str) -> str | None:
    """A file of the directory as a data: address; None where it is missing, too large, elsewhere or no picture."""
    file = directory / name
    kind = PICTURES.get(file.suffix.lower())
    inside = file.resolve().parent == directory.resolve()
    if kind is None or not inside or not file.is_file() or file.stat().st_size > PICTURE_BYTES:
        return None
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def sessions(run: Run) -> list[dict[str, Any]]:
    """The sessions, all but the last of those that say `running` having been killed."""
    found = []
    for number, session in enumerate(run.sessions, 1):
        said = session.get("state", UNFINISHED)
        state = run.state if number == len(run.sessions) else record.KILLED if said == record.RUNNING else said
        known = {key: session.get(key) for key in ("command", "started", "ended", "reason", "first_step", "last_step")}
        found.append(known | {"state": state})
    return found


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the numbers below `count`, evenly spaced, the first and the last among them."""
    if count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else printable(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def moment(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or seconds <= 0:
        return "–"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "–"


def _measured(line: Mapping[str, Any]) -> Mapping[str, Any]:
    return line.get("measures") or {}

"""Records of evaluations of a run's checkpoints, as files in the run: RUN/evaluations/NAME.json.

    {"name": "perplexity", "metrics": {"perplexity": 1.37, ...}, "command": "llamita evaluate ...",
     "time": 1767225600.0, "model": "checkpoints/step-00004000", "pictures": ["confusion.png"]}

`metrics` are numbers by name; `NAME_stderr` is the standard error of NAME, and objects in it group names. `time` is in
seconds since 1970, `model` lies in the run, `pictures` are files beside the record. Every evaluation writes
one; `llamita runs` and `llamita report` read them. Knows nothing of how anything is measured.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamita.storage import files

DIRECTORY = "evaluations"
MANIFEST = "run.json"


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation of a model; `metrics` are flat, with dots between the names of groups."""

    name: str
    metrics: Mapping[str, float | None]
    command: str = ""
    time: float = 0.0
    model: str = ""
    pictures: tuple[str, ...] = ()


def run_of(model: Path) -> Path | None:
    """Returns the run that `model` is, or whose `best`, `last` or checkpoint it is; None for other models."""
    path = model.absolute()
    if not path.exists():  # the name of a model on the hub
        return None
    whole = path.resolve()
    checkpoints = (whole.parent.parent,) if whole.parent.name == "checkpoints" else ()
    for candidate in (path, path.parent, *checkpoints):
        if (candidate / MANIFEST).is_file():
            return candidate
    return None


def write(
    run: Path,
    name: str,
    metrics: Mapping[str, Any],
    command: str,
    model: Path | None = None,
    pictures: Sequence[str] = (),
) -> Path:
    """Writes a record into a run, in place of an earlier one of that name; numbers that are not finite become null.

    `pictures` are names of files that lie in RUN/evaluations already.
    """
    resolved = model.resolve() if model else None
    inside = resolved is not None and resolved.is_relative_to(run.resolve())
    where = str(resolved.relative_to(run.resolve())) if inside and resolved else ""
    record = EvaluationRecord(name, flat(metrics), command, round(time.time(), 3), where, tuple(pictures))
    file = run / DIRECTORY / f"{file_name(name)}.json"
    file.parent.mkdir(exist_ok=True)
    files.atomic_write(file, json.dumps(asdict(record), indent=2, allow_nan=False) + "\n")
    return file


def read(run: Path) -> tuple[list[EvaluationRecord], list[str]]:
    """Returns the records of a run, oldest first, and a line for each file that is no record."""
    found, faults = [], []
    for file in sorted((run / DIRECTORY).glob("*.json")):
        try:
            found.append(_record(file))
        except (ValueError, OSError) as error:
            faults.append(f"{file.name} is no record of an evaluation: {error}")
    return sorted(found, key=lambda record: record.time), faults


def file_name(name: str) -> str:
    """Returns the name with nothing in it but characters that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:120] or "evaluation"


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Returns the metrics with groups flattened; what is no number is left out, infinity and NaN become None."""
    result: dict[str, float | None] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            result[f"{prefix}{name}"] = value if value is not None and math.isfinite(value) else None
    return result


def with_errors(metrics: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns each metric's name and value with its standard error, None where it has none."""
    return [
        (name, value, metrics.get(f"{name}_stderr"))
        for name, value in metrics.items()
        if not (name.endswith("_stderr") and name.removesuffix("_stderr") in metrics)
    ]


def _record(file: Path) -> EvaluationRecord:
    content = files.read_json(file)
    metrics, name = content.get("metrics"), content.get("name", file.stem)
    if not isinstance(metrics, dict) or not isinstance(name, str):
        raise ValueError("it must have an object `metrics`, and a text for a `name`")
    when, pictures = content.get("time"), content.get("pictures") or []
    return EvaluationRecord(
        name,
        flat(metrics),
        str(content.get("command") or ""),
        float(when) if isinstance(when, int | float) and math.isfinite(when) else 0.0,
        str(content.get("model") or ""),
        tuple(picture for picture in pictures if isinstance(picture, str)) if isinstance(pictures, list) else (),
    )

"""Runs as they lie on disk: found under a directory, read, summed up, held against one another.

Reads run.json, metrics.jsonl and evaluations/; writes nothing, and takes no lock for longer than a moment. Runs of
older versions, which lack some of it, open as well. How any of it is shown is not known here.
"""

import dataclasses
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llamita.evaluation import records
from llamita.evaluation.records import EvaluationRecord
from llamita.model.config import ModelConfig
from llamita.model.sizes import count_parameters
from llamita.training import metrics, record, run_directory
from llamita.training.autopsy import read_autopsy
from llamita.training.run_directory import AUTOPSIES, MANIFEST, flatten, read_manifest

UNFINISHED = "unfinished"  # of a run that does not say how it ended
PREDICTED = ("loss", "perplexity", "nats_per_character", "bits_per_byte")


@dataclass(frozen=True)
class Run:
    """A run at the moment when it was read."""

    path: Path
    manifest: Mapping[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    evaluations: list[EvaluationRecord]
    faults: list[str]  # files that could not be read
    held: bool  # by a process that trains
    written: float  # when its newest file was, in seconds since 1970
    sessions: list[dict[str, Any]] = field(default_factory=list)
    autopsies: list[dict[str, Any]] = field(default_factory=list)  # of updates that went wrong, by step

    @property
    def kind(self) -> str:
        return str(self.manifest["identity"].get("kind", "training"))

    @property
    def arguments(self) -> Mapping[str, Any]:
        found = self.manifest.get("arguments")
        return found if isinstance(found, dict) else {}

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("kind") == "train" and isinstance(line.get("step"), int)]

    @cached_property
    def checks(self) -> list[dict[str, Any]]:
        """The evaluations made while training."""
        return [line for line in self.lines if line.get("kind") == "evaluation" and isinstance(line.get("step"), int)]

    @property
    def steps_done(self) -> int:
        return int(self.updates[-1]["step"]) if self.updates else 0

    @property
    def steps(self) -> int | None:
        """Updates of the whole run, as it was asked for."""
        value = self.arguments.get("steps")
        return value if isinstance(value, int) else None

    @cached_property
    def model(self) -> ModelConfig | None:
        """The shape of the model; None where this version of the library does not know it."""
        shape = self.manifest["identity"].get("model")
        if not isinstance(shape, dict):
            return None
        known = {field.name for field in dataclasses.fields(ModelConfig)} - {
            "rope_scaling"
        }  # an object; counts nothing
        try:
            return ModelConfig(**{name: _hashable(value) for name, value in shape.items() if name in known})
        except (TypeError, ValueError):
            return None

    @property
    def parameters(self) -> int | None:
        return count_parameters(self.model).total if self.model else None

    @property
    def state(self) -> str:
        """Returns running, finished, interrupted, failed, killed, or unfinished where nobody knows."""
        if self.held:
            return record.RUNNING
        state = self.sessions[-1].get("state") if self.sessions else None
        if state is None:
            return record.FINISHED if self.steps and self.steps_done >= self.steps else UNFINISHED
        return record.KILLED if state == record.RUNNING else str(state)

    @property
    def started(self) -> float | None:
        return self.sessions[0].get("started") if self.sessions else None

    @property
    def best(self) -> tuple[str, float, int] | None:
        """Returns the metric that chose the best checkpoint, its value there, and its step."""
        chosen = [line for line in self.checks if line.get("best")] or self.checks[-1:]
        if not chosen:
            return None
        line, name = chosen[-1], self.manifest.get("best_measure") or "loss"
        value = line.get("loss") if name == "loss" else (line.get("measures") or {}).get(name)
        return None if value is None else (name, value, line["step"])

    def final_metrics(self) -> dict[str, Any]:
        """The last metrics of training and validation, the speed, and all that evaluations found."""
        found: dict[str, Any] = {}
        if self.updates:
            losses = [line["loss"] for line in self.updates if line.get("loss") is not None]
            speeds = [line["tokens_per_second"] for line in self.updates if line.get("tokens_per_second")]
            found |= {"train.steps": self.steps_done}
            found |= {"train.loss (smoothed)": metrics.smoothed(losses)[-1]} if losses else {}
            found |= {"train.tokens_per_second (median)": statistics.median(speeds)} if speeds else {}
        if self.checks:
            line = self.checks[-1]
            found |= {f"validation.{key}": line[key] for key in PREDICTED if line.get(key) is not None}
            found |= {f"validation.{key}": value for key, value in (line.get("measures") or {}).items()}
        if self.best:
            name, value, step = self.best
            found |= {f"best.{name}": value, "best.step": step}
        for evaluation in self.evaluations:
            found |= {f"evaluation.{evaluation.name}.{key}": value for key, value in evaluation.metrics.items()}
        return found


def open_run(path: Path) -> Run:
    """Read a run; FileNotFoundError or ValueError, in one line, where there is none or its run.json is damaged."""
    manifest = read_manifest(path)
    if not isinstance(manifest.get("identity"), dict):
        raise ValueError(f"{path / MANIFEST} has no identity; it is damaged, or another program's")
    lines = metrics.read_records(path / "metrics.jsonl")
    evaluations, faults = records.read(path)
    autopsies = []
    for file in sorted((path / AUTOPSIES).glob("step-*/report.json")):
        try:
            autopsies.append(read_autopsy(file))
        except (ValueError, OSError) as error:
            faults.append(str(error))
    sessions = [session for session in manifest.get("sessions") or [] if isinstance(session, dict)]
    written = max(file.stat().st_mtime for file in (path / MANIFEST, path / "metrics.jsonl") if file.is_file())
    held = run_directory.is_running(path)
    return Run(path, manifest, lines, evaluations, faults, held, written, sessions, autopsies)


def find(directory: Path) -> Iterator[Path]:
    """The runs under a directory, itself included, in the order of their names; links are not followed."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; give the one that your runs lie in")
    for folder, names, inside in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if MANIFEST in inside:
            names.clear()
            yield Path(folder)


def differences(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Every option, hash, value of the environment and final figure in which two runs differ, None where one has none.

    Times, processes and directories differ always and are left out.
    """
    left, right = _described(a), _described(b)
    return [
        (key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def _described(run: Run) -> dict[str, Any]:
    session = run.sessions[-1] if run.sessions else {}
    identity = {key: value for key, value in run.manifest["identity"].items() if key != "training"}
    whole = {
        "option": run.arguments,
        "identity": identity,
        "tokenizer": run.manifest.get("tokenizer"),
        "floor": run.manifest.get("floor"),
        "condition": run.manifest.get("conditions") or {},
        "code": session.get("code") or {},
        "environment": session.get("environment") or {},
        "state": run.state,
    }
    return flatten(whole) | run.final_metrics()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

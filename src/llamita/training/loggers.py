"""TensorBoard and Weights & Biases, for those who ask for them; the records of metrics.jsonl go to each.

Either package is imported only when it is used. Knows nothing of training.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

LoggerName = Literal["tensorboard", "wandb"]


class Logger(Protocol):
    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def require(names: Sequence[LoggerName]) -> None:
    """Raise ModuleNotFoundError for a logger whose package is missing, so that a run need not begin to find out."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--log {name} needs the package {name!r}", name=name)


def make_loggers(names: Sequence[LoggerName], directory: Path, identity: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run in `directory`; ModuleNotFoundError where a package is missing."""
    made: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoardLogger(directory))
        elif name == "wandb":
            made.append(WandbLogger(directory, identity))
        else:
            raise ValueError(f"log={name!r} is unknown; use tensorboard or wandb")
    return made


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as `train/loss`, `evaluation/perplexity` and so on."""
    flat = {key: value for key, value in record.items() if key != "measures"} | record.get("measures", {})
    return {
        f"{record['kind']}/{key}": float(value)
        for key, value in flat.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoardLogger:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory / "tensorboard"))

    def log(self, record: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        self._writer.add_event(
            self._event(wall_time=record["time"], step=record["step"], summary=self._summary(value=values))
        )

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run; WANDB_MODE=offline keeps it in RUN/wandb until `wandb sync`."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="llamita", name=directory.name, dir=str(directory), config=dict(identity))

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()

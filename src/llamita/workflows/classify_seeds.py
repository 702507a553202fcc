"""One tuning run over several seeds, one after another, and what their accuracies come to.

OUTPUT/seed-0, seed-1, ...   a run each
OUTPUT/seeds.json            the options; once all are done, the accuracies, their mean and their deviation
"""

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from llamita.backend.interface import Backend
from llamita.storage import files
from llamita.training import run_directory
from llamita.training.config import saved_options, with_options
from llamita.workflows.classify import ACCURACY, ClassifyConfig, Report, read_task, train_classifier
from llamita.workflows.options import SEEDS, options_of_run


@dataclass(frozen=True)
class SeedsResult:
    """The validation accuracy of each seed's best checkpoint; the deviation is that of a sample (n - 1)."""

    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    interrupted: bool
    signal: int = 0
    """The number of the signal that interrupted it."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def train_seeds(config: ClassifyConfig, backend: Backend, report: Report = print) -> SeedsResult:
    """Train once with each of the seeds; resuming leaves finished ones alone, goes on with the one that was stopped,
    and trains the rest, which may be more than there were."""
    root = config.run.output
    file = root / SEEDS
    if config.run.resume:
        if not file.is_file():
            raise FileNotFoundError(f"{root} holds no runs over seeds to resume; leave --resume out to begin")
        earlier = options_of_run(root)["seeds"]
        config = replace(config, seeds=tuple(dict.fromkeys((*earlier, *config.seeds))))
    else:
        run_directory.check(root, resume=False)
    if not read_task(config, lambda text: None).validated:
        raise ValueError("--validation is missing: the accuracy on it is what is compared over seeds")
    record: dict[str, Any] = {"arguments": saved_options(config)}
    root.mkdir(parents=True, exist_ok=True)
    files.atomic_write(file, json.dumps(record, indent=2) + "\n")
    accuracies: list[float] = []
    for seed in config.seeds:
        output = root / f"seed-{seed}"
        report(f"seed {seed}: {output}")
        begun = (output / run_directory.MANIFEST).is_file()
        one = with_options(config, output=output, resume=begun, seed=seed, seeds=())
        result = train_classifier(one, backend, report)
        if result.interrupted:
            return SeedsResult(config.seeds, tuple(accuracies), True, result.signal)
        assert result.best is not None
        accuracies.append(result.best.measures[ACCURACY])
    found = SeedsResult(config.seeds, tuple(accuracies), False)
    record |= {"seeds": config.seeds, ACCURACY: accuracies, "mean": found.mean, "deviation": found.deviation}
    files.atomic_write(file, json.dumps(record, indent=2) + "\n")
    return found

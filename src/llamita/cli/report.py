"""`llamita report`: writes a run as one HTML page, which workflows/report.py makes."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class ReportConfig:
    """Write a run as one HTML page that needs nothing else: curves, samples, evaluations, how to make it again."""

    run: tyro.conf.Positional[Path]
    """Directory of a training run, which may still be running."""
    output: Path | None = None
    """The file to write. Left out: report.html in the run. An earlier report there is replaced."""


def run(config: ReportConfig) -> int:
    from llamita.workflows import report

    print(f"wrote {report.write(config.run, config.output)}")
    return 0

"""What a run of training need not do every time it is tested: measure the machine, draw its losses, wait for the disk.

Each takes longer than the updates of a short run, and none has anything to do with the others of a test.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def take(drawn: bool = False) -> None:
    """Has runs of this process take all shortcuts, and those of processes forked from it; `drawn` has even the first
    run leave a picture that was drawn before it."""
    measure_briefly()
    draw_once(drawn)
    os.fsync = os.fstat  # type: ignore[assignment]  # it too refuses what is no open file


def measure_briefly() -> None:
    """Has the backends' training steps measure the speed of a large product by the best of five, not for 0.3 seconds,
    and once a process for each device and precision, where they are not asked for less."""
    from llamita.backend.torch.train.step import TorchTrainStep

    steps: list[Any] = [TorchTrainStep]
    try:
        from llamita.backend.mlx.train.step import MlxTrainStep
    except ModuleNotFoundError:
        pass
    else:
        steps.append(MlxTrainStep)
    for step in steps:
        step.peak_flops = _remembered(step.peak_flops)


def _remembered(measure: Callable[[Any, float], float]) -> Callable[..., float]:
    known: dict[tuple[str, str], float] = {}

    def peak_flops(self: Any, seconds: float = 0.3) -> float:
        if seconds < 0.3:
            return measure(self, seconds)
        key = (str(self.device), self.precision)
        if key not in known:
            known[key] = measure(self, 0.0)
        return known[key]

    return peak_flops


def draw_once(drawn: bool) -> None:
    """Has the first run draw its losses, and others leave a copy of that picture; `__wrapped__` of it draws."""
    from llamita.training import metrics
    from llamita.training.trainer import Trainer

    draw: Callable[[Any], None] = Trainer._plot
    picture: list[bytes] = []
    if drawn:
        with tempfile.TemporaryDirectory() as directory:
            metrics.plot_losses([{"kind": "train", "step": 1, "loss": 1.0}], Path(directory) / "loss.png")
            picture.append((Path(directory) / "loss.png").read_bytes())

    @functools.wraps(draw)
    def plot(self: Any) -> None:
        if not self.run_directory.writes:
            return
        file = self.run_directory.file("loss.png")
        if picture:
            self._plotted = time.monotonic()
            file.write_bytes(picture[0])
        else:
            draw(self)
            picture.append(file.read_bytes())

    Trainer._plot = plot  # type: ignore[method-assign]

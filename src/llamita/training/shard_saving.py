"""Checkpoints that several processes write in parts, beside the updates that follow.

While the parts are on their way to the disk, training goes on; the first process then makes a checkpoint of them. Knows
nothing of frameworks.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamita.backend.interface import TrainStep
from llamita.model.config import ModelConfig
from llamita.training.run_directory import RunDirectory


class ShardSaving:
    """At most one checkpoint on its way; all processes of the group call the same methods in the same order."""

    def __init__(self, run: RunDirectory, step: TrainStep) -> None:
        self.run = run
        self.step = step
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(
        self,
        step: int,
        config: ModelConfig,
        state: Mapping[str, Any],
        tokenizer_directory: Path | None,
        finished: Callable[[], None],
    ) -> None:
        """Begin a checkpoint of the weights as they are now; `finished` is called by the first process when it is one.

        OSError where this one cannot be begun, or the one before it could not be written.
        """
        self.finish()
        directory = self.run.group.first(lambda: self.run.begin_shards(step))
        saving = self.step.save_shards(directory)

        def wait() -> None:
            try:
                saving.result()
                if self.run.writes:
                    self.run.finish_shards(step, config, state, tokenizer_directory)
                    finished()
            except Exception as error:  # told to all processes by `finish`
                self._error = error

        self._thread = threading.Thread(target=wait, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that is on its way is there; its error is raised in all processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        for found in self.run.group.gather(error):
            if found is not None:
                raise found

    def put_together(self, steps: Sequence[int]) -> None:
        """Make ordinary model directories of these checkpoints."""

        def write() -> None:
            for step in sorted(set(steps)):
                saved = self.run.load(step, verify=False)
                if saved.shards is not None:
                    self.run.put_together(saved, *self.step.read_shards(saved.shards))

        self.run.group.first(write)

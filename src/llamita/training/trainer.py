"""The training loop: batches in, updates, evaluations, checkpoints, a record of all of it.

Pre-training, instruction tuning, preference tuning and classification are this loop with other examples and another
loss, which the caller has put into the batches and the step. Knows no tensor and no framework.
"""

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamita.backend.group import check_batch_size, share
from llamita.backend.interface import StepMetrics, TrainStep
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.sizes import flops_per_token
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.training.config import TrainingConfig
from llamita.training.display import Display, SilentDisplay, make_display
from llamita.training.evaluation import Evaluation, OnEvaluation, evaluate
from llamita.training.examples import Examples
from llamita.training.loggers import Logger, make_loggers
from llamita.training.record import INTERRUPTED, ended
from llamita.training.run_directory import BEST, Checkpoint, RunDirectory
from llamita.training.shard_saving import ShardSaving

PLOT_SECONDS = 30.0  # between two drawings of the loss while training


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run: its number of updates, its smoothed loss, and whether Ctrl-C `interrupted` it.

    `checkpoint` is None only where it was interrupted before the first update.
    """

    step: int
    loss: float
    evaluation: Evaluation | None
    best: Evaluation | None
    checkpoint: Path | None
    interrupted: bool


class Trainer:
    """Trains in an open run directory, from its newest checkpoint where it has one.

    With several processes each has a trainer: all do the same, on rows of their own, and the first one writes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: ModelConfig,
        step: TrainStep,
        examples: Examples,
        run: RunDirectory,
        *,
        tokenizer_directory: Path | None = None,
        on_evaluation: OnEvaluation | None = None,
        measure: Callable[[], Mapping[str, float]] | None = None,
        floor: float | None = None,
        best_measure: str | None = None,
        display: Display | None = None,
    ) -> None:
        """`measure` gives what else an evaluation is to hold, of the weights as they are: scores of what they write.

        `floor` is the lowest loss that the data allows, in nats per character; it is drawn into the plot.

        The best checkpoint is that of the lowest loss, or of the highest `best_measure` where one is named.
        """
        self.config = config.resolved()
        self.model = model
        self.step = step
        self.examples = examples
        self.run_directory = run
        self.tokenizer_directory = tokenizer_directory
        self.on_evaluation = on_evaluation
        self.measure = measure
        self.floor = floor
        self.best_measure = best_measure
        self._display = display
        self._rates = self.config.learning_rates()
        self._group = step.group
        check_batch_size(self.config.batch_size, self._group)
        self._saving = ShardSaving(run, step) if step.is_divided else None
        self._stopped = False
        self._done = 0
        self._evaluation: Evaluation | None = None
        self._best: Evaluation | None = None
        self._evaluated_step = -1
        self._checkpoint_step = -1
        self._smoothed = metrics.SmoothedLoss()
        self._plotted = time.monotonic()
        self._peak = 0.0
        self._flops_per_token = functools.cache(functools.partial(flops_per_token, model))

    def run(self) -> TrainingResult:
        """Train to the end or to Ctrl-C, which finishes the update and saves; a second Ctrl-C ends at once.

        ValueError where loss or gradient is not finite, naming the step and the rows; the weights are left alone.
        """
        messages: list[str] = []
        self._restore(self._newest(messages.append), messages.append)
        writes = self.run_directory.writes
        shown = make_display(self.config.steps, self._done) if writes else SilentDisplay()
        self.display = self._display or shown
        for text in messages:
            self.display.message(text)
        self._metrics = metrics.MetricsFile(self.run_directory.file("metrics.jsonl") if writes else None)
        self._loggers: list[Logger] = []
        try:
            if writes:
                identity = self.run_directory.manifest["identity"]
                self._loggers += make_loggers(self.config.log, self.run_directory.path, identity)
            self._peak = self.step.peak_flops()
            with _interrupt() as interrupted:
                loss = self._loop(interrupted)
                stopped = self._stopped and self._done < self.config.steps
        except ConnectionError as error:
            raise ConnectionError(self._after_loss(error)) from error
        finally:
            self.display.close()
            self._metrics.close()
            for logger in self._loggers:
                logger.close()
        self.run_directory.update_session({"last_step": self._done} | (ended(INTERRUPTED) if stopped else {}))
        path = self.run_directory.checkpoint_path(self._done) if self._done else None
        return TrainingResult(self._done, loss, self._evaluation, self._best, path, stopped)

    def _after_loss(self, error: ConnectionError) -> str:
        """Returns what to do after the loss of another process."""
        steps = self.run_directory.steps()
        saved = f"its last checkpoint is {self.run_directory.checkpoint_path(steps[-1])}" if steps else "it saved none"
        return f"{error}; the run ended after {self._done} updates and {saved}: go on with --resume"

    def _loop(self, interrupted: threading.Event) -> float:
        """Updates until the last one or an interruption; returns the smoothed loss."""
        while True:
            # An evaluation that is due comes first: a run that was stopped in its midst is resumed here.
            if self._evaluation_is_due():
                self._evaluate(interrupted)
            self._stopped = self._group.any(interrupted.is_set())
            last = self._done >= self.config.steps or self._stopped
            if self._done and (last or self._checkpoint_is_due()) and self._checkpoint_step != self._done:
                self._save()
            if last:
                break
            self._update()
        if self._saving is not None:
            self._saving.finish()
            if not self._stopped:
                self._saving.put_together([self._done, *([self._best.step] if self._best else [])])
        self._plot()
        return self._smoothed.value

    def _update(self) -> None:
        started = time.perf_counter()
        batch = self.examples.batches.next()
        micro_batches = split(share(batch, self._group), self.config.micro_batch_size)
        rate = self._rates.at(self._done)
        result = self.step.step(micro_batches, rate)
        if not result.is_finite:
            self._refuse(micro_batches, result)
        self._done += 1
        seconds = time.perf_counter() - started
        speed = batch.tokens_BT.size / seconds
        flops = self._flops_per_token(batch.tokens_BT.shape[1]) * speed
        record = {
            "kind": "train",
            "step": self._done,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "targets": result.targets,
            **batch.metrics,
            **result.measures,
            "tokens_per_second": round(speed, 1),
            "utilization": round(flops / self._peak, 4),
            "memory_bytes": self.step.memory_bytes(),
            "seconds": round(seconds, 6),
        }
        self._record(record)
        self.display.update(record | {"smoothed": self._smoothed.update(result.loss)})

    def _refuse(self, micro_batches: Sequence[Batch], result: StepMetrics) -> None:
        faulty = [micro_batches[i] for i in result.faulty_micro_batches] or micro_batches
        rows = [int(row) for batch in faulty for row in batch.row_ids]
        rows = sorted(row for part in self._group.gather(rows) for row in part)
        what = f"loss is {result.loss}" if result.faulty_micro_batches else f"gradient norm is {result.grad_norm}"
        raise ValueError(
            f"step {self._done + 1}: the {what} on rows {rows}; the update was not made and the run stopped. Its "
            f"checkpoints are intact: look at those rows, or begin anew with a lower learning rate than "
            f"{self._rates.at(self._done):.3g}"
        )

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every
        due = self._done == self.config.steps or (every and self._done % every == 0)
        return bool(self._done and due and self._evaluated_step != self._done)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        is_best = self._best is not None and self._best.step == self._done
        return is_best or bool(every and self._done % every == 0)

    def _evaluate(self, interrupted: threading.Event) -> None:
        """Evaluate, record, and call back; left undone when interrupted, to be done when the run is resumed."""
        totals = evaluate(self.step, self.examples, lambda: self._group.any(interrupted.is_set()))
        if totals is None:
            return
        self._evaluated_step = self._done
        self._checkpoint_step = -1  # one that was written before, on an interruption, lacks this evaluation
        if totals.targets == 0:
            return
        if self.measure is not None:
            measured = self._group.gather(dict(self.measure()))[0]  # the last bits may differ between machines
            totals = replace(totals, measures={**totals.measures, **measured})
        evaluation = Evaluation(step=self._done, best=False, **asdict(totals))
        best = math.isfinite(totals.loss) and (self._best is None or self._rank(evaluation) > self._rank(self._best))
        self._evaluation = replace(evaluation, best=best)
        if best:
            self._best = self._evaluation
        record = {"kind": "evaluation", **asdict(self._evaluation)}
        self._record(record)
        self.display.evaluation(record)
        text = self.on_evaluation(self._evaluation) if self.on_evaluation else None
        if text and self.run_directory.writes:
            metrics.append_sample(self.run_directory.file("samples.txt"), self._done, text)
            self.display.message(text)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _rank(self, evaluation: Evaluation) -> tuple[float, ...]:
        """Returns what makes one checkpoint better than another; the loss decides where a measure is equal."""
        measured = () if self.best_measure is None else (evaluation.measures[self.best_measure],)
        return (*measured, -evaluation.loss)

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        for logger in self._loggers:
            logger.log(record | {"time": time.time()})

    def _plot(self) -> None:
        self._plotted = time.monotonic()
        if not self.run_directory.writes:
            return
        records = metrics.read_records(self.run_directory.file("metrics.jsonl"))
        floor = None
        if self.floor is not None and self._evaluation is not None and self._evaluation.nats_per_character:
            floor = self.floor * self._evaluation.loss / self._evaluation.nats_per_character
        metrics.plot_losses(records, self.run_directory.file("loss.png"), floor)

    def _save(self) -> None:
        self._metrics.sync()
        state = {
            "data": self.examples.batches.state(),
            "evaluation": self._evaluation and asdict(self._evaluation),
            "best": self._best and asdict(self._best),
            "evaluated_step": self._evaluated_step,
            "conditions": self.step.conditions(),
        }
        step, best = self._done, self._best.step if self._best else None
        run = self.run_directory

        def kept() -> None:
            if best == step:
                run.link(BEST, step)
            run.prune(self.config.keep_checkpoints, best)

        def write() -> None:
            run.save(step, self.model, self.step.weights(), self.step.state(), state, self.tokenizer_directory)
            kept()

        if self._saving is None:
            self._group.first(write)
        else:
            self._saving.begin(step, self.model, state, self.tokenizer_directory, kept)
        self._checkpoint_step = step

    def _newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Returns the newest intact checkpoint, as the first process finds it."""
        found: list[Checkpoint | None] = []

        def find() -> int | None:
            found.append(self.run_directory.newest(report))
            return found[0].step if found[0] else None

        step = self._group.first(find)
        if found or step is None:
            return found[0] if found else None
        return self.run_directory.load(step, verify=False)

    def _restore(self, saved: Checkpoint | None, report: Callable[[str], None]) -> None:
        """Go on from a checkpoint: weights, optimiser, data, and the record up to there."""
        run, step = self.run_directory, saved.step if saved else 0
        conditions = self.step.conditions()
        before = run.manifest.get("conditions", conditions)
        for key in sorted(key for key in conditions if before.get(key) != conditions[key]):
            report(
                f"{key} was {before.get(key)!r} and is now {conditions[key]!r}: the run goes on, but its weights "
                "may differ in the last bits from those of a run under the same conditions"
            )
        tokenizer = self.tokenizer_directory and Tokenizer.load(self.tokenizer_directory).hash
        known = {"floor": self.floor, "best_measure": self.best_measure, "tokenizer": tokenizer}
        run.update_manifest({"conditions": conditions} | {key: value for key, value in known.items() if value})
        run.update_session({"first_step": step})
        if run.writes:
            records = metrics.rewind(run.file("metrics.jsonl"), step)
            metrics.rewind_samples(run.file("samples.txt"), step)
            for record in records:
                if record["kind"] == "train":
                    self._smoothed.update(record["loss"])
        if saved is None:
            return
        if saved.shards is not None:
            self.step.load_shards(saved.shards)
        else:
            self.step.load_state(saved.weights, saved.optimizer)
        self.examples.batches.load_state(saved.state["data"])
        self._done = self._checkpoint_step = step
        self._evaluated_step = saved.state["evaluated_step"]
        evaluation, best = saved.state["evaluation"], saved.state["best"]
        self._evaluation = Evaluation(**evaluation) if evaluation else None
        self._best = Evaluation(**best) if best else None
        if run.writes:
            run.relink(step, self._best.step if self._best else None)
        report(f"resumed from step {step} of {self.config.steps}")


def split(batch: Batch, size: int) -> list[Batch]:
    """Consecutive groups of at most `size` rows."""
    return [batch.rows(slice(start, start + size)) for start in range(0, len(batch.row_ids), size)]


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as it always does."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        event.set()
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()

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
from typing import Any, Literal

from llamita.backend.group import check_batch_size, share
from llamita.backend.interface import StepMetrics, TrainStep
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.sizes import flops_per_token
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.training.autopsy import Finding, Healthy, RowText, autopsy, in_words
from llamita.training.config import TrainingConfig
from llamita.training.display import Display, SilentDisplay, make_display
from llamita.training.evaluation import Evaluation, OnEvaluation, evaluate
from llamita.training.examples import Examples
from llamita.training.loggers import Logger, make_loggers
from llamita.training.record import INTERRUPTED, ended
from llamita.training.run_directory import BEST, Checkpoint, RunDirectory
from llamita.training.shard_saving import ShardSaving
from llamita.training.spikes import SpikeDetector, SpikePolicy, Threshold

PLOT_SECONDS = 30.0  # between two drawings of the loss while training
HEALTHY_BYTES = 1 << 26  # of a batch that is held until the next; what a teacher says of one can be far larger
MOST_REPORTED = 20  # spikes of a run that get an autopsy where nothing else is done about them


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run: its number of updates, its smoothed loss, and whether a signal such as Ctrl-C `interrupted` it.

    `checkpoint` is None only where it was interrupted before the first update.
    """

    step: int
    loss: float
    evaluation: Evaluation | None
    best: Evaluation | None
    checkpoint: Path | None
    interrupted: bool
    signal: int = 0
    """The number of the signal that interrupted it."""


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
        self._skipped: set[int] = set()  # the steps whose batches are passed over
        self._passed_over = 0  # batches that were passed over or gone back from
        self._healthy: tuple[int, float, Sequence[Batch]] | None = None  # the last update without a spike
        self._spikes = SpikeDetector(self.config.spike_deviations, self.config.warmup_steps or 0)
        self._tokenizer: Tokenizer | None = None
        self._smoothed = metrics.SmoothedLoss()
        self._plotted = time.monotonic()
        self._peak = 0.0
        self._flops_per_token = functools.cache(functools.partial(flops_per_token, model))

    def run(self) -> TrainingResult:
        """Train to the end or to a signal (Ctrl-C, SIGTERM, SIGUSR1), which finishes the update and saves.

        A second signal ends at once. ValueError, naming the step, the rows and the autopsy, where loss or gradient is
        not finite or a spike is to stop the run; the weights are left alone.
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
            with _interrupt() as interruption:
                loss = self._loop(interruption)
                stopped = self._stopped and self._done < self.config.steps
                number = max(self._group.gather(interruption.number)) if stopped else 0
        except ConnectionError as error:
            raise ConnectionError(self._after_loss(error)) from error
        finally:
            self.display.close()
            self._metrics.close()
            for logger in self._loggers:
                logger.close()
        how = ended(INTERRUPTED) | {"signal": signal.Signals(number).name} if stopped else {}
        self.run_directory.update_session({"last_step": self._done} | how)
        path = self.run_directory.checkpoint_path(self._done) if self._done else None
        return TrainingResult(self._done, loss, self._evaluation, self._best, path, stopped, number)

    def _after_loss(self, error: ConnectionError) -> str:
        """Returns what to do after the loss of another process."""
        steps = self.run_directory.steps()
        saved = f"its last checkpoint is {self.run_directory.checkpoint_path(steps[-1])}" if steps else "it saved none"
        return f"{error}; the run ended after {self._done} updates and {saved}: go on with --resume"

    def _loop(self, interruption: "Interruption") -> float:
        """Updates until the last one or an interruption; returns the smoothed loss."""
        while True:
            # A checkpoint comes before the evaluation of the same step, which may fail and must cost no update.
            if self._done and (self._is_last(interruption) or self._checkpoint_is_due()):
                self._save()
            # One that was stopped or failed in its midst is made up for here when the run is resumed.
            if self._evaluation_is_due() and self._evaluate(interruption):
                self._save_evaluation()
            if self._is_last(interruption):
                break
            self._update()
        if self._done:
            self._save()  # where the interruption came during the evaluation
        if self._saving is not None:
            self._saving.finish()
            if not self._stopped:
                self._saving.put_together([self._done, *([self._best.step] if self._best else [])])
        self._plot()
        return self._smoothed.value

    def _is_last(self, interruption: "Interruption") -> bool:
        self._stopped = self._group.any(interruption.is_set())
        return self._done >= self.config.steps or self._stopped

    def _update(self) -> None:
        started = time.perf_counter()
        policy, threshold = self.config.on_spike, self._spikes.threshold()
        limit = math.inf if threshold is None or (policy == "report" and self._spikes.goes_on) else threshold.limit
        position = None if policy == "report" else self.examples.batches.state()
        batch = self.examples.batches.next()
        micro_batches = split(batch, self.config.micro_batch_size)
        own = split(share(batch, self._group), self.config.micro_batch_size)
        if self._done + 1 in self._skipped:
            self._pass_over(micro_batches)
            return
        rate = self._rates.at(self._done)
        result = self.step.step(own, rate, limit)
        if not result.is_update:
            if not self._goes_on_after(finding_of(self._done + 1, result, rate, threshold), micro_batches, position):
                return
            result = self.step.step(own, rate)
        else:
            size = sum(array.nbytes for array in batch.extras.values())
            self._healthy = (self._done + 1, result.loss, micro_batches) if size <= HEALTHY_BYTES else None
        self._done += 1
        self._spikes.add(result.loss)
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

    def _goes_on_after(self, finding: Finding, micro_batches: Sequence[Batch], position: dict[str, Any] | None) -> bool:
        """Writes an autopsy of an update that was not made, and does what the policy says; returns whether the update
        is to be made all the same. ValueError where the run stops; `position` is that of the data before the batch."""
        action, back = self._action(finding)
        outcomes = {
            "report": "The update was made all the same.",
            "skip": "The update was not made, and the run went on with the next batch.",
            "rewind": f"The run went back to step {back.step if back else 0}, to pass over the batch this time.",
            "stop": "The update was not made and the run stopped.",
        }
        all_rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        rows, where = all_rows, ""
        if action != "report" or len(self.run_directory.autopsies()) < MOST_REPORTED:
            rows, where = self._write_autopsy(finding, micro_batches, outcomes[action])
        about = f"step {finding.step}: {finding} on rows {rows}"
        if action == "stop":
            if finding.kind == "spike":
                if position is not None:
                    self.examples.batches.load_state(position)
                    self._save()
                advice = "go on with --resume and --on-spike report, skip or rewind"
                if self.config.on_spike != "stop":
                    advice = f"go on with --resume and --spike-limit above {self.config.spike_limit}"
            else:
                advice = (
                    "its checkpoints are intact: look at those rows, or begin anew with a lower learning rate than "
                    f"{finding.learning_rate:.3g}"
                )
            raise ValueError(f"{about}; the update was not made and the run stopped{where}; {advice}")
        self.display.message(f"{about}{where}")
        if action == "report":
            limit = finding.threshold.limit if finding.threshold else None
            # All rows: who is named depends on the batch before, which a resumed run may not have at hand.
            record = {"kind": "spike", "step": finding.step, "loss": finding.loss, "limit": limit, "rows": all_rows}
            self._record(record)
            return True
        self._passed_over += 1
        if back is None:
            self._skipped.add(finding.step)
            self._pass_over(micro_batches, finding.loss)
        else:
            self._rewind(back, finding)
        return False

    def _action(self, finding: Finding) -> tuple[SpikePolicy, Checkpoint | None]:
        """Returns what is to be done, and for `rewind` the checkpoint to go back to; without one, it is `skip`."""
        policy = self.config.on_spike
        if policy in ("skip", "rewind") and self._passed_over >= self.config.spike_limit:
            return "stop", None
        if policy == "rewind":
            first = min(self._at_fault(finding.step))
            back = self._newest(self.display.message, at_most=first - 1)
            return ("rewind", back) if back else ("skip", None)
        return ("stop" if policy == "report" and finding.kind != "spike" else policy), None

    def _at_fault(self, step: int) -> set[int]:
        """Returns the steps whose batches are to be passed over: that of the spike, and where it comes right behind
        batches that already were, so that these cannot have been the cause, the last one before them too."""
        before = step - 1
        while before in self._skipped:
            before -= 1
        return {step} if before == step - 1 or before < 1 else {step, before}

    def _write_autopsy(self, finding: Finding, micro_batches: Sequence[Batch], outcome: str) -> tuple[list[int], str]:
        """Returns the numbers of the rows at fault, and words on where the autopsy lies; it costs no run."""
        all_rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        try:
            before = None
            if self._healthy is not None:
                step, loss, batches = self._healthy
                before = Healthy(step, loss, self.step.diagnose(batches))
            found = self.step.diagnose(micro_batches)
            words = RowText(
                self._tokenizer,
                self.examples.origin,
                (self.model.label_names or ()) if self.model.num_labels else None,
            )

            def write() -> tuple[list[int], Path]:
                records = metrics.read_records(self.run_directory.file("metrics.jsonl"))
                history = [record for record in records if record.get("kind") == "train"]
                report = autopsy(finding, micro_batches, found, before, history, words, outcome)
                path = self.run_directory.write_autopsy(finding.step, report, in_words(report))
                return report["suspects"], path

            suspects, path = self._group.first(write)
        except ConnectionError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:  # a full disk, or no memory for it
            return all_rows, f" (no autopsy: {' '.join(str(error).split())})"
        return suspects or all_rows, f"; see {path / 'report.md'}"

    def _pass_over(self, micro_batches: Sequence[Batch], loss: float | None = None) -> None:
        """A step without an update, whose batch has been taken: those that follow have the batches that are theirs."""
        self._done += 1
        rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        self._record({"kind": "skipped", "step": self._done, "rows": rows} | ({} if loss is None else {"loss": loss}))
        self.display.message(f"step {self._done}: the batch was passed over")

    def _rewind(self, saved: Checkpoint, finding: Finding) -> None:
        """Goes back to a checkpoint, which notes the batches to be passed over from there on."""
        run, step = self.run_directory, saved.step
        self._skipped |= self._at_fault(finding.step)
        skipped, passed_over = sorted(self._skipped), self._passed_over

        def note() -> list[dict[str, Any]]:
            run.update_state(step, {"skipped": skipped, "passed_over": passed_over})
            run.delete_after(step)
            metrics.rewind_samples(run.file("samples.txt"), step)
            return self._metrics.rewind(step)

        self._take_over(saved, self._group.first(note))
        self._skipped, self._passed_over = set(skipped), passed_over
        threshold = finding.threshold
        self._record(
            {"kind": "rewind", "step": step, "from": finding.step, "loss": finding.loss, "skipped": skipped}
            | ({"limit": threshold.limit} if threshold else {})
        )
        self.display.message(f"went back to step {step}; passes over the batches of steps {skipped}")

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every
        due = self._done == self.config.steps or (every and self._done % every == 0)
        return bool(self._done and due and self._evaluated_step != self._done)

    def _checkpoint_is_due(self) -> bool:
        every = (self.config.checkpoint_every, self.config.keep_every)
        return any(updates and self._done % updates == 0 for updates in every)

    def _evaluate(self, interruption: "Interruption") -> bool:
        """Evaluates, records and calls back; returns whether it was done. Interrupted, it is left to who resumes."""
        totals = evaluate(self.step, self.examples, lambda: self._group.any(interruption.is_set()))
        if totals is None:
            return False
        self._evaluated_step = self._done
        if totals.targets == 0:
            return True
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
        return True

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
        """Writes a checkpoint of this step, unless there is one."""
        if self._checkpoint_step == self._done:
            return
        self._metrics.sync()
        run, step, state, finished = self.run_directory, self._done, self._state(), self._kept()

        def write() -> None:
            run.save(step, self.model, self.step.weights(), self.step.state(), state, self.tokenizer_directory)
            finished()

        if self._saving is None:
            self._group.first(write)
        else:
            self._saving.begin(step, self.model, state, self.tokenizer_directory, finished)
        self._checkpoint_step = step

    def _save_evaluation(self) -> None:
        """Adds an evaluation to the checkpoint of this step; without one, writes one where this is the best step."""
        if self._checkpoint_step == self._done:
            self._metrics.sync()
            state, finished = self._state(), self._kept()

            def write() -> None:
                self.run_directory.update_state(self._done, state)
                finished()

            if self._saving is not None:
                self._saving.finish()
            self._group.first(write)
        elif self._best is not None and self._best.step == self._done:
            self._save()

    def _kept(self) -> Callable[[], None]:
        """Returns what is done when the checkpoint of this step is there: a link to the best, old ones deleted."""
        run, step, best = self.run_directory, self._done, self._best.step if self._best else None

        def link_and_prune() -> None:
            if best == step:
                run.link(BEST, step)
            run.prune(self.config.keep_checkpoints, best, self.config.keep_every)

        return link_and_prune

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides weights and optimiser."""
        return {
            "data": self.examples.batches.state(),
            "evaluation": self._evaluation and asdict(self._evaluation),
            "best": self._best and asdict(self._best),
            "evaluated_step": self._evaluated_step,
            "skipped": sorted(self._skipped),
            "passed_over": self._passed_over,
            "conditions": self.step.conditions(),
        }

    def _newest(self, report: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
        """Returns the newest intact checkpoint, as the first process finds it."""
        if self._saving is not None:
            self._saving.finish()
        found: list[Checkpoint | None] = []

        def find() -> int | None:
            found.append(self.run_directory.newest(report, at_most))
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
        self._tokenizer = Tokenizer.load(self.tokenizer_directory) if self.tokenizer_directory else None
        known = {
            "floor": self.floor,
            "best_measure": self.best_measure,
            "tokenizer": self._tokenizer and self._tokenizer.hash,
        }
        run.update_manifest({"conditions": conditions} | {key: value for key, value in known.items() if value})
        run.update_session({"first_step": step})
        evaluated = saved is None or saved.state["evaluated_step"] == step

        def rewind() -> list[dict[str, Any]]:
            metrics.rewind_samples(run.file("samples.txt"), step if evaluated else step - 1)
            return metrics.rewind(run.file("metrics.jsonl"), step, evaluated)

        records = self._group.first(rewind)
        if saved is not None:
            self._take_over(saved, records)
            report(f"resumed from step {step} of {self.config.steps}")

    def _take_over(self, saved: Checkpoint, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes weights, optimiser and position of a checkpoint, and what the record up to there says of losses."""
        if saved.shards is not None:
            self.step.load_shards(saved.shards)
        else:
            self.step.load_state(saved.weights, saved.optimizer)
        self.examples.batches.load_state(saved.state["data"])
        self._done = self._checkpoint_step = saved.step
        self._evaluated_step = saved.state["evaluated_step"]
        evaluation, best = saved.state["evaluation"], saved.state["best"]
        self._evaluation = Evaluation(**evaluation) if evaluation else None
        self._best = Evaluation(**best) if best else None
        self._skipped = set(saved.state.get("skipped", ()))  # older versions had none
        self._passed_over = saved.state.get("passed_over", 0)
        self._healthy = None
        losses = [record["loss"] for record in records if record["kind"] == "train"]
        self._smoothed = metrics.SmoothedLoss()
        for loss in losses:
            self._smoothed.update(loss)
        self._spikes.replay(losses)
        if self.run_directory.writes:
            self.run_directory.relink(saved.step, self._best.step if self._best else None)


def finding_of(step: int, result: StepMetrics, rate: float, threshold: Threshold | None) -> Finding:
    """Returns what kept an update from being made."""
    if result.is_finite:
        return Finding(step, "spike", result.loss, result.grad_norm, rate, threshold)
    kind: Literal["loss", "gradient"] = "gradient" if math.isfinite(result.loss) else "loss"
    return Finding(step, kind, result.loss, result.grad_norm, rate)


def split(batch: Batch, size: int) -> list[Batch]:
    """Consecutive groups of at most `size` rows."""
    return [batch.rows(slice(start, start + size)) for start in range(0, len(batch.row_ids), size)]


class Interruption(threading.Event):
    """Set by the first signal that asks for the end; `number` is that signal's, 0 before."""

    number = 0


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a scheduler that wants the machine back; one that was asked to warn before that (Slurm's --signal=USR1)."""


@contextmanager
def _interrupt() -> Iterator[Interruption]:
    """An event that the first of SIGNALS sets; the second acts as it always does."""
    event = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        event.number = number
        event.set()
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()

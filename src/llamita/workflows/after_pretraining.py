"""The second half of `llamita quickstart --full`: questions, preferences, happy or sad, and a report of each run.

Each part is a run of its own that a user could begin with the verb named beside it; only the choices are made here. The
backend is passed in.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llamita.backend.interface import Backend
from llamita.data.labelled import Fields, read_labelled
from llamita.evaluation import classification
from llamita.training import exit_status
from llamita.training.config import TrainingVerb, with_options
from llamita.training.record import FINISHED, command_line
from llamita.training.run_directory import BEST, MANIFEST
from llamita.training.trainer import TrainingResult
from llamita.workflows import report
from llamita.workflows.classify import Classifier, ClassifyConfig, train_classifier
from llamita.workflows.dpo import DpoConfig, dpo
from llamita.workflows.options import resolve
from llamita.workflows.quickstart import QuickstartConfig
from llamita.workflows.runs import open_run
from llamita.workflows.sft import SftConfig, sft

PRETRAINED, ANSWERS, PREFERENCES, LABELS = "run", "answers", "preferences", "happy-or-sad"
"""Directories of the runs, the first of them the quickstart's own."""


@dataclass(frozen=True)
class Amounts:
    """The amounts of updates and of what they are taken from."""

    answer_steps: int = 2000
    conversations: int = 16_000
    pair_steps: int = 100
    pairs: int = 1600
    label_steps: int = 200
    texts: int = 3200
    asked: int = 200  # held-out questions at each evaluation
    labelled: int = 1000  # held-out stories to label in the end

    def at_most(self, steps: int, asked: int) -> "Amounts":
        """Returns the amounts of a quick look: no more updates in a run than `steps`, nor questions or stories to label
        at an evaluation than `asked`; 0 is no bound."""
        updates = {name: min(getattr(self, name), steps or sys.maxsize) for name in UPDATES}
        held_out = {name: min(getattr(self, name), asked or sys.maxsize) for name in HELD_OUT}
        return replace(self, **updates, **held_out)


UPDATES, HELD_OUT = ("answer_steps", "pair_steps", "label_steps"), ("asked", "labelled")
SMALL = Amounts(100, 1000, 20, 200, 50, 800, 50, 200)


@dataclass(frozen=True)
class Part:
    """A run: what it is called, the verb that does the same, its options, and what does it."""

    title: str
    verb: str
    config: TrainingVerb
    run: Callable[[Any], TrainingResult]


def tune_and_report(
    config: QuickstartConfig,
    backend: Backend,
    console: Console,
    amounts: Amounts = Amounts(),
) -> int:
    """Run all parts, those of an earlier call excepted, and print what came out; the exit status."""
    for number, part in enumerate(parts(config, backend, console, amounts), start=4):
        run = part.config.run.output
        begun = (run / MANIFEST).is_file()
        if begun and open_run(run).state == FINISHED:
            continue
        console.print(f"[bold]{number}. {part.title}[/], as llamita {part.verb} does it")
        result = part.run(with_options(part.config, resume=begun))
        if result.interrupted:
            console.print("stopped and saved; the same command goes on from here")
            return exit_status.of_signal(result.signal)
    measure_classifier(config.output / LABELS, backend, amounts.labelled)
    console.print("[bold]7. Reports[/]")
    for name in (PRETRAINED, ANSWERS, PREFERENCES, LABELS):
        console.print(f"  {report.write(config.output / name)}")
    show(config.output, console)
    return 0


def parts(config: QuickstartConfig, backend: Backend, console: Console, amounts: Amounts) -> list[Part]:
    """The runs in their order; each begins from what one before it left."""
    output = config.output
    shared: dict[str, Any] = {"batch_size": 16, "seed": config.seed, "backend": config.backend}
    taught = resolve(
        SftConfig,
        output=output / ANSWERS,
        model=output / PRETRAINED,
        data=("meadow",),
        conversations=amounts.conversations,
        answers=amounts.asked,
        mode="pad",
        steps=amounts.answer_steps,
        learning_rate=2e-3,
        evaluate_every=-(-amounts.answer_steps // 3),
        **shared,
    )
    preferring = resolve(
        DpoConfig,
        output=output / PREFERENCES,
        model=output / ANSWERS,
        data=("meadow",),
        pairs=amounts.pairs,
        validation_share=0.15,
        answers=amounts.asked,
        steps=amounts.pair_steps,
        evaluate_every=-(-amounts.pair_steps // 2),
        **shared,
    )
    labelling = resolve(
        ClassifyConfig,
        output=output / LABELS,
        model=output / PRETRAINED,
        data=(f"meadow:{amounts.texts}",),
        steps=amounts.label_steps,
        evaluate_every=-(-amounts.label_steps // 2),
        **shared,
    )
    given: dict[str, Any] = {"backend": backend, "report": console.print}
    return [
        Part("Questions and answers", "sft", taught, partial(sft, **given)),
        Part("Right answers preferred to wrong ones", "dpo", preferring, partial(dpo, **given)),
        Part("Happy or sad", "classify train", labelling, partial(train_classifier, **given)),
    ]


def measure_classifier(run: Path, backend: Backend, count: int) -> None:
    """Leave accuracy, confusion and calibration over held-out stories in the run."""
    model = Classifier.load(run / BEST, backend)
    texts = read_labelled((f"meadow:{count}",), "validation", model.config.labels, Fields())
    found = classification.classification_report(
        model.log_probabilities(model.encode(texts.texts, texts.source)), texts.labels, texts.names
    )
    classification.record(run, "happy or sad", found, command_line(sys.argv), run / BEST)


def show(output: Path, console: Console) -> None:
    """The metrics of all parts, and what to do next."""
    answers, preferences, labels = (open_run(output / name) for name in (ANSWERS, PREFERENCES, LABELS))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("on held-out stories", "reached"):
        table.add_column(title, justify="right" if title == "reached" else "left")
    for text, run, key in (
        ("answers right to the letter", answers, "best.exact"),
        ("right answers preferred to wrong ones", preferences, "validation.accuracy"),
        ("answers right to the letter, after that", preferences, "validation.exact"),
        ("happy or sad", labels, "evaluation.happy or sad.accuracy"),
    ):
        table.add_row(text, f"{run.final_metrics()[key]:.1%}")
    console.print(table)
    console.print("[bold]What next[/]")
    for command in (
        f"llamita chat {output / ANSWERS}",
        f"llamita runs list {output}",
        f"llamita classify predict {output / LABELS} --data meadow:5",
    ):
        console.print(f"  {command}")

"""`llamita classify train|evaluate|predict|zero-shot|calibrate`: flags and printed results; the work lies in workflows/
and evaluation/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llamita.backend.interface import BackendName
from llamita.cli.own_code import backend_with
from llamita.cli.tuning import stopped, training_backend
from llamita.training import exit_status
from llamita.workflows.classify import ClassifyConfig

if TYPE_CHECKING:
    import numpy as np

    from llamita.backend.interface import Backend
    from llamita.data.labelled import Fields, LabelledTexts
    from llamita.evaluation.classification import Report
    from llamita.learn.own_model import Use

Dtype = Literal["auto", "float32", "bfloat16"]


def train(config: ClassifyConfig) -> int:
    """Tune a language model to label texts, or carry on an interrupted run.

    Examples:
      llamita classify train --model RUN --data meadow --output CLASSIFIER
      llamita classify train --model RUN --data train.txt --validation dev.txt --label-mapping labels.json \\
        --output CLASSIFIER --seeds 0 1 2 3 4
      llamita classify train --output CLASSIFIER --resume

    Ctrl-C, SIGTERM and SIGUSR1 finish the update, save and end; a second one ends at once.
    """
    from llamita.workflows.classify import ACCURACY, train_classifier
    from llamita.workflows.classify_seeds import train_seeds

    backend, output = training_backend(config, config.own_code, "classify train"), config.run.output
    if config.seeds:
        found = train_seeds(config, backend)
        if found.interrupted:
            print(f"stopped; go on with: llamita classify train --output {output} --resume")
            return exit_status.of_signal(found.signal)
        accuracies = ", ".join(f"{value:.4f}" for value in found.accuracies)
        print(f"validation accuracy of {len(found.accuracies)} seeds: {accuracies}")
        print(f"mean {found.mean:.4f}, standard deviation {found.deviation:.4f}; in {output / 'seeds.json'}")
        return 0
    result = train_classifier(config, backend)
    if result.interrupted:
        return stopped("classify train", config, result)
    print(f"trained {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        accuracy = result.best.measures[ACCURACY]
        print(f"best validation accuracy {accuracy:.4f} at step {result.best.step}: {output / 'best'}")
    print(f"measure it with: llamita classify evaluate {output} --data FILE --output DIRECTORY")
    return 0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The reading of texts, and the running of a model on them."""

    text_field: str = "text"
    """The column or field that holds a text, in CSV, JSON lines and hub datasets."""
    tsv_quotes: bool = False
    """Fields of .tsv files may stand in quotes, as in .csv; without it a quote there is a character like any other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto: that of the file."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: str = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""
    own_code: Annotated[Path | None, tyro.conf.arg(name="with")] = None
    """The folder of the course min-llama, whose code labels the texts in the place of the library's (PyTorch,
    float32)."""

    def loaded_backend(self, use: Use) -> Backend:
        """Returns the backend that computes; ValueError where a check of the code for this use does not pass."""
        return backend_with(self.own_code, use, self.backend, self.device)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a tuned model: accuracy, F1, the confusion of labels, calibration."""

    model: tyro.conf.Positional[Path]
    """A model directory, or a training run (then its best checkpoint)."""
    data: tuple[str, ...]
    """Labelled texts: files (label ||| sentence, .csv, .tsv, .jsonl), meadow[:COUNT] (its validation stories),
    hub:NAME[:CONFIG][@SPLIT]."""
    output: Path | None = None
    """A new directory for evaluation.json, confusion.png and reliability.png. Left out: they are not kept."""
    label_field: str = "label"
    """The column or field that holds a text's label."""
    name: str = ""
    """Name of the record in the run; an earlier one of that name is replaced. Left out: the files' names."""
    running: TextConfig = TextConfig()


def evaluate(config: EvaluateConfig) -> None:
    from llamita.data.labelled import Fields, read_labelled
    from llamita.evaluation import records
    from llamita.evaluation.classification import classification_report, record
    from llamita.training.record import command_line
    from llamita.workflows.classify import Classifier

    _check_output(config.output)
    backend = config.running.loaded_backend("classify")
    model = Classifier.load(config.model, backend, config.running.dtype, config.running.device)
    fields = Fields(config.running.text_field, config.label_field, config.running.tsv_quotes)
    texts = read_labelled(config.data, "validation", model.config.labels, fields)
    encoded = model.encode(texts.texts, texts.source)
    print(_context(len(texts), encoded.truncated, encoded.context, model.keep))
    report = classification_report(model.log_probabilities(encoded), texts.labels, texts.names)
    about = {"model": str(model.directory), "data": list(config.data), "context": encoded.context}
    about |= {"truncated": encoded.truncated, "keep": model.keep, "temperature": model.temperature}
    _show(report, config.output, about)
    if (run := records.run_of(config.model)) is not None:
        name = config.name or f"classification {' '.join(Path(file).stem for file in config.data)}"
        try:
            print(f"recorded in {record(run, name, report, command_line(sys.argv), model.directory)}")
        except OSError as error:
            print(f"note: the metrics could not be recorded in {run}: {error}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Label texts with a tuned model. Labels that the texts already have are ignored."""

    model: tyro.conf.Positional[Path]
    """A model directory, or a training run (then its best checkpoint)."""
    data: tuple[str, ...] = ()
    """Texts: files (a text a line, or label ||| sentence; .csv, .tsv, .jsonl), meadow[:COUNT],
    hub:NAME[:CONFIG][@SPLIT]."""
    text: str | None = None
    """One text, instead of data; the probability of each label is printed."""
    output: Path | None = None
    """The file to write, a line `label ||| sentence` for each text. Left out: the lines are printed."""
    names: bool = False
    """Write the labels' names instead of their numbers."""
    overwrite: bool = False
    """Replace a file that exists."""
    running: TextConfig = TextConfig()


def predict(config: PredictConfig) -> None:
    import math
    import sys

    from llamita.data.labelled import SEPARATOR, Fields, read_records
    from llamita.storage import files
    from llamita.workflows.classify import Classifier

    if (config.text is None) == (not config.data):
        raise ValueError("give either --data, texts to label, or --text, one text")
    if config.output and config.output.exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} exists already; choose another name, or pass --overwrite")
    backend = config.running.loaded_backend("classify")
    model = Classifier.load(config.model, backend, config.running.dtype, config.running.device)
    labels = model.config.labels
    if config.text is not None:
        (log_p,) = model.log_probabilities(model.encode([config.text], "--text"))
        for number in (-log_p).argsort(kind="stable"):
            print(f"{labels[number]}  {math.exp(log_p[number]):.4f}")
        return
    fields = Fields(config.running.text_field, tsv_quotes=config.running.tsv_quotes)
    records = [
        record for source in config.data for record in read_records(source, "validation", fields, labelled=False)
    ]
    encoded = model.encode([record.text for record in records], ", ".join(config.data))
    predicted = model.log_probabilities(encoded).argmax(axis=1)
    lines = [
        f"{labels[label] if config.names else label} {SEPARATOR} {' '.join(record.text.split())}\n"
        for label, record in zip(predicted, records, strict=True)
    ]
    print(_context(len(records), encoded.truncated, encoded.context, model.keep), file=sys.stderr)
    if any(record.label is not None for record in records):
        print(
            "the labels in the data were not looked at; llamita classify evaluate scores them",
            file=sys.stderr,
        )
    if config.output is None:
        print("".join(lines), end="")
        return
    with files.atomic_file(config.output, config.overwrite) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {len(lines)} lines to {config.output}")


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """The question that a language model is asked about each text."""

    label_mapping: Path | None = None
    """A JSON list of the labels' names in the order of their numbers, or an object that gives each name its number."""
    labels: tuple[str, ...] = ()
    """The words that stand for the labels, in the order of the labels. Left out: the labels' names."""
    suffix: str | None = None
    """The question after a text; the label follows it after a space. Left out: Is this movie LABELS? This movie is"""
    score: Literal["sum", "mean"] = "sum"
    """A label's score: the sum or the mean of its tokens' log-probabilities."""
    calibrate: bool = False
    """Divide the probabilities by those of texts without content (Zhao et al. 2021)."""
    sequence_length: int = 0
    """Most tokens of text, question and label together; 0: as many as the model has positions."""
    keep: Literal["end", "start"] = "end"
    """The side of a too long text that is kept; the question is kept whole."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Label texts with an untuned language model, by the label that it finds likeliest after a question."""

    model: tyro.conf.Positional[Path]
    """A model directory, or a training run (then its best checkpoint)."""
    data: tuple[str, ...]
    """Labelled texts: files (label ||| sentence, .csv, .tsv, .jsonl), meadow[:COUNT] (its validation stories),
    hub:NAME[:CONFIG][@SPLIT]."""
    question: QuestionConfig = QuestionConfig()
    output: Path | None = None
    """A new directory for evaluation.json, confusion.png and reliability.png. Left out: they are not kept."""
    label_field: str = "label"
    """The column or field that holds a text's label."""
    running: TextConfig = TextConfig()


def zero_shot(config: ZeroShotConfig) -> None:
    from llamita.data.labelled import Fields
    from llamita.evaluation.calibration import with_temperature
    from llamita.evaluation.classification import classification_report
    from llamita.storage import calibration, model_directory

    _check_output(config.output)
    directory = model_directory.resolve_model_directory(config.model)
    fields = Fields(config.running.text_field, config.label_field, config.running.tsv_quotes)
    asked = _ask(directory, config.data, config.question, fields, config.running)
    question = config.question
    temperature = calibration.load(directory).question_temperature(
        asked.suffix, asked.words, question.score, question.calibrate
    )
    report = classification_report(
        with_temperature(asked.log_probabilities, temperature), asked.texts.labels, asked.texts.names
    )
    about = {"model": str(directory), "data": list(config.data), "context": asked.context}
    about |= {"truncated": asked.truncated, "suffix": asked.suffix, "words": list(asked.words)}
    about |= {"score": question.score, "calibrated": question.calibrate, "temperature": temperature}
    _show(report, config.output, about)


@dataclass(frozen=True)
class Asked:
    """The answers of a language model to a question about texts, at temperature 1."""

    texts: LabelledTexts
    words: tuple[str, ...]
    suffix: str
    context: int
    truncated: int
    log_probabilities: np.ndarray


def _ask(directory: Path, data: Sequence[str], question: QuestionConfig, fields: Fields, running: TextConfig) -> Asked:
    """Asks the question about each text; ValueError for a model with a head, and for words that fit no labels."""
    from llamita.data.labelled import read_labelled, read_mapping
    from llamita.evaluation import zero_shot as asking
    from llamita.storage import model_directory, peft_directory
    from llamita.text.tokenizer import Tokenizer
    from llamita.workflows.classify import context_length

    backend = running.loaded_backend("generate")
    model_config = model_directory.load_config(peft_directory.place_of(directory, peft_directory.CONFIG))
    if model_config.num_labels:
        raise ValueError(f"{directory} has a classification head: llamita classify evaluate measures it")
    length = context_length(question.sequence_length, model_config)
    names = read_mapping(question.label_mapping) if question.label_mapping else question.labels
    texts = read_labelled(data, "validation", names, fields)
    words = question.labels or texts.names
    if len(words) != len(texts.names):
        raise ValueError(f"--labels has {len(words)} words, but there are {len(texts.names)} labels")
    suffix = asking.default_suffix(words) if question.suffix is None else question.suffix
    print(f"question: {suffix.rstrip()} {'|'.join(words)}")
    found = asking.zero_shot(
        backend.load_runner(directory, running.dtype, running.device),
        Tokenizer.load(peft_directory.place_of(directory, *peft_directory.VOCABULARY)),
        texts.texts,
        words,
        suffix=suffix,
        length=length,
        vocab_size=model_config.vocab_size,
        keep=question.keep,
        reduction=question.score,
        calibrate=question.calibrate,
    )
    print(_context(len(texts), found.truncated, length, question.keep))
    return Asked(texts, words, suffix, length, found.truncated, found.log_probabilities)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Fit the temperature that makes a model's label probabilities fit how often it is right, and store it with it.

    Of a model with a classification head it is the head's. A language model has one for each question: give the same
    labels and suffix as to zero-shot. From then on all that gives probabilities of those labels applies it.
    """

    model: tyro.conf.Positional[Path]
    """A model directory, or a training run (then its best checkpoint); calibration.json is written into it."""
    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled texts that the model did not learn from: files (label ||| sentence, .csv, .tsv, .jsonl), meadow[:COUNT]
    (its validation stories), hub:NAME[:CONFIG][@SPLIT]."""
    question: QuestionConfig = QuestionConfig()
    label_field: str = "label"
    """The column or field that holds a text's label."""
    running: TextConfig = TextConfig()


def calibrate(config: CalibrateConfig) -> None:
    from llamita.data.labelled import Fields, read_labelled
    from llamita.storage import model_directory, peft_directory
    from llamita.workflows.calibrate import calibrate_head, calibrate_question
    from llamita.workflows.classify import Classifier

    if not config.data:
        raise ValueError("DATA is missing: give labelled texts that the model did not learn from")
    directory = model_directory.resolve_model_directory(config.model)
    fields = Fields(config.running.text_field, config.label_field, config.running.tsv_quotes)
    if model_directory.load_config(peft_directory.place_of(directory, peft_directory.CONFIG)).num_labels:
        if config.question != QuestionConfig():
            raise ValueError(f"{directory} has a classification head, which is asked no question; leave its flags out")
        backend = config.running.loaded_backend("classify")
        model = Classifier.load(directory, backend, config.running.dtype, config.running.device)
        texts = read_labelled(config.data, "validation", model.config.labels, fields)
        encoded = model.encode(texts.texts, texts.source)
        print(_context(len(texts), encoded.truncated, encoded.context, model.keep))
        found = calibrate_head(model, encoded, texts)
    else:
        asked, question = _ask(directory, config.data, config.question, fields, config.running), config.question
        found = calibrate_question(
            directory,
            asked.log_probabilities,
            asked.texts,
            asked.suffix,
            asked.words,
            question.score,
            question.calibrate,
        )
    print(f"temperature {found.temperature:.4f}, the least loss on these texts; wrote {found.file}")
    for name, values in (
        ("loss", (found.before.loss, found.after.loss)),
        ("Brier score", (found.before.brier_score, found.after.brier_score)),
        ("calibration error", (found.before.calibration_error, found.after.calibration_error)),
    ):
        print(f"{name:<17} {values[0]:.4f} before, {values[1]:.4f} after")
    print(f"accuracy          {found.after.accuracy:.4f}, which a temperature does not change")


def _check_output(output: Path | None) -> None:
    """Raises FileExistsError before the work is done rather than after it."""
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists already; choose another --output")


def _context(texts: int, truncated: int, context: int, keep: str) -> str:
    cut = f"{truncated} cut, their {keep} kept" if truncated else "none is cut"
    return f"{texts} texts, context of {context} tokens: {cut}"


def _show(report: Report, output: Path | None, about: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llamita.evaluation.classification import write_report

    table = Table(box=None, pad_edge=False)

    for name in ("label", "texts", "predicted", "precision", "recall", "F1"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for scores in report.labels:
        values = (scores.precision, scores.recall, scores.f1)
        table.add_row(scores.label, str(scores.texts), str(scores.predicted), *(f"{value:.4f}" for value in values))
    Console(highlight=False, markup=False).print(table)
    print(
        f"accuracy          {report.accuracy:.4f} (standard error {report.standard_error:.4f}; "
        f"the most frequent label alone {report.majority:.4f})\n"
        f"macro F1          {report.macro_f1:.4f}\n"
        f"loss              {report.loss:.4f} nats per text\n"
        f"Brier score       {report.brier_score:.4f}\n"
        f"calibration error {report.calibration_error:.4f}"
    )
    if about["temperature"] != 1:
        print(f"temperature       {about['temperature']:.4f}, fitted by llamita classify calibrate")
    if output is not None:
        write_report(output, report, about)
        print(f"wrote {output}: evaluation.json, confusion.png, reliability.png")

"""What several questions about one text cost beside one, and what a fitted temperature changes on texts it never saw.

    python benchmarks/decisions.py questions MODEL [--text FILE] [--tokens 1500] [--layout chat] [--passes 5]
    python benchmarks/decisions.py calibration MODEL --fit dev.txt --measure test.txt [--labels bad good --suffix "..."]

`questions`: the text is a file's, else Meadow stories, cut to so many tokens; the prefix cache is emptied before each
request. One question and five take turns; the ratio is that of their medians. `calibration`: MODEL has a classification
head, or is asked about labels after a suffix; nothing is written. Without `--measure`, the first half of the texts is
fitted on and the second measured.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import llamita
from llamita.backend.choice import load_backend
from llamita.data import meadow
from llamita.data.labelled import Fields, read_labelled, read_mapping
from llamita.evaluation.calibration import fit_temperature, with_temperature
from llamita.evaluation.classification import classification_report, label_log_probabilities
from llamita.evaluation.zero_shot import zero_shot
from llamita.storage import model_directory, peft_directory
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.classify import Classifier
from llamita.workflows.decisions import decide
from llamita.workflows.questions import Choice, Labels, Option, Predicate, Question, Score

QUESTIONS: tuple[Question, ...] = (
    Predicate("Is the text about a family?"),
    Choice("What is the text?", (Option("story"), Option("letter"), Option("report"))),
    Score("How sad is the text?", (Option("low"), Option("medium"), Option("high"))),
    Predicate("Does an animal speak in the text?"),
    Labels("What is in the text?", (Option("castle"), Option("music"))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    asked = parts.add_parser("questions")
    asked.add_argument("model", type=Path)
    asked.add_argument("--text", type=Path)
    asked.add_argument("--tokens", type=int, default=1500)
    asked.add_argument("--layout", choices=("auto", "chat", "plain"), default="auto")
    asked.add_argument("--passes", type=int, default=5)
    fitted = parts.add_parser("calibration")
    fitted.add_argument("model", type=Path)
    fitted.add_argument("--fit", required=True)
    fitted.add_argument("--measure")
    fitted.add_argument("--label-mapping", type=Path)
    fitted.add_argument("--labels", nargs="+", default=[])
    fitted.add_argument("--suffix", default="")
    fitted.add_argument("--sequence-length", type=int, default=0)
    arguments = parser.parse_args()
    {"questions": questions, "calibration": calibration}[arguments.part](arguments)


def questions(arguments: argparse.Namespace) -> None:
    model = llamita.load(arguments.model)
    assert model.tokenizer is not None, "questions are text"
    source = arguments.text.read_text("utf-8") if arguments.text else " ".join(meadow.corpus(0, 300, "validation"))
    text = model.tokenizer.decode(model.tokenizer.encode(source)[: arguments.tokens])

    def seconds(asked: tuple[Question, ...]) -> tuple[float, float]:
        model.engine.manager.forget_unused()
        begun, busy = time.perf_counter(), time.process_time()
        decide(model, text, asked, layout=arguments.layout)
        return time.perf_counter() - begun, time.process_time() - busy

    sets = {"one": QUESTIONS[:1], "five": QUESTIONS}
    for asked in sets.values():
        seconds(asked)  # what is compiled or fetched on first use
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    for _ in range(arguments.passes):
        for name, asked in sets.items():
            times[name].append(seconds(asked))
    table = Table(title=f"{arguments.model.name}: questions about {arguments.tokens} tokens", title_justify="left")
    for column in ("questions", "tokens read", "seconds", "least", "most", "seconds of CPUs"):
        table.add_column(column, justify="left" if column == "questions" else "right")
    medians = {}
    for name, asked in sets.items():
        model.engine.manager.forget_unused()
        read = decide(model, text, asked, layout=arguments.layout).input_tokens
        whole, busy = zip(*times[name], strict=True)
        medians[name] = (statistics.median(whole), statistics.median(busy))
        found = (medians[name][0], min(whole), max(whole), medians[name][1])
        table.add_row(name, str(read), *(f"{value:.2f}" for value in found))
    Console().print(table)
    wall, cpu = (five / one for five, one in zip(medians["five"], medians["one"], strict=True))
    print(f"five take {wall:.2f} times as long as one, and {cpu:.2f} times the CPUs' time")


def calibration(arguments: argparse.Namespace) -> None:
    names, sources = (), (arguments.fit, *([arguments.measure] if arguments.measure else []))
    backend = load_backend("auto")
    directory = model_directory.resolve_model_directory(arguments.model)
    config = model_directory.load_config(peft_directory.place_of(directory, peft_directory.CONFIG))
    if config.num_labels:
        classifier = Classifier.load(directory, backend)
        names = config.labels
    elif arguments.label_mapping:
        names = read_mapping(arguments.label_mapping)

    def log_probabilities(texts: tuple[str, ...]) -> np.ndarray:
        if config.num_labels:
            return label_log_probabilities(classifier.runner, classifier.encode(texts).tokens, config.num_labels)
        runner = backend.load_runner(directory)
        tokenizer = Tokenizer.load(peft_directory.place_of(directory, *peft_directory.VOCABULARY))
        length = arguments.sequence_length or config.max_position_embeddings
        asked = {"suffix": arguments.suffix, "length": length, "vocab_size": config.vocab_size}
        return zero_shot(runner, tokenizer, texts, arguments.labels, **asked).log_probabilities

    sets = []
    for source in sources:
        texts = read_labelled((source,), "validation", names or tuple(arguments.labels), Fields())
        sets.append((log_probabilities(texts.texts), texts.labels))
    if len(sets) == 1:
        (log_p, labels), half = sets[0], len(sets[0][1]) // 2
        sets = [(log_p[:half], labels[:half]), (log_p[half:], labels[half:])]
    temperature = fit_temperature(*sets[0])
    table = Table(title=f"{arguments.model}: temperature {temperature:.3f}", title_justify="left")
    for column in ("texts", "temperature", "accuracy", "loss", "Brier score", "calibration error"):
        table.add_column(column, justify="right")
    for what, (log_p, labels) in zip(("fitted on", "measured on"), sets, strict=True):
        for value in (1.0, temperature):
            shown = [str(i) for i in range(log_p.shape[1])]
            report = classification_report(with_temperature(log_p, value), labels, shown)
            scores = (report.accuracy, report.loss, report.brier_score, report.calibration_error)
            table.add_row(f"{len(labels)} {what}", f"{value:.3f}", *(f"{score:.4f}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Scores predicted labels: their probabilities from a runner, accuracy, F1, confusion, calibration, pictures.

Works in numpy on log-probabilities of labels, from a classifier's head or a language model's likelihoods. Knows nothing
of frameworks, of training, or of where texts come from. C: labels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.backend.interface import Forward, TextLabeller
from llamita.data.labelled_batches import by_length
from llamita.evaluation import records
from llamita.storage import files

BINS = 15
BATCH = 64


def label_log_probabilities(
    runner: Forward, tokens: Sequence[np.ndarray], num_labels: int, batch_size: int = BATCH
) -> np.ndarray:
    """Returns log p of each label (float64 [n, labels]) from a classifier's logits at the last token of each text.

    Texts run together padded on the right, which causal attention does not see.
    """
    result = np.empty((len(tokens), num_labels))
    for ids in by_length(tokens, batch_size):
        if isinstance(runner, TextLabeller):
            result[ids] = runner.label_log_probs([tokens[i] for i in ids])
            continue
        lengths = np.array([len(tokens[i]) for i in ids])
        tokens_BT = np.zeros((len(ids), lengths.max()), dtype=np.int64)
        for b, i in enumerate(ids):
            tokens_BT[b, : lengths[b]] = tokens[i]
        logits_BTV = runner.forward(tokens_BT)["logits"]
        result[ids] = log_softmax(logits_BTV[np.arange(len(ids)), lengths - 1].astype(np.float64))
    return result


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Returns the log-softmax over the last axis; a row of scores may hold -inf beside finite ones."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class LabelScores:
    """The scores of one label: `texts` texts have it, `predicted` texts were given it."""

    label: str
    texts: int
    predicted: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Bin:
    """The texts whose confidence lies in (`above`, `up_to`]: their number, mean confidence and accuracy."""

    above: float
    up_to: float
    texts: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """The results of `classification_report`; `to_dict` gives the JSON that is written."""

    texts: int
    accuracy: float
    standard_error: float
    """The standard error of the accuracy a: sqrt(a (1 - a) / n), the texts taken for independent draws."""
    majority: float
    """The accuracy of always giving the most frequent label of these texts."""
    macro_f1: float
    """The mean F1 over the labels that occur among the true or the predicted ones."""
    loss: float
    """The mean -log p of the true labels, in nats."""
    brier_score: float
    """The mean squared difference between the probabilities and what is right, as scikit-learn gives it: of two labels,
    that of one of them (0 to 1); of more, summed over the labels (0 to 2). Brier 1950."""
    calibration_error: float
    """Expected calibration error: the mean over texts of the gap between confidence and accuracy in their bin."""
    labels: tuple[LabelScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Counts of texts; row: the true label, column: the predicted one."""
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def classification_report(log_probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Report:
    """Measures predictions, the likeliest label of each text: log p (n, labels) against the true labels (n,).

    Calibration after Guo et al. 2017 (arXiv:1706.04599): 15 bins of equal width over the confidence, which is the
    probability of the predicted label.
    """
    n, C = log_probabilities.shape
    predicted = log_probabilities.argmax(axis=1)
    confusion = np.zeros((C, C), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, true, given = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall, f1 = _ratio(hits, given), _ratio(hits, true), _ratio(2 * hits, true + given)
    accuracy = float(hits.sum() / n)
    bins = _bins(np.exp(log_probabilities.max(axis=1)), predicted == labels)
    return Report(
        texts=n,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / n),
        majority=float(true.max() / n),
        macro_f1=float(f1[(true + given) > 0].mean()),
        loss=float(-log_probabilities[np.arange(n), labels].mean()),
        brier_score=_brier_score(np.exp(log_probabilities), labels),
        calibration_error=sum(bucket.texts / n * abs(bucket.confidence - bucket.accuracy) for bucket in bins),
        labels=tuple(
            LabelScores(name, int(true[i]), int(given[i]), float(precision[i]), float(recall[i]), float(f1[i]))
            for i, name in enumerate(names)
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        bins=bins,
    )


def _ratio(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Returns parts / wholes, 0 where the whole is 0."""
    return np.divide(parts, wholes, out=np.zeros(len(parts)), where=wholes > 0)


def _brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    C = probabilities.shape[1]
    squares_n = ((probabilities - np.eye(C)[labels]) ** 2).sum(axis=1)
    return float(squares_n.mean()) / (2 if C == 2 else 1)


def _bins(confidence: np.ndarray, right: np.ndarray) -> tuple[Bin, ...]:
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        inside = place == i
        mean = [float(values[inside].mean()) if inside.any() else 0.0 for values in (confidence, right)]
        found.append(Bin(i / BINS, (i + 1) / BINS, int(inside.sum()), *mean))
    return tuple(found)


# --- files and pictures ----------------------------------------------------------------------------------------------


def write_report(directory: Path, report: Report, about: Mapping[str, Any]) -> None:
    """Writes evaluation.json (`about` and the report), confusion.png and reliability.png; all or none."""
    names = [scores.label for scores in report.labels]
    with files.atomic_directory(directory) as temporary:
        (temporary / "evaluation.json").write_text(json.dumps({**about, **report.to_dict()}, indent=2) + "\n")
        plot_confusion(np.array(report.confusion), names, temporary / "confusion.png")
        plot_reliability(report, temporary / "reliability.png")


def record(run: Path, name: str, report: Report, command: str, model: Path) -> Path:
    """Writes the metrics and both pictures to RUN/evaluations, for reports and lists of runs; returns the file."""
    directory = run / records.DIRECTORY
    directory.mkdir(exist_ok=True)
    pictures = [f"{records.file_name(name)}-{kind}.png" for kind in ("confusion", "reliability")]
    plot_confusion(np.array(report.confusion), [scores.label for scores in report.labels], directory / pictures[0])
    plot_reliability(report, directory / pictures[1])
    metrics = {"accuracy": report.accuracy, "accuracy_stderr": report.standard_error, "macro_f1": report.macro_f1}
    metrics |= {"loss": report.loss, "brier_score": report.brier_score}
    metrics |= {"calibration_error": report.calibration_error, "texts": report.texts}
    return records.write(run, name, metrics, command, model, pictures)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draws the counts; the darker a cell, the larger its share of its row (the texts of one true label)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    C = len(names)
    side = min(12.0, 2.2 + 0.75 * C)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if C <= 20:
        for i, j in np.ndindex(C, C):
            color = "white" if share[i, j] > 0.55 else "#222222"
            axes.text(j, i, f"{confusion[i, j]}", ha="center", va="center", color=color)
    axes.set_xticks(range(C), names, rotation=30 if sum(map(len, names)) > 8 * C else 0)
    axes.set_yticks(range(C), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true label's texts")
    figure.savefig(path, format="png", dpi=120)


def plot_reliability(report: Report, path: Path) -> None:
    """Draws the accuracy of each bin of confidence beside the diagonal of a calibrated model, and the bins' sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [bucket for bucket in report.bins if bucket.texts]
    width = 1 / BINS
    above.plot([0, 1], [0, 1], color="#555555", linestyle="--", linewidth=1.2, label="calibrated")
    above.bar(
        [bucket.above + width / 2 for bucket in filled],
        [bucket.accuracy for bucket in filled],
        width * 0.92,
        color="#9ecae1",
        label="accuracy",
    )
    above.plot(
        [bucket.confidence for bucket in filled],
        [bucket.accuracy for bucket in filled],
        color="#d94801",
        marker="o",
        markersize=4,
        linewidth=0,
        clip_on=False,
        label="at its mean confidence",
    )
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1)
    above.set_title(f"expected calibration error {report.calibration_error:.3f}", fontsize=10)
    above.legend(frameon=False, loc="upper left")
    below.bar(
        [bucket.above + width / 2 for bucket in report.bins], [bucket.texts for bucket in report.bins], width * 0.92
    )
    below.set_ylabel("texts")
    below.set_xlabel("confidence (probability of the predicted label)")
    below.set_xlim(0, 1)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)

"""Fitting a model's temperature on development texts and storing it with the model, in `calibration.json`.

What is already stored is left out of the fit, so that calibrating again gives the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamita.data.labelled import LabelledTexts
from llamita.data.labelled_batches import EncodedTexts
from llamita.evaluation.calibration import fit_temperature, with_temperature
from llamita.evaluation.classification import Report, classification_report
from llamita.storage import calibration
from llamita.storage.calibration import HeadTemperature, QuestionTemperature, Reduction
from llamita.workflows.classify import Classifier


@dataclass(frozen=True)
class Calibrated:
    """A fitted temperature, what its texts say of the model before and after, and the file that it is in."""

    temperature: float
    before: Report
    after: Report
    file: Path


def calibrate_head(model: Classifier, encoded: EncodedTexts, texts: LabelledTexts) -> Calibrated:
    """Fits the temperature of a classification head and stores it; ValueError for texts that cannot tell it."""
    log_p = replace(model, temperature=1.0).log_probabilities(encoded)
    temperature = fit_temperature(log_p, texts.labels)
    stored = calibration.load(model.directory)
    head = HeadTemperature(temperature, model.config.labels, len(texts))
    calibration.save(model.directory, replace(stored, head=head))
    return _calibrated(model.directory, log_p, texts, temperature)


def calibrate_question(
    directory: Path,
    log_probabilities: np.ndarray,
    texts: LabelledTexts,
    suffix: str,
    words: Sequence[str],
    score: Reduction = "sum",
    contextual: bool = False,
) -> Calibrated:
    """Fits the temperature of a question to a language model from its answers, log p (n, labels), and stores it."""
    temperature = fit_temperature(log_probabilities, texts.labels)
    question = QuestionTemperature(temperature, suffix.strip(), tuple(words), len(texts), score, contextual)
    calibration.save(directory, calibration.load(directory).with_question(question))
    return _calibrated(directory, log_probabilities, texts, temperature)


def _calibrated(directory: Path, log_p: np.ndarray, texts: LabelledTexts, temperature: float) -> Calibrated:
    before = classification_report(log_p, texts.labels, texts.names)
    after = classification_report(with_temperature(log_p, temperature), texts.labels, texts.names)
    return Calibrated(temperature, before, after, calibration.path_of(directory))

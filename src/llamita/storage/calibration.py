"""The temperatures fitted to a model's label probabilities, in `calibration.json` beside its `config.json`.

A classification head has one temperature, and a language model one for each question that it was calibrated on: labels
after a suffix. A file of its own, since transformers leaves unknown files alone; a GGUF file `model.gguf` has
`model.gguf.calibration.json` beside it.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamita.storage import files

FILE = "calibration.json"
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class HeadTemperature:
    """The number that the logits of a classification head are divided by, and what it was fitted on."""

    temperature: float
    labels: tuple[str, ...]
    texts: int
    """The number of development texts that it was fitted on."""


@dataclass(frozen=True)
class QuestionTemperature:
    """The number that the log-probabilities of some words after a suffix are divided by."""

    temperature: float
    suffix: str
    words: tuple[str, ...]
    texts: int
    score: Reduction = "sum"
    contextual: bool = False
    """Whether it applies after contextual calibration (`zero-shot --calibrate`)."""

    def asks(self, suffix: str, words: Collection[str], score: Reduction, contextual: bool) -> bool:
        """Returns whether this is that question; the order of the words and blanks around the suffix do not matter."""
        own = (self.suffix.strip(), sorted(self.words), self.score, self.contextual)
        return own == (suffix.strip(), sorted(words), score, contextual)


@dataclass(frozen=True)
class Calibration:
    """All temperatures of a model: that of its head, and those of questions to it as a language model."""

    head: HeadTemperature | None = None
    questions: tuple[QuestionTemperature, ...] = ()

    def head_temperature(self, labels: Sequence[str], where: Path) -> float:
        """Returns the head's temperature, 1 where it has none; ValueError where it was fitted to other labels."""
        if self.head is None:
            return 1.0
        if self.head.labels != tuple(labels):
            raise ValueError(
                f"{path_of(where)} is for the labels {', '.join(self.head.labels)}, and the model's are "
                f"{', '.join(labels)}; remove it, or calibrate the model again"
            )
        return self.head.temperature

    def question_temperature(
        self, suffix: str, words: Collection[str], score: Reduction = "sum", contextual: bool = False
    ) -> float:
        """Returns the temperature of the question with these words after this suffix, 1 where it has none."""
        asked = (question for question in self.questions if question.asks(suffix, words, score, contextual))
        return next((question.temperature for question in asked), 1.0)

    def with_question(self, new: QuestionTemperature) -> "Calibration":
        """Returns the calibration with one more question, in place of an earlier temperature of the same."""
        asked = (new.suffix, new.words, new.score, new.contextual)
        kept = tuple(question for question in self.questions if not question.asks(*asked))
        return replace(self, questions=(*kept, new))


def path_of(place: Path) -> Path:
    """Returns the file that holds the calibration of a model directory, or of a GGUF file."""
    return place / FILE if place.is_dir() else place.with_name(f"{place.name}.{FILE}")


def load(place: Path) -> Calibration:
    """Returns the calibration of a model, an empty one where it has none; ValueError for a broken file."""
    file = path_of(place)
    if not file.is_file():
        return Calibration()
    values = files.read_json(file)
    try:
        head = HeadTemperature(**_fields(values["head"], "labels")) if values.get("head") else None
        questions = tuple(QuestionTemperature(**_fields(each, "words")) for each in values.get("questions", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no calibration ({error}); remove it, or calibrate the model again") from None
    return Calibration(head, questions)


def save(place: Path, calibration: Calibration) -> None:
    """Writes the calibration of a model, in one step; an empty one writes nothing."""
    if calibration != Calibration():
        files.atomic_write(path_of(place), json.dumps(asdict(calibration), indent=2, ensure_ascii=False) + "\n")


def _fields(values: dict[str, Any], texts: str) -> dict[str, Any]:
    """Returns the fields of a temperature, checked; `texts` names the one that is a list of texts."""
    temperature = values["temperature"]
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be a finite number above 0")
    if not isinstance(values[texts], list) or not all(isinstance(text, str) for text in values[texts]):
        raise ValueError(f"{texts} must be a list of texts")
    return {**values, texts: tuple(values[texts])}

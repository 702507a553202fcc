"""The questions of decisions, and their answers: data, checked as it is made. Knows nothing of models or of HTTP.

Predicate   yes or no          Choice   one of several options
Score       a level of a scale Labels   several options at once, each with its own yes or no
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Option:
    """One of the options of a question, and what it means. A boolean is written `true` or `false`."""

    value: str | bool
    description: str = ""

    @property
    def text(self) -> str:
        """The words that the model judges."""
        return str(self.value).lower() if isinstance(self.value, bool) else self.value.strip()


@dataclass(frozen=True)
class Predicate:
    """Asks whether something holds of the text; `yes` and `no` may say what either means."""

    instructions: str
    yes: str = ""
    no: str = ""

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)

    @property
    def options(self) -> tuple[Option, ...]:
        return Option(YES_NO[0], self.yes), Option(YES_NO[1], self.no)


@dataclass(frozen=True)
class Choice:
    """Asks for one of several options, at least two."""

    instructions: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)
        _check_options(self.options, 2)


@dataclass(frozen=True)
class Labels:
    """Asks of each option whether it applies to the text; any number of them may."""

    instructions: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)
        _check_options(self.options, 1)


@dataclass(frozen=True)
class Score:
    """Asks for a level of a scale, the options from its lowest to its highest."""

    instructions: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)
        _check_options(self.options, 2)


Question = Predicate | Choice | Labels | Score


@dataclass(frozen=True)
class Answer:
    """The probabilities of a question's options, in their order.

    They sum to one, but those of `Labels`, each of which is that of its own yes or no.
    """

    question: Question
    probabilities: tuple[float, ...]

    @property
    def likeliest(self) -> int:
        """The number of the likeliest option, the first of equal ones."""
        return int(np.argmax(self.probabilities))

    @property
    def choice(self) -> str | bool:
        """The value of the likeliest option."""
        return self.question.options[self.likeliest].value

    @property
    def probability(self) -> float:
        """The probability of yes, of a `Predicate`."""
        assert isinstance(self.question, Predicate), "other questions have no yes"
        return self.probabilities[0]

    @property
    def score(self) -> float:
        """The expected level, from 0 for the lowest to one less than there are levels."""
        return float(np.dot(self.probabilities, np.arange(len(self.probabilities))))

    @property
    def confidence(self) -> float:
        """0 where all k options are equally likely, 1 where one is certain: (p - 1/k) / (1 - 1/k) of the likeliest."""
        even = 1 / len(self.probabilities)
        return (max(self.probabilities) - even) / (1 - even)


@dataclass(frozen=True)
class Decisions:
    """The answers, in the order of the questions, and the tokens that were read for them.

    `input_tokens` counts what prompts share once; `cached_tokens` of the first one were found in the prefix cache.
    """

    answers: tuple[Answer, ...]
    input_tokens: int
    cached_tokens: int = 0


def _check_instructions(instructions: str) -> None:
    if not instructions.strip():
        raise ValueError("the instructions of a question are empty; say what is asked about the text")


def _check_options(options: Sequence[Option], least: int) -> None:
    texts = [option.text for option in options]
    if len(texts) < least:
        raise ValueError(f"a question with the options {texts} needs at least {least}")
    if not all(texts):
        raise ValueError(f"option {texts.index('') + 1} of a question is empty; give it a word")
    repeated = next((text for text in texts if texts.count(text) > 1), None)
    if repeated is not None:
        raise ValueError(f"the option {repeated!r} is given twice; each must be another")

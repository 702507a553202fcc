"""Multiple choice: scores the choice that a model finds likeliest, over questions from a file of JSON lines.

    {"question": "Who has the kite?", "choices": ["the fox", "the owl"], "answer": 0}
    {"context": "The fox has the", "choices": ["kite", "pond"], "answer": "kite"}

Nothing is generated: each choice is scored as the continuation of the prompt and a blank. Knows no framework.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.backend.interface import Forward
from llamita.data.sources import json_records
from llamita.evaluation import continuations
from llamita.evaluation.continuations import Encode, Likelihood


@dataclass(frozen=True)
class Question:
    """A prompt, the choices of its continuation, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """The shares of questions that the likeliest choice answers rightly, with their standard errors.

    `accuracy` takes the choice of the highest log-probability; `accuracy_norm` divides the log-probability by the
    characters of the choice, so that a short one has no advantage. A single question has no standard error: None.
    """

    questions: int
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float
    accuracy_norm_stderr: float | None
    chance: float  # the accuracy of guessing: the mean of 1 / number of choices
    likelihoods: tuple[tuple[Likelihood, ...], ...]  # of each question's choices

    def metrics(self) -> dict[str, float | None]:
        names = ("questions", "accuracy", "accuracy_stderr", "accuracy_norm", "accuracy_norm_stderr", "chance")
        return {name: getattr(self, name) for name in names}


def evaluate(
    runner: Forward, encode: Encode, questions: Sequence[Question], vocab_size: int, positions: int
) -> MultipleChoice:
    """Scores every choice of every question. `encode` gives a text's ids, the token that begins a text included."""
    if not questions:
        raise ValueError("expected at least one question, got none")
    pairs = []
    for number, question in enumerate(questions, 1):
        for choice in question.choices:
            pair = continuations.encode_pair(encode, question.prompt, f" {choice}")
            if not pair.context or not pair.continuation:
                raise ValueError(
                    f"question {number}: the choice {choice!r} is no token of its own after this prompt; "
                    "give a prompt that ends with a whole word"
                )
            pairs.append(pair)
    scored = iter(continuations.score(runner, pairs, vocab_size, positions))
    likelihoods = tuple(tuple(next(scored) for _ in question.choices) for question in questions)
    hits, hits_norm = [], []
    for question, row in zip(questions, likelihoods, strict=True):
        nats = np.array([likelihood.nats for likelihood in row])
        sizes = np.array([len(choice) for choice in question.choices])
        hits.append(float(nats.argmax() == question.answer))
        hits_norm.append(float((nats / sizes).argmax() == question.answer))
    return MultipleChoice(
        len(questions),
        float(np.mean(hits)),
        standard_error(hits),
        float(np.mean(hits_norm)),
        standard_error(hits_norm),
        float(np.mean([1 / len(question.choices) for question in questions])),
        likelihoods,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean of independent values; None for a single one."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def read_questions(file: Path, limit: int = 0) -> list[Question]:
    """Returns the first `limit` questions of a file (0: all); ValueError names the line and what is wrong with it."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give one of JSON lines, a question each")
    questions = []
    for value, where in json_records(file):
        try:
            questions.append(question(value))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if limit and len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{file} holds no question")
    return questions


def question(value: Any) -> Question:
    """Returns the question in an object with `question` or `context` (or both), `choices` and `answer`.

    `answer` is a choice or its index from 0. ValueError says what is wrong with the object.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    texts = [value.get(key, "") for key in ("context", "question")]
    if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
        raise ValueError("expected a text under `question` or `context`")
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError("expected at least two texts, none of them empty, under `choices`")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer!r} must be one of the choices, or its index from 0 to {len(choices) - 1}")
    context, asked = texts
    prompt = "\n".join(part for part in (context, f"Question: {asked}\nAnswer:" if asked else "") if part)
    return Question(prompt, tuple(choices), answer)

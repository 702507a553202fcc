"""Rewards of answers: the ones that there are by name, and calling one of them or a user's own.

A reward is a function of a `Sample` that returns a number; finding one by its Python path is the command line's. Knows
nothing of models or updates.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llamita.data import meadow


@dataclass(frozen=True)
class Sample:
    """One answer of a model, as a reward function sees it."""

    prompt: str
    """The text that the model went on from: with a chat template, what was said last."""
    answer: str
    """The answer, without what ends it."""
    record: Mapping[str, Any]
    """The whole record of the prompt: `answer`, `difficulty`, whatever its file holds."""
    ended: bool
    """Whether the model ended by itself, and was not cut off."""


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and a hash that changes with it, so that no run goes on with another."""

    name: str
    function: Callable[[Sample], float]
    digest: str = ""

    def __call__(self, sample: Sample, where: str) -> float:
        """The reward; ValueError, in one line that names the sample, where there is none."""
        try:
            value = float(self.function(sample))
        except Exception as error:  # a user's own function
            raise ValueError(f"reward {self.name} raised {type(error).__name__} on {where}: {error}") from error
        if not math.isfinite(value):
            raise ValueError(f"reward {self.name} is {value} on {where}; it must be a finite number")
        return value


def consistent_story(sample: Sample) -> float:
    """1 for a story of Meadow all of whose facts agree, else 0; of one that was cut off too."""
    return float(sample.ended and meadow.parse(sample.answer.strip()) is not None)


def exact(sample: Sample) -> float:
    """1 where the model said what the record's `answer` says, to the letter, and ended; else 0."""
    if not isinstance(sample.record.get("answer"), str):
        raise ValueError("the record has no field 'answer' that is a text")
    return float(sample.ended and sample.answer.strip() == sample.record["answer"].strip())


BUILT_IN = {reward.name: reward for reward in (Reward("meadow", consistent_story), Reward("exact", exact))}

LoadReward = Callable[[str], Reward]
"""Finds a reward by its name or its Python path; ValueError where there is none."""

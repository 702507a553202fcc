"""What training reads: batches in an order that can be resumed, and the rows that validate.

Only types; knows nothing of where batches come from.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from llamita.data.batches import Batch, Batches


@dataclass(frozen=True)
class TokenText:
    """The amount of text that each token id stands for: int64 arrays over the vocabulary; 0 for special tokens."""

    characters_V: np.ndarray
    bytes_V: np.ndarray


@dataclass(frozen=True)
class ValidationPart:
    """What validates one source of a mixture: `batches` starts anew at each call; weights are relative."""

    name: str
    weight: float
    batches: Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Examples:
    """Batches to learn from and to be judged by. `validation` starts anew at each call and may yield nothing.

    `target` is what the loss is a mean over; only of tokens is there a perplexity. `origin` says in a few words where
    the row of a number comes from. Where there are `parts`, they validate instead of `validation`: the loss is the
    weighted mean of theirs.
    """

    batches: Batches
    validation: Callable[[], Iterable[Batch]] = tuple
    text: TokenText | None = None
    target: str = "token"
    origin: Callable[[int], str] | None = None
    parts: tuple[ValidationPart, ...] = ()

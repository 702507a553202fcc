"""The loss over validation rows, per token, character and byte. Knows nothing of when it is taken or where it goes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llamita.backend.interface import TrainStep
from llamita.data.batches import IGNORE_INDEX
from llamita.training.examples import Examples


@dataclass(frozen=True)
class Evaluation:
    """A pass over the validation rows after `step` updates: nats per target, and per character where that is known.

    `perplexity` is None where a target is no token. `measures` are means over the targets.
    """

    step: int
    loss: float
    perplexity: float | None
    nats_per_character: float | None
    bits_per_byte: float | None
    targets: int
    best: bool
    target: str = "token"
    measures: Mapping[str, float] = field(default_factory=dict)


OnEvaluation = Callable[[Evaluation], str | None]
"""Called after each evaluation; the text it returns (samples, scores) is shown and added to RUN/samples.txt."""


@dataclass(frozen=True)
class Totals:
    """Nats per target, per character where the text is known, and how many targets were scored; see `Evaluation`."""

    loss: float
    perplexity: float | None
    nats_per_character: float | None
    bits_per_byte: float | None
    targets: int
    target: str
    measures: Mapping[str, float]


def evaluate(step: TrainStep, examples: Examples, stop: Callable[[], bool] = lambda: False) -> Totals | None:
    """The loss over the validation rows; None when `stop` said so in between.

    Characters and bytes are those of the scored tokens themselves, so they fit whatever rows are scored.
    """
    nats, targets, characters, size = 0.0, 0, 0, 0
    sums: dict[str, float] = {}
    for batch in examples.validation():
        if stop():
            return None
        found = step.evaluate(batch)
        nats += found.nats
        targets += found.targets
        for name, value in found.measures.items():
            sums[name] = sums.get(name, 0.0) + value
        if examples.text is not None:
            labels = batch.labels_BT[batch.labels_BT != IGNORE_INDEX]
            characters += int(examples.text.characters_V[labels].sum())
            size += int(examples.text.bytes_V[labels].sum())
    loss = nats / targets if targets else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Totals(
        loss=loss,
        perplexity=perplexity if examples.target == "token" else None,
        nats_per_character=nats / characters if characters else None,
        bits_per_byte=nats / size / math.log(2) if size else None,
        targets=targets,
        target=examples.target,
        measures={name: value / targets for name, value in sums.items()},
    )

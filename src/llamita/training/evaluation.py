"""The loss over validation rows, per token, character and byte. Knows nothing of when it is taken or where it goes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from llamita.backend.interface import TrainStep
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.training.examples import Examples, ValidationPart


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

    Of a mixture, the loss is the weighted mean of its parts' losses, and so are nats per character, bits per byte and
    measures; `loss/NAME` among the measures is the loss of a part.
    """
    if not examples.parts:
        return _totals(step, examples.validation(), examples, stop)
    found: list[tuple[ValidationPart, Totals]] = []
    for part in examples.parts:
        totals = _totals(step, part.batches(), examples, stop)
        if totals is None:
            return None
        if totals.targets:
            found.append((part, totals))
    whole = sum(part.weight for part, _ in found)

    def mean(values: Iterable[float | None]) -> float | None:
        known = list(values)
        if not known or any(value is None for value in known):
            return None
        return sum(
            part.weight / whole * value for (part, _), value in zip(found, known, strict=True) if value is not None
        )

    loss = mean(totals.loss for _, totals in found)
    loss = math.nan if loss is None else loss
    names = dict.fromkeys(name for _, totals in found for name in totals.measures)
    measures = {name: mean(totals.measures.get(name) for _, totals in found) for name in names}
    return Totals(
        loss=loss,
        perplexity=_perplexity(loss, examples),
        nats_per_character=mean(totals.nats_per_character for _, totals in found),
        bits_per_byte=mean(totals.bits_per_byte for _, totals in found),
        targets=sum(totals.targets for _, totals in found),
        target=examples.target,
        measures={
            **{name: value for name, value in measures.items() if value is not None},
            **{f"loss/{part.name}": totals.loss for part, totals in found},
        },
    )


def _totals(step: TrainStep, batches: Iterable[Batch], examples: Examples, stop: Callable[[], bool]) -> Totals | None:
    """The loss over some batches; None when `stop` said so in between.

    Characters and bytes are those of the scored tokens themselves, so they fit whatever rows are scored.
    """
    nats, targets, characters, size = 0.0, 0, 0, 0
    sums: dict[str, float] = {}
    for batch in batches:
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
    return Totals(
        loss=loss,
        perplexity=_perplexity(loss, examples),
        nats_per_character=nats / characters if characters else None,
        bits_per_byte=nats / size / math.log(2) if size else None,
        targets=targets,
        target=examples.target,
        measures={name: value / targets for name, value in sums.items()},
    )


def _perplexity(loss: float, examples: Examples) -> float | None:
    if examples.target != "token":
        return None
    return math.exp(loss) if loss < 700 else math.inf

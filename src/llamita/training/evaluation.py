"""The loss over validation rows, per token, character and byte. Knows nothing of when it is taken or where it goes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from llamita.data.batches import NOT_SCORED
from llamita.training.interfaces import Examples, TrainStep


@dataclass(frozen=True)
class Totals:
    """Nats per token, per character where the text is known, and how many tokens were scored."""

    loss: float
    perplexity: float
    nats_per_character: float | None
    bits_per_byte: float | None
    targets: int


def evaluate(step: TrainStep, examples: Examples, stop: Callable[[], bool] = lambda: False) -> Totals | None:
    """The loss over the validation rows; None when `stop` said so in between.

    Characters and bytes are those of the scored tokens themselves, so they fit whatever rows are scored.
    """
    nats, targets, characters, size = 0.0, 0, 0, 0
    for batch in examples.validation():
        if stop():
            return None
        batch_nats, batch_targets = step.evaluate(batch)
        nats += batch_nats
        targets += batch_targets
        if examples.text is not None:
            labels = batch.labels_BT[batch.labels_BT != NOT_SCORED]
            characters += int(examples.text.characters_V[labels].sum())
            size += int(examples.text.bytes_V[labels].sum())
    loss = nats / targets if targets else math.nan
    return Totals(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        nats_per_character=nats / characters if characters else None,
        bits_per_byte=nats / size / math.log(2) if size else None,
        targets=targets,
    )

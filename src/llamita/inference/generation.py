"""What a model wrote for one prompt, put together from the engine's events. Knows nothing of prompts or of waiting."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llamita.inference.request import FinishReason, Statistics, TokenEvent


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt. `text` ends before a stop string; `token_ids` and `logprobs` have all sampled.

    Where several were asked for (`n`), this is the first, and `continuations` are all of them, in the order of their
    seeds, this one included.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    statistics: Statistics
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # a row a token, where asked for
    prompt_logprobs: tuple[float, ...] = ()  # of prompt tokens 1, 2, ..., where asked for
    index: int = 0
    others: tuple["Generation", ...] = field(default=(), repr=False)

    @property
    def continuations(self) -> tuple["Generation", ...]:
        """All `n` continuations of the prompt; of one that is not the first, itself alone."""
        return (self, *self.others)


class Collector:
    """Takes the events of one request, its continuations interleaved, and makes a `Generation` of them."""

    def __init__(self, n: int) -> None:
        self._events: list[list[TokenEvent]] = [[] for _ in range(n)]
        self._open = n

    def feed(self, events: Iterable[TokenEvent]) -> bool:
        """Take in events; True once every continuation has ended. RuntimeError where one failed."""
        for event in events:
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
            self._events[event.index].append(event)
            self._open -= event.finish_reason is not None
        return self._open == 0

    def generation(self) -> Generation:
        """What was written, once all of it is there."""
        scored = next((event.prompt_logprobs for row in self._events for event in row if event.prompt_logprobs), ())
        first, *others = (_generation(events, scored) for events in self._events)
        return replace(first, others=tuple(others))


def _generation(events: list[TokenEvent], prompt_logprobs: tuple[float, ...]) -> Generation:
    last = events[-1]
    assert last.finish_reason is not None
    sampled = [event for event in events if event.token_id is not None]
    return Generation(
        text="".join(event.text for event in events),
        token_ids=tuple(event.token_id for event in sampled if event.token_id is not None),
        logprobs=tuple(event.logprob for event in sampled),
        finish_reason=last.finish_reason,
        statistics=last.statistics,
        top_logprobs=tuple(event.top_logprobs for event in sampled) if any(e.top_logprobs for e in sampled) else (),
        prompt_logprobs=prompt_logprobs,
        index=last.index,
    )

"""Decides who may come in: a bound on the requests that wait and on the prompt tokens that are still to be read.

A place is taken before a request's text is looked at, so that a flood costs next to nothing; the cache's memory decides
later, in the engine's scheduler, who runs. Used from one event loop; knows nothing of HTTP.
"""

import contextlib
from collections.abc import Iterator


class QueueFullError(Exception):
    """There is no room for a further request now; the text says what is full."""


class DrainingError(Exception):
    """The server is about to end and takes no further request."""


class Place:
    """A request's place: it counts until it is left, its prompt tokens until the first token came."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._tokens = 0

    def read_prompt(self, tokens: int) -> None:
        """Counts the prompt's tokens; raises QueueFullError where too many wait already."""
        self._admission.take_tokens(tokens)
        self._tokens += tokens

    def began(self) -> None:
        """Says that the prompt was read."""
        self._admission.queued_tokens -= self._tokens
        self._tokens = 0


class Admission:
    """`running` requests at once and `max_queued` more; `max_tokens` prompt tokens that wait to be read."""

    def __init__(self, running: int, max_queued: int, max_tokens: int) -> None:
        self.limit, self.max_tokens = running + max_queued, max_tokens
        self.open_requests = 0
        self.queued_tokens = 0
        self.draining = False

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """Takes a place for the time of the `with`; raises QueueFullError or DrainingError."""
        if self.draining:
            raise DrainingError("the server is ending and takes no further requests")
        if self.open_requests >= self.limit:
            raise QueueFullError(
                f"{self.open_requests} requests are open, as many as the server takes; try again shortly"
            )
        self.open_requests += 1
        place = Place(self)
        try:
            yield place
        finally:
            place.began()
            self.open_requests -= 1

    def take_tokens(self, tokens: int) -> None:
        if self.queued_tokens and self.queued_tokens + tokens > self.max_tokens:
            raise QueueFullError(
                f"{self.queued_tokens} prompt tokens wait to be read, and {tokens} more would pass the limit of "
                f"{self.max_tokens}; try again shortly"
            )
        self.queued_tokens += tokens

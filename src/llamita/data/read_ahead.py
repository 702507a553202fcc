"""Reads the next batch while the one before it is computed with."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llamita.data.batches import Batch, Batches


class ReadAhead:
    """The same batches in the same order, each read by a thread while the caller computes with the one before.

    `order` depends on nothing but the data: a BatchIterator, a MixtureIterator.
    `state` is that of the batches that were handed out. An error in reading is raised where its batch is asked for.
    """

    def __init__(self, order: Batches) -> None:
        self.order = order
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming: Future[Batch] | None = None
        self._state = order.state()

    def next(self) -> Batch:
        """Returns the next batch, and begins to read the one behind it."""
        batch = (self._coming or self._reader.submit(self.order.next)).result()
        self._state = self.order.state()
        self._coming = self._reader.submit(self.order.next)
        return batch

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` needs to go on behind the last batch that was handed out."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state()` was taken; what was read ahead is dropped."""
        if self._coming is not None:
            self._coming.exception()  # waits; its error, if any, is of a batch that nobody asked for
            self._coming = None
        self.order.load_state(state)
        self._state = self.order.state()

"""Batches read ahead are the same batches, and the state is that of those handed out."""

import threading
from typing import Any

import numpy as np
import pytest

from llamita.data.batches import Batch
from llamita.data.read_ahead import ReadAhead


class Numbered:
    """Batches that hold their own number; the one of `broken` cannot be read."""

    def __init__(self, broken: int = -1) -> None:
        self.step, self.broken, self.threads = 0, broken, set[int]()

    def next(self) -> Batch:
        self.threads.add(threading.get_ident())
        if self.step == self.broken:
            raise OSError("the disk is gone")
        self.step += 1
        tokens = np.full((1, 2), self.step)
        return Batch(tokens, tokens, None, np.arange(1))

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def number(batch: Batch) -> int:
    return int(batch.tokens_BT[0, 0])


def test_the_same_batches_come_in_the_same_order_from_another_thread() -> None:
    plain = Numbered()
    ahead = ReadAhead(plain)
    assert [number(ahead.next()) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert len(plain.threads) == 1
    assert threading.get_ident() not in plain.threads


def test_the_state_is_behind_what_was_handed_out() -> None:
    ahead = ReadAhead(Numbered())
    assert ahead.state() == {"step": 0}
    for _ in range(3):
        ahead.next()
    saved = ahead.state()
    assert saved == {"step": 3}
    assert [number(ahead.next()) for _ in range(2)] == [4, 5]
    ahead.load_state(saved)
    assert number(ahead.next()) == 4
    fresh = ReadAhead(Numbered())
    fresh.load_state(saved)
    assert fresh.state() == saved
    assert number(fresh.next()) == 4


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    ahead = ReadAhead(Numbered(broken=2))
    assert [number(ahead.next()) for _ in range(2)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.next()
    ahead.load_state({"step": 0})
    assert number(ahead.next()) == 1

"""Streams as they leave the server: when their head is sent, the signs of life, their end; without a server around."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from llamita.server.streaming import EventStream

Sent = list[tuple[str, bytes]]


def send_all(steps: Sequence[bytes | float], heartbeat: float = 60.0) -> list[Sent]:
    """Returns what was sent before each step (a piece, or seconds of waiting), and in the end."""
    sent: Sent = []
    seen: list[Sent] = []

    async def pieces() -> AsyncGenerator[bytes]:
        for step in steps:
            await asyncio.sleep(0 if isinstance(step, bytes) else step)
            seen.append(list(sent))
            if isinstance(step, bytes):
                yield step
        seen.append(list(sent))

    async def send(message: dict[str, object]) -> None:
        sent.append((str(message["type"]).rpartition(".")[2], bytes(message.get("body", b""))))  # type: ignore[arg-type]

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    asyncio.run(EventStream(pieces(), heartbeat)({}, receive, send))  # type: ignore[arg-type]
    return [*seen, sent]


def test_nothing_is_sent_before_the_second_piece() -> None:
    *_, before_second, after_second, after_third, whole = send_all([b"a", b"b", b"c"])
    assert before_second == []
    assert after_second == [("start", b""), ("body", b"ab")]
    assert after_third == [*after_second, ("body", b"c")]
    assert whole == [*after_third, ("body", b"")]


def test_a_stream_of_one_piece_is_sent_at_its_end() -> None:
    assert send_all([b"a"])[-1] == [("start", b""), ("body", b"a")]


def test_a_sign_of_life_takes_the_head_and_the_first_piece_with_it() -> None:
    whole = send_all([b"a", 0.2, b"b"], heartbeat=0.05)[-1]
    assert whole[:2] == [("start", b""), ("body", b"a: still working\n\n")]
    assert whole.count(("start", b"")) == 1
    assert whole[-2:] == [("body", b"b"), ("body", b"")]
    assert ("body", b": still working\n\n") in whole, "and more of them while nothing comes"

"""The server's socket: what is written to a client leaves at once."""

import asyncio
import socket

from llamita.server.run import bind


def test_tokens_are_not_held_back_until_earlier_ones_are_acknowledged() -> None:
    """Nagle's algorithm would keep a small write until the one before is acknowledged, 40 ms later."""

    async def run() -> int:
        held_back = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted: socket.socket = writer.get_extra_info("socket")
            held_back.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            no_delay = await held_back
            writer.close()
            return no_delay

    assert asyncio.run(run()) == 1

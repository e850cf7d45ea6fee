"""Clients that mean harm, for the benchmark: python -m tests.bench.attackers PORT SECONDS

All from 127.0.0.2 to 127.0.0.1, a fixed number of each kind, each as fast as it gets: handshakes a byte at a time,
connections without end, options without reading, requests without reading, garbage, half-closed connections.
"""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import Final

from tests.bench import probe

SOURCE: Final = "127.0.0.2"
LORIS_SECONDS: Final = 0.1
HOLD_SECONDS: Final = 0.5
"""How long a connection that has done its worst is kept."""
EXPORT: Final = b"bench"
OPTION: Final = struct.Struct(">QII")
REQUEST: Final = struct.Struct(">IHHQQI")
ENTER: Final = (
    struct.pack(">I", probe.FIXED_NEWSTYLE | probe.NO_ZEROES)
    + OPTION.pack(probe.IHAVEOPT, probe.OPT_EXPORT_NAME, len(EXPORT))
    + EXPORT
)
HELLO: Final = struct.pack(">I", probe.FIXED_NEWSTYLE | probe.NO_ZEROES)


class Attack:
    """Attackers of one server. attempts: connections so far, whatever became of them."""

    def __init__(self, port: int) -> None:
        self.attempts = 0
        self._port = port
        self._loop = asyncio.get_running_loop()

    async def connected(self) -> socket.socket:
        """A connection; OSError."""
        self.attempts += 1
        sock = socket.socket()
        sock.setblocking(False)
        try:
            sock.bind((SOURCE, 0))
            await self._loop.sock_connect(sock, ("127.0.0.1", self._port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def send(self, sock: socket.socket, data: bytes) -> None:
        await self._loop.sock_sendall(sock, data)
        await asyncio.sleep(0)  # what the socket takes at once does not give others their turn

    async def until_closed(self, sock: socket.socket) -> None:
        """Read and drop, for HOLD_SECONDS at most."""
        async with asyncio.timeout(HOLD_SECONDS):
            while await self._loop.sock_recv(sock, 1 << 16):
                pass

    async def again_and_again(self, kind: Callable[["Attack", socket.socket], Awaitable[None]]) -> None:
        """One attacker of a kind, which connects again as soon as it has lost its connection."""
        while True:
            with contextlib.suppress(OSError):
                sock = await self.connected()
                try:
                    await kind(self, sock)
                finally:
                    sock.close()
            await asyncio.sleep(0)


async def loris(attack: Attack, sock: socket.socket) -> None:
    for byte in HELLO + OPTION.pack(probe.IHAVEOPT, probe.OPT_EXPORT_NAME, 4000) + bytes(4000):
        await attack.send(sock, bytes((byte,)))
        await asyncio.sleep(LORIS_SECONDS)


async def connections(attack: Attack, sock: socket.socket) -> None:
    pass


async def options(attack: Attack, sock: socket.socket) -> None:
    await attack.send(sock, HELLO)
    async with asyncio.timeout(HOLD_SECONDS):
        while True:
            await attack.send(sock, OPTION.pack(probe.IHAVEOPT, probe.OPT_LIST, 0) * 100)


async def reads(attack: Attack, sock: socket.socket) -> None:
    await attack.send(sock, ENTER)
    async with asyncio.timeout(HOLD_SECONDS):
        while True:
            await attack.send(sock, REQUEST.pack(probe.REQUEST_MAGIC, 0, probe.CMD_READ, 1, 0, 1 << 20) * 8)


async def garbage(attack: Attack, sock: socket.socket) -> None:
    await attack.send(sock, ENTER + bytes(range(256)) * 4)
    await attack.until_closed(sock)


async def half_close(attack: Attack, sock: socket.socket) -> None:
    await attack.send(sock, ENTER + REQUEST.pack(probe.REQUEST_MAGIC, 0, probe.CMD_READ, 1, 0, 1 << 20) * 8)
    sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(HOLD_SECONDS)


KINDS: Final = ((loris, 100), (connections, 4), (options, 4), (reads, 4), (garbage, 4), (half_close, 4))
"""Each kind, and how many of them."""


async def attack(port: int, seconds: float) -> int:
    """Attack for a while; how many connections were tried."""
    all_of_them = Attack(port)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for kind, count in KINDS:
                for _ in range(count):
                    group.create_task(_quiet(all_of_them, kind))
    return all_of_them.attempts


async def _quiet(attack: Attack, kind: Callable[[Attack, socket.socket], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            await attack.again_and_again(kind)


if __name__ == "__main__":
    print(asyncio.run(attack(int(sys.argv[1]), float(sys.argv[2]))))

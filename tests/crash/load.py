"""Clients that write until the server is gone, and tell the oracle what they sent and what was answered."""

import asyncio
import random
from typing import Final

from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient, attached
from tests.support.nbd_spec import Command, CommandFlag, Reply
from tests.support.oracle import BLOCK_BYTES, Oracle, Write

READ_BYTES: Final = 1 << 20
READS_IN_FLIGHT: Final = 8
SIZES: Final = ((1, 1), (1, 1), (1, 1), (2, 16), (2, 16), (17, 128))
"""Blocks a request covers: one of these ranges, then one size in it."""
LARGE: Final = (256, 700)
"""More than one record holds: such a request is cut into parts."""
LARGE_SHARE, FLUSH_SHARE, FUA_SHARE = 0.01, 0.1, 0.05


class Connection:
    """One connection with several requests in flight."""

    def __init__(self, client: NbdClient, oracle: Oracle, rng: random.Random) -> None:
        self._client = client
        self._oracle = oracle
        self._rng = rng
        self._depth = rng.choice((1, 4, 16))
        self._writes: dict[int, Write] = {}
        self._flushes: dict[int, int] = {}

    async def drive(self) -> None:
        """Send requests until the server hangs up (Disconnected). A reply with an error fails the test."""
        while True:
            while len(self._writes) + len(self._flushes) < self._depth:
                await self._send_one()
            self._take(await self._client.next_reply())

    async def _send_one(self) -> None:
        # The cookie is chosen here so that the reply is known even if the send is cut off in the middle.
        cookie = self._rng.getrandbits(63)
        if self._rng.random() < FLUSH_SHARE:
            self._flushes[cookie] = self._oracle.flush_sent()
            await self._client.submit(Command.FLUSH, cookie=cookie)
            return
        count = self._rng.randint(*(LARGE if self._rng.random() < LARGE_SHARE else self._rng.choice(SIZES)))
        write = self._oracle.submit(self._rng.randrange(self._oracle.block_count - count), count)
        self._writes[cookie] = write
        flags = CommandFlag.FUA if self._rng.random() < FUA_SHARE else 0
        offset = write.first * BLOCK_BYTES
        await self._client.submit(Command.WRITE, offset, payload=write.payload(), flags=flags, cookie=cookie)

    def _take(self, reply: Reply) -> None:
        request = reply.request
        assert not reply.errors, f"{request}: {reply.errors}"
        if request.command == Command.FLUSH:
            self._oracle.flushed(self._flushes.pop(request.cookie))
        else:
            self._oracle.answer(self._writes.pop(request.cookie), durable=bool(request.flags & CommandFlag.FUA))


async def write_until_gone(address: str, export: str, oracle: Oracle, rng: random.Random, connections: int) -> None:
    """Load an export through so many connections; returns when the server has hung up on all of them."""

    async def one(seed: int) -> None:
        try:
            async with attached(address, export) as client:
                await Connection(client, oracle, random.Random(seed)).drive()
        except (Disconnected, ConnectionError, FileNotFoundError):
            return

    await asyncio.gather(*(one(rng.getrandbits(32)) for _ in range(connections)))


async def read_image(address: str, export: str) -> bytearray:
    """The whole export."""
    async with attached(address, export) as client:
        image = bytearray(client.size_bytes)
        for start in range(0, len(image), READ_BYTES * READS_IN_FLIGHT):
            ends = min(len(image), start + READ_BYTES * READS_IN_FLIGHT)
            replies = [
                await client.submit(Command.READ, offset, min(READ_BYTES, ends - offset))
                for offset in range(start, ends, READ_BYTES)
            ]
            for reply in await client.wait_all(replies):
                assert not reply.errors, f"{reply.request}: {reply.errors}"
                offset = reply.request.offset_bytes
                image[offset : offset + len(reply.data)] = reply.data
        return image


async def check_image(address: str, export: str, oracle: Oracle) -> int:
    """Hold what the server shows against the oracle and begin its next life.

    Returns how many writes of the last life are there.
    """
    image = await read_image(address, export)
    count = oracle.check(image)
    oracle.restart(image)
    return count

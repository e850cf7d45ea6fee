"""Random requests on several connections at once, compared with a bytearray; and streams cut and mixed at random.

Each connection has a region of its own, cut into slots with at most one request in flight: overlapping requests in
flight have no order (proto.md, "Ordering of messages and writes"), so their outcome could not be told.
"""

import asyncio
import contextlib
import random

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import STATE_ZERO, Command, CommandFlag, Err, Reply, Request
from tests.support.serving import MIB, Served

PAGE = 4096
SLOT_BYTES = 300_000
SLOTS = 12
KINDS = [(False, False), (True, False), (False, True)]


class Worker:
    """One connection's requests and the model of its region."""

    def __init__(self, client: NbdClient, base: int, dice: random.Random) -> None:
        self.client = client
        self.base = base
        self.dice = dice
        self.model = bytearray(SLOT_BYTES * SLOTS)
        self.in_flight: dict[int, tuple[Reply, int, int]] = {}

    async def step(self) -> None:
        """Send a request to a free slot, or take the reply of a busy one."""
        slot = self.dice.randrange(SLOTS)
        if slot in self.in_flight:
            await self._finish(slot)
            return
        length = min(self.dice.choice([1, 512, PAGE, PAGE, 3 * PAGE, 65536, 70_000, 250_000]), SLOT_BYTES)
        start = slot * SLOT_BYTES + self.dice.randrange(SLOT_BYTES - length + 1)
        command = self.dice.choice([Command.READ] * 4 + [Command.WRITE] * 4 + [Command.TRIM, Command.WRITE_ZEROES])
        if self.client.contexts and self.dice.random() < 0.1:
            command = Command.BLOCK_STATUS
        flags = self.dice.choice([0, 0, 0, CommandFlag.FUA])
        offset = self.base + start
        if command == Command.WRITE:
            data = self.dice.randbytes(length)
            reply = await self.client.submit(command, offset, payload=data, flags=flags)
            self.model[start : start + length] = data
        else:
            reply = await self.client.submit(command, offset, length, flags=flags)
        if command == Command.WRITE_ZEROES:
            self.model[start : start + length] = bytes(length)
        elif command == Command.TRIM:
            first, last = -(-offset // PAGE) * PAGE - self.base, (offset + length) // PAGE * PAGE - self.base
            if first < last:
                self.model[first:last] = bytes(last - first)
        self.in_flight[slot] = (reply, start, length)

    async def _finish(self, slot: int) -> None:
        reply, start, length = self.in_flight.pop(slot)
        await self.client.wait(reply)
        assert reply.error == Err.OK
        if reply.request.command == Command.READ:
            assert reply.data == self.model[start : start + length]
        for extents in reply.extents.values():
            for size, status in extents:
                end = min(start + size, len(self.model))
                assert not status & STATE_ZERO or not any(self.model[start:end])
                start = end

    async def finish(self) -> None:
        for slot in list(self.in_flight):
            await self._finish(slot)
        assert await self.client.read(self.base, len(self.model)) == self.model


@pytest.mark.parametrize("seed", range(4))
async def test_random_requests_against_a_model(nbd_server: Served, seed: int) -> None:
    """ "Request types": whatever is in flight on whatever connections, contents are those of a plain array."""
    dice = random.Random(seed)

    async def work(index: int) -> None:
        structured, extended = KINDS[index % 3] if nbd_server.knows_extended_headers else KINDS[index % 2]
        contexts = ["base:allocation"] if structured or extended else []
        async with nbd_server.attached(structured=structured, extended=extended, contexts=contexts) as client:
            worker = Worker(client, index * 8 * MIB + 4 * PAGE, random.Random(dice.random()))
            for _ in range(150):
                await worker.step()
            await worker.finish()

    async with asyncio.TaskGroup() as group:
        for index in range(3):
            group.create_task(work(index))


def stream(client: NbdClient, base: int, dice: random.Random) -> tuple[bytes, list[tuple[Reply, bytes]]]:
    """Some writes in one run of bytes, and their replies to come with what was written."""
    parts, expected = [], []
    flags = CommandFlag.PAYLOAD_LEN if client.extended else 0
    for index in range(12):
        length = dice.choice([1, 100, PAGE, 50_000, 65_536, 65_537, 180_000])
        data, offset = dice.randbytes(length), base + index * 200_000
        write = Request(Command.WRITE, flags, 2 * index, offset, length)
        parts.append(client.pack_request(Command.WRITE, offset, length, flags=flags, cookie=2 * index) + data)
        expected.append((client.expect(write), data))
    return b"".join(parts), expected


@pytest.mark.parametrize("seed", range(3))
async def test_streams_cut_anywhere_and_mixed(nbd_server: Served, seed: int) -> None:
    """Requests of many connections, cut at any byte and interleaved, reach the disk whole and unmixed."""
    dice = random.Random(seed)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for index in range(6):
            structured, extended = KINDS[index % 3] if nbd_server.knows_extended_headers else KINDS[index % 2]
            attached = nbd_server.attached(structured=structured, extended=extended)
            clients.append(await stack.enter_async_context(attached))
        streams = [stream(client, index * 4 * MIB, dice) for index, client in enumerate(clients)]
        left = {index: data for index, (data, _) in enumerate(streams)}
        while left:
            index = dice.choice(list(left))
            cut = dice.choice([1, 5, 27, 28, 29, 1000, 5000, 64_000, 100_000])
            await clients[index].send(left[index][:cut])
            left[index] = left[index][cut:]
            if not left[index]:
                del left[index]
        for client, (_, expected) in zip(clients, streams, strict=True):
            for reply, data in expected:
                assert (await client.wait(reply)).error == Err.OK
                assert await client.read(reply.request.offset_bytes, len(data)) == data

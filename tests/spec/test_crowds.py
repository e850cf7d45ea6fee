"""Crowds: many connections that do nothing, many that work, and some that only stand in the way, all at once.

Bounded in number and time; Unix sockets only.
"""

import asyncio
import contextlib
import resource
import struct
from pathlib import Path

import pytest

from tests.nbdserver.volumes import until
from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import OPTION_HEADER, Command, Option
from tests.support.our_server import OurServed, serve
from tests.support.serving import Disk

PAGE = 4096
IDLE = 1000
BUSY = 200
IHAVEOPT = 0x49484156454F5054
UNLIMITED = {"connections_max": 4096, "client_connections_max": 0, "client_connects_per_second": 0.0}


@pytest.fixture(autouse=True)
def _descriptors() -> None:
    """Both ends of every connection are in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * (IDLE + BUSY):
        pytest.skip(f"needs {4 * (IDLE + BUSY)} descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def works(client: NbdClient, number: int, rounds: int = 3) -> None:
    """Writes a page of its own, reads it again, flushes."""
    for turn in range(rounds):
        data = struct.pack(">II", number, turn) * (PAGE // 8)
        await client.write(number * PAGE, data)
        assert await client.read(number * PAGE, PAGE) == data
        await client.flush()


async def entered(served: OurServed) -> NbdClient:
    client = await NbdClient.connect(served.address)
    await client.greet()
    assert (await client.go("disk")).accepted
    return client


async def test_a_thousand_idle_and_two_hundred_busy_connections(tmp_path: Path) -> None:
    async with serve([Disk("disk")], tmp_path, **UNLIMITED) as served:
        clients = [await entered(served) for _ in range(IDLE + BUSY)]
        idle, busy = clients[:IDLE], clients[IDLE:]
        await asyncio.gather(*(works(client, number) for number, client in enumerate(busy)))
        assert len(served.server.clients()) == IDLE + BUSY
        await works(idle[0], 0)
        await works(idle[-1], 1)
        for client in clients:
            client.close()


async def slow_loris(served: OurServed) -> NbdClient:
    """Sends its handshake byte by byte and never comes to its end."""
    client = await NbdClient.connect(served.address)
    for byte in b"\0\0\0\1" + OPTION_HEADER.pack(IHAVEOPT, Option.GO, 40)[:10]:
        await client.send(bytes((byte,)))
    return client


async def half_closed(served: OurServed) -> NbdClient:
    """Asks, says that it will send nothing more, and does not take the answers."""
    client = await entered(served)
    for cookie in range(8):
        await client.send(client.pack_request(Command.READ, 0, 1 << 20, cookie=cookie))
    client.half_close()
    return client


async def never_reading(served: OurServed) -> NbdClient:
    client = await entered(served)
    with contextlib.suppress(TimeoutError, Disconnected):
        async with asyncio.timeout(0.05):
            for cookie in range(200):
                await client.send(client.pack_request(Command.READ, 0, 1 << 20, cookie=cookie))
    return client


async def garbage(served: OurServed) -> NbdClient:
    client = await entered(served)
    await client.send(bytes(range(256)) * 8)
    return client


async def options_without_end(served: OurServed) -> NbdClient:
    client = await NbdClient.connect(served.address)
    await client.greet()
    with contextlib.suppress(TimeoutError, Disconnected):
        async with asyncio.timeout(0.05):
            for _ in range(100):
                await client.send(OPTION_HEADER.pack(IHAVEOPT, Option.LIST, 0) * 500)
    return client


async def test_those_who_stand_in_the_way_cost_others_nothing_but_time(tmp_path: Path) -> None:
    """Each kind of them, several times, while others work: every answer is right, and afterwards nothing is left."""
    async with serve([Disk("disk")], tmp_path, handshake_seconds=0.5, stall_seconds=1.0, **UNLIMITED) as served:
        good = [await entered(served) for _ in range(4)]
        working = [asyncio.create_task(works(client, number, rounds=100)) for number, client in enumerate(good)]
        kinds = (slow_loris, half_closed, never_reading, garbage, options_without_end)
        bad = [await kind(served) for _ in range(8) for kind in kinds]
        await asyncio.gather(*working)
        for client in bad:
            client.close()
        await until(lambda: len(served.server.clients()) == len(good))
        await works(good[0], 0)
        network = served.server.network()
        assert network.buffer_bytes < network.buffer_bytes_max // 8
        for client in good:
            client.close()

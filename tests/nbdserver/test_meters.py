"""What the data path counts."""

import asyncio
from pathlib import Path

import pytest

from nbdserver.meters import BOUNDS_SECONDS, BUCKETS, COMMANDS, IDLE_METERS_MAX, METERS_MAX, SHARED, Meter, Meters
from nbdserver.server import Listener, Server
from nbdserver.wire.constants import Command
from objstore.errors import Unavailable
from objstore.volume.memory import MemorySource
from tests.nbdserver.volumes import TestVolume, until
from tests.support.nbd_client import attached
from tests.support.nbd_spec import Command as SpecCommand
from tests.support.nbd_spec import CommandFlag

BLOCK = 4096


@pytest.mark.parametrize("nanoseconds", [0, 1, 16_383, 16_384, 16_385, 1 << 20, (1 << 34) - 1, 1 << 34, 1 << 60])
def test_a_latency_is_counted_in_the_bucket_that_it_fits_into(nanoseconds: int) -> None:
    meter = Meter("disk")
    meter.one(Command.READ, 512, nanoseconds)
    meter.batch(Command.WRITE, 3, 4096, nanoseconds)
    for command, count in ((Command.READ, 1), (Command.WRITE, 3)):
        index = meter.buckets[command].index(count)
        assert sum(meter.buckets[command]) == count
        assert index == BUCKETS or nanoseconds / 1e9 <= BOUNDS_SECONDS[index]
        assert index == 0 or nanoseconds / 1e9 >= BOUNDS_SECONDS[index - 1]
    assert (meter.nanoseconds[Command.READ], meter.nanoseconds[Command.WRITE]) == (nanoseconds, 3 * nanoseconds)
    assert (meter.immediate[Command.READ], meter.immediate[Command.WRITE]) == (0, 3)


def test_a_copy_stays_as_it_was() -> None:
    meter = Meter("disk")
    meter.one(Command.READ, 512, 10)
    meter.error("EIO")
    copied = meter.copy()
    meter.one(Command.READ, 512, 10)
    meter.error("EIO")
    assert sum(copied.buckets[Command.READ]) == 1
    assert copied.answered_bytes[Command.READ] == 512
    assert copied.errors == {"EIO": 1}


def test_numbers_outlive_a_reconnect_and_their_memory_is_bounded() -> None:
    meters = Meters()
    first = meters.take("disk")
    assert meters.take("disk") is first
    meters.give_back(first)
    meters.give_back(first)
    assert meters.take("disk") is first
    meters.give_back(first)
    for number in range(IDLE_METERS_MAX):
        meters.give_back(meters.take(f"d{number}"))
    assert len(meters.copies()) == IDLE_METERS_MAX
    assert "disk" not in [meter.name for meter in meters.copies()]
    taken = [meters.take(f"e{number}") for number in range(METERS_MAX + 2)]
    assert taken[-1] is taken[-2]
    assert taken[-1].name == SHARED
    assert len(meters.copies()) <= METERS_MAX + 1 + IDLE_METERS_MAX


async def counted(tmp_path: Path, volume: TestVolume) -> tuple[Server, str]:
    server = Server(MemorySource({"disk": volume}))
    server.meter()
    await server.start([Listener.parse(f"unix://{tmp_path / 's'}")])
    return server, str(server.listeners[0])


async def test_every_request_is_counted_once(tmp_path: Path) -> None:
    """Whether it is answered at once, has to wait, shares a flush, is refused or fails."""
    volume = TestVolume()
    server, address = await counted(tmp_path, volume)
    async with attached(address, "disk", contexts=["base:allocation"]) as client:
        for slow in (False, True):
            volume.slow = slow
            await client.write(0, b"x" * BLOCK)
            await client.read(0, BLOCK)
            await client.read(1 << 20, BLOCK)
            await client.read(0, 1 << 20)
            await client.flush()
        await client.call(SpecCommand.TRIM, 0, BLOCK)
        await client.call(SpecCommand.WRITE_ZEROES, 0, BLOCK)
        await client.call(SpecCommand.CACHE, 0, BLOCK)
        await client.status(0, BLOCK)
        await client.write(0, b"f" * BLOCK, flags=CommandFlag.FUA)
        (meter,) = server.network().meters
        counts = {command: sum(meter.buckets[command]) for command in COMMANDS}
        assert counts == {
            Command.READ: 6,
            Command.WRITE: 3,
            Command.FLUSH: 2,
            Command.TRIM: 1,
            Command.CACHE: 1,
            Command.WRITE_ZEROES: 1,
            Command.BLOCK_STATUS: 1,
        }
        assert meter.answered_bytes[Command.READ] == 2 * (2 * BLOCK + (1 << 20))
        assert meter.answered_bytes[Command.WRITE] == 3 * BLOCK
        assert (meter.immediate[Command.READ], meter.immediate[Command.WRITE]) == (2, 1)  # not the long one with holes
        assert meter.errors == {}
        assert all(meter.nanoseconds[command] > 0 for command in counts)

        await client.call(99)
        volume.fails = Unavailable("zones are missing")
        volume.slow = False
        await client.call(SpecCommand.READ, 0, BLOCK)
        await client.call(SpecCommand.TRIM, 0, BLOCK)
        (meter,) = server.network().meters
        assert meter.errors == {"EINVAL": 1, "EIO": 2}
        assert meter.answered_bytes[Command.TRIM] == BLOCK
        assert meter.connections == 1
        volume.fails = None
    await until(lambda: server.network().meters[0].connections == 0)
    await server.stop()


async def test_flushes_that_share_one_are_counted_each(tmp_path: Path) -> None:
    volume = TestVolume()
    volume.gate = asyncio.Event()
    server, address = await counted(tmp_path, volume)
    async with attached(address, "disk") as client:
        await client.write(0, b"x" * BLOCK)
        flushes = [await client.submit(SpecCommand.FLUSH) for _ in range(3)]
        await until(lambda: volume.calls)
        volume.gate.set()
        await client.wait_all(flushes)
        (meter,) = server.network().meters
        assert sum(meter.buckets[Command.FLUSH]) == 3
    await server.stop()


async def test_connections_that_come_to_nothing_are_counted(tmp_path: Path) -> None:
    server, address = await counted(tmp_path, TestVolume())
    async with attached(address, "disk") as client:
        await client.send(b"no request of the protocol at all, whatever its length may be")
        await client.expect_close()
    async with attached(address, "disk"):
        counts = server.network().counts
        assert (counts.accepted, counts.broken, counts.failed_handshakes) == (2, 1, 0)
    await server.stop()

"""Reading a disk: from memory and from zones, verified, around every copy that is bad."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import Corrupt, Unavailable
from objstore.log.address import BLOCK_BITS
from objstore.log.reader import in_turn, load_directory
from objstore.units import BLOCK_BYTES
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stale import make_stale
from tests.support.stepping import WatchedHandle, World, executor_of, turns


@pytest.fixture
async def disk() -> AsyncIterator[ModelDisk]:
    world = World(2)
    await world.open(create=True)
    yield await ModelDisk(world).create()
    await world.kill()


@pytest.fixture(params=["from memory", "waiting"])
def nowait(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether files are in the host's memory."""
    monkeypatch.setattr(WatchedHandle, "nowait", request.param == "from memory")
    return bool(WatchedHandle.nowait)


async def fill(disk: ModelDisk, *, reopen: bool = False) -> None:
    """Blocks 0-99 in several segments, with holes and reserved zeros between, all durable."""
    for first in range(0, 100, 10):
        await disk.write(first, 10)
    await disk.trim(15, 3)
    await disk.reserve(55, 3)
    await disk.vdi.flush()
    if reopen:
        await disk.reopen(clean=True)
        await disk.vdi.extents(0, len(disk.model))  # brings the map into memory, no data


@pytest.mark.parametrize("reopen", [False, True])
async def test_what_was_written_is_read(disk: ModelDisk, nowait: bool, reopen: bool) -> None:
    await fill(disk, reopen=reopen)
    for first, blocks in ((0, 100), (0, 1), (15, 1), (14, 5), (55, 3), (99, 1), (50, 300), (500, 7)):
        assert await disk.read(first, blocks) == disk.expected(first, blocks)


async def test_undurable_data_is_read_from_memory(disk: ModelDisk, nowait: bool) -> None:
    await fill(disk)
    executor_of(disk.vdi.disk.env).hold(0, 1)
    await disk.write(5, 2)
    disk.vdi.disk.writer.cut()
    await disk.write(7, 2)
    into = memoryview(bytearray(4 * BLOCK_BYTES))
    assert disk.vdi.read_now(5 * BLOCK_BYTES, len(into), into) == 0
    assert into == disk.expected(5, 4)
    executor_of(disk.vdi.disk.env).release(0, 1)
    await disk.check()


async def test_a_read_over_memory_and_zones(disk: ModelDisk, nowait: bool) -> None:
    """Within one run of one segment: some records are durable already, some are not."""
    await disk.write(0, 8)
    await disk.vdi.flush()
    await disk.write(8, 8)
    disk.vdi.disk.writer.cut()
    assert await disk.read(0, 16) == disk.expected(0, 16)


async def test_a_zone_that_lags_behind_is_not_read_for_what_it_has_not_got(disk: ModelDisk, nowait: bool) -> None:
    await fill(disk)
    executor_of(disk.vdi.disk.env).hold(1)
    for _ in range(4):
        await disk.write(5, 3)
        disk.vdi.disk.writer.request_sync()
        await turns()
    assert await disk.read(0, 10) == disk.expected(0, 10)
    assert disk.vdi.disk.env.bad_copies == 0
    executor_of(disk.vdi.disk.env).release(1)


@pytest.mark.parametrize("zone", [0, 1])
@pytest.mark.parametrize("reopen", [False, True])
async def test_a_bad_copy_is_passed_over(
    disk: ModelDisk, nowait: bool, zone: int, reopen: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow(r"checksum wrong segment=.* zone=zone zone\d blocks=1")
    await fill(disk, reopen=reopen)
    for block in (0, 42, 77):
        disk.damage(block, zones=[zone])
    for first, blocks in ((0, 100), (42, 1), (40, 10), (77, 1)):
        assert await disk.read(first, blocks) == disk.expected(first, blocks)


@pytest.mark.parametrize("reopen", [False, True])
async def test_different_blocks_bad_in_different_zones(
    disk: ModelDisk, nowait: bool, reopen: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong")
    await fill(disk, reopen=reopen)
    for block in range(40, 50):
        disk.damage(block, zones=[block % 2])
    assert await disk.read(35, 20) == disk.expected(35, 20)
    assert disk.vdi.disk.env.bad_copies > 0


async def test_blocks_that_every_zone_has_lost_are_named_exactly(
    disk: ModelDisk, nowait: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong|a copy is bad, not replaced|no zone has all of a segment")
    await fill(disk)
    for block in (21, 22, 30):
        disk.damage(block)
    offset, length = 20 * BLOCK_BYTES + 100, 40 * BLOCK_BYTES
    into = memoryview(bytearray(b"\xee" * length))
    with pytest.raises(Corrupt) as caught:
        await disk.vdi.read(offset, length, into)
    assert caught.value.bad == ((21 * BLOCK_BYTES, 2 * BLOCK_BYTES), (30 * BLOCK_BYTES, BLOCK_BYTES))
    good = bytearray(into)
    expected = bytearray(disk.model[offset : offset + length])
    for start, size in caught.value.bad:
        good[start - offset : start - offset + size] = expected[start - offset : start - offset + size] = bytes(size)
    assert good == expected, "every other byte is filled"
    assert not any(into[21 * BLOCK_BYTES - offset :][: 2 * BLOCK_BYTES]), "nothing wrong is handed out"


async def test_the_damaged_range_is_clipped_to_what_was_asked(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong")
    await fill(disk)
    disk.damage(21)
    with pytest.raises(Corrupt) as caught:
        await disk.vdi.read(21 * BLOCK_BYTES + 10, 50, memoryview(bytearray(50)))
    assert caught.value.bad == ((21 * BLOCK_BYTES + 10, 50),)


async def test_a_partial_write_over_a_lost_block_fails_and_changes_nothing(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong|a copy is bad, not replaced|no zone has all of a segment")
    await fill(disk)
    disk.damage(21)
    position = disk.vdi.disk.writer.position
    for change in (
        disk.vdi.write(21 * BLOCK_BYTES + 7, memoryview(b"x")),
        disk.vdi.write(20 * BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES + 7))),
        disk.vdi.zero(21 * BLOCK_BYTES + 7, 9),
    ):
        with pytest.raises(Corrupt):
            await change
    assert disk.vdi.disk.writer.position == position
    await disk.write(21)
    await disk.check()


async def test_errors_of_a_zone_are_passed_over(
    disk: ModelDisk, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("read failed segment=.* zone=zone zone0")
    await fill(disk, reopen=True)
    monkeypatch.setattr(WatchedHandle, "nowait", False)

    def fault(call: str, name: str) -> None:
        if call in ("read", "open") and name.startswith("log/000001"):
            raise ZoneFailed(f"input/output error name={name}")

    await disk.read(0, 100)
    disk.world.backends[0].fault = fault
    assert await disk.read(0, 100) == disk.expected(0, 100)


@pytest.mark.parametrize("zones", [[0], [1]])
async def test_a_damaged_directory_is_passed_over(
    disk: ModelDisk, zones: list[int], expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("directory unreadable")
    await fill(disk, reopen=True)
    name, _ = disk.place(42)
    disk.world.damage(name, -100, zones=zones)
    assert await disk.read(40, 5) == disk.expected(40, 5)


async def test_a_segment_without_any_directory_is_lost(disk: ModelDisk) -> None:
    await fill(disk, reopen=True)
    name, _ = disk.place(42)
    disk.world.damage(name, -100)
    with pytest.raises(Corrupt) as caught:
        await disk.read(42)
    assert caught.value.bad == ((42 * BLOCK_BYTES, BLOCK_BYTES),)


async def test_a_block_that_moved_during_the_read_is_read_where_it_is_now(
    disk: ModelDisk, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """Its old place may hold anything by then: that is no damage."""
    expected_warnings.allow("checksum wrong")
    monkeypatch.setattr(WatchedHandle, "nowait", False)
    await fill(disk)
    executor = executor_of(disk.vdi.disk.env)
    await turns()
    executor.hold(0, 1)
    into = memoryview(bytearray(10 * BLOCK_BYTES))
    read = asyncio.create_task(disk.vdi.read(40 * BLOCK_BYTES, len(into), into))
    await turns()
    disk.damage(42)
    disk.damage(43)
    await disk.write(42)
    await disk.trim(43, 1)
    executor.release(0, 1)
    await read
    assert into == disk.expected(40, 10)


async def test_what_is_read_is_pinned(disk: ModelDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WatchedHandle, "nowait", False)
    await fill(disk)
    entry = disk.vdi.disk.map.lookup(42)
    segment = disk.vdi.disk.env.segments[entry >> 12]
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0, 1)
    read = asyncio.create_task(disk.read(42))
    await turns()
    assert segment.pins == 1
    read.cancel()
    await asyncio.gather(read, return_exceptions=True)
    executor.release(0, 1)
    await turns()
    assert segment.pins == 0
    read = asyncio.create_task(disk.read(42))
    assert await read == disk.expected(42)
    assert segment.pins == 0


async def test_descriptors_are_bounded(disk: ModelDisk) -> None:
    env = disk.vdi.disk.env
    await fill(disk, reopen=True)
    env = disk.vdi.disk.env
    env.readers_max = 2
    for _ in range(3):
        assert await disk.read(0, 100) == disk.expected(0, 100)
        assert sum(1 for segment in disk.vdi.disk.segments.values() if segment.reader is not None) <= 3


async def test_data_on_a_zone_that_is_put_out_while_it_is_read_is_out_of_reach_and_not_damaged(
    monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    monkeypatch.setattr(WatchedHandle, "nowait", False)
    for text in ("is put out", "is out of service", "read failed"):
        expected_warnings.allow(text)
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world).create(copies=1)
    await fill(disk)
    await disk.vdi.keeper.checkpoint()  # seals what there is
    env = disk.vdi.disk.env
    segment = next(s for s in disk.vdi.disk.segments.values() if s.memory is None)
    (zone,) = segment.zones
    block = next(b for b in range(100) if disk.vdi.disk.map.lookup(b) >> BLOCK_BITS == segment.key)
    await disk.read(block, 1)  # the checksums are known now
    executor_of(env).hold(zone)
    read = asyncio.create_task(disk.read(block, 1))
    await turns()
    assert executor_of(env).waiting(zone)
    segment.zones = ()  # as the writer does with a segment whose seal the zone does not have
    env.zone_failing(zone, ZoneFailed("no answer"))
    with pytest.raises(Unavailable):
        await read
    assert not disk.vdi.disk.damage.blocks
    executor_of(env).release(zone)
    await world.kill()


async def test_a_copy_of_another_writer_is_not_read(
    disk: ModelDisk, nowait: bool, expected_warnings: ExpectedWarnings
) -> None:
    """A zone shows a segment of the right number and length, whole and sealed, with other data: its seal tells."""
    expected_warnings.allow("another segment|a copy is bad|checksum wrong")
    await fill(disk, reopen=True)
    for name in disk.segments:
        image = disk.world.storages[0].objects[name]
        if image[-128:-120] == b"SHEEPDIR":
            make_stale(image)
    assert await disk.read(0, 100) == disk.expected(0, 100)
    assert disk.vdi.disk.env.bad_copies


async def test_a_copy_that_was_moved_while_it_was_looked_for_is_no_bad_one(disk: ModelDisk) -> None:
    """Recovery takes it out of the table and removes it while a read waits for its directory."""
    await fill(disk, reopen=True)
    env = disk.vdi.disk.env
    segment = next(s for s in disk.vdi.disk.segments.values() if len(s.zones) == 2)
    first = in_turn(env, segment)[0]
    executor_of(env).hold(first)
    directory = asyncio.create_task(load_directory(env, segment))
    await turns()
    segment.zones = tuple(z for z in segment.zones if z != first)
    del disk.world.storages[first].objects[segment.name]
    executor_of(env).release(first)
    assert await directory is not None
    assert not env.bad_copies

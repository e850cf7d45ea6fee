"""Checkpoints and freeing: what is written, what waits for what, and what a failure leaves."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.backend.memory import MemoryWriter
from objstore.errors import Corrupt, NoSpace, Stopping, Unavailable
from objstore.format.checkpoint import DEAD, LIVE
from objstore.log.checkpoint import CheckpointWriter, CheckpointZones, read_checkpoint
from objstore.log.keeper import REWRITE_BYTES_MAX
from objstore.log.regionmap import PageRef
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.serving import eventually
from tests.support.stepping import World, executor_of, failing, turns


@pytest.fixture
async def disk() -> AsyncIterator[ModelDisk]:
    world = World(2)
    await world.open(create=True)
    yield await ModelDisk(world).create()
    await world.kill()


def loaded(disk: ModelDisk, zone: int = 0):  # type: ignore[no-untyped-def]
    env = disk.vdi.disk.env
    return read_checkpoint(env.zones[zone].backend, env.store_id, LOG, disk.vdi.keeper.number)


async def test_a_checkpoint_says_where_the_log_stands(disk: ModelDisk) -> None:
    await disk.write(0, 30)
    await disk.write(500, 3)
    writer = disk.vdi.disk.writer
    await disk.vdi.keeper.checkpoint()
    header, root, table = loaded(disk)
    assert header.position == writer.position == 2
    assert header.previous_crc == writer.previous_crc
    assert header.blocks == disk.blocks
    assert header.next_segment == writer.tail_number == 1
    assert root["region"].tolist() == [0]
    assert [(row["number"], row["live"], row["zones"], row["state"]) for row in table] == [(0, 33, 0b11, LIVE)]
    assert header == loaded(disk, 1).header


async def test_nothing_of_a_checkpoint_is_seen_before_its_segments_are_sealed(disk: ModelDisk) -> None:
    await disk.write(0, 10)
    await turns()
    executor_of(disk.vdi.disk.env).hold(1)
    checkpoint = asyncio.create_task(disk.vdi.keeper.checkpoint())
    await turns(300)
    assert not checkpoint.done()
    assert disk.checkpoints == []
    executor_of(disk.vdi.disk.env).release(1)
    await checkpoint
    assert len(disk.checkpoints) == 1


async def test_a_checkpoint_that_is_asked_for_between_the_parts_of_a_request_comes_behind_them(disk: ModelDisk) -> None:
    """Whoever waits for it removes what it does not list any more."""
    await disk.write(0, 10)
    env, keeper = disk.vdi.disk.env, disk.vdi.keeper
    await turns()
    executor_of(env).hold(0, 1)  # no segment for the rest of the request
    request = asyncio.create_task(disk.write(0, 1000))
    await turns()
    assert disk.vdi.disk.between_parts
    asked = [asyncio.create_task(keeper.checkpoint()) for _ in range(2)]
    await turns()
    assert not any(task.done() for task in asked)
    executor_of(env).release(0, 1)
    await asyncio.gather(request, *asked)
    assert loaded(disk).header.position == disk.vdi.disk.writer.position
    assert keeper.number == 1, "one for both"


async def test_a_checkpoint_that_never_comes_is_no_success(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("log stopped")
    await disk.write(0, 10)
    env, keeper = disk.vdi.disk.env, disk.vdi.keeper
    await turns()
    executor_of(env).hold(0, 1)
    request = asyncio.create_task(disk.write(0, 1000))
    await turns()
    asked = asyncio.create_task(keeper.checkpoint())
    await turns()
    disk.vdi.disk.writer.fail(Unavailable("no zone is left"))
    await turns()
    with pytest.raises(Unavailable):
        await asked
    with pytest.raises(Unavailable):
        await request
    executor_of(env).release(0, 1)


async def test_no_checkpoint_begins_once_the_log_is_being_closed(disk: ModelDisk) -> None:
    await disk.write(0, 10)
    await disk.vdi.keeper.close()
    with pytest.raises(Stopping):
        await disk.vdi.keeper.checkpoint()


async def test_clients_go_on_while_a_checkpoint_is_written(disk: ModelDisk) -> None:
    """What they change meanwhile is not in it, and not lost."""
    await disk.write(0, 40)
    await turns()
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0, 1)
    checkpoint = asyncio.create_task(disk.vdi.keeper.checkpoint())
    await turns()
    await disk.write(5, 3)
    await disk.trim(20, 5)
    executor.release(0, 1)
    await checkpoint
    assert loaded(disk).header.position == 1
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    await disk.check()


@pytest.mark.parametrize("waited_for", [False, True])
async def test_a_checkpoint_makes_way_for_that_of_a_snapshot(disk: ModelDisk, waited_for: bool) -> None:
    """Which has all that it would have had. Whoever waits for it gets one all the same."""
    await disk.write(0, 40)
    await turns()
    keeper = disk.vdi.keeper
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0, 1)
    asked = [asyncio.create_task(keeper.checkpoint())] if waited_for else []
    if not waited_for:
        keeper.hurry(now=True, waited_for=True)
    await turns()
    assert not keeper.ready_for_snapshot
    await disk.write(5, 3)
    taken = [asyncio.create_task(disk.vdi.begin_snapshot()) for _ in range(2)]
    await turns()
    assert not any(task.done() for task in taken)
    executor.release(0, 1)
    await asyncio.gather(*asked)
    numbers = [(await task)[0] for task in taken]
    await keeper.snapshot_written(numbers[-1])
    assert numbers[1] == numbers[0] + 1, "that of a snapshot makes no way"
    found = [int(name[-8:], 16) for name in disk.checkpoints]
    assert 1 not in found
    assert set(numbers) <= set(found)
    assert loaded(disk).header.position == 2
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    await disk.check()


async def test_only_changed_regions_are_written() -> None:
    world = World(1)
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=8 * 1024).create(copies=1)
        for region in range(8):
            await disk.write(region * 1024 + 5)
        await disk.vdi.keeper.checkpoint()
        first = disk.vdi.keeper.number
        await disk.write(3 * 1024 + 9)
        await disk.trim(5 * 1024, 1024)
        await disk.vdi.keeper.checkpoint()
        _, root, _ = loaded(disk)
        assert {row["region"]: row["checkpoint"] for row in root} == {
            region: first + 1 if region == 3 else first for region in range(8) if region != 5
        }
        await disk.reopen(clean=False)
        await disk.check()
    finally:
        await world.kill()


async def test_pages_of_old_checkpoints_are_taken_over_in_time() -> None:
    """Else one page that never changes would keep a large old checkpoint for ever."""
    world = World(1)
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=8 * 1024).create(copies=1)
        for region in range(8):
            await disk.write(region * 1024 + 5)
        for turn in range(10):
            for region in range(7):
                await disk.write(region * 1024 + 7 + turn)
            await disk.vdi.keeper.checkpoint()
            await turns()
            assert len(disk.checkpoints) <= 4
        assert loaded(disk).root["checkpoint"].min() > 5
        await disk.reopen(clean=False)
        await disk.check()
        assert REWRITE_BYTES_MAX >= MIB
    finally:
        await world.kill()


async def test_dead_segments_wait_for_two_checkpoints_that_began_after_their_death(disk: ModelDisk) -> None:
    disk.vdi.keeper.hurry = lambda **how: None  # type: ignore[method-assign]
    await disk.write(0, 40)
    first = disk.segments[0]
    await disk.vdi.keeper.checkpoint()
    await disk.write(0, 40)
    await turns(300)
    await disk.vdi.flush()
    disk.vdi.collector.poke()
    await turns(300)
    assert [segment.name for segment, _ in disk.vdi.disk.dead.values()] == [first]
    await disk.vdi.keeper.checkpoint()
    await turns(300)
    assert [row["state"] for row in loaded(disk).table if row["number"] == 0] == [DEAD]
    assert first in disk.segments, "the checkpoint before still needs it"
    await disk.vdi.keeper.checkpoint()
    await turns(300)
    assert first not in disk.segments
    assert first not in disk.world.names(1)
    await disk.check()


async def test_a_segment_that_dies_during_a_checkpoint_is_not_counted_by_it(disk: ModelDisk) -> None:
    disk.vdi.keeper.hurry = lambda **how: None  # type: ignore[method-assign]
    await disk.write(0, 40)
    segment = disk.vdi.disk.segments[0]
    await turns()
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0)
    checkpoint = asyncio.create_task(disk.vdi.keeper.checkpoint())
    await turns()
    await disk.write(0, 40)
    disk.vdi.disk.bury(segment)
    executor.release(0)
    await checkpoint
    assert disk.vdi.disk.dead[0] == (segment, 0)
    for _ in range(2):
        assert segment.name in disk.segments
        await disk.vdi.keeper.checkpoint()
        await turns(300)
    assert segment.name not in disk.segments


async def test_pinned_segments_are_not_freed(disk: ModelDisk) -> None:
    await disk.write(0, 40)
    segment = disk.vdi.disk.segments[0]
    segment.pins += 1
    await disk.write(0, 40)
    for _ in range(4):
        await disk.vdi.keeper.checkpoint()
        disk.vdi.collector.poke()
        await turns(300)
    assert segment.name in disk.segments
    segment.pins -= 1
    await disk.vdi.keeper.checkpoint()
    await turns(300)
    assert segment.name not in disk.segments


async def test_a_checkpoint_without_space_is_given_up_and_the_disk_goes_on(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checkpoint given up")
    await disk.write(0, 40)
    storage = disk.world.storages[1]
    await turns()
    before, storage.capacity_bytes = storage.capacity_bytes, 1
    with pytest.raises(NoSpace):
        await disk.vdi.keeper.checkpoint()
    storage.capacity_bytes = before
    await disk.write(3, 4)
    await disk.vdi.keeper.checkpoint()
    await disk.vdi.flush()
    await disk.check()
    await disk.reopen(clean=False)
    await disk.check()


async def test_a_checkpoint_under_which_all_zones_fail_is_written_when_they_are_back(
    disk: ModelDisk, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (
        "given up",
        "log stopped log=0",
        "is put out",
        "is out of service",
        "can't be done without",
        "is back",
    ):
        expected_warnings.allow(text)
    monkeypatch.setattr("objstore.log.env.PUT_OUT_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr("objstore.volume.zones.RETRY_SECONDS", 0.02)
    monkeypatch.setattr("objstore.log.keeper.IDLE_SECONDS", 0.02)
    await disk.write(0, 40)
    for backend in disk.world.backends:
        backend.fault = failing("put", "checkpoint/")
    with pytest.raises(Unavailable):
        await disk.vdi.keeper.checkpoint()
    await eventually(lambda: disk.vdi.keeper.number > 0)
    store = disk.world.store
    assert store is not None
    await eventually(lambda: len(store.membership.in_service) == 2 and not store.env.failing)
    await disk.write(50, 4)
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    await disk.check()


async def test_a_checkpoint_that_lacks_zones_is_not_begun_again_at_once(
    disk: ModelDisk, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told of its end and wants space made it begin again in the same instant, without end (simulation, seed
    2034)."""
    expected_warnings.allow("checkpoint given up")
    keeper = disk.vdi.keeper
    attempts = 0

    async def no_zones(*_arguments: object) -> None:
        nonlocal attempts
        attempts += 1
        raise Unavailable("too few zones")

    def told() -> None:
        keeper.hurry(now=True, waited_for=True)

    for first in range(0, 600, 20):
        await disk.write(first, 20)
    with monkeypatch.context() as patched:
        patched.setattr(keeper, "_pages", no_zones)
        patched.setattr(keeper, "on_progress", told)
        with pytest.raises(Unavailable):
            await keeper.checkpoint()
        before = attempts
        await turns(300)
        assert attempts == before
        assert keeper.waits_for_zones
        with pytest.raises(Unavailable):
            await keeper.checkpoint()
        assert attempts > before, "who asks for one by name gets an attempt"
    keeper._again_timer.cancel()
    keeper._again()
    await keeper.settled()
    assert keeper.number > 0
    await disk.check()


async def test_a_zone_put_out_while_its_thread_works_for_a_checkpoint_does_not_stop_the_log(
    monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """What is worked out in a thread of that zone is worked out again in another's."""
    for text in ("is put out", "is out of service"):
        expected_warnings.allow(text)
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world).create(copies=3)
    env = disk.vdi.disk.env
    executor = executor_of(env)
    opened = CheckpointWriter.open

    async def open_and_hang(self: CheckpointWriter) -> None:
        await opened(self)
        executor.hold(0)

    monkeypatch.setattr(CheckpointWriter, "open", open_and_hang)
    await disk.write(0, 40)
    checkpoint = asyncio.create_task(disk.vdi.keeper.checkpoint())
    await turns(300)
    assert executor.waiting(0)
    env.zone_failing(0, ZoneFailed("no answer"))
    await checkpoint
    assert disk.vdi.disk.writer.error is None
    await disk.write(3, 4)
    await disk.vdi.flush()
    await disk.check()
    executor.release(0)
    await world.kill()


async def test_a_zone_that_fails_while_a_checkpoint_is_given_up_does_not_stop_the_log(
    disk: ModelDisk, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """The checkpoint finds no space, and its unfinished object can't be removed."""
    expected_warnings.allow("checkpoint given up")
    await disk.write(0, 40)
    aborts = 0

    def full(*_: object) -> None:
        raise NoSpace("full")

    def broken(*_: object) -> None:
        nonlocal aborts
        aborts += 1
        raise ZoneFailed("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryWriter, "commit", full)
        patch.setattr(MemoryWriter, "abort", broken)
        with pytest.raises(NoSpace):
            await disk.vdi.keeper.checkpoint()
    assert aborts == 2
    await disk.write(3, 4)
    await disk.vdi.keeper.checkpoint()
    await disk.vdi.flush()
    await disk.check()


async def test_damaged_map_pages_are_an_error_for_their_range_only(expected_warnings: ExpectedWarnings) -> None:
    world = World(2)
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=3 * 1024).create()
        for region in range(3):
            await disk.write(region * 1024 + 5)
        await disk.vdi.keeper.checkpoint()
        await disk.vdi.flush()
        ref = disk.vdi.keeper.root.get(1)
        name = disk.checkpoints[-1]
        await world.kill()
        world.damage(name, ref.offset + 13, zones=[0])
        await world.open()
        await disk.open()
        await disk.check()
        await world.kill()
        world.damage(name, ref.offset + 13, zones=[1])
        await world.open()
        await disk.open()
        assert await disk.read(5) == disk.expected(5)
        assert await disk.read(2 * 1024 + 5) == disk.expected(2 * 1024 + 5)
        with pytest.raises(Corrupt, match="map pages can't be read from any zone"):
            await disk.read(1024 + 5)
        with pytest.raises(Corrupt):
            await disk.write(1024 + 6)
        assert await disk.read(5) == disk.expected(5)
    finally:
        await world.kill()


async def test_a_page_that_was_taken_over_while_a_zone_is_out_is_looked_for_again(
    expected_warnings: ExpectedWarnings,
) -> None:
    """The checkpoint that held it is gone in one zone, and the other can't be asked."""
    for text in ("is put out", "is out of service", "map pages unreadable"):
        expected_warnings.allow(text)
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world).create(copies=3)
    await disk.write(5)
    await disk.vdi.keeper.checkpoint()
    await disk.reopen(clean=True)
    inner, env = disk.vdi.disk, disk.vdi.disk.env
    ref = inner.map.regions[0]
    assert isinstance(ref, PageRef)
    await env.put_out(1, ZoneFailed("no answer"))
    assert isinstance(inner.checkpoint_zones, CheckpointZones)
    inner.checkpoint_zones.found(ref.checkpoint + 100, (0, 1, 2))
    gone = PageRef(ref.checkpoint + 100, ref.offset, ref.length)
    await inner.load([(0, gone)])
    assert inner.map.regions[0] == ref, "not loaded, and no error: the caller looks again"
    inner.map.regions[0] = gone
    with pytest.raises(Unavailable, match="out of reach"):
        await inner.load([(0, gone)])
    inner.map.regions[0] = ref
    await disk.check()
    await world.kill()


async def test_maps_larger_than_their_memory() -> None:
    """Regions leave memory and come back, while they change and while checkpoints are written."""
    world = World(1, settings=StoreSettings(segment_bytes=1 * MIB, dirty_age_seconds=60.0, map_memory_bytes=4 * MIB))
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=1024).create(copies=1)
        assert world.store is not None
        big = await world.store.create_vdi("big", 4096 * 1024 * BLOCK_BYTES, copies=1, mode="writeback-always")
        volume = await world.store.open(big.name)
        model: dict[int, bytes] = {}
        for turn in range(6):
            for _ in range(1500):
                block = disk.dice.randrange(1000) * 1024 + disk.dice.randrange(70)
                model[block] = data = block.to_bytes(4, "little") + bytes([turn]) * (BLOCK_BYTES - 4)
                await volume.write(block * BLOCK_BYTES, memoryview(data))
            await volume.flush()
            await volume.keeper.checkpoint()  # type: ignore[attr-defined]
        into = memoryview(bytearray(BLOCK_BYTES))
        for block, data in model.items():
            assert await volume.read(block * BLOCK_BYTES, BLOCK_BYTES, into) == 0
            assert into == data
        assert world.store.env.maps.loaded_bytes < 4 * MIB + 64 * 8300
    finally:
        await world.kill()

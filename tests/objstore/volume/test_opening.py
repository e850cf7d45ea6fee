"""Opening VDIs: from the newest checkpoint, from the one before it, after any end of the process before."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.check.report import Severity
from objstore.errors import Corrupt
from objstore.log.checkpoint import checkpoint_folder
from objstore.units import BLOCK_BYTES, KIB, MIB, REGION_BLOCKS
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import Checked
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World, executor_of, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2)
    await world.open(create=True)
    yield world
    await world.kill()


@pytest.fixture
async def disk(world: World) -> ModelDisk:
    return await ModelDisk(world).create()


@pytest.mark.parametrize("clean", [True, False])
async def test_contents_survive_every_restart(disk: ModelDisk, clean: bool) -> None:
    for _ in range(6):
        await disk.churn(60)
        await disk.vdi.flush()
        await disk.reopen(clean=clean)
        await disk.check()


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("where", ["header", "footer", "table", "missing"])
async def test_the_checkpoint_before_serves_when_the_newest_is_lost(
    disk: ModelDisk, where: str, clean: bool, expected_warnings: ExpectedWarnings
) -> None:
    """Segments that died between the two must still be there; and the fallback can be lost and found again."""
    expected_warnings.allow("the one before it, [0-9]+, and what was written since serve")
    for turn in range(3):
        await disk.churn(250)
        await disk.vdi.keeper.checkpoint()
        await turns()
        await disk.churn(250)
        await disk.vdi.keeper.checkpoint()
        await turns()
        await disk.churn(150 * (turn % 2))
        await disk.vdi.flush()
        freed = disk.vdi.keeper.freed
        await (disk.world.stop() if clean else disk.world.kill())
        newest = disk.checkpoints[-1]
        if where == "missing":
            for storage in disk.world.storages:
                del storage.objects[newest]
        else:
            disk.world.damage(newest, {"header": 20, "footer": -100, "table": -140}[where])
        await disk.world.open()
        await disk.open()
        await disk.check()
    assert freed, "no segment was freed: the test did not test much"


async def test_no_older_checkpoint_than_the_one_before_is_believed(disk: ModelDisk) -> None:
    await disk.churn(50)
    await disk.vdi.keeper.checkpoint()
    oldest = disk.checkpoints[-1]
    kept = [bytearray(storage.objects[oldest]) for storage in disk.world.storages]
    for _ in range(3):
        await disk.churn(250)
        await disk.vdi.keeper.checkpoint()
    await disk.world.stop()
    for name in disk.checkpoints[-2:]:
        disk.world.damage(name, 20)
    for storage, data in zip(disk.world.storages, kept, strict=True):
        for name in disk.checkpoints[:-2]:
            storage.objects.pop(name, None)
        storage.objects[oldest] = data
    await disk.world.open()
    with pytest.raises(Corrupt, match="no checkpoint can be read"):
        await disk.open()


async def test_a_gap_in_the_numbers_of_checkpoints_does_not_hide_the_one_before(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    """A checkpoint was given up for want of space: the one before the newest has not the number before."""
    expected_warnings.allow("the one before it, [0-9]+, and what was written since serve")
    await disk.churn(100)
    await disk.vdi.keeper.checkpoint()
    number = disk.vdi.keeper.number
    disk.vdi.keeper.next_number += 1
    await disk.churn(3)
    await disk.vdi.keeper.checkpoint()
    assert disk.vdi.keeper.number == number + 2
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    await disk.world.kill()
    disk.world.damage(disk.checkpoints[-1], 20)
    await disk.world.open()
    await disk.open()
    await disk.check()


async def test_a_checkpoint_of_one_zone_is_copied_to_the_others(disk: ModelDisk) -> None:
    """The process died between the two zones: what is built on that checkpoint must not hang on a single copy."""
    await disk.churn(100)
    await disk.vdi.keeper.checkpoint()
    await disk.vdi.flush()
    await disk.world.kill()
    newest = disk.checkpoints[-1]
    del disk.world.storages[1].objects[newest]
    await disk.world.open()
    await disk.open()
    assert newest in disk.world.storages[1].objects
    await disk.world.kill()
    disk.world.damage(newest, 20, zones=[0])
    disk.world.damage(newest, 5000, zones=[0])
    await disk.world.open()
    await disk.open()
    await disk.check()


async def test_a_segment_sealed_in_one_zone_only_is_copied(disk: ModelDisk) -> None:
    """Its seal proves nothing about the body in the other zone, whose sync may never have come."""
    await disk.churn(1, blocks_max=1)
    await disk.vdi.flush()
    segment = disk.vdi.disk.writer.segment
    assert segment is not None
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(1)
    await disk.write(7, 2)
    await disk.write(8, 2)
    disk.vdi.disk.writer.finish_segment()
    disk.vdi.disk.writer.request_sync()
    await turns()
    sizes = [len(storage.objects[segment.name]) for storage in disk.world.storages]
    assert sizes[0] < sizes[1], "sealed in zone 0 alone"
    await disk.reopen(clean=False)
    await disk.check()
    await disk.vdi.flush()
    for name in disk.world.names(0, "log/000001/"):
        objects = [storage.objects[name] for storage in disk.world.storages]
        assert objects[0] == objects[1], "what was read and flushed is in both zones"


@pytest.mark.parametrize("smaller", [256 * KIB, 512 * KIB])
async def test_opening_with_smaller_segments_than_before(smaller: int) -> None:
    """The unsealed end has operations larger than the segments that the settings now ask for."""
    world = World(2, settings=StoreSettings(segment_bytes=8 * MIB, dirty_age_seconds=60.0))
    await world.open(create=True)
    try:
        disk = await ModelDisk(world).create()
        for blocks in (1, 10, 60, 70, 100, 200, 250, 1, 90):
            await disk.write(0, blocks)
        await disk.vdi.flush()
        await world.kill()
        world.settings = StoreSettings(segment_bytes=smaller, dirty_age_seconds=60.0)
        await world.open()
        await disk.open()
        await disk.check()
        await disk.reopen(clean=True)
        await disk.check()
    finally:
        await world.kill()


async def test_live_counters_of_a_checkpoint_are_those_of_its_position(disk: ModelDisk) -> None:
    """What clients overwrite while it is being written is counted again when the tail is replayed."""
    await disk.write(0, 40)
    await turns()
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0)
    checkpoint = asyncio.create_task(disk.vdi.keeper.checkpoint())
    await turns()
    await disk.write(0, 40)
    executor.release(0)
    await checkpoint
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    assert disk.vdi.disk.live_total == 40
    assert sorted(segment.live for segment in disk.vdi.disk.segments.values()) == [0, 40]
    await disk.check()


async def test_a_checkpoint_of_another_run_is_never_read(expected_warnings: ExpectedWarnings) -> None:
    """A crash leaves a checkpoint in one zone alone; the next run does without that zone and writes checkpoints of its
    own. What the zone brings back has the number, the length and the places of the pages of one of them."""
    expected_warnings.allow("is put out|is out of service|is back|is out since|copy is missing")
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=4 * REGION_BLOCKS).create(copies=3)

    async def scatter() -> None:
        for block in range(0, 2 * REGION_BLOCKS, 7):
            await disk.write(block)

    await scatter()
    await disk.vdi.keeper.checkpoint()
    await scatter()
    await disk.vdi.keeper.checkpoint()
    lonely = disk.checkpoints[-1]
    await world.kill()
    for zone in (1, 2):
        del world.storages[zone].objects[lonely]
    await world.open(here=[1, 2])
    await disk.open()
    await scatter()
    await disk.vdi.keeper.checkpoint()
    own = world.names(1, checkpoint_folder(LOG))[-1]
    await disk.write(2 * REGION_BLOCKS, 3)
    await disk.vdi.keeper.checkpoint()
    await world.stop()
    assert lonely in world.names(0)
    assert own in world.names(1)
    assert not [finding for finding in Checked(world).check().findings if finding.severity is Severity.DAMAGE]
    await world.open()
    await disk.open()
    await disk.check()
    await world.stop()


@pytest.mark.parametrize("client", [False, True])
async def test_who_waits_for_an_opening_gets_an_open_disk(disk: ModelDisk, client: bool) -> None:
    """Others wait for it too, and who comes first may have used and left the disk before the next one goes on: it was
    given a disk that was being closed (simulation, seeds 371 and 745)."""
    await disk.write(0, 4)
    await disk.vdi.flush()
    await disk.world.stop()
    await disk.world.open()
    store = disk.world.store
    assert store is not None

    async def short() -> None:
        async with store.using(store._entry("disk")):
            pass

    async def longer() -> bytes:
        into = memoryview(bytearray(4 * BLOCK_BYTES))
        if client:
            volume = await store.open("disk")
            await turns(100)
            await volume.read(0, len(into), into)
            await store.close(volume)
        else:
            async with store.using(store._entry("disk")) as vdi:
                await turns(100)
                await vdi.read(0, len(into), into)
        return bytes(into)

    results = await asyncio.gather(short(), longer(), short(), longer())
    assert results[1] == results[3] == disk.expected(0, 4)

"""Map pages that are damaged in every zone: made again from the checkpoint before and the log, or an error for their
blocks alone."""

from collections.abc import AsyncIterator

import pytest

from objstore.errors import Corrupt
from objstore.units import BLOCK_BYTES, REGION_BLOCKS
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import World

REGIONS = 6


@pytest.fixture
async def disk(expected_warnings: ExpectedWarnings) -> AsyncIterator[ModelDisk]:
    expected_warnings.allow(
        "made again from what|a map page is lost|is not whole|can't be (collected|merged)|live counters stay|directory"
    )
    world = World(2)
    await world.open(create=True)
    yield await ModelDisk(world, blocks=REGIONS * REGION_BLOCKS).create()
    await world.kill()


async def churn(disk: ModelDisk, times: int = 60) -> None:
    await disk.churn(times, blocks_max=40)
    await disk.trim(REGION_BLOCKS + 100, 2 * REGION_BLOCKS)  # over several regions
    await disk.churn(times)
    await disk.reserve(3 * REGION_BLOCKS - 5, 10)
    await disk.write(4 * REGION_BLOCKS - 30, 60)


def spoil_pages(disk: ModelDisk, *, older: bool = False) -> list[int]:
    """One bit of every page that is in the newest checkpoint (older: in others), in all zones; their regions."""
    keeper = disk.vdi.keeper
    spoilt = []
    for region, checkpoint, length, offset in keeper.root.rows.tolist():
        if (checkpoint == keeper.number) is not older:
            disk.world.damage(f"checkpoint/000001/{checkpoint:08x}", offset + length // 2)
            spoilt.append(region)
    return spoilt


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("rounds", [2, 4])
async def test_lost_pages_of_the_newest_checkpoint_come_from_the_log(disk: ModelDisk, rounds: int, clean: bool) -> None:
    for _ in range(rounds):
        await churn(disk)
        await disk.vdi.keeper.checkpoint()
    await disk.churn(20)
    await disk.vdi.flush()
    await (disk.world.stop() if clean else disk.world.kill())
    await disk.world.open()
    await disk.open()
    await disk.world.kill()
    assert spoil_pages(disk)
    await disk.world.open()
    await disk.open()
    await disk.check()
    env = disk.vdi.disk.env
    assert env.rebuilt_pages
    assert disk.vdi.disk.damage.count(disk.vdi.disk) == 0
    await churn(disk)
    await disk.vdi.keeper.checkpoint()
    await disk.reopen(clean=True)
    await disk.check()
    assert disk.vdi.disk.env.rebuilt_pages == 0, "the next checkpoint has them"


async def test_pages_are_made_again_while_the_disk_is_used(disk: ModelDisk) -> None:
    """Evicted, lost, asked for; what collection has moved is found where it is now."""
    for _ in range(3):
        await churn(disk)
        await disk.vdi.keeper.checkpoint()
    blockmap, root = disk.vdi.disk.map, disk.vdi.keeper.root
    spoilt = spoil_pages(disk)
    evicted = 0
    for region in spoilt:
        ref = root.get(region)
        assert ref is not None
        evicted += blockmap.evict(region, ref)  # those that collection has changed since stay
    assert evicted
    await disk.check()
    assert disk.vdi.disk.env.rebuilt_pages == evicted
    await disk.vdi.keeper.checkpoint()
    await disk.reopen(clean=True)
    await disk.check()


@pytest.mark.parametrize("clean", [True, False])
async def test_a_page_that_is_bad_in_both_checkpoints_costs_its_region_alone(disk: ModelDisk, clean: bool) -> None:
    """Operations behind the checkpoints touch it; the disk opens, and nothing of that region is zeros or old data."""
    await churn(disk)
    await disk.vdi.keeper.checkpoint()
    await disk.write(5)
    await disk.vdi.keeper.checkpoint()
    await disk.write(2 * REGION_BLOCKS + 7)
    await disk.write(5 * REGION_BLOCKS + 7)
    await disk.vdi.flush()
    await disk.world.kill()
    lost = spoil_pages(disk, older=True)
    assert lost
    assert 0 not in lost
    for turn in range(3):
        await disk.world.open()
        await disk.open()
        for region in range(REGIONS):
            first = region * REGION_BLOCKS
            if region in lost:
                with pytest.raises(Corrupt):
                    await disk.read(first, REGION_BLOCKS)
                with pytest.raises(Corrupt):
                    await disk.vdi.write((first + 9) * BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES)))
            else:
                assert await disk.read(first, REGION_BLOCKS) == disk.expected(first, REGION_BLOCKS)
        ranges = await disk.vdi.disk.damage.ranges(disk.vdi.disk)
        assert sum(length for _, length in ranges) == len(lost) * REGION_BLOCKS * BLOCK_BYTES
        await disk.write(9 + turn)
        await disk.vdi.keeper.checkpoint()
        await (disk.world.stop() if clean else disk.world.kill())
    await disk.world.open()
    await disk.open()
    for region in lost:  # what is written as a whole is known again
        await disk.trim(region * REGION_BLOCKS, REGION_BLOCKS)
    await disk.check()


async def test_a_lost_region_that_the_log_replaces_is_whole(disk: ModelDisk) -> None:
    await churn(disk)
    await disk.vdi.keeper.checkpoint()
    await disk.write(5)
    await disk.vdi.keeper.checkpoint()
    disk.vdi.keeper._closed = True  # no checkpoint follows
    await disk.write(77)
    await disk.trim(0, REGIONS * REGION_BLOCKS)
    await disk.write(78, 3)
    await disk.vdi.flush()
    await disk.world.kill()
    spoil_pages(disk, older=True)
    await disk.world.open()
    await disk.open()
    await disk.check()
    assert disk.vdi.disk.damage.count(disk.vdi.disk) == 0


async def test_a_gap_in_the_log_behind_is_no_page(disk: ModelDisk) -> None:
    """A directory that is needed is lost as well: an error, never what the rest of the log would make."""
    await churn(disk)
    await disk.vdi.keeper.checkpoint()
    await churn(disk)
    await disk.vdi.keeper.checkpoint()
    await disk.world.stop()
    lost = spoil_pages(disk)
    keeper = disk.vdi.keeper
    between = range(keeper.previous_next_segment, keeper.next_segment)
    names = [name for name in disk.segments if int(name[-7:], 16) in between]
    disk.world.damage(names[len(names) // 2], -20)
    await disk.world.open()
    await disk.open()
    with pytest.raises(Corrupt):
        await disk.read(lost[0] * REGION_BLOCKS, 2)

"""Opening with zones that are missing, out of date, from a backup, doubled or damaged: what is served, what is refused
and by which names, and that nothing flushed is lost to a wrong belief."""

import copy
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from objstore.backend.memory import MemoryStorage
from objstore.errors import Corrupt, InvalidRequest, StoreError, Unavailable
from objstore.log.segment import segment_name
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import SMALL_SEGMENTS, World, failing, turns

OUT = "failed and is put out|is out of service"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def reopen(world: World, here: list[int], *, force: bool = False) -> None:
    await world.kill()
    await world.open(here=here, force=force)


def paths(numbers: list[int]) -> str:
    return ".*".join(f"zone{number}" for number in numbers)


def members(world: World) -> list[int]:
    assert world.store is not None
    return sorted(world.store.membership.in_service)


@pytest.mark.parametrize("here", [[0, 1], [0, 2], [1, 2]])
@pytest.mark.parametrize("clean", [True, False])
async def test_two_of_three_serve_everything(world: World, here: list[int], clean: bool) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(120)
    await disk.vdi.keeper.checkpoint()
    await disk.churn(60)
    await disk.vdi.flush()
    await (world.stop() if clean else world.kill())
    await world.open(here=here)
    assert members(world) == here
    await disk.open()
    await disk.check()
    await disk.churn(60)
    await disk.vdi.flush()
    # Everybody is there again; the one that was away knows less and is not believed.
    await reopen(world, [0, 1, 2])
    assert members(world) == [0, 1, 2]
    await disk.open()
    await disk.check()
    await disk.churn(20)
    await disk.vdi.flush()
    await reopen(world, here)
    await disk.open()
    await disk.check()


@pytest.mark.parametrize("here", [[0], [1], [2]])
async def test_one_of_three_is_refused_with_the_names_of_the_others(world: World, here: list[int]) -> None:
    missing = [number for number in range(3) if number not in here]
    with pytest.raises(Unavailable, match=f"zones are missing: {paths(missing)}.*--force"):
        await reopen(world, here)


async def test_a_zone_that_went_on_alone_is_needed(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow(OUT)
    disk = await ModelDisk(world).create(copies=3)
    store = world.store
    assert store is not None
    await store.membership.exclude([0], "failed")
    await disk.churn(20)
    await disk.vdi.flush()
    with pytest.raises(Unavailable, match="zone1"):
        await reopen(world, [0, 2])
    await world.open(here=[1, 2])
    await disk.open()
    await disk.check()


async def test_a_zone_from_a_backup_is_not_believed(world: World) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(40)
    await disk.vdi.flush()
    await world.kill()
    backup = copy.deepcopy(world.storages[0].objects)
    for _ in range(2):
        await world.open()
        await disk.open()
        await disk.churn(40)
        await disk.vdi.flush()
        await world.kill()
    world.storages[0].objects = backup
    await world.open()
    await disk.open()
    await disk.check()
    assert members(world) == [0, 1, 2]


async def test_a_backup_and_a_missing_zone_are_too_much(world: World) -> None:
    """What was flushed last may be on the missing one alone, as far as anybody here knows."""
    backup = copy.deepcopy(world.storages[0].objects)
    await reopen(world, [0, 1, 2])
    await reopen(world, [0, 1])
    await world.kill()
    world.storages[0].objects = backup
    with pytest.raises(Unavailable, match=r"missing: zone1 .*another past: zone0"):
        await world.open(here=[0, 2])


async def test_two_copies_of_one_zone_are_refused_by_name(world: World) -> None:
    await world.stop()
    world.storages[1] = MemoryStorage()
    world.storages[1].objects = copy.deepcopy(world.storages[0].objects)
    with pytest.raises(InvalidRequest, match="zone1 and zone0 are the same zone"):
        await world.open()


async def test_a_zone_whose_directory_is_empty_is_missing(world: World) -> None:
    """Its disk is not mounted."""
    world_store = world.store
    assert world_store is not None
    await world.stop()
    kept, world.storages[2].objects = world.storages[2].objects, {}
    store = await world.open(create=True)
    assert members(world) == [0, 1]
    assert [(zone.path, zone.reason) for zone in store.membership.epoch.out] == [("zone2", "it is empty")]
    status = await store.status()
    assert status.health == "degraded"
    assert any("zone2 is out" in reason and "it is empty" in reason for reason in status.reasons)
    assert not world.storages[2].objects, "nothing is written there"
    await world.stop()
    world.storages[2].objects = kept
    await world.open()
    assert members(world) == [0, 1, 2]


async def test_a_damaged_superblock_is_a_missing_zone(world: World) -> None:
    await world.stop()
    world.damage("superblock", -10, zones=[1])
    store = await world.open()
    assert members(world) == [0, 2]
    (out,) = store.membership.epoch.out
    assert "zone1/superblock is damaged" in out.reason


async def test_a_zone_that_can_not_be_read_is_done_without(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow(f"failed|can't be written|{OUT}")
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(30)
    await disk.vdi.flush()
    await world.kill()
    for call in ("get", "put", "open"):
        await world.open(faults={2: failing(call, times=1000)})
        await disk.open()
        await disk.check()
        await world.kill()


@pytest.fixture
async def frugal() -> AsyncIterator[World]:
    """A store whose VDIs take writes with a single copy."""
    world = World(3, settings=replace(SMALL_SEGMENTS, min_copies=1))
    await world.open(create=True)
    yield world
    await world.kill()


@pytest.mark.parametrize("here", [[0], [1], [2]])
async def test_force_opens_what_is_there(frugal: World, here: list[int], expected_warnings: ExpectedWarnings) -> None:
    world = frugal
    expected_warnings.allow("epoch .* is given up|forced")
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(40)
    await disk.vdi.flush()
    await world.kill()
    await world.open(here=here, force=True)
    assert members(world) == here
    await disk.open()
    await disk.check()
    await disk.churn(40)
    await disk.vdi.flush()
    await reopen(world, [0, 1, 2])
    await disk.open()
    await disk.check()


async def test_zones_that_come_back_after_force_are_overruled(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    """Two of three went on without the third; it was forced alone; all come back."""
    expected_warnings.allow("epoch .* is given up|forced")
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(40)
    await disk.vdi.flush()
    model = bytes(disk.model)
    await reopen(world, [0, 1])
    await disk.open()
    await disk.write(0, 5)
    await disk.vdi.flush()
    world.settings = replace(world.settings, min_copies=1)
    await reopen(world, [2], force=True)
    await disk.open()
    disk.model[:] = model
    await disk.check()
    await disk.write(100, 5)
    await disk.vdi.flush()
    await reopen(world, [0, 1, 2])
    await disk.open()
    await disk.check()


# -- more zones than copies -----------------------------------------------------------------------------------------


async def many(world: World, count: int, copies: int) -> dict[str, bytes]:
    """VDIs with some flushed blocks each, and what their first blocks hold."""
    store = world.store
    assert store is not None
    contents = {}
    for i in range(count):
        await store.create_vdi(f"d{i}", MIB, copies=copies, mode="writeback-always")
        vdi = await store.open(f"d{i}")
        contents[f"d{i}"] = data = bytes([i + 1]) * (4 * BLOCK_BYTES)
        await vdi.write(0, memoryview(data))
        await vdi.flush()
    return contents


async def shown(world: World, name: str) -> bytes:
    assert world.store is not None
    vdi = await world.store.open(name)
    assert isinstance(vdi, Vdi)
    into = memoryview(bytearray(4 * BLOCK_BYTES))
    await vdi.read(0, len(into), into)
    return bytes(into)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("copies", [1, 2, 3])
async def test_with_every_subset_each_vdi_is_whole_or_refused(copies: int, clean: bool) -> None:
    """Five zones: three are enough for the store, not for every VDI. Nothing is ever served short or as zeros, and
    nothing that is refused is lost: with all zones there again all is well."""
    world = World(5)
    await world.open(create=True)
    contents = await many(world, 6, copies)
    await (world.stop() if clean else world.kill())
    refused = 0
    for size in (3, 4):
        for here in itertools.combinations(range(5), size):
            await world.open(here=list(here))
            for name, data in contents.items():
                try:
                    assert await shown(world, name) == data
                except Unavailable:
                    refused += 1
                    status = world.store.vdi(name)
                    assert status.state == "failed"
                    assert any(f"zone{z}" in status.reason for z in set(range(5)).difference(here)), status.reason
            await world.kill()
            await world.open()
            for name, data in contents.items():
                assert await shown(world, name) == data
            await (world.stop() if clean else world.kill())
    assert bool(refused) == (copies < 3)


async def test_what_was_not_opened_keeps_its_rights() -> None:
    """Zones that were away hold the only copies of a VDI that nobody opened meanwhile."""
    world = World(5)
    await world.open(create=True)
    contents = await many(world, 8, 1)
    await world.kill()
    for here in ([0, 1, 2], [1, 2, 4], [2, 3, 4], [0, 1, 2, 3, 4]):
        await world.open(here=here)
        for name in list(contents)[: len(here)]:
            try:
                assert await shown(world, name) == contents[name]
            except Unavailable:
                assert len(here) < 5
        await world.kill()
    await world.open()
    for name, data in contents.items():
        assert await shown(world, name) == data
    await world.kill()


async def test_a_deleted_vdi_is_purged_where_a_zone_comes_back(world: World) -> None:
    contents = await many(world, 1, 3)
    assert contents
    await reopen(world, [0, 1])
    assert world.store is not None
    await world.store.delete_vdi("d0")
    await turns()
    assert world.names(2, "log/000001/")
    await world.stop()
    await world.open()
    await turns(200)
    assert not world.names(2, "log/000001/")
    assert not world.store.catalog.state.garbage
    await world.stop()


async def test_the_checkpoints_of_a_zone_that_is_away_are_missed_by_name() -> None:
    world = World(4)
    await world.open(create=True)
    disk = await ModelDisk(world).create(copies=1)
    for _ in range(3):
        await disk.churn(200)
        await disk.vdi.keeper.checkpoint()
    await disk.vdi.flush()
    await world.stop()
    holders = [z for z in range(4) if world.names(z, "checkpoint/")]
    assert len(holders) == 1
    await world.open(here=[z for z in range(4) if z not in holders])
    with pytest.raises(Unavailable, match=f"zone{holders[0]}"):
        await disk.open()
    await world.stop()
    await world.open()
    await disk.open()
    await disk.check()
    await world.kill()


async def test_an_old_checkpoint_is_not_taken_for_the_one_before_while_a_zone_is_away() -> None:
    """It stays because a map has pages in it; the zone that is away has both of those that were newest."""
    world = World(4)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=4096).create(copies=1)
    for block in range(0, disk.blocks, 12):
        await disk.write(block)
    await disk.vdi.keeper.checkpoint()
    oldest = disk.checkpoints[-1]
    for _ in range(3):
        await disk.write(0, 1)
        await disk.vdi.keeper.checkpoint()
    assert len(disk.checkpoints) == 3
    assert disk.checkpoints[0] == oldest
    await disk.vdi.flush()
    await world.stop()
    (holder,) = (z for z in range(4) if world.names(z, "checkpoint/"))
    other = (holder + 1) % 4
    away = world.storages[holder].objects
    moved = [oldest, *world.names(holder, "log/000001/")]
    for name in moved:
        world.storages[other].objects[name] = away.pop(name)
    await world.open(here=[z for z in range(4) if z != holder])
    with pytest.raises(Unavailable, match=f"newest checkpoint.*zone{holder}"):
        await disk.open()
    await world.stop()
    for name in moved:
        away[name] = world.storages[other].objects.pop(name)
    await world.open()
    await disk.open()
    await disk.check()
    await world.kill()


async def test_a_zone_that_was_removed_is_not_missed(expected_warnings: ExpectedWarnings) -> None:
    for text in ("checkpoint", "out of service"):
        expected_warnings.allow(text)
    world = World(4)
    await world.open(create=True)
    assert world.store is not None
    disk = await ModelDisk(world).create(copies=1)
    await disk.write(1, 5)
    await disk.vdi.keeper.checkpoint()
    (holder,) = (z for z in range(4) if world.names(z, "checkpoint/"))
    removed = (holder + 1) % 4
    await world.store.change_zones("drain", f"zone{removed}")
    await world.store.recovery.settled()
    await world.store.change_zones("remove", f"zone{removed}")
    await disk.write(3, 5)
    await disk.vdi.flush()
    await world.stop()
    for z in range(4):
        for name in world.names(z, "checkpoint/")[-1:]:
            damaged = world.storages[z].objects[name]
            damaged[:] = bytes(len(damaged))
    await world.open(here=[z for z in range(4) if z != removed])
    await disk.open()
    await disk.check()
    await world.kill()


async def test_a_store_that_was_never_opened_needs_all_its_zones(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("can't be written")
    fresh = World(3)
    with pytest.raises(StoreError):
        await fresh.open(create=True, fault=failing("put", "epoch/", times=1000))
    with pytest.raises(Unavailable, match="first opened with all of its zones"):
        await fresh.open(here=[0, 1])
    await fresh.open(create=True)
    await fresh.kill()


async def test_names_that_are_none_of_ours_are_passed_over(world: World) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(20)
    await disk.vdi.keeper.checkpoint()
    await world.stop()
    for folder in ("epoch", "catalog", "log/000000", "log/000001", "checkpoint/000001"):
        for name in ("readme", "-1234567", "00_00001", "0000001x", "+0000001"[:7]):
            if name[0] in "-0123456789abcdefr":
                world.storages[0].objects[f"{folder}/{name}"] = bytearray(b"?")
    await world.open()
    await disk.open()
    await disk.check()


async def test_segments_that_no_zone_has_any_more(world: World) -> None:
    disk = await ModelDisk(world).create(copies=2)
    await disk.churn(20)
    await disk.vdi.flush()
    writer = disk.vdi.disk.writer
    assert writer.segment is not None
    gone = segment_name(1, writer.segment.number)
    for _ in range(2):
        await disk.churn(20)
        await disk.vdi.flush()
    assert not disk.vdi.keeper.number
    await world.kill()
    for storage in world.storages:
        storage.objects.pop(gone, None)
    await world.open()
    with pytest.raises(Corrupt, match="ends before what was durable"):
        await disk.open()


async def test_the_catalog_is_compacted_while_the_store_is_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objstore.volume.catalog.COMPACT_BYTES", 64 * KIB)
    store = world.store
    assert store is not None
    for i in range(40):
        await store.create_vdi(f"d{i}", MIB)
    assert len(world.names(0, "catalog/")) == 1
    assert sum(len(world.storages[0].objects[name]) for name in world.names(0, "log/000000/")) < MIB
    assert store.membership.version > 3
    await world.kill()
    await world.open()
    assert world.store.names() == sorted(f"d{i}" for i in range(40))


async def test_a_head_longer_than_a_segment_of_the_catalog(world: World) -> None:
    from objstore.format.catalog import HeadEntry, TailRow

    store = world.store
    assert store is not None
    rows = [TailRow(number, 0xFFFFFFFF, 7) for number in range(40_000)]
    head = HeadEntry(
        log=9, generation=1, tail=rows, first_number=1 << 20, checkpoint=0, clean=True, epoch="0" * 32, copies=3
    )
    await store.catalog.commit(head)
    await world.kill()
    await world.open()
    assert world.store.catalog.state.heads[9] == head

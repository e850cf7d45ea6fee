"""Scrub and read repair: what is bad is replaced, what is lost is named, deleted VDIs and restarts don't disturb it."""

import itertools
from collections.abc import AsyncIterator

import pytest

from objstore.errors import Corrupt, NoSpace
from objstore.log.checkpoint import checkpoint_folder, checkpoint_name
from objstore.log.segment import log_folder
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume import damaged
from objstore.volume.scrub import NOTE_NAME, NOTE_SECONDS, SETTLE_SECONDS
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World, turns

DAY = 86400.0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def filled(world: World) -> ModelDisk:
    """A disk on all three zones with two checkpoints, everything sealed and durable."""
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(40)
    await disk.vdi.keeper.checkpoint()
    await disk.churn(20)
    await disk.vdi.keeper.checkpoint()
    return disk


async def scrub(world: World) -> None:
    assert world.store is not None
    await world.store.start_scrub()
    await world.store.wait_for_scrub()


def objects(world: World, zone: int) -> dict[str, bytes]:
    """What scrub looks after."""
    prefixes = (log_folder(LOG), checkpoint_folder(LOG), "epoch/", "catalog/")
    return {name: bytes(data) for name, data in world.storages[zone].objects.items() if name.startswith(prefixes)}


@pytest.mark.parametrize("attached", [True, False])
async def test_every_bad_copy_is_found_and_replaced(
    world: World, attached: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad, replaced|a copy is bad object=(epoch|catalog)")
    disk = await filled(world)
    if not attached:
        await disk.reopen(clean=True)
        await world.stop()
        await world.open()
    assert world.store is not None
    names = [n for n, data in objects(world, 0).items() if data[-128:-120] in (b"SHEEPDIR", b"SHEEPEND")]
    names += [world.names(0, folder)[-1] for folder in ("epoch/", "catalog/")]
    before = {name: objects(world, 0)[name] for name in names}
    for number, name in enumerate(names):
        zone = number % 3
        if number % 4 == 3 and name.startswith("log/"):  # opening would restore a checkpoint itself
            del world.storages[zone].objects[name]
        else:
            world.damage(name, min(5000, len(before[name]) // 2), zones=[zone])
    await scrub(world)
    status = (await world.store.status()).scrub
    assert (status.copies_bad, status.copies_repaired, status.copies_unrepaired) == (len(names), len(names), 0)
    assert status.copies_checked == 3 * len(names)
    assert status.skipped == []
    for zone in range(3):
        assert {name: objects(world, zone)[name] for name in names} == before
    await scrub(world)
    assert world.store.scrub.status().copies_bad == 0
    assert (await world.store.status()).health == "ok"
    assert world.store.vdi("disk").state == ("open" if attached else "closed")
    if not attached:
        await disk.open()
    await disk.check()


async def test_scenario_34_the_majority_is_not_asked_the_checksum_is(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    """One copy lost, one corrupted: the third one is right, whatever the two say."""
    expected_warnings.allow("a copy is bad, replaced")
    disk = await filled(world)
    name = disk.segments[0]
    whole = bytes(world.storages[2].objects[name])
    del world.storages[0].objects[name]
    world.damage(name, 5000, zones=[1])
    await scrub(world)
    assert [bytes(world.storages[zone].objects[name]) for zone in range(3)] == [whole] * 3


async def test_what_no_zone_has_is_damage_and_never_zeros(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("a copy is bad, not replaced|no zone has all of a segment|checksum wrong")
    disk = await filled(world)
    assert world.store is not None
    await disk.write(100, 20)
    disk.vdi.disk.writer.finish_segment()
    await disk.vdi.flush()
    await disk.vdi.disk.writer.sealed_below(disk.vdi.disk.writer.next_number)
    for block in (103, 104, 110):
        disk.damage(block)
    await scrub(world)
    found = await world.store.damage("disk")
    ranges = [(part.offset_bytes, part.length_bytes) for part in found.ranges]
    assert ranges == [(103 * BLOCK_BYTES, 2 * BLOCK_BYTES), (110 * BLOCK_BYTES, BLOCK_BYTES)]
    assert found.complete
    status = await world.store.status()
    assert status.health == "degraded"
    assert any("12288 bytes are damaged in every copy" in reason for reason in status.reasons)
    assert world.store.vdi("disk").damaged_bytes == 3 * BLOCK_BYTES
    into = memoryview(bytearray(20 * BLOCK_BYTES))
    with pytest.raises(Corrupt) as caught:
        await disk.vdi.read(100 * BLOCK_BYTES, len(into), into)
    assert caught.value.bad == ((103 * BLOCK_BYTES, 2 * BLOCK_BYTES), (110 * BLOCK_BYTES, BLOCK_BYTES))
    await disk.write(103, 2)
    await disk.trim(110, 1)
    await disk.check()
    assert (await world.store.damage("disk")).ranges == []
    assert world.store.vdi("disk").damaged_bytes == 0


async def test_a_segment_without_any_directory_costs_what_the_map_has_in_it(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad|no zone has all of a segment|no zone has the directory")
    disk = await filled(world)
    assert world.store is not None
    segment = next(s for s in disk.vdi.disk.segments.values() if s.live)
    expected = [b for b in range(disk.blocks) if disk.vdi.disk.map.lookup(b) >> 12 == segment.key]
    world.damage(segment.name, -1)
    world.damage(segment.name, BLOCK_BYTES)
    await scrub(world)
    ranges = (await world.store.damage("disk")).ranges
    got = [b for r in ranges for b in range(r.offset_bytes >> 12, (r.offset_bytes + r.length_bytes) >> 12)]
    assert got == expected
    assert len(expected) == segment.live


async def test_damage_of_a_detached_vdi_stays_known(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("a copy is bad|no zone has all of a segment")
    disk = await filled(world)
    block = next(b for b in range(disk.blocks) if disk.vdi.disk.map.lookup(b) > 1)
    disk.damage(block)
    await world.stop()
    await world.open()
    assert world.store is not None
    await scrub(world)
    assert (world.store.vdi("disk").state, world.store.vdi("disk").damaged_bytes) == ("closed", BLOCK_BYTES)
    assert [r.offset_bytes for r in (await world.store.damage("disk")).ranges] == [block * BLOCK_BYTES]


async def test_a_checkpoint_that_no_zone_has_whole_is_written_anew(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    """Each zone has another part of it."""
    expected_warnings.allow("a copy is bad, not replaced|no zone has a whole checkpoint")
    disk = await filled(world)
    name = disk.checkpoints[-1]
    size = len(world.storages[0].objects[name])
    for zone, offset in ((0, 4096 + 20), (1, 3), (2, size - 1)):
        world.damage(name, offset, zones=[zone])
    await scrub(world)
    assert disk.checkpoints[-1] > name
    await disk.reopen(clean=False)
    await disk.check()


async def test_a_map_page_that_no_zone_has_is_damage_of_its_region(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad, not replaced|no zone has a whole checkpoint|checkpoint")
    disk = await filled(world)
    await world.stop()
    await world.open()
    await disk.open()
    assert world.store is not None
    page = disk.vdi.keeper.root.get(0)
    world.damage(checkpoint_name(LOG, page.checkpoint), page.offset + 100)
    await scrub(world)
    ranges = (await world.store.damage("disk")).ranges
    assert [(r.offset_bytes, r.length_bytes) for r in ranges] == [(0, len(disk.model))]


async def test_a_read_that_meets_a_bad_copy_has_it_replaced(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("checksum wrong|a copy is bad, replaced|read failed")
    disk = await filled(world)
    assert world.store is not None
    before = objects(world, 0)
    block = next(b for b in range(disk.blocks) if disk.vdi.disk.map.lookup(b) > 1)
    name, _ = disk.place(block)
    segment = disk.vdi.disk.env.segments[disk.vdi.disk.map.lookup(block) >> 12]
    read_first = segment.number % 3
    disk.damage(block, zones=[read_first])
    segment.close_handles()
    assert await disk.read(block) == disk.expected(block)
    await turns()
    assert objects(world, read_first)[name] == before[name]
    assert world.store.scrub.status().read_repairs == 1
    segment.close_handles()
    del world.storages[read_first].objects[name]
    assert await disk.read(block) == disk.expected(block)
    await turns()
    assert objects(world, read_first)[name] == before[name]
    bad = disk.vdi.disk.env.bad_copies
    await disk.check()
    assert disk.vdi.disk.env.bad_copies == bad
    assert (await world.store.status()).health == "ok"


async def test_what_can_not_be_listed_as_damaged_ends_neither_repair_nor_scrub(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    """Which blocks of a disk a lost block was is in a map page that is lost too."""
    expected_warnings.allow("a copy is bad|no zone has a|list of damaged blocks is not complete|checkpoint")
    disk = await filled(world)
    await world.stop()
    await world.open()
    await disk.open()
    assert world.store is not None
    page = disk.vdi.keeper.root.get(0)
    world.damage(checkpoint_name(LOG, page.checkpoint), page.offset + 100)
    lost, bad = (s for s in disk.vdi.disk.segments.values() if s.sealed and s.name in disk.segments[:2])
    whole = objects(world, 1)[bad.name]
    world.damage(lost.name, 2 * BLOCK_BYTES)
    world.damage(bad.name, 2 * BLOCK_BYTES, zones=[1])
    world.store.scrub.suspect(lost, 0)
    await turns(100)
    world.store.scrub.suspect(bad, 1)
    await turns(100)
    assert objects(world, 1)[bad.name] == whole
    world.damage(bad.name, 2 * BLOCK_BYTES, zones=[2])
    await scrub(world)
    assert objects(world, 2)[bad.name] == whole
    assert world.store.scrub.status().skipped == []


async def test_a_copy_that_cannot_be_replaced_is_reported_until_it_is(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad|a copy could not be written")
    disk = await filled(world)
    assert world.store is not None
    world.damage(disk.segments[0], 5000, zones=[1])

    def full(call: str, name: str) -> None:
        if call == "put" and name == disk.segments[0]:
            raise NoSpace("the zone is full")

    world.backends[1].fault = full
    await scrub(world)
    world.backends[1].fault = lambda call, name: None
    status = await world.store.status()
    assert (status.health, status.scrub.copies_unrepaired) == ("degraded", 1)
    assert "1 bad copies could not be replaced" in status.reasons
    await scrub(world)
    status = await world.store.status()
    assert (status.health, status.scrub.copies_unrepaired) == ("ok", 0)


async def test_a_deletion_waits_for_the_copy_under_way_and_no_file_comes_back(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad, replaced")
    disk = await filled(world)
    assert world.store is not None
    await world.store.close(disk.vdi)
    for name in disk.segments:
        world.damage(name, 5000, zones=[1])
    await world.store.start_scrub()
    for _ in range(1000):
        if world.store.scrub.status().copies_repaired:
            break
        await turns(1)
    await world.store.delete_vdi("disk")
    await world.store.wait_for_scrub()
    await turns(300)
    for zone in range(3):
        assert not world.names(zone, log_folder(LOG))
        assert not world.names(zone, checkpoint_folder(LOG))


async def test_a_vdi_that_cannot_be_opened_is_named_and_the_others_are_looked_at(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad, replaced")
    disk = await filled(world)
    assert world.store is not None
    await world.store.create_vdi("other", MIB, copies=3, mode="writeback-always")
    other = await world.store.open("other")
    await other.write(0, memoryview(bytes(range(256)) * 16))
    await other.flush()
    await world.stop()
    checkpoints = disk.checkpoints
    for zone in range(3):
        for name in checkpoints:
            del world.storages[zone].objects[name]
    await world.open()
    world.damage(world.names(0, log_folder(2))[0], 4500, zones=[2])
    await scrub(world)
    assert world.store is not None
    status = world.store.scrub.status()
    assert len(status.skipped) == 1
    assert status.skipped[0].startswith("VDI disk: ")
    assert status.copies_repaired == 1


async def wake(world: World, seconds: float) -> None:
    """Time passes, and whoever sleeps looks at it."""
    assert world.store is not None
    world.clock.now += seconds
    world.store.scrub._wake.set()
    await turns(200)


async def test_the_background_pass_takes_its_period(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("the event loop stood still")
    await filled(world)
    assert world.store is not None
    scrub = world.store.scrub
    await wake(world, SETTLE_SECONDS)
    assert scrub.status().running
    assert not scrub.status().on_demand
    seen = []
    for _ in range(13):
        await wake(world, DAY)
        seen.append(scrub.status().bytes_done / max(1, scrub.status().bytes_total))
    # A third of the bytes are segments set aside and not yet used: weighed, never looked at.
    assert seen[0] < 0.2
    assert seen[6] < 0.7
    assert all(later - sooner < 0.1 for sooner, later in itertools.pairwise(seen) if later < 1)
    assert not scrub.status().running
    assert scrub.status().finished is not None
    await wake(world, DAY / 2)
    assert not scrub.status().running
    await wake(world, DAY)
    assert scrub.status().running


@pytest.mark.parametrize("clean", [True, False])
async def test_a_pass_goes_on_where_it_was_after_a_restart(
    world: World, clean: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("the event loop stood still")
    disk = await filled(world)
    assert world.store is not None
    await wake(world, SETTLE_SECONDS)
    for _ in range(6):
        await wake(world, DAY)
    done = world.store.scrub._note
    assert done.segment > 0
    await disk.reopen(clean=clean)
    await wake(world, SETTLE_SECONDS)
    again = world.store.scrub._note
    assert (again.log, again.started) == (done.log, done.started)
    assert again.segment >= done.segment - 1
    for zone in range(3):
        assert NOTE_NAME in world.names(zone)
    assert NOTE_SECONDS < DAY


async def test_without_a_period_only_what_is_asked_for_is_done(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("the event loop stood still")
    await world.kill()
    world = World(3, settings=type(world.settings)(segment_bytes=world.settings.segment_bytes, scrub_days=0.0))
    await world.open(create=True)
    await filled(world)
    assert world.store is not None
    for _ in range(20):
        await wake(world, DAY)
    assert world.store.scrub.status().started is None
    await scrub(world)
    assert world.store.scrub.status().finished is not None
    await world.kill()


@pytest.mark.parametrize("clean", [True, False])
async def test_damage_is_known_after_a_restart(
    world: World, clean: bool, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is written again, discarded or repaired; and reading it is an error all the time, never zeros."""
    monkeypatch.setattr(damaged, "DELAY_SECONDS", 0.0)
    expected_warnings.allow("a copy is bad|no zone has all of a segment|checksum wrong|can't be collected")
    disk = await filled(world)
    await disk.write(100, 20)
    await disk.vdi.keeper.checkpoint()
    name, offset = disk.place(118)
    good = bytes(world.storages[1].objects[name][offset : offset + BLOCK_BYTES])
    for block in (103, 104, 110, 118):
        disk.damage(block)
    with pytest.raises(Corrupt):
        await disk.read(100, 20)
    await turns(200)

    async def known() -> list[tuple[int, int]]:
        assert world.store is not None
        found = await world.store.damage("disk")
        return [(r.offset_bytes // BLOCK_BYTES, r.length_bytes // BLOCK_BYTES) for r in found.ranges]

    everything = [(103, 2), (110, 1), (118, 1)]
    assert await known() == everything
    for _ in range(2):
        await (world.stop() if clean else world.kill())
        store = await world.open()
        assert store.vdi("disk").damaged_bytes == 4 * BLOCK_BYTES
        status = await store.status()
        assert status.health == "degraded"
        assert any("are damaged in every copy" in reason for reason in status.reasons)
        assert await known() == everything
        await disk.open()
        for block in (103, 104, 110, 118):
            with pytest.raises(Corrupt):
                await disk.read(block)
    await disk.write(103)
    await disk.trim(110, 1)
    await disk.vdi.flush()
    assert await known() == [(104, 1), (118, 1)]
    await turns(200)
    await (world.stop() if clean else world.kill())
    await world.open()
    assert await known() == [(104, 1), (118, 1)]
    world.storages[1].objects[name][offset : offset + BLOCK_BYTES] = good
    await disk.open()
    assert await disk.read(118) == disk.expected(118)
    assert await known() == [(104, 1)]
    await disk.write(104)
    await disk.vdi.flush()
    assert await known() == []
    await turns(200)
    await (world.stop() if clean else world.kill())
    store = await world.open()
    assert store.vdi("disk").damaged_bytes == 0
    await disk.open()
    await disk.check()


async def test_lost_map_pages_and_deleted_disks_are_known_after_a_restart(
    world: World, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damaged, "DELAY_SECONDS", 0.0)
    expected_warnings.allow("a map page is lost|a copy is bad|no zone has a whole checkpoint|not replaced|merged")
    disk = await filled(world)
    await disk.vdi.flush()
    await world.stop()
    keeper = disk.vdi.keeper
    (row,) = keeper.root.rows.tolist()
    world.damage(checkpoint_name(LOG, row[1]), row[3] + row[2] // 2)
    for number in keeper.sizes:
        if number < row[1]:
            world.damage(checkpoint_name(LOG, number), 30)
    store = await world.open()
    await disk.open()
    with pytest.raises(Corrupt):
        await disk.read(0)
    await world.stop()
    store = await world.open()
    assert store.vdi("disk").damaged_bytes == disk.blocks * BLOCK_BYTES
    await store.delete_vdi("disk")
    await store.create_vdi("disk", MIB, copies=3)
    await world.stop()
    store = await world.open()
    assert store.vdi("disk").damaged_bytes == 0
    assert not store.catalog.state.damage


async def test_a_catalog_whose_log_was_replaced_is_whole(world: World) -> None:
    """By a snapshot, before the pass and while it is under way: what is gone for good is no bad copy."""
    store = world.store
    assert store is not None
    await store.create_vdi("disk", MIB, copies=2)
    await store.attributes.set("disk", "key", b"x" * (200 * KIB // 4))
    for _ in range(12):
        await store.attributes.set("disk", "key", b"y" * (60 * KIB))
    await store.catalog.compact()
    for _ in range(12):
        await store.attributes.set("disk", "key", b"z" * (60 * KIB))
    await scrub(world)
    await store.start_scrub()
    await turns(20)
    await store.catalog.compact()
    await store.wait_for_scrub()
    status = store.scrub.status()
    assert (status.copies_bad, status.copies_unrepaired) == (0, 0)
    assert [
        s.name for s in store.env.segments.values() if s.log == 0 and s.name not in world.names(0, "log/000000/")
    ] == []

"""The store: its VDIs, their creation and deletion, what a new process finds, what is said when it can't open."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import Busy, Corrupt, Exists, FormatError, InvalidRequest, NotFound, Stopping, Unavailable
from objstore.format.catalog import VdiEntry
from objstore.names import NAME_BYTES_MAX
from objstore.units import KIB, MIB, VDI_BYTES_MAX
from objstore.volume.directories import lock_note, zone_paths
from objstore.volume.store import open_store
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import World, failing, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


@pytest.mark.parametrize("clean", [True, False])
async def test_vdis_survive_restarts(world: World, clean: bool) -> None:
    assert world.store is not None
    for number in range(30):
        mode = ("writeback", "unsafe")[number % 2]
        await world.store.create_vdi(f"disk{number}", (number + 1) * MIB, copies=number % 3 + 1, mode=mode)
    for number in range(0, 30, 3):
        await world.store.delete_vdi(f"disk{number}")
    before = world.store.vdis()
    for _ in range(3):
        await (world.stop() if clean else world.kill())
        await world.open()
        assert world.store.vdis() == before
        assert (world.store.unclean_stop is None) == clean
    assert [vdi.name for vdi in before] == sorted(vdi.name for vdi in before)
    assert len(before) == 20


async def test_numbers_are_never_used_again(world: World) -> None:
    assert world.store is not None
    logs = set()
    for _ in range(5):
        for name in ("a", "b"):
            status = await world.store.create_vdi(name, MIB)
            assert status.log not in logs
            logs.add(status.log)
        for name in ("a", "b"):
            await world.store.delete_vdi(name)
        await world.kill()
        await world.open()


async def test_numbers_are_taken_by_one_at_a_time(world: World) -> None:
    """Two disks with one log number would be one disk."""
    store = world.store
    assert store is not None
    async with store._change:
        task = asyncio.create_task(store.create_vdi("disk", MIB))
        await turns()
        taken = store.catalog.state.next_log
        await store.catalog.commit(
            VdiEntry(
                vdi_id=store.catalog.state.next_vdi,
                name="other",
                log=taken,
                size_bytes=MIB,
                copies=1,
                mode="writeback",
                created=0.0,
                prealloc=False,
            )
        )
    await task
    assert store.vdi("other").log == taken
    assert store.vdi("disk").log == taken + 1
    assert store.vdi("disk").vdi_id != store.vdi("other").vdi_id


async def test_what_create_refuses(world: World) -> None:
    assert world.store is not None
    store = world.store
    await store.create_vdi("disk", MIB)
    with pytest.raises(Exists, match="'disk' already"):
        await store.create_vdi("disk", MIB)
    for name in ("", "a/b", "-x", ".x", "a@b", "a:b", "x" * (NAME_BYTES_MAX + 1), "line\nbreak"):
        with pytest.raises(InvalidRequest):
            await store.create_vdi(name, MIB)
    for size in (0, -1, VDI_BYTES_MAX + 1):
        with pytest.raises(InvalidRequest, match="impossible"):
            await store.create_vdi("other", size)
    for copies in (0, 4):
        with pytest.raises(InvalidRequest, match="3 zones of the store take data"):
            await store.create_vdi("other", MIB, copies=copies)
    with pytest.raises(InvalidRequest, match="mode 'fast'"):
        await store.create_vdi("other", MIB, mode="fast")
    assert store.names() == ["disk"]


async def test_two_creations_of_one_name(world: World) -> None:
    assert world.store is not None
    results = await asyncio.gather(*(world.store.create_vdi("x", MIB) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(result, Exists) for result in results) == 3
    assert world.store.names() == ["x"]


async def test_two_deletions_of_one_name(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("x", MIB)
    results = await asyncio.gather(*(world.store.delete_vdi("x") for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(result, NotFound) for result in results) == 3
    await turns()
    await world.kill()
    await world.open()
    assert world.store.names() == []


async def test_deleting_gives_everything_back(world: World) -> None:
    assert world.store is not None
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(50)
    await disk.vdi.flush()
    await disk.vdi.keeper.checkpoint()
    with pytest.raises(Busy, match="attached by 1"):
        await world.store.delete_vdi("disk")
    await world.store.close(disk.vdi)
    await world.store.delete_vdi("disk")
    await turns(300)
    for zone in range(3):
        assert not world.names(zone, "log/000001")
        assert not world.names(zone, "checkpoint/")
    with pytest.raises(NotFound):
        await world.store.open("disk")
    with pytest.raises(NotFound):
        await world.store.delete_vdi("disk")


async def test_a_deletion_cut_short_is_finished_by_the_next_process(world: World) -> None:
    assert world.store is not None
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(20)
    await disk.vdi.flush()
    await world.store.close(disk.vdi)
    world.backends[1].fault = failing("delete", "log/000001", times=100)
    await world.store.delete_vdi("disk")
    await world.kill()
    assert world.names(1, "log/000001")
    await world.open()
    await turns(300)
    assert not world.names(1, "log/000001")
    await world.kill()
    await world.open()
    assert not world.store.catalog.state.garbage


async def test_opening_is_done_once_for_all(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    volumes = await asyncio.gather(*(world.store.open("disk") for _ in range(5)))
    assert len(set(map(id, volumes))) == 1
    assert world.store.vdi("disk").attached == 5
    for volume in volumes:
        await world.store.close(volume)
    assert world.store.vdi("disk").attached == 0


async def test_the_last_close_starts_a_flush(world: World) -> None:
    assert world.store is not None
    disk = await ModelDisk(world).create()
    await disk.write(0, 3)
    await world.store.close(disk.vdi)
    await turns()
    assert disk.vdi.disk.writer.durable_upto == disk.vdi.disk.writer.position == 1


async def test_peeking_opens_nothing(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB, copies=1, mode="unsafe")
    info = world.store.peek("disk")
    assert info is not None
    assert (info.size_bytes, info.read_only, info.description) == (MIB, False, "unsafe, 1 copy")
    assert world.store.peek("other") is None
    assert world.store.vdi("disk").state == "closed"


async def test_a_stopped_store_takes_nothing(world: World) -> None:
    store = world.store
    assert store is not None
    await store.create_vdi("disk", MIB)
    await world.stop()
    with pytest.raises(Stopping):
        await store.open("disk")
    with pytest.raises(Stopping):
        await store.create_vdi("other", MIB)
    await store.shutdown()


async def test_a_zone_that_fails_at_the_stop_is_put_out(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("zone zone2 failed and is put out|zone zone2 is out of service")
    store, world.store = world.store, None
    assert store is not None
    await store.create_vdi("disk", MIB, copies=3, mode="writeback-always")
    volume = await store.open("disk")
    await volume.write(0, memoryview(b"x" * 4096))
    await turns()
    world.backends[2].fault = failing("write_durable", "log/000001")
    await store.shutdown()
    assert [member.number for member in store.membership.epoch.members] == [0, 1]
    await world.open()
    assert world.store.unclean_stop is None
    assert len(world.store.membership.epoch.members) == 3


# -- starts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", [0, 1, 2])
async def test_a_catalog_snapshot_damaged_in_some_zones(world: World, zone: int) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    await world.stop()
    await world.open()
    await world.stop()
    (name,) = world.names(0, "catalog/")
    world.damage(name, 30, zones=[z for z in range(3) if z != zone])
    await world.open()
    assert world.store.names() == ["disk"]


async def test_a_catalog_that_no_zone_has_is_never_an_empty_store(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    await world.stop()
    (name,) = world.names(0, "catalog/")
    world.damage(name, 30)
    with pytest.raises(Corrupt, match="no zone has the catalog"):
        await world.open()


async def test_catalog_records_are_taken_from_whichever_zone_has_them(world: World) -> None:
    assert world.store is not None
    for number in range(6):
        await world.store.create_vdi(f"disk{number}", MIB)
    await world.kill()
    (name, *_) = world.names(0, "log/000000/")
    for zone in range(3):
        for number in range(6):
            if number % 3 != zone:
                world.damage(name, (1 + 2 * number) * 4096 + 50, zones=[zone])
    await world.open()
    assert len(world.store.names()) == 6


async def test_a_damaged_record_of_the_catalog_is_not_its_end(world: World) -> None:
    """Something durable stands behind it: refuse, never go on with an older catalog."""
    assert world.store is not None
    for number in range(6):
        await world.store.create_vdi(f"disk{number}", MIB)
    await world.kill()
    (name, *_) = world.names(0, "log/000000/")
    world.damage(name, 3 * 4096 + 50)
    with pytest.raises(Corrupt, match="ends before what was durable"):
        await world.open()


@pytest.mark.parametrize("calls", range(16))
async def test_a_start_that_ends_anywhere_is_repeated(calls: int, expected_warnings: ExpectedWarnings) -> None:
    """Between any two calls of the zones that change something; nothing changes any more after that."""
    expected_warnings.allow("log stopped|could not be removed yet|garbage stays|stays? until|superblock not renewed")
    expected_warnings.allow(
        "is left out|can't be written|failed and is put out|is out of service|can't be done without"
    )
    world = World(2)
    await world.open(create=True)
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    await world.kill()
    left = calls

    def fault(call: str, name: str) -> None:
        nonlocal left
        if call in ("put", "delete", "create", "write", "sync"):
            left -= 1
            if left < 0:
                raise ZoneFailed(f"the end call={call} name={name}")

    try:
        await world.open(fault=fault)
    except Unavailable:
        assert left < 0
    await turns()
    await world.kill()
    for _ in range(2):
        await world.open()
        assert world.store is not None
        assert world.store.names() == ["disk"]
        await world.stop()


async def test_many_starts_leave_nothing_behind(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    counts = []
    for turn in range(20):
        await (world.stop() if turn % 2 else world.kill())
        await world.open()
        counts.append(len(world.names(0)))
    assert max(counts[-6:]) <= 16 + 8


# -- directories ----------------------------------------------------------------------------------------------------


async def test_directories(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    with pytest.raises(Unavailable, match="a: there is no such directory"):
        await open_store(paths)
    store = await open_store(paths, create=True, lock_note="pid 1")
    with pytest.raises(Busy, match="pid 1"):
        await open_store(paths)
    assert lock_note(paths[1]) == "pid 1"
    await store.create_vdi("disk", 64 * KIB)
    await store.shutdown()
    assert lock_note(paths[1]) is None
    assert zone_paths(paths[2]) == paths
    with pytest.raises(InvalidRequest, match="given twice"):
        await open_store([paths[0], paths[0]])
    for name in "bc":
        (tmp_path / name).rename(tmp_path / f"away-{name}")
    with pytest.raises(Unavailable, match=r"zones are missing: .*/b .*/c "):
        await open_store(paths)
    for name in "bc":
        (tmp_path / f"away-{name}").rename(tmp_path / name)
    (tmp_path / "d").mkdir()
    with pytest.raises(InvalidRequest, match=r"d is empty, but .*a belongs to store"):
        await open_store([*paths[:2], tmp_path / "d"])
    store = await open_store(list(reversed(paths)))
    assert store.names() == ["disk"]
    await store.shutdown()


async def test_moved_directories_are_found_again(tmp_path: Path) -> None:
    store = await open_store([tmp_path / "a", tmp_path / "b"], create=True)
    await store.shutdown()
    (tmp_path / "b").rename(tmp_path / "moved")
    store = await open_store([tmp_path / "a", tmp_path / "moved"])
    await store.shutdown()
    assert zone_paths(tmp_path / "a") == [tmp_path / "a", tmp_path / "moved"]


async def test_a_newer_format_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    store = await open_store([tmp_path / "a"], create=True)
    await store.shutdown()
    block = tmp_path / "a" / "superblock"
    block.write_bytes(block.read_bytes().replace(b"superblock 1 ", b"superblock 7 "))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    with pytest.raises(FormatError, match="format version 7, this program knows up to 1"):
        await open_store([tmp_path / "a"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


async def test_an_opening_that_fails_gives_the_zones_back(tmp_path: Path) -> None:
    store = await open_store([tmp_path / "a", tmp_path / "b"], create=True)
    await store.shutdown()
    (tmp_path / "b").rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await open_store([tmp_path / "a"])
    (tmp_path / "away").rename(tmp_path / "b")
    store = await open_store([tmp_path / "a", tmp_path / "b"])
    await store.shutdown()

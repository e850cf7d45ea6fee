"""What a VDI promises beyond the volume contract: modes, order of admission, whole requests, errors."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from objstore.errors import InvalidRequest, NotFound, Stopping, Unavailable
from objstore.log.env import BUFFER_BYTES
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.base import Extent
from objstore.volume.settings import MODES, StoreSettings
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import World, executor_of, failing, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2)
    await world.open(create=True)
    yield world
    await world.kill()


async def make(world: World, mode: str, size_bytes: int = 4 * MIB) -> Vdi:
    assert world.store is not None
    await world.store.create_vdi("disk", size_bytes, copies=2, mode=mode)
    vdi = await world.store.open("disk")
    assert isinstance(vdi, Vdi)
    await vdi.write(0, memoryview(bytes(BLOCK_BYTES)))
    await turns()
    return vdi


def page(letter: bytes, blocks: int = 1) -> memoryview:
    return memoryview(letter * (blocks * BLOCK_BYTES))


async def waits_for_zones(vdi: Vdi, act: "asyncio.Task[None]") -> bool:
    """Whether something under way ends only after zone 1, which is held, has gone on."""
    executor = executor_of(vdi.disk.env)
    await turns()
    waited = not act.done()
    executor.release(1)
    await act
    await turns()
    return waited


# -- modes --------------------------------------------------------------------------------------------------------

WRITE_WAITS = {"writeback": (True, False), "writeback-always": (False, False), "writethrough": (True, True)}
"""Whether a write waits for the zones before the first flush, and after it."""


@pytest.mark.parametrize("mode", sorted(WRITE_WAITS))
async def test_when_a_write_is_acknowledged(world: World, mode: str) -> None:
    vdi = await make(world, mode)
    for waits in WRITE_WAITS[mode]:
        for change in (
            lambda: vdi.write(8192, page(b"x")),
            lambda: vdi.write(8192 + 10, page(b"x")[:5]),
            lambda: vdi.trim(0, 4096),
            lambda: vdi.zero(0, 4096, no_hole=True),
        ):
            executor_of(vdi.disk.env).hold(1)
            assert await waits_for_zones(vdi, asyncio.create_task(change())) == waits
        assert vdi.write_now(0, page(b"y")) != waits
        assert vdi.write_through == waits
        await vdi.flush()


@pytest.mark.parametrize("mode", sorted(WRITE_WAITS))
async def test_fua_and_flush_wait_in_every_mode_but_one(world: World, mode: str) -> None:
    vdi = await make(world, mode)
    executor_of(vdi.disk.env).hold(1)
    assert await waits_for_zones(vdi, asyncio.create_task(vdi.write(0, page(b"x"), fua=True)))
    assert vdi.write_through == (mode == "writethrough"), "FUA shows that the client knows how to flush"
    vdi.write_now(0, page(b"y"))
    executor_of(vdi.disk.env).hold(1)
    act = asyncio.create_task(vdi.flush())
    assert await waits_for_zones(vdi, act) == (mode != "writethrough")


async def test_unsafe_waits_for_nothing(world: World) -> None:
    vdi = await make(world, "unsafe")
    executor_of(vdi.disk.env).hold(0, 1)
    await vdi.write(4096, page(b"x"), fua=True)
    await vdi.flush()
    assert vdi.disk.writer.durable_upto < vdi.disk.writer.position
    executor_of(vdi.disk.env).release(0, 1)


async def test_the_first_flush_on_any_connection_counts(world: World) -> None:
    assert world.store is not None
    vdi = await make(world, "writeback")
    other = await world.store.open("disk")
    assert other is vdi
    await other.flush()
    assert not vdi.write_through
    await world.store.close(other)
    assert not vdi.write_through
    await world.store.close(vdi)


@pytest.mark.parametrize("mode", MODES)
async def test_what_is_said_about_it(world: World, mode: str) -> None:
    vdi = await make(world, mode)
    assert vdi.description == f"{mode}, 2 copies"


# -- order and wholeness --------------------------------------------------------------------------------------------


async def test_partial_writes_of_one_block_never_lose_each_other(world: World) -> None:
    vdi = await make(world, "writeback-always")
    pieces = list(range(0, 3 * BLOCK_BYTES, 128))
    random.Random(1).shuffle(pieces)
    await asyncio.gather(*(vdi.write(at, memoryview(at.to_bytes(4, "little") * 32)) for at in pieces))
    into = memoryview(bytearray(3 * BLOCK_BYTES))
    await vdi.read(0, len(into), into)
    for at in pieces:
        assert into[at : at + 128] == at.to_bytes(4, "little") * 32


async def test_partial_writes_where_the_base_has_to_be_waited_for(world: World) -> None:
    """The block under them lies in zones that answer slowly; a write that needs no base must not overtake them."""
    disk = await ModelDisk(world).create()
    await disk.write(0, 10)
    await disk.vdi.flush()
    await disk.reopen(clean=True)
    await disk.vdi.extents(0, len(disk.model))  # brings the map into memory
    await disk.write(900)
    await turns()
    disk.vdi.disk.segments[0].close_handles()
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0, 1)
    parts = [asyncio.create_task(disk.vdi.write(100 * i, memoryview(bytes([i]) * 50))) for i in range(1, 5)]
    await turns()
    assert not disk.vdi.write_now(0, page(b"z")), "others wait already"
    whole = asyncio.create_task(disk.vdi.write(0, page(b"z")))
    await turns()
    executor.release(0, 1)
    await asyncio.gather(*parts, whole)
    into = memoryview(bytearray(BLOCK_BYTES))
    await disk.vdi.read(0, BLOCK_BYTES, into)
    assert into == page(b"z")


async def test_large_requests_are_whole_or_not_there(world: World) -> None:
    """At the end of the process a request of many records is there or not, at every moment of its writing."""
    disk = await ModelDisk(world).create()
    whole, into = len(disk.model), memoryview(bytearray(len(disk.model)))
    await disk.vdi.write(0, page(b"a", disk.blocks))
    await disk.vdi.flush()
    seen, now = set(), b"a"
    for turn in (0, 1, 5, 20, 40, 60, 80, 120, 160, 240, 400, 800):
        new = b"b" if now == b"a" else b"a"
        write = asyncio.create_task(disk.vdi.write(0, page(new, disk.blocks)))
        await turns(turn)
        disk.vdi.disk.writer.request_sync()
        await turns(turn % 7)
        write.cancel()
        await disk.reopen(clean=False)
        await disk.vdi.read(0, whole, into)
        assert bytes(into) in (bytes(page(now, disk.blocks)), bytes(page(new, disk.blocks)))
        seen.add(bytes(into[:1]) == new)
        now = bytes(into[:1])
    assert seen == {True, False}


async def test_a_request_with_rough_edges_is_one(world: World) -> None:
    """Zeroing: a part of a block, whole blocks, a part of a block. Replay takes all of it or nothing."""
    disk = await ModelDisk(world).create()
    await disk.write(0, 600)
    await disk.vdi.zero(100, 500 * BLOCK_BYTES)
    disk.model[100 : 100 + 500 * BLOCK_BYTES] = bytes(500 * BLOCK_BYTES)
    await disk.check()
    await disk.vdi.flush()
    await disk.reopen(clean=False)
    await disk.check()


async def test_who_is_gone_before_the_turn_came_is_dropped(world: World) -> None:
    disk = await ModelDisk(world).create()
    await disk.write(0, 10)
    await disk.vdi.flush()
    await disk.reopen(clean=True)
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0, 1)
    gone: list[bool] = []
    first = asyncio.create_task(disk.vdi.write(5, memoryview(b"x")))
    second = asyncio.create_task(disk.vdi.write(4096, page(b"y"), alive=lambda: not gone))
    await turns()
    gone.append(True)
    executor.release(0, 1)
    await first
    with pytest.raises(InvalidRequest, match="is gone"):
        await second
    disk.model[5:6] = b"x"
    await disk.check()


async def test_cancelled_writes_leave_the_disk_usable(world: World) -> None:
    vdi = await make(world, "writeback-always")
    executor = executor_of(vdi.disk.env)
    for turn in range(20):
        executor.hold(1)
        write = asyncio.create_task(vdi.write(0, page(b"c", 1000)))
        await turns(turn)
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
        executor.release(1)
        await vdi.write(0, page(b"d", 1000))
        into = memoryview(bytearray(1000 * BLOCK_BYTES))
        await vdi.read(0, len(into), into)
        assert into == page(b"d", 1000)
        await vdi.flush()


async def test_dirty_data_is_bounded() -> None:
    world = World(2, settings=StoreSettings(dirty_bytes_max=1 * MIB, dirty_age_seconds=60.0))
    await world.open(create=True)
    try:
        vdi = await make(world, "writeback-always", 64 * MIB)
        executor_of(vdi.disk.env).hold(1)
        writes = [asyncio.create_task(vdi.write(i << 18, page(b"w", 64))) for i in range(40)]
        await turns(300)
        # The limit, and what the record that passed it holds.
        assert vdi.disk.env.dirty_bytes < MIB + 2 * BUFFER_BYTES
        assert not all(write.done() for write in writes)
        assert not vdi.write_now(0, page(b"n"))
        executor_of(vdi.disk.env).release(1)
        await asyncio.gather(*writes)
        await vdi.flush()
        assert vdi.disk.env.dirty_bytes == 0
    finally:
        await world.kill()


# -- extents and trims ----------------------------------------------------------------------------------------------


async def test_extents_never_lie() -> None:
    world = World(1)
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=3000).create(copies=1)
        for turn in range(4):
            await disk.churn(80, blocks_max=60)
            await disk.vdi.flush()
            if turn % 2:
                await disk.reopen(clean=turn == 3)
            at = 0
            while at < len(disk.model):
                for extent in await disk.vdi.extents(at, len(disk.model) - at, extents_max=7):
                    if extent.zero:
                        assert not any(disk.model[at : at + extent.length_bytes])
                    at += extent.length_bytes
    finally:
        await world.kill()


async def test_the_end_of_an_odd_disk(world: World) -> None:
    size = 5 * BLOCK_BYTES + 1000
    vdi = await make(world, "writeback-always", size)
    await vdi.write(0, memoryview(b"x" * size))
    assert await vdi.extents(0, size) == [Extent(size, hole=False, zero=False)]
    await vdi.trim(4 * BLOCK_BYTES + 1, size - 4 * BLOCK_BYTES - 1)
    assert await vdi.extents(0, size) == [Extent(5 * BLOCK_BYTES, False, False), Extent(1000, True, True)]
    await vdi.write(size - 1, memoryview(b"y"))
    await vdi.zero(5 * BLOCK_BYTES, 1000, fast=True)
    assert await vdi.extents(5 * BLOCK_BYTES, 1000) == [Extent(1000, True, True)]
    await vdi.trim(5 * BLOCK_BYTES, 500)
    await vdi.write(5 * BLOCK_BYTES + 10, memoryview(b"z" * 100))
    await vdi.trim(5 * BLOCK_BYTES, 500)
    into = memoryview(bytearray(1000))
    assert await vdi.read(5 * BLOCK_BYTES, 1000, into) == 0
    assert bytes(into) == bytes(10) + b"z" * 100 + bytes(890)


async def test_reserved_zeros_survive_a_restart(world: World) -> None:
    disk = await ModelDisk(world).create()
    await disk.write(0, 20)
    await disk.reserve(5, 5)
    await disk.trim(12, 3)
    expected = [
        Extent(5 * BLOCK_BYTES, False, False),
        Extent(5 * BLOCK_BYTES, False, True),
        Extent(2 * BLOCK_BYTES, False, False),
        Extent(3 * BLOCK_BYTES, True, True),
        Extent(5 * BLOCK_BYTES, False, False),
    ]
    for clean in (False, True):
        assert await disk.vdi.extents(0, 20 * BLOCK_BYTES) == expected
        await disk.vdi.flush()
        await disk.reopen(clean=clean)
    await disk.check()


# -- a flush that is expected -------------------------------------------------------------------------------------


async def test_a_flush_joins_the_sync_that_was_begun_for_it(world: World) -> None:
    disk = await ModelDisk(world).create()
    await disk.write(2, 1)
    await disk.vdi.flush()
    await turns()
    executor = executor_of(disk.vdi.disk.env)
    for backend in world.backends:
        backend.calls.clear()
    executor.hold(0)
    executor.hold(1)
    await disk.write(0, 1)
    disk.vdi.sync_soon()
    disk.vdi.sync_soon()
    flush = asyncio.create_task(disk.vdi.flush())
    executor.release(0)
    assert await waits_for_zones(disk.vdi, flush)
    for backend in world.backends:
        assert [call for call, _, _ in backend.calls] == ["write_durable"], "one sync for both"


async def test_a_sync_that_was_begun_before_the_last_write_is_not_enough(world: World) -> None:
    disk = await ModelDisk(world).create()
    await disk.write(2, 1)
    await disk.vdi.flush()
    await turns()
    executor = executor_of(disk.vdi.disk.env)
    executor.hold(0)
    executor.hold(1)
    await disk.write(0, 1)
    disk.vdi.sync_soon()
    await disk.write(1, 1)
    flush = asyncio.create_task(disk.vdi.flush())
    executor.release(0)
    await turns()
    executor.step(1)
    await turns()
    assert disk.vdi.disk.writer.durable_upto < disk.vdi.disk.writer.position
    assert await waits_for_zones(disk.vdi, flush)
    assert disk.vdi.disk.writer.durable_upto == disk.vdi.disk.writer.position


async def test_an_expected_flush_does_not_end_write_through(world: World) -> None:
    vdi = await make(world, "writeback")
    vdi.sync_soon()
    await turns()
    assert vdi.write_through


async def test_what_a_failed_sync_leaves_is_told_by_the_flush(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    for text in ("log stopped", "is put out", "can't be done without"):
        expected_warnings.allow(text)
    disk = await ModelDisk(world).create()
    await disk.write(2, 1)
    await disk.vdi.flush()
    await turns()
    await disk.write(0, 1)
    for backend in world.backends:
        backend.fault = failing("write_durable")
    disk.vdi.sync_soon()
    await turns()
    for backend in world.backends:
        backend.fault = None
    disk.vdi.sync_soon()
    with pytest.raises(Unavailable):
        await disk.vdi.flush()


async def test_nothing_is_begun_for_a_disk_whose_flush_does_nothing(world: World) -> None:
    vdi = await make(world, "unsafe")
    for backend in world.backends:
        backend.calls.clear()
    vdi.sync_soon()
    await turns()
    assert not world.backends[0].calls


# -- the end --------------------------------------------------------------------------------------------------------


async def test_zones_that_all_fail_stop_the_vdi_and_not_its_reads(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    for text in ("log stopped", "is put out", "can't be done without"):
        expected_warnings.allow(text)
    disk = await ModelDisk(world).create()
    await disk.write(0, 5)
    await disk.vdi.flush()
    await disk.write(3, 2)
    for backend in world.backends:
        backend.fault = failing("write_durable")
    with pytest.raises(Unavailable, match="zone1"):
        await disk.vdi.flush()
    for change in (
        disk.vdi.write(0, page(b"x")),
        disk.vdi.write(1, memoryview(b"x")),
        disk.vdi.trim(0, 4096),
        disk.vdi.zero(0, 4096),
        disk.vdi.flush(),
    ):
        with pytest.raises(Unavailable):
            await change
    await disk.check()
    assert world.store is not None
    status = world.store.vdi("disk")
    assert status.state == "failed"
    assert "zone1" in status.reason


async def test_a_closed_vdi_says_why(world: World) -> None:
    assert world.store is not None
    vdi = await make(world, "writeback-always")
    await world.stop()
    into = memoryview(bytearray(4096))
    for act in (vdi.write(0, page(b"x")), vdi.read(0, 4096, into), vdi.trim(0, 4096), vdi.flush(), vdi.extents(0, 1)):
        with pytest.raises(Stopping):
            await act
    with pytest.raises(Stopping):
        vdi.read_now(0, 4096, into)


async def test_a_deleted_vdi_is_not_found_any_more(world: World) -> None:
    assert world.store is not None
    vdi = await make(world, "writeback-always")
    await world.store.close(vdi)
    await world.store.delete_vdi("disk")
    with pytest.raises(NotFound, match="was deleted"):
        await vdi.write(0, page(b"x"))

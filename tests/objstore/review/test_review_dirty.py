"""The account of dirty data when a log ends before its data is durable."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.errors import Unavailable
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.support.serving import eventually
from tests.support.stepping import World, executor_of, failing, turns

SETTINGS = StoreSettings(segment_bytes=2 * MIB, dirty_age_seconds=60.0, dirty_bytes_max=MIB, write_wait_seconds=0.0)
BLOCK = memoryview(b"\x5a" * BLOCK_BYTES)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2, settings=SETTINGS)
    await world.open(create=True)
    yield world
    await world.kill()


async def make(world: World, name: str, copies: int = 2) -> Vdi:
    store = world.store
    assert store is not None
    await store.create_vdi(name, 16 * MIB, copies=copies, mode="writeback-always")
    vdi = await store.open(name)
    assert isinstance(vdi, Vdi)
    await vdi.write(0, BLOCK, fua=True)
    return vdi


async def test_dirty_data_of_a_failed_log_stops_no_other(world: World, expected_warnings: ExpectedWarnings) -> None:
    for text in ("waits for zones", "is put out", "is out of service", "can't be appended again", "recovery"):
        expected_warnings.allow(text)
    one, other = await make(world, "one", copies=1), await make(world, "other")
    store = world.store
    assert store is not None
    executor_of(store.env).hold(0, 1)
    while store.env.dirty_bytes < store.env.dirty_bytes_max:
        last = store.env.dirty_bytes // BLOCK_BYTES * BLOCK_BYTES
        await one.write(last, BLOCK)
    for backend in world.backends:
        backend.fault = failing("write_durable", "log/000001/")
    waiting = asyncio.create_task(other.write(0, BLOCK))
    await turns()
    assert not waiting.done(), "the limit holds for all disks together"
    executor_of(store.env).release(0, 1)
    with pytest.raises(Unavailable):
        await one.flush()
    await turns()
    assert waiting.done(), "nobody is left to wake the other disk"
    await waiting
    await other.flush()
    assert not store.env.dirty_bytes
    into = bytearray(BLOCK_BYTES)
    assert await one.read(last, BLOCK_BYTES, memoryview(into)) == 0
    assert into == BLOCK, "what a failed log holds in memory can still be read"
    await other.write(4 * KIB, BLOCK, fua=True)
    with pytest.raises(Unavailable):
        await world.stop()


async def test_dirty_data_of_a_deleted_disk_is_forgotten(world: World) -> None:
    disk = await make(world, "one")
    store = world.store
    assert store is not None
    await store.close(disk)
    await turns()
    assert not store.env.dirty_bytes
    await disk.write(0, BLOCK)  # as collection does when no client is there
    await store.delete_vdi("one")
    await eventually(lambda: not store.env.dirty_bytes)
    await world.stop()


async def test_at_the_limit_the_dirty_data_of_every_disk_goes_to_the_zones(world: World) -> None:
    """Else a write waits until the other disk's data is old enough, here a minute."""
    one, other = await make(world, "one"), await make(world, "other")
    store = world.store
    assert store is not None
    for lba in range(0, 256, 8):
        await one.write(lba * BLOCK_BYTES, memoryview(bytes(8 * BLOCK_BYTES)))
    assert store.env.dirty_bytes >= store.env.dirty_bytes_max, "all of it gathered in one record"
    waiting = asyncio.create_task(other.write(0, BLOCK))
    await turns()
    assert waiting.done()
    await waiting
    await world.stop()

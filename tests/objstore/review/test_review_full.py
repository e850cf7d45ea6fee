"""A store that is full: what frees space must always find some."""

from collections.abc import AsyncIterator

import pytest

from objstore.errors import NoSpace
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.vdi import Vdi
from tests.support.stepping import World

SETTINGS = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, dirty_bytes_max=MIB)
BLOCK = memoryview(b"\x5a" * BLOCK_BYTES)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(1, settings=SETTINGS, capacity_bytes=12 * MIB)
    await world.open(create=True)
    yield world
    await world.kill()


async def fill_up(vdi: Vdi, lba: int) -> int:
    """Write until the zone is full; the first block not written."""
    while True:
        try:
            if not vdi.write_now(lba * BLOCK_BYTES, BLOCK):
                await vdi.write(lba * BLOCK_BYTES, BLOCK)
        except NoSpace:
            await vdi.flush()
            return lba
        lba += 1
        if not lba % 64:
            await vdi.flush()


async def test_clients_never_write_into_space_that_discards_took_from_the_reserve(world: World) -> None:
    store = world.store
    assert store is not None
    await store.create_vdi("disk", 64 * MIB, mode="writeback-always")
    vdi = await store.open("disk")
    assert isinstance(vdi, Vdi)
    storage = world.storages[0]
    segment_bytes = vdi.disk.writer.segment_blocks * BLOCK_BYTES
    lba = 0
    for _ in range(8):
        lba = await fill_up(vdi, lba)
        for _ in range(400):  # more than one record holds
            await vdi.trim(63 * MIB, BLOCK_BYTES)
        await vdi.flush()
        free = storage.capacity_bytes - storage.used_bytes()
        assert free > store.env.reserve_bytes - 2 * segment_bytes
    assert lba < 2560, "the test is about a full store"
    await vdi.trim(0, 4 * MIB)
    for block in range(512):
        await vdi.write(block * BLOCK_BYTES, BLOCK)
    await vdi.flush()
    assert not vdi.disk.writer.scarce
    await store.close(vdi)
    await world.stop()

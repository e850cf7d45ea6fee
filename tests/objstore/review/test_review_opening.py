"""Opening after damage, and openings that fail."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from objstore.errors import NoSpace
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.vdi import Vdi
from tests.support.stepping import SMALL_SEGMENTS, World, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(1, settings=replace(SMALL_SEGMENTS, dirty_bytes_max=MIB), capacity_bytes=9 * MIB)
    await world.open(create=True)
    assert world.store is not None
    await world.store.create_vdi("disk", 16 * MIB, mode="writeback-always")
    yield world
    await world.kill()


async def attach(world: World) -> Vdi:
    assert world.store is not None
    vdi = await world.store.open("disk")
    assert isinstance(vdi, Vdi)
    return vdi


def block(lba: int, turn: int = 0) -> bytes:
    return f"{lba:8}{turn:8}".encode() * (BLOCK_BYTES // 16)


async def contents(vdi: Vdi, lba: int) -> bytes:
    into = memoryview(bytearray(BLOCK_BYTES))
    return bytes(BLOCK_BYTES) if await vdi.read(lba * BLOCK_BYTES, BLOCK_BYTES, into) == BLOCK_BYTES else bytes(into)


@pytest.mark.parametrize("blocks", [3, 100])
async def test_a_damaged_first_page_hides_no_flushed_record(world: World, blocks: int) -> None:
    """blocks: 3 = the only segment of the log, not sealed; 100 = one sealed segment and one more."""
    vdi = await attach(world)
    for lba in range(blocks):
        await vdi.write(lba * BLOCK_BYTES, memoryview(block(lba)))
    await vdi.flush()
    await world.kill()
    world.damage("log/000001/0000000", 50)
    await world.open()
    vdi = await attach(world)
    for lba in range(blocks):
        assert await contents(vdi, lba) == block(lba)


async def test_an_opening_that_found_no_space_leaves_nothing_behind(world: World) -> None:
    vdi = await attach(world)
    blocks = 300
    for lba in range(blocks):
        await vdi.write(lba * BLOCK_BYTES, memoryview(block(lba)))
        if lba % 50 == 0:
            await vdi.flush()
    await vdi.flush()
    await world.kill()
    # Without its seals everything has to be copied.
    for name in world.names(0, "log/000001/"):
        del world.storages[0].objects[name][-BLOCK_BYTES:]
    storage = world.storages[0]
    capacity = storage.capacity_bytes
    await world.open()
    storage.capacity_bytes = storage.used_bytes() + 400 * KIB
    store = world.store
    assert store is not None
    before = set(world.names(0, "log/000001/"))
    for _ in range(3):
        with pytest.raises(NoSpace):
            await store.open("disk")
        await turns()
        assert before.issuperset(world.names(0, "log/000001/")), "each try takes more space"
        assert not store.env.segments
        assert not store.env.dirty_bytes
    storage.capacity_bytes = capacity
    vdi = await attach(world)
    for lba in range(blocks):
        assert await contents(vdi, lba) == block(lba)


async def test_segments_set_aside_and_never_used_make_room_for_the_opening(world: World) -> None:
    vdi = await attach(world)
    vdi.disk.writer.prepared_target = 6
    for lba in range(100):
        await vdi.write(lba * BLOCK_BYTES, memoryview(block(lba)))
    await vdi.flush()
    await turns()
    await world.kill()
    storage = world.storages[0]
    assert len(world.names(0, "log/000001/")) == 8
    await world.open()
    storage.capacity_bytes = storage.used_bytes() + 16 * KIB
    vdi = await attach(world)
    for lba in range(100):
        assert await contents(vdi, lba) == block(lba)

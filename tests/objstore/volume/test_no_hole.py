"""Zeros that shall be no hole, on disks whose space is not set aside."""

import pytest

from objstore.errors import NoSpace
from objstore.log.address import RESERVED
from objstore.log.blockmap import FILL_STEP
from objstore.units import BLOCK_BYTES, GIB, MIB, REGION_BYTES, TIB
from objstore.volume.vdi import Vdi
from tests.support.stepping import World


async def create(world: World, size_bytes: int, **properties: object) -> Vdi:
    assert world.store is not None
    await world.store.create_vdi("disk", size_bytes, copies=1, mode="writeback-always", **properties)  # type: ignore[arg-type]
    vdi = await world.store.open("disk")
    assert isinstance(vdi, Vdi)
    return vdi


async def test_a_range_that_the_zones_cannot_hold_is_refused() -> None:
    world = World(1, capacity_bytes=200 * MIB)
    await world.open(create=True)
    try:
        vdi = await create(world, GIB)
        await vdi.write(0, memoryview(bytes([7]) * BLOCK_BYTES))
        with pytest.raises(NoSpace, match="needed_bytes"):
            await vdi.zero(0, GIB, no_hole=True)
        assert [extent.hole for extent in await vdi.extents(0, GIB)] == [False, True]
        assert vdi.read_now(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES))) == 0, "nothing was changed"
        await vdi.zero(0, 100 * MIB, no_hole=True)
        assert [extent[:2] for extent in await vdi.extents(0, GIB)] == [(100 * MIB, False), (GIB - 100 * MIB, True)]
        await vdi.zero(0, 100 * MIB, no_hole=True)
        await vdi.zero(0, GIB)
    finally:
        await world.kill()


async def test_data_that_is_there_already_needs_no_more_room() -> None:
    world = World(1, capacity_bytes=150 * MIB)
    await world.open(create=True)
    try:
        vdi = await create(world, 80 * MIB)
        for offset in range(0, 80 * MIB, MIB):
            await vdi.write(offset, memoryview(bytes([7]) * MIB))
        await vdi.zero(0, 80 * MIB, no_hole=True)
    finally:
        await world.kill()


async def test_any_length_is_possible_where_there_is_room() -> None:
    world = World(1, capacity_bytes=2 * TIB)
    await world.open(create=True)
    try:
        vdi = await create(world, TIB)
        length = 300 * GIB
        assert length > FILL_STEP * REGION_BYTES
        await vdi.zero(BLOCK_BYTES, length, no_hole=True)
        assert [extent[:2] for extent in await vdi.extents(0, BLOCK_BYTES * 2)] == [
            (BLOCK_BYTES, True),
            (BLOCK_BYTES, False),
        ]
        assert vdi.disk.map.lookup(length // BLOCK_BYTES) == RESERVED
        assert vdi.disk.map.lookup(length // BLOCK_BYTES + 1) == 0
    finally:
        await world.kill()

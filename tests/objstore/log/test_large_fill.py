"""Discards of a large part of a disk: they go into the map in steps, and nothing comes in between."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.log import blockmap, disk
from objstore.log.address import HOLE, RESERVED
from objstore.units import BLOCK_BYTES, GIB, REGION_BLOCKS, REGION_BYTES, VDI_BYTES_MAX
from objstore.volume.vdi import Vdi
from tests.support.disks import ModelDisk
from tests.support.stepping import World, turns

STEP = 4
REGIONS = 30


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(blockmap, "FILL_STEP", STEP)
    monkeypatch.setattr(blockmap, "FILL_TALLY_MAX", STEP)
    monkeypatch.setattr(disk, "FILL_AT_ONCE_BLOCKS", STEP * REGION_BLOCKS)
    world = World(1, capacity_bytes=GIB)
    await world.open(create=True)
    yield world
    await world.kill()


async def filled(world: World, blocks: int = REGIONS * REGION_BLOCKS) -> ModelDisk:
    """A block in every region."""
    made = await ModelDisk(world, blocks=blocks).create(copies=1)
    for region in range(REGIONS):
        await made.write(region * REGION_BLOCKS + region)
    await made.vdi.flush()
    return made


async def first_step(vdi: Vdi, change: "asyncio.Task[None]") -> None:
    """Let a discard begin."""
    while vdi.disk._applying is None:
        await turns(1)
        assert not change.done()


@pytest.mark.parametrize("kind", [HOLE, RESERVED])
async def test_others_have_their_turns_and_a_checkpoint_waits(world: World, kind: int) -> None:
    made = await filled(world)
    vdi = made.vdi
    length = made.blocks * BLOCK_BYTES
    change = asyncio.create_task(vdi.trim(0, length) if kind == HOLE else vdi.zero(0, length, no_hole=True))
    await first_step(vdi, change)
    seen = {sum(vdi.disk.map.lookup(r * REGION_BLOCKS + r) > RESERVED for r in range(REGIONS))}
    vdi.keeper._force()
    while not change.done():
        assert vdi.keeper._task is None
        await turns(1)
        seen.add(sum(vdi.disk.map.lookup(r * REGION_BLOCKS + r) > RESERVED for r in range(REGIONS)))
    await change
    assert len(seen) >= REGIONS // STEP
    made._zero(0, made.blocks)
    await made.check()
    await turns(300)
    assert vdi.keeper.number == 1, "the checkpoint that was wanted meanwhile"
    assert vdi.disk.map.lookup(5) == kind
    await made.write(3)
    await vdi.flush()
    await made.reopen(clean=False)
    assert made.vdi.disk.map.lookup(5) == kind
    await made.check()


async def test_a_caller_that_goes_leaves_no_half_of_it(world: World) -> None:
    made = await filled(world)
    change = asyncio.create_task(made.vdi.trim(0, made.blocks * BLOCK_BYTES))
    await first_step(made.vdi, change)
    assert any(made.vdi.disk.map.regions)
    change.cancel()
    await asyncio.wait([change])
    assert not made.vdi.disk.between_parts
    made._zero(0, made.blocks)
    await made.check()
    await made.vdi.flush()
    await made.reopen(clean=False)
    await made.check()


async def test_writes_wait_until_all_of_it_is_in_the_map(world: World) -> None:
    made = await filled(world)
    change = asyncio.create_task(made.vdi.trim(0, made.blocks * BLOCK_BYTES))
    await first_step(made.vdi, change)
    assert not made.vdi.write_now(0, memoryview(bytes(BLOCK_BYTES)))
    made._zero(0, made.blocks)
    await made.write(29 * REGION_BLOCKS)
    assert change.done()
    await made.check()


async def test_collection_in_between_revives_nothing(world: World) -> None:
    made = await filled(world)
    collector = made.vdi.collector
    made.vdi.disk.writer.finish_segment()
    await made.vdi.flush()
    await made.vdi.disk.writer.sealed_below(made.vdi.disk.writer.next_number)
    change = asyncio.create_task(made.vdi.trim(0, made.blocks * BLOCK_BYTES))
    await first_step(made.vdi, change)
    collector._pressed += 1
    collector.poke()
    await change
    await turns(300)
    collector._pressed -= 1
    made._zero(0, made.blocks)
    await made.check()
    await made.vdi.flush()
    await made.reopen(clean=False)
    await made.check()


@pytest.mark.parametrize("first_byte", [0, 5 * BLOCK_BYTES, 100])
async def test_the_largest_disk_is_discarded_as_one_range(
    world: World, first_byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 1,024 operations, one of 16 TiB each, must not make as many passes over the map, nor look at each other."""
    assert world.store is not None
    await world.store.create_vdi("huge", VDI_BYTES_MAX, copies=1, mode="writeback-always")
    vdi = await world.store.open("huge")
    assert isinstance(vdi, Vdi)
    data = memoryview(bytes([7]) * BLOCK_BYTES)
    for offset in (0, 77 * REGION_BYTES, VDI_BYTES_MAX // 2, VDI_BYTES_MAX - BLOCK_BYTES):
        await vdi.write(offset, data)
    ranges: list[tuple[int, int]] = []
    looked_at: list[int] = []
    fill_steps = vdi.disk.map.fill_steps
    missing_edges = vdi.disk.map.missing_edges
    monkeypatch.setattr(blockmap.BlockMap, "fill_steps", lambda _, *args: ranges.append(args[:2]) or fill_steps(*args))
    monkeypatch.setattr(
        blockmap.BlockMap, "missing_edges", lambda _, *args: looked_at.append(1) or missing_edges(*args)
    )
    before = vdi.disk.writer.position
    await vdi.trim(first_byte, VDI_BYTES_MAX - first_byte)
    whole = -(-first_byte // BLOCK_BYTES)
    assert vdi.disk.writer.position - before >= 1024
    assert ranges == [(whole, VDI_BYTES_MAX // BLOCK_BYTES - whole)]
    assert len(looked_at) < 4 * 1100
    assert list(vdi.disk.map.regions) == ([] if first_byte == 0 else [0])

"""Checkpoints of which recovery finds no whole copy, or one in a zone that was away: what may go, what must stay."""

from collections.abc import AsyncIterator

import pytest

from objstore.errors import Corrupt
from objstore.log.checkpoint import checkpoint_name
from objstore.volume import recovery, zones
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World

EXPECTED = (
    "is put out|is out of service|is out since|is back|a map page is lost|can't be (read|collected)|can't be looked"
)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(zones, "RETRY_SECONDS", 3600.0)


@pytest.fixture
async def world(expected_warnings: ExpectedWarnings) -> AsyncIterator[World]:
    expected_warnings.allow(EXPECTED)
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def two_checkpoints(world: World) -> tuple[ModelDisk, int, int, tuple[int, ...]]:
    """A disk of two copies whose newest checkpoint needs the one before, their numbers, and the zones of both."""
    disk = await ModelDisk(world, blocks=4096).create(copies=2)
    for block in range(
        0, disk.blocks, 12
    ):  # pages longer than all else in a checkpoint, so that they stay where they are
        await disk.write(block)
    await disk.vdi.keeper.checkpoint()
    first = disk.vdi.keeper.number
    await disk.write(0, 1)
    await disk.vdi.keeper.checkpoint()
    assert disk.vdi.keeper.needs is not None
    assert first in disk.vdi.keeper.needs
    where = disk.vdi.disk.checkpoint_zones(first)
    assert len(where) == 2
    return disk, first, disk.vdi.keeper.number, where


@pytest.mark.parametrize("checkpoints", [0, 1, 2, 3])
async def test_what_the_map_needs_stays_in_a_zone_that_returns(world: World, checkpoints: int) -> None:
    """The store was opened without the only zone that has an older checkpoint: nothing had listed it."""
    disk, first, _, (only, other) = await two_checkpoints(world)
    await world.kill()
    name = checkpoint_name(LOG, first)
    del world.storages[other].objects[name]
    await world.open(here=[z for z in range(3) if z != only])
    assert world.store is not None
    await disk.open()
    with pytest.raises(Corrupt, match="map pages can't be read"):
        await disk.check()
    for _ in range(checkpoints):
        await disk.vdi.keeper.checkpoint()
    await world.store.zones.add(f"zone{only}")
    await world.store.wait_for_recovery()
    await disk.check()
    assert sum(name in storage.objects for storage in world.storages) == 2
    assert (await world.store.status()).health == "ok"


async def test_a_torn_copy_found_first_does_not_hide_the_whole_one(world: World) -> None:
    disk, first, _, (only, other) = await two_checkpoints(world)
    await world.kill()
    name = checkpoint_name(LOG, first)
    del world.storages[other].objects[name][-1000:]
    await world.open(here=[z for z in range(3) if z != only])
    assert world.store is not None
    await disk.open()
    await world.store.zones.add(f"zone{only}")
    await world.store.wait_for_recovery()
    await disk.check()
    assert world.storages[only].objects[name] == world.storages[other].objects[name]


async def test_a_damaged_checkpoint_that_nobody_needs_goes(world: World) -> None:
    """Its deletion was undone by a power cut, and what came back of it is not whole."""
    disk, first, _, _ = await two_checkpoints(world)
    while first in disk.vdi.keeper.sizes:
        for block in range(5, disk.blocks, 1024):
            await disk.write(block)
        await disk.vdi.keeper.checkpoint()
    await world.stop()
    name = checkpoint_name(LOG, first)
    world.storages[1].objects[name] = bytearray(b"rotten" * 1000)
    await world.open()
    assert world.store is not None
    await disk.open()
    await world.store.wait_for_recovery()
    world.store.recovery.request()
    status = await world.store.wait_for_recovery()
    assert not status.problems
    assert not any(name in storage.objects for storage in world.storages)
    await disk.check()


async def test_a_damaged_checkpoint_that_the_map_needs_is_told(world: World) -> None:
    disk, first, _, where = await two_checkpoints(world)
    await world.store.zones.drain(f"zone{where[1]}")  # type: ignore[union-attr]
    for z in where:
        data = world.storages[z].objects[checkpoint_name(LOG, first)]
        data[len(data) // 2] ^= 1
    world.store.recovery.request()  # type: ignore[union-attr]
    status = await world.store.wait_for_recovery()  # type: ignore[union-attr]
    assert any(f"no zone in service has checkpoint {first} whole" in problem for problem in status.problems)
    number = disk.vdi.keeper.number
    world.store.recovery.request()  # type: ignore[union-attr]
    status = await world.store.wait_for_recovery()  # type: ignore[union-attr]
    assert status.problems
    assert disk.vdi.keeper.number == number, "another one would not help"

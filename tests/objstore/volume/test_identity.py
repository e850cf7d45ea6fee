"""What tells a client that comes back whether it may go on: the same after clean stops, another one after anything that
may have taken acknowledged writes away."""

from collections.abc import AsyncIterator

import pytest

from objstore.units import MIB
from tests.support.stepping import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


def identity(world: World, name: str = "disk") -> str:
    assert world.store is not None
    info = world.store.peek(name)
    assert info is not None
    return info.identity


async def used(world: World) -> str:
    """Write to the disk; its identity, which is the same before it is opened, while it is open, and when it is closed
    again."""
    assert world.store is not None
    before = identity(world)
    vdi = await world.store.open("disk")
    await vdi.write(0, memoryview(b"x" * 4096))
    assert identity(world) == before
    await world.store.close(vdi)
    assert identity(world) == before
    return before


async def test_it_stays_over_clean_stops(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    first = await used(world)
    for _ in range(3):
        await world.stop()
        await world.open()
        assert await used(world) == first


async def test_it_changes_with_every_stop_that_was_not_clean(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    seen = [await used(world)]
    for _ in range(3):
        await world.kill()
        await world.open()
        seen.append(await used(world))
        await world.stop()
        await world.open()
        assert await used(world) == seen[-1], "a clean stop loses nothing, whatever was before"
    assert len(set(seen)) == 4


async def test_a_disk_that_was_closed_when_the_server_died_has_lost_nothing(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    first = await used(world)
    await world.stop()
    await world.open()
    await world.kill()
    await world.open()
    assert await used(world) == first


async def test_force_changes_it(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    first = await used(world)
    await world.stop()
    await world.open(force=True)
    second = await used(world)
    assert second != first
    await world.stop()
    await world.open()
    assert await used(world) == second


async def test_a_rollback_changes_it(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB)
    first = await used(world)
    await world.store.create_snapshot("disk", "before")
    assert identity(world) == first
    await world.store.rollback("disk@before")
    assert await used(world) != first


async def test_where_every_write_is_durable_nothing_can_be_lost(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", MIB, mode="writethrough")
    first = await used(world)
    await world.kill()
    await world.open()
    assert await used(world) == first


async def test_no_two_are_the_same(world: World) -> None:
    assert world.store is not None
    for name in ("disk", "other"):
        await world.store.create_vdi(name, MIB)
        await world.store.create_snapshot(name, "tag")
    names = ["disk", "other", "disk@tag", "other@tag"]
    assert len({identity(world, name) for name in names}) == 4

"""Heads of open VDIs that are written anew once recovery has ended: which zones an opening then waits for."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import Unavailable
from objstore.volume import recovery, zones
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World, executor_of, turns


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("put out|out of service|out since|copies are missing")
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(zones, "RETRY_SECONDS", 3600.0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(5)
    await world.open(create=True)
    yield world
    await world.kill()


async def recovered(world: World) -> None:
    assert world.store is not None
    status = await world.store.wait_for_recovery()
    assert not status.problems
    assert not status.copies_missing


@pytest.mark.parametrize("absent", [[0, 1], [2, 3], [1, 4]])
async def test_a_disk_that_got_more_copies_opens_without_as_many_zones_less_one(
    world: World, absent: list[int]
) -> None:
    """Without a restart in between: what one zone alone could have was copied to the others."""
    disk = await ModelDisk(world).create(copies=1)
    await disk.churn(50)
    await disk.vdi.flush()
    assert world.store is not None
    await world.store.set_copies("disk", 3)
    await recovered(world)
    await disk.churn(50)
    await disk.vdi.flush()
    await world.kill()
    await world.open(here=[z for z in range(5) if z not in absent])
    await disk.open()
    await disk.check()


async def test_zones_that_went_one_after_the_other_are_not_missed_together(world: World) -> None:
    disk = await ModelDisk(world).create(copies=2)
    await disk.churn(50)
    assert world.store is not None
    first, second = disk.vdi.disk.writer.place(0)
    for z in (first, second):
        await world.store.env.put_out(z, ZoneFailed("input/output error"))
        world.store.recovery.request()
        await recovered(world)
        await disk.churn(50)
        await disk.vdi.flush()
    await world.kill()
    await world.open(here=[z for z in range(5) if z not in (first, second)])
    await disk.open()
    await disk.check()


async def test_zones_that_went_together_are_missed(world: World) -> None:
    """Recovery had no copy to make another one from."""
    disk = await ModelDisk(world).create(copies=2)
    await disk.churn(50)
    await disk.vdi.flush()
    assert world.store is not None
    gone = disk.vdi.disk.writer.place(0)
    await world.kill()
    await world.open(here=[z for z in range(5) if z not in gone])
    with pytest.raises(Unavailable, match="what was written last may be on zones that are missing"):
        await disk.open()


async def test_a_head_is_made_from_what_all_before_it_have_left(world: World) -> None:
    """Fewer copies and a new head are asked for at once: the head must know of the fewer copies."""
    disk = await ModelDisk(world).create(copies=1)
    store = world.store
    assert store is not None
    await store.set_copies("disk", 4)
    await recovered(world)
    await store.set_copies("disk", 2)
    await recovered(world)
    heads = store.catalog.state.heads
    assert heads[LOG].copies == 2
    await store.set_copies("disk", 4)
    store.recovery.request()
    async with store.catalog._lock:
        fewer = asyncio.create_task(store.set_copies("disk", 1))
        renewed = asyncio.create_task(store.renew_head(disk.vdi))
        for _ in range(200):
            await asyncio.sleep(0)
    await asyncio.gather(fewer, renewed)
    assert heads[LOG].copies == 1


async def test_a_segment_that_was_being_made_when_copies_were_raised_is_not_used(world: World) -> None:
    """It has fewer zones than are needed from then on: nothing in it would ever count as durable."""
    disk = await ModelDisk(world).create(copies=2)
    await disk.write(0)
    await disk.vdi.flush()
    assert world.store is not None
    writer = disk.vdi.disk.writer
    writer.forget_prepared()
    executor = executor_of(world.store.env)
    one = writer.place(0)[0]
    executor.hold(one)
    writer._prepare(0)
    await turns()
    raised = asyncio.create_task(disk.vdi.set_copies(5, 4))
    await turns(200)
    changes = asyncio.create_task(disk.churn(5))
    await turns()
    executor.release(one)
    await raised
    await changes
    flushed = asyncio.create_task(disk.vdi.flush())
    await turns(2000)
    assert flushed.done()
    await disk.check()

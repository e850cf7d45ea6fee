"""The trash: deleted VDIs that are kept, brought back or purged, what they keep, and what a full store says."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.store import Store
from objstore.volume.vdi import Vdi
from tests.objstore.check.stores import Checked, faults
from tests.objstore.volume.test_snapshots import attach, churn, make, put, store_of, whole
from tests.support.stepping import SMALL_SEGMENTS, World, turns

DAY = 86400.0
SIZE = 2 * MIB


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3, settings=dataclasses.replace(SMALL_SEGMENTS, trash_days=7.0))
    await world.open(create=True)
    yield world
    if world.store is not None:
        await background(world.store)  # what is being closed would go on under `kill`
    await world.kill()


async def filled(world: World, name: str, seed: int) -> bytes:
    """A VDI with random contents, which nobody has open any more."""
    vdi = await make(world, name, size=SIZE)
    model = bytearray(SIZE)
    await churn(vdi, model, random.Random(seed), 40)
    await store_of(world).close(vdi)
    return bytes(model)


async def background(store: Store) -> None:
    """Whatever the store has begun by itself ends."""
    while store._work or store._purging or store._closing:
        await asyncio.wait([*store._work, *store._purging, *store._closing.values()])
    await turns()


def log_files(world: World, log: int) -> int:
    return sum(1 for zone in range(3) for _ in world.names(zone, f"log/{log:06x}/"))


async def fill(vdi: Vdi) -> None:
    for offset in range(0, SIZE, MIB // 4):
        await put(vdi, offset, b"x" * (MIB // 4))


async def names(store: Store) -> list[str]:
    return [entry.name for entry in await store.trash()]


@pytest.mark.parametrize("end", ["none", "stop", "kill"])
async def test_what_is_deleted_comes_back_whole(world: World, end: str) -> None:
    contents = await filled(world, "disk", 1)
    store = store_of(world)
    await store.attributes.set("disk", "key", b"value")
    await store.delete_vdi("disk")
    assert (store.names(), await names(store)) == ([], ["disk"])
    with pytest.raises(NotFound):
        await store.open("disk")
    if end != "none":
        await background(store)
        await (world.stop() if end == "stop" else world.kill())
        assert faults(Checked(world).check()) == []
        store = await world.open()
    (entry,) = await store.trash()
    assert entry.kept_until == entry.deleted + 7 * DAY
    assert entry.file_bytes > len(contents) // 4
    back = await store.undelete("disk")
    assert (back.name, back.size_bytes) == ("disk", SIZE)
    assert await names(store) == []
    assert store.attributes.get("disk", "key") == b"value"
    assert await whole(world, "disk") == contents
    vdi = await attach(world)
    await put(vdi, 0, b"x" * BLOCK_BYTES)
    await vdi.flush()
    await store.close(vdi)
    await world.stop()
    assert faults(Checked(world).check()) == []


async def test_its_name_is_free_at_once_and_those_of_one_name_are_told_apart(world: World) -> None:
    first = await filled(world, "disk", 1)
    store = store_of(world)
    number = store.vdi("disk").vdi_id
    await store.delete_vdi("disk")
    second = await filled(world, "disk", 2)
    with pytest.raises(Exists):
        await store.undelete("disk")
    world.clock.now += 1.0
    await store.delete_vdi("disk")
    third = await filled(world, "disk", 3)
    assert await names(store) == ["disk", "disk"]
    await store.undelete("disk", "newest")
    await store.undelete("disk", "oldest", vdi_id=number)
    for name, contents in (("oldest", first), ("newest", second), ("disk", third)):
        assert await whole(world, name) == contents
    with pytest.raises(NotFound, match="trash"):
        await store.undelete("disk")
    with pytest.raises(NotFound, match="number 77"):
        await store.purge("newest", vdi_id=77)
    await store.delete_vdi("newest")
    with pytest.raises(InvalidRequest):
        await store.undelete("newest", "a/b")


async def test_purging_gives_the_space_back(world: World) -> None:
    await filled(world, "disk", 1)
    store = store_of(world)
    log = store.vdi("disk").log
    await store.delete_vdi("disk")
    await background(store)
    assert log_files(world, log)
    await store.purge("disk")
    await background(store)
    assert await names(store) == []
    assert log_files(world, log) == 0
    with pytest.raises(NotFound):
        await store.undelete("disk")


async def test_it_goes_when_its_time_is_over(world: World) -> None:
    await filled(world, "early", 1)
    await filled(world, "late", 2)
    store = store_of(world)
    log = store.vdi("early").log
    await store.delete_vdi("early")
    world.clock.now += 3 * DAY
    await store.delete_vdi("late")
    world.clock.now += 4 * DAY
    store._look_at_trash()
    await background(store)
    assert await names(store) == ["late"]
    assert log_files(world, log) == 0
    await world.stop()
    world.clock.now += 4 * DAY
    store = await world.open()
    await background(store)
    assert await names(store) == []
    await world.stop()
    assert faults(Checked(world).check()) == []


async def test_snapshots_and_clones_of_what_is_in_the_trash(world: World) -> None:
    contents = await filled(world, "disk", 1)
    store = store_of(world)
    await store.create_snapshot("disk", "s")
    await store.clone("disk@s", "clone")
    await store.delete_vdi("clone")
    with pytest.raises(Busy, match=r"clone \(in the trash\)"):
        await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    assert store.snapshot("disk@s").vdi_deleted
    assert await whole(world, "disk@s") == contents
    await background(store)
    await world.kill()
    store = await world.open()
    await background(store)
    await store.undelete("clone")
    assert await whole(world, "clone") == contents
    await store.undelete("disk")
    assert await whole(world, "disk") == contents
    await store.delete_vdi("clone")
    await store.purge("clone")
    await store.delete_snapshot("disk@s")
    await background(store)
    # Its snapshot keeps the log of one that is purged, as of one that is deleted.
    await store.create_snapshot("disk", "t")
    await store.delete_vdi("disk")
    await store.purge("disk")
    await background(store)
    assert await whole(world, "disk@t") == contents
    await store.delete_snapshot("disk@t")
    await background(store)
    await world.stop()
    assert faults(Checked(world).check()) == []
    assert [name for zone in range(3) for name in world.names(zone, "log/") if not name.startswith("log/000000/")] == []


async def test_a_name_that_its_snapshots_can_not_take(world: World) -> None:
    await filled(world, "disk", 1)
    await filled(world, "other", 2)
    store = store_of(world)
    for name in ("disk", "other"):
        await store.create_snapshot(name, "s")
        await store.delete_vdi(name)
    with pytest.raises(Exists, match="other@s"):
        await store.undelete("disk", "other")
    assert (await store.undelete("disk", "third")).name == "third"
    assert store.snapshot("third@s").vdi_deleted is False


async def test_what_is_purged_can_not_come_back_meanwhile(world: World) -> None:
    await filled(world, "disk", 1)
    store = store_of(world)
    await store.delete_vdi("disk")
    results = await asyncio.gather(store.purge("disk"), store.undelete("disk"), return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], NotFound)
    assert store.names() == []
    await background(store)


async def test_who_comes_while_it_is_deleted_does_not_get_it(world: World) -> None:
    await filled(world, "disk", 1)
    store = store_of(world)
    results = await asyncio.gather(store.delete_vdi("disk"), store.open("disk"), return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], NotFound)
    assert all(not vdi.attached for vdi in store.open_vdis())
    assert await names(store) == ["disk"]
    await background(store)


async def test_a_full_store_names_the_trash(world: World) -> None:
    await filled(world, "disk", 1)
    store = store_of(world)
    with pytest.raises(NoSpace) as first:
        await store.create_vdi("large", 1 << 40, prealloc=True)
    assert "trash" not in str(first.value)
    await store.delete_vdi("disk")
    with pytest.raises(NoSpace, match="1 deleted VDI is in the trash"):
        await store.create_vdi("large", 1 << 40, prealloc=True)
    vdi = await make(world, "small", size=SIZE)
    capacities = [storage.capacity_bytes for storage in world.storages]
    for storage in world.storages:
        storage.capacity_bytes = storage.used_bytes() + MIB
    with pytest.raises(NoSpace, match="sheepfold trash"):
        await fill(vdi)
    for storage, capacity in zip(world.storages, capacities, strict=True):
        storage.capacity_bytes = capacity


async def test_without_a_trash_deleting_is_for_good(world: World) -> None:
    await filled(world, "disk", 1)
    store = store_of(world)
    await store.delete_vdi("disk")
    await world.stop()
    world.settings = SMALL_SEGMENTS
    store = await world.open()
    await filled(world, "other", 2)
    await store.delete_vdi("other")
    assert await names(store) == ["disk"], "what was put there before stays"
    with pytest.raises(NotFound):
        await store.undelete("other")

"""Imports: a crash at any moment leaves the VDI as it was, or half of an import that nobody can open, or all of it."""

import random

import pytest

from objstore.errors import Busy, Exists, InvalidRequest, NotFound, Suspended
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.imports import Import
from objstore.volume.store import Store
from tests.objstore.check.stores import Checked, faults
from tests.objstore.volume.test_changed import Model, scribble
from tests.objstore.volume.test_snapshots import attach, make, put, store_of, whole, world
from tests.support.stepping import World

__all__ = ["world"]

SIZE = 6 * MIB


async def importing(store: Store, what: Import, data: bytes, name: str = "disk") -> None:
    """All of an import: `data` at the beginning."""
    volume = await store.begin_import(name, what)
    try:
        await volume.write(0, memoryview(data))
        await store.finish_import(volume, "t")
    finally:
        await store.close(volume)


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("clean", [True, False])
async def test_a_crash_at_each_step(world: World, step: int, clean: bool) -> None:
    model = Model()
    vdi = await make(world, size=SIZE)
    await scribble(vdi, model, random.Random(step), 60)
    store = store_of(world)
    await store.close(vdi)
    base = (await store.create_snapshot("disk", "s")).snapshot.identity
    what = Import(base, "elsewhere:7", SIZE + MIB)
    data = b"new!" * (MIB // 4)
    after = bytearray(model.data) + bytes(MIB)
    after[: len(data)] = data
    if step:
        volume = await store.begin_import("disk", what)
        if step > 1:
            await volume.write(0, memoryview(data[: MIB // 2 if step == 2 else MIB]))
        if step > 2:
            await volume.flush()
        if step > 3:
            await store.finish_import(volume, "t")
        await store.close(volume)
    await (world.stop() if clean else world.kill())
    await world.open()
    store = store_of(world)
    assert await whole(world, "disk@s") == model.data
    if step == 0:
        assert await whole(world, "disk") == model.data
    elif step < 4:
        assert store.vdi("disk").importing == f"{base}..elsewhere:7"
        for refused in (
            lambda: store.open("disk"),
            lambda: store.create_snapshot("disk"),
            lambda: store.clone("disk", "x"),
        ):
            with pytest.raises(Suspended, match="half of what is imported"):
                await refused()
        with pytest.raises(Busy, match="half of what another stream"):
            await store.begin_import("disk", what._replace(identity="elsewhere:8"))
        await importing(store, what, data)
    if step:
        assert await whole(world, "disk") == after
        assert await whole(world, "disk@t") == after
        assert store.snapshot("disk@t").identity == "elsewhere:7"
        assert not store.vdi("disk").importing
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_a_disk_that_is_made_by_an_import(world: World) -> None:
    store = store_of(world)
    what = Import("", "elsewhere:1", SIZE, copies=9, mode="unsafe")
    volume = await store.begin_import("disk", what)
    with pytest.raises(Busy):
        await store.begin_import("disk", what)
    await store.close(volume)
    await world.kill()
    await world.open()
    store = store_of(world)
    assert (store.vdi("disk").copies, store.vdi("disk").mode) == (3, "unsafe")
    await importing(store, what, b"x" * BLOCK_BYTES)
    assert await whole(world, "disk@t") == b"x" * BLOCK_BYTES + bytes(SIZE - BLOCK_BYTES)
    with pytest.raises(Exists, match="there is a VDI 'disk' already"):
        await store.begin_import("disk", what)
    await importing(store, what, b"x", "other")
    assert store.vdi("other").importing == ""
    await importing(store, what._replace(copies=-5), b"x", "negative")
    assert store.vdi("negative").copies == 1
    await store.rename("other", "third")
    await store.delete_vdi("third")
    with pytest.raises(NotFound):
        await store.begin_import("none", what._replace(base="elsewhere:1"))


async def test_nothing_to_finish_and_nothing_to_begin(world: World) -> None:
    vdi = await make(world, size=SIZE)
    store = store_of(world)
    base = (await store.create_snapshot("disk", "s")).snapshot.identity
    with pytest.raises(InvalidRequest, match="nothing is imported"):
        await store.finish_import(vdi, "t")
    with pytest.raises(InvalidRequest, match="nothing is imported"):
        await store.finish_import(await store.open("disk@s"), "t")
    for what in (Import(base, "", SIZE), Import(base, "e:1", 0), Import(base, "e:1", 1 << 62)):
        with pytest.raises(InvalidRequest, match="impossible"):
            await store.begin_import("disk", what)
    with pytest.raises(Busy, match="attached"):
        await store.begin_import("disk", Import(base, "e:1", SIZE))
    await put(vdi, 0, b"x" * BLOCK_BYTES)
    await store.close(vdi)
    with pytest.raises(InvalidRequest, match="has changed since disk@s"):
        await store.begin_import("disk", Import(base, "e:1", SIZE))
    assert not store.vdi("disk").importing
    await store.close(await attach(world))


async def test_collection_does_not_make_a_disk_another_one(world: World) -> None:
    """What a disk is compared with before an import is what it holds, not where."""
    vdi = await make(world, size=SIZE)
    rng, model = random.Random(9), Model()
    for _ in range(4):
        await scribble(vdi, model, rng, 150)
        await vdi.give_back()
    store = store_of(world)
    base = (await store.create_snapshot("disk", "s")).snapshot.identity
    await vdi.give_back()
    await store.close(vdi)
    await world.stop()
    await world.open()
    await importing(store_of(world), Import(base, "e:1", SIZE), b"x" * BLOCK_BYTES)
    model.data[:BLOCK_BYTES] = b"x" * BLOCK_BYTES
    assert await whole(world, "disk") == model.data

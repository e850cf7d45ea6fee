"""Renaming, growing and rolling back VDIs through the store."""

import asyncio
import contextlib
import random

import pytest

from objstore.access.local import LocalConnection
from objstore.errors import Busy, Exists, Fenced, InvalidRequest, NotFound, StoreError, Suspended
from objstore.units import BLOCK_BYTES, MIB, VDI_BYTES_MAX
from tests.objstore.check.stores import Checked, faults
from tests.objstore.volume.test_snapshots import (
    attach,
    churn,
    get,
    make,
    pattern,
    put,
    segments_of,
    store_of,
    whole,
    world,
)
from tests.support.stepping import World, turns

__all__ = ["world"]

SIZE = 2 * MIB


async def clean(world: World) -> None:
    """The check finds nothing wrong, and the store goes on."""
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_scenario_2_rolled_back_to_and_fro(world: World) -> None:
    """Two snapshots, rolled back to one, the other, the first: contents follow, and what was there before each can be
    had again."""
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    for n in (1, 2):
        await put(vdi, 0, pattern(n, SIZE))
        await store.create_snapshot("disk", f"s{n}")
    await put(vdi, 0, pattern(3, SIZE))
    await store.close(vdi)
    contents = {"disk@s1": pattern(1, SIZE), "disk@s2": pattern(2, SIZE)}
    now = pattern(3, SIZE)
    for n in (1, 2, 1):
        undo = await store.rollback(f"disk@s{n}")
        contents[undo.name] = now
        vdi = await attach(world)
        assert await get(vdi, 0, SIZE) == pattern(n, SIZE)
        await put(vdi, n * 4096, pattern(10 + n, 65536))
        now = await get(vdi, 0, SIZE)
        await store.close(vdi)
        for name, content in contents.items():
            assert await whole(world, name) == content
        await vdi.flush()
        await world.kill()
        store = await world.open()
        assert await whole(world, "disk") == now
    assert store.names() == ["disk"]
    assert len(store.snapshots("disk")) == 5
    await clean(world)
    store = store_of(world)
    undo = await store.rollback("disk@3")  # what was there before the first time
    assert await whole(world, "disk") == pattern(3, SIZE)
    await store.delete_vdi("disk")
    for snapshot in reversed(store.snapshots("disk")):
        await store.delete_snapshot(snapshot.name)
    await segments_of(world, 1)
    assert not store.catalog.state.vdis
    assert not [name for zone in range(3) for name in world.names(zone, "log/") if "log/000000" not in name]


async def test_scenario_3_what_is_no_snapshot_changes_nothing(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    for name in ("disk", "disk@t", "disk@2", "other@s"):
        with pytest.raises(NotFound):
            await store.rollback(name)
    with pytest.raises(Busy, match="attached"):
        await store.rollback("disk@s")
    assert await get(vdi, 0, SIZE) == pattern(2, SIZE)
    assert len(store.snapshots()) == 1
    await store.close(vdi)
    await store.delete_vdi("disk")
    with pytest.raises(NotFound):
        await store.rollback("disk@s")


async def test_scenario_4_a_rollback_cut_anywhere_is_done_or_not(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    await vdi.flush()
    await store.close(vdi)
    now, seen = pattern(2, SIZE), set()
    for step in range(0, 120, 5):
        store = store_of(world)
        count = len(store.snapshots())
        task = asyncio.create_task(store.rollback("disk@s"))
        await turns(step)
        await world.kill()
        with contextlib.suppress(StoreError, asyncio.CancelledError):
            await task
        store = await world.open()
        assert store.names() == ["disk"]
        shown = await whole(world, "disk")
        done = len(store.snapshots()) > count
        seen.add(done)
        assert shown == (pattern(1, SIZE) if done else now)
        if done:
            assert await whole(world, store.snapshots()[-1].name) == now
        vdi = await attach(world)
        now = pattern(100 + step, SIZE)
        await put(vdi, 0, now)
        await vdi.flush()
        await store.close(vdi)
        assert await whole(world, "disk@s") == pattern(1, SIZE)
    assert seen == {True, False}
    await clean(world)


async def test_a_client_that_comes_during_a_rollback_gets_the_disk_of_then(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    await store.close(vdi)
    for step in range(0, 60, 3):
        task = asyncio.create_task(store.rollback("disk@s"))
        await turns(step)
        vdi = await attach(world)
        with contextlib.suppress(Busy):
            await task
        assert await get(vdi, 0, SIZE) == (pattern(2, SIZE) if task.exception() else pattern(1, SIZE))
        assert vdi.vdi_id == 1
        await put(vdi, 0, pattern(2, SIZE))
        await store.close(vdi)


async def test_a_forced_rollback_closes_who_is_attached_and_keeps_everybody_out(world: World) -> None:
    store = store_of(world)
    holder = LocalConnection(store)
    await (await make(world, size=SIZE)).flush()
    vdi = store.open_vdis()[0]
    await store.close(vdi)
    handle = await holder.open("disk")
    await handle.write(0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await handle.write(0, pattern(2, SIZE), writeback=True)
    raw = await store.open("disk")  # by somebody whom nobody can ask to close it
    with pytest.raises(Busy, match="attached by 1"):
        await store.rollback("disk@s", force=True)
    with pytest.raises(Fenced, match="rolled back to disk@s"):
        await handle.write(0, b"stale")
    assert await get(raw, 0, SIZE) == pattern(2, SIZE)
    assert not store.vdi("disk").suspended
    await store.close(raw)
    handle = await holder.open("disk")
    undo = await store.rollback("disk@s", force=True)
    for call in (handle.write(0, b"stale"), handle.read(0, 5), handle.flush(), handle.discard(0, 4096)):
        with pytest.raises(Fenced, match="rolled back to disk@s"):
            await call
    await world.kill()
    store = await world.open()
    holder = LocalConnection(store)
    for _ in range(2):
        info = store.peek("disk")
        assert info is not None
        assert "rolled back to disk@s" in info.refused
        with pytest.raises(Suspended, match="sheepfold vdi resume disk"):
            await holder.open("disk")
        await clean(world)
        store = store_of(world)
        holder = LocalConnection(store)
    assert store.vdi("disk").suspended == "it was rolled back to disk@s"
    assert await whole(world, undo.name) == pattern(2, SIZE)
    assert not (await store.clone("disk", "copy")).suspended
    assert await whole(world, "copy") == pattern(1, SIZE)
    assert (await store.rename("disk", "new")).suspended
    for _ in range(2):
        assert not (await store.resume("new")).suspended
    assert await whole(world, "new") == pattern(1, SIZE)
    with pytest.raises(NotFound):
        await store.resume("disk")
    await clean(world)
    assert await whole(world, "new") == pattern(1, SIZE)


async def test_a_forced_rollback_cut_anywhere_is_done_and_closed_or_neither(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    await vdi.flush()
    await store.close(vdi)
    seen = set()
    for step in range(0, 120, 7):
        store = store_of(world)
        await LocalConnection(store).open("disk")
        task = asyncio.create_task(store.rollback("disk@s", force=True))
        await turns(step)
        await world.kill()
        with contextlib.suppress(StoreError, asyncio.CancelledError):
            await task
        store = await world.open()
        done = bool(store.vdi("disk").suspended)
        seen.add(done)
        await store.resume("disk")
        assert await whole(world, "disk") == pattern(1 if done else 2, SIZE)
        if done:
            await store.rollback(store.snapshots()[-1].name)
    assert seen == {True, False}
    await clean(world)


async def test_a_write_that_waits_when_its_handle_is_closed_does_not_happen(world: World) -> None:
    """It waits for its turn in the log behind a request that can't go on; then the VDI is rolled back."""
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await store.close(vdi)
    handle = await LocalConnection(store).open("disk")
    async with vdi._turn:
        write = asyncio.create_task(handle.write(0, b"stale"))
        await turns(3)
        rollback = asyncio.create_task(store.rollback("disk@s", force=True))
        await turns(20)
        assert not rollback.done()
    with pytest.raises(InvalidRequest, match="gone"):
        await write
    undo = await rollback
    assert await whole(world, undo.name) == pattern(1, SIZE)
    await store.resume("disk")
    assert await whole(world, "disk") == pattern(1, SIZE)


async def test_the_snapshot_that_was_gone_back_to_may_be_deleted(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    await store.close(vdi)
    undo = await store.rollback("disk@s")
    await store.delete_snapshot("disk@s")
    with pytest.raises(NotFound):
        await store.open("disk@s")
    assert [snapshot.name for snapshot in store.snapshots()] == [undo.name]
    assert await whole(world, "disk") == pattern(1, SIZE)
    await clean(world)
    store = store_of(world)
    assert await whole(world, "disk") == pattern(1, SIZE)
    await store.create_snapshot("disk", "s")
    await store.delete_vdi("disk")
    for snapshot in store.snapshots("disk"):
        await store.delete_snapshot(snapshot.name)
    await segments_of(world, 1)
    assert not store.catalog.state.vdis
    assert not store.catalog.state.snapshots


async def test_a_name_changes_and_everything_goes_with_it(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await store.clone("disk@s", "clone")
    renamed = await store.rename("disk", "new")
    assert (renamed.name, renamed.attached) == ("new", 1)
    await put(vdi, 0, pattern(2, SIZE))
    assert vdi.name == "new"
    assert [snapshot.name for snapshot in store.snapshots()] == ["new@s"]
    assert store.vdi("clone").parent == "new@s"
    with pytest.raises(NotFound):
        await store.open("disk")
    await make(world, size=MIB)
    with pytest.raises(Exists):
        await store.rename("new", "disk")
    with pytest.raises(NotFound):
        await store.rename("nobody", "somebody")
    with pytest.raises(InvalidRequest):
        await store.rename("new", "a@b")
    await clean(world)
    assert store_of(world).names() == ["clone", "disk", "new"]
    assert await whole(world, "new") == pattern(2, SIZE)
    assert await whole(world, "new@s") == await whole(world, "clone") == pattern(1, SIZE)


async def test_a_name_under_which_snapshots_are_left_is_not_taken(world: World) -> None:
    store = store_of(world)
    for name in ("disk", "other"):
        vdi = await make(world, name, size=MIB)
        await store.create_snapshot(name, "s")
        await store.close(vdi)
    await store.delete_vdi("disk")
    with pytest.raises(Exists, match="disk@s"):
        await store.rename("other", "disk")
    await store.delete_snapshot("disk@s")
    assert (await store.rename("other", "disk")).name == "disk"


@pytest.mark.parametrize("restarted", [True, False])
async def test_scenario_21_a_disk_grows_and_what_is_new_is_zeros(world: World, restarted: bool) -> None:
    size = MIB + 1000
    store = store_of(world)
    vdi = await make(world, size=size)
    rng = random.Random(3)
    model = bytearray(size)
    await churn(vdi, model, rng, 20)
    await put(vdi, size - 1000, b"e" * 1000)
    model[size - 1000 :] = b"e" * 1000
    await store.create_snapshot("disk", "s")
    assert (await store.resize("disk", 3 * MIB)).size_bytes == 3 * MIB
    if restarted:
        await world.kill()
        store = await world.open()
        vdi = await attach(world)
    assert vdi.size_bytes == 3 * MIB
    assert await get(vdi, 0, 3 * MIB) == bytes(model) + bytes(3 * MIB - size)
    await put(vdi, 3 * MIB - BLOCK_BYTES, b"n" * BLOCK_BYTES)
    await vdi.flush()
    for bad in (size, 0, VDI_BYTES_MAX + 1):
        with pytest.raises(InvalidRequest):
            await store.resize("disk", bad)
    with pytest.raises(NotFound):
        await store.resize("nobody", MIB)
    shown = await store.open("disk@s")
    assert shown.size_bytes == size
    assert await get(shown, 0, size) == model
    await store.close(shown)
    await clean(world)
    store = store_of(world)
    vdi = await attach(world)
    assert (await get(vdi, 0, 3 * MIB))[-BLOCK_BYTES:] == b"n" * BLOCK_BYTES
    await store.close(vdi)
    await store.rollback("disk@s")
    assert store.vdi("disk").size_bytes == size
    assert await whole(world, "disk") == model

"""Renaming, growing and rolling back VDIs through the store."""

import asyncio
import contextlib
import random

import pytest

from objstore.access.local import LocalConnection
from objstore.errors import Busy, Exists, Fenced, InvalidRequest, NoSpace, NotFound, StoreError, Suspended
from objstore.units import BLOCK_BYTES, MIB, VDI_BYTES_MAX
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
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
    for bad in (size, 0, VDI_BYTES_MAX + 1):  # smaller: only by force
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


def data(n: int, length: int) -> bytes:
    """As `pattern`, for sizes that are no whole blocks."""
    return pattern(n, length + BLOCK_BYTES)[:length]


async def grown_again(world: World, size: int) -> bytes:
    """What the disk shows after it has become that large."""
    store = store_of(world)
    await store.resume("disk")
    await store.resize("disk", size)
    return await whole(world, "disk")


async def test_scenario_21_a_disk_that_was_made_smaller_grows_with_zeros(world: World) -> None:
    size, small = 3 * MIB + 700, MIB + 1234
    store = store_of(world)
    handle = await LocalConnection(store).open((await make(world, size=size)).name)
    await store.close(store.open_vdis()[0])
    await handle.write(0, data(1, size))
    await store.create_snapshot("disk", "s")
    await handle.write(0, data(2, size), writeback=True)
    with pytest.raises(InvalidRequest, match="only by force"):
        await store.resize("disk", small)
    with pytest.raises(InvalidRequest):
        await store.resize("disk", 0, force=True)
    assert (await store.resize("disk", small, force=True)).size_bytes == small
    with pytest.raises(Fenced, match="made smaller"):
        await handle.write(0, b"stale")
    with pytest.raises(Suspended, match="made smaller"):
        await store.open("disk")
    await clean(world)
    store = store_of(world)
    assert "made smaller" in store.vdi("disk").suspended
    assert await whole(world, "disk@s") == data(1, size)
    await store.create_snapshot("disk", "t")
    assert await whole(world, "disk@t") == data(2, size)[:small]
    await store.clone("disk@t", "clone")
    await store.resize("clone", size)
    expected = data(2, size)[:small] + bytes(size - small)
    assert await whole(world, "clone") == expected
    assert await grown_again(world, size) == expected
    await store.rollback("disk@s")
    assert await whole(world, "disk") == data(1, size)
    await store.rollback("disk@t")
    assert await grown_again(world, size) == expected
    await clean(world)


@pytest.mark.parametrize("small", [MIB + 1234, MIB])
async def test_a_shrink_cut_anywhere_is_done_or_not_and_shows_no_old_bytes(world: World, small: int) -> None:
    size = 2 * MIB + 700
    store = store_of(world)
    vdi = await make(world, size=size)
    await store.close(vdi)
    seen = set()
    for step in range(0, 80, 4):
        store = store_of(world)
        vdi = await attach(world)
        await put(vdi, 0, data(step, size))
        await vdi.flush()
        await store.close(vdi)
        task = asyncio.create_task(store.resize("disk", small, force=True))
        await turns(step)
        await world.kill()
        with contextlib.suppress(StoreError, asyncio.CancelledError):
            await task
        assert not faults(Checked(world).check())
        store = await world.open()
        done = store.vdi("disk").size_bytes == small
        seen.add(done)
        assert bool(store.vdi("disk").suspended) == done
        if step % 3 == 0:  # the snapshot's map has nothing behind its end either
            await store.create_snapshot("disk", f"s{step}")
            await store.clone(f"disk@s{step}", f"clone{step}")
            await store.resize(f"clone{step}", size)
            kept = small if done else size
            assert await whole(world, f"clone{step}") == data(step, size)[:kept] + bytes(size - kept)
        if done:
            assert await grown_again(world, size) == data(step, size)[:small] + bytes(size - small)
        else:
            assert await whole(world, "disk") == data(step, size)
    assert seen == {True, False}
    await clean(world)


async def test_what_is_behind_the_end_may_have_no_place_to_be_discarded_now(
    world: World, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """The record counts, the rest comes later: until then nobody grows the disk or takes a snapshot of it."""
    expected_warnings.allow("discarded later")
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, data(1, SIZE))
    await store.close(vdi)

    async def full(self: Vdi) -> None:
        raise NoSpace("full")

    with monkeypatch.context() as patched:
        patched.setattr(Vdi, "clear_behind", full)
        await store.resize("disk", MIB - 1, force=True)
        for change in (store.resize("disk", SIZE), store.create_snapshot("disk"), store.clone("disk", "c")):
            with pytest.raises(NoSpace):
                await change
        with pytest.raises(NoSpace):
            await store.resize("disk", BLOCK_BYTES, force=True)
    assert not faults(Checked(world).check())
    assert await grown_again(world, SIZE) == data(1, SIZE)[: MIB - 1] + bytes(SIZE - MIB + 1)
    await clean(world)


@pytest.mark.parametrize("stopped", [True, False])
async def test_the_check_sees_what_is_left_behind_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, data(1, SIZE))
    await vdi.flush()
    await store.close(vdi)

    async def forgets(self: Vdi) -> None:
        pass

    monkeypatch.setattr(Vdi, "clear_behind", forgets)
    await store.resize("disk", MIB, force=True)
    await (world.stop() if stopped else world.kill())
    assert "behind the end" in str(faults(Checked(world).check()))


async def test_disks_grow_and_shrink_at_once(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, data(1, SIZE))
    await vdi.flush()
    await store.close(vdi)
    sizes = [MIB, SIZE, BLOCK_BYTES, 3 * MIB, MIB // 2, SIZE]
    done = await asyncio.gather(
        *(store.resize("disk", size, force=True) for size in sizes),
        *(store.create_snapshot("disk") for _ in range(2)),
        return_exceptions=True,
    )
    assert all(not isinstance(one, BaseException) or isinstance(one, Busy) for one in done)
    least = min(size for size, one in zip(sizes, done, strict=False) if not isinstance(one, BaseException))
    shown = await grown_again(world, 4 * MIB)
    assert shown == data(1, SIZE)[:least] + bytes(4 * MIB - least)
    await clean(world)

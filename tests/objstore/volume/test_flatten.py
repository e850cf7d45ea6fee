"""Flattening: clones that need nobody any more, whenever it is cut off and whoever uses them meanwhile."""

import asyncio
import contextlib
import random

import pytest

from objstore.errors import Busy, InvalidRequest, NotFound, StoreError, Unavailable
from objstore.format.catalog import Entry, VdiEntry
from objstore.log.root import own
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.status import JobStatus
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

SIZE = 6 * MIB


async def flattened(world: World, name: str) -> JobStatus:
    store = store_of(world)
    return await store.jobs.wait((await store.flatten(name)).job_id)


async def prepared(world: World, *, size: int = SIZE) -> bytearray:
    """A disk of data, reserved zeros and holes, its snapshot `disk@s` and `clone` of that, with something of its own;
    what the clone shows."""
    vdi = await make(world, size=size)
    model = bytearray(size)
    await churn(vdi, model, random.Random(5), 60)
    await vdi.zero(size // 2, MIB, no_hole=True)
    model[size // 2 : size // 2 + MIB] = bytes(MIB)
    await vdi.flush()
    store = store_of(world)
    await store.create_snapshot("disk", "s")
    await store.close(vdi)
    await store.clone("disk@s", "clone")
    clone = await attach(world, "clone")
    await churn(clone, model, random.Random(6), 10)
    await clone.flush()
    await store.close(clone)
    return model


async def clean(world: World) -> None:
    """The check finds nothing wrong, and the store goes on."""
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_a_flattened_clone_needs_nobody_and_its_clients_stay(world: World) -> None:
    model = await prepared(world)
    store = store_of(world)
    clone = await attach(world, "clone")
    kinds = [(e.hole, e.zero) for e in await clone.extents(0, SIZE)]
    with pytest.raises(Busy, match="clone"):
        await store.delete_snapshot("disk@s")
    done = await flattened(world, "clone")
    assert (done.state, done.kind, done.bytes_done, done.message) == ("done", "flatten", SIZE, "")
    assert store.vdi("clone").parent == ""
    assert [(e.hole, e.zero) for e in await clone.extents(0, SIZE)] == kinds
    assert own(clone.keeper.root.rows).all()
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await segments_of(world, 1)
    assert not [name for zone in range(3) for name in world.names(zone, "log/000001")]
    assert await get(clone, 0, SIZE) == model
    await churn(clone, model, random.Random(7), 40)
    await clone.flush()
    assert await get(clone, 0, SIZE) == model
    await world.kill()
    assert not faults(Checked(world).check())
    await world.open()
    assert await whole(world, "clone") == model
    await clean(world)
    assert await whole(world, "clone") == model


async def test_clients_write_while_it_is_flattened(world: World) -> None:
    model = await prepared(world)
    store = store_of(world)
    clone = await attach(world, "clone")
    job = await store.flatten("clone")
    rng = random.Random(9)
    while store.jobs.get(job.job_id).state == "running":
        await churn(clone, model, rng, 3)
        await turns(1)
    assert store.jobs.get(job.job_id).state == "done"
    assert await get(clone, 0, SIZE) == model
    await clone.flush()
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await world.kill()
    await world.open()
    assert await whole(world, "clone") == model
    await clean(world)


async def test_a_write_between_looking_and_copying_is_kept(world: World) -> None:
    model = await prepared(world)
    clone = await attach(world, "clone")
    read = clone.disk.read
    times = 0

    async def read_and_write(first: int, count: int, into: memoryview) -> int:
        nonlocal times
        zeros = await read(first, count, into)
        times += 1
        if times <= 3:
            await put(clone, first * BLOCK_BYTES, b"n" * BLOCK_BYTES)
            model[first * BLOCK_BYTES : (first + 1) * BLOCK_BYTES] = b"n" * BLOCK_BYTES
        return zeros

    clone.disk.read = read_and_write  # type: ignore[method-assign]
    assert (await flattened(world, "clone")).state == "done"
    assert times > 3
    assert await get(clone, 0, SIZE) == model


async def test_cut_off_anywhere_it_can_be_repeated(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("not closed in good order")  # the process dies while the parent is being closed
    model = await prepared(world, size=2 * MIB)
    store = store_of(world)
    seen = []
    for step in range(0, 400, 11):
        store = store_of(world)
        if not store.catalog.state.vdis[store.catalog.state.names["clone"]].base:
            break
        task = asyncio.create_task(store.flatten("clone"))
        await turns(step)
        await world.kill()
        with contextlib.suppress(StoreError, asyncio.CancelledError):
            await task
        assert not faults(Checked(world).check())
        store = await world.open()
        assert await whole(world, "clone") == model
        seen.append(store.vdi("clone").parent)
    assert seen[0] == "disk@s"
    assert seen[-1] == ""
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    assert await whole(world, "clone") == model
    await clean(world)
    assert await whole(world, "clone") == model


async def test_aborted_it_leaves_a_clone(world: World) -> None:
    model = await prepared(world)
    store = store_of(world)
    job = await store.flatten("clone")
    with pytest.raises(Busy, match="just being flattened"):
        await store.flatten("clone")
    assert (await store.jobs.abort(job.job_id)).state == "aborted"
    assert store.vdi("clone").parent == "disk@s"
    assert await whole(world, "clone") == model
    assert (await flattened(world, "clone")).state == "done"
    assert await whole(world, "clone") == model


async def test_what_a_vdi_was_cloned_through_goes_with_it(world: World) -> None:
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, pattern(1, SIZE))
    await store_of(world).clone("disk", "clone")
    assert len(store_of(world).catalog.state.snapshots) == 1
    assert (await flattened(world, "clone")).state == "done"
    while store_of(world)._work:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    assert not store_of(world).catalog.state.snapshots
    assert await whole(world, "clone") == pattern(1, SIZE)
    await clean(world)


async def test_snapshots_and_clones_of_before_stand_in_the_way(world: World) -> None:
    model = await prepared(world)
    store = store_of(world)
    with pytest.raises(InvalidRequest, match="no clone"):
        await store.flatten("disk")
    with pytest.raises(NotFound):
        await store.flatten("nobody")
    await store.create_snapshot("clone", "t")
    with pytest.raises(Busy, match="clone@t"):
        await store.flatten("clone")
    await store.delete_snapshot("clone@t")
    await store.clone("clone", "child")
    with pytest.raises(Busy, match="child"):
        await store.flatten("clone")
    assert (await flattened(world, "child")).state == "done"
    while store._work:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    clone = await attach(world, "clone")
    copy_in, gate = clone.copy_in, asyncio.Event()

    async def held(offset: int, length: int) -> int:
        await gate.wait()
        return await copy_in(offset, length)

    clone.copy_in = held  # type: ignore[method-assign]
    job = await store.flatten("clone")
    await store.create_snapshot("clone", "u")  # while it is under way
    gate.set()
    assert "clone@u" in (await store.jobs.wait(job.job_id)).message
    assert store.jobs.get(job.job_id).state == "failed"
    with pytest.raises(Busy, match="clone"):
        await store.delete_snapshot("disk@s")
    await store.delete_snapshot("clone@u")
    assert (await flattened(world, "clone")).state == "done"
    await store.create_snapshot("clone", "v")
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await segments_of(world, 1)
    for name in ("clone", "child", "clone@v"):
        assert await whole(world, name) == model
    await clean(world)
    for name in ("clone", "child", "clone@v"):
        assert await whole(world, name) == model


async def test_a_chain_is_cut_in_the_middle(world: World) -> None:
    vdi = await make(world, "c0", size=SIZE)
    content = bytearray(pattern(1, SIZE))
    await put(vdi, 0, bytes(content))
    for n in range(1, 4):
        await store_of(world).create_snapshot(f"c{n - 1}", "s")
        await store_of(world).clone(f"c{n - 1}@s", f"c{n}")
        vdi = await attach(world, f"c{n}")
        await put(vdi, n * MIB, pattern(n + 1, MIB))
        content[n * MIB : (n + 1) * MIB] = pattern(n + 1, MIB)
    assert (await flattened(world, "c3")).state == "done"
    await vdi.flush()
    store = store_of(world)
    for n in (2, 1, 0):
        other = await attach(world, f"c{n}")
        other.attached = 0  # whoever wrote to it has gone
        await store.delete_snapshot(f"c{n}@s")
        await store.delete_vdi(f"c{n}")
    await segments_of(world, 1)
    assert {entry.name for entry in store.catalog.state.vdis.values()} == {"c3"}
    assert await whole(world, "c3") == content
    await clean(world)
    assert await whole(world, "c3") == content


async def test_a_disk_that_was_rolled_back(world: World) -> None:
    vdi = await make(world, size=SIZE)
    store = store_of(world)
    await put(vdi, 0, pattern(1, SIZE))
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, SIZE))
    await store.close(vdi)
    undo = await store.rollback("disk@s")
    job = await store.flatten("disk")
    await store.rollback(undo.name)
    assert "rolled back" in (await store.jobs.wait(job.job_id)).message
    assert await whole(world, "disk") == pattern(2, SIZE)
    assert (await flattened(world, "disk")).state == "done"
    for snapshot in reversed(store.snapshots("disk")):
        await store.delete_snapshot(snapshot.name)
    await segments_of(world, 1)
    assert [entry.name for entry in store.catalog.state.vdis.values()] == ["disk"]
    assert await whole(world, "disk") == pattern(2, SIZE)
    await clean(world)


async def test_a_disk_that_was_made_smaller_meanwhile(world: World) -> None:
    model = await prepared(world)
    store = store_of(world)
    job = await store.flatten("clone")
    await store.resize("clone", MIB, force=True)
    await store.jobs.wait(job.job_id)
    await store.resume("clone")
    if store.vdi("clone").parent:
        assert (await flattened(world, "clone")).state == "done"
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await segments_of(world, 1)
    await store.resize("clone", SIZE)
    assert await whole(world, "clone") == model[:MIB] + bytes(SIZE - MIB)
    await clean(world)


async def test_the_checkpoint_to_fall_back_on_needs_nobody_either(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checkpoint")
    model = await prepared(world)
    store = store_of(world)
    clone = await attach(world, "clone")
    log = store.vdi("clone").log
    assert (await flattened(world, "clone")).state == "done"
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await segments_of(world, 1)
    await clone.flush()
    await world.kill()
    names = {name for zone in range(3) for name in world.names(zone, f"checkpoint/{log:06x}")}
    newest = max(names)
    world.damage(newest, 20, zones=[zone for zone in range(3) if newest in world.names(zone, newest)])
    await world.open()
    assert await whole(world, "clone") == model


async def test_nobody_knows_whether_the_record_is_durable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clone needs nobody, and what it needed may go: that record is behind the one in doubt."""
    model = await prepared(world)
    store = store_of(world)
    clone = await attach(world, "clone")
    commit = store.catalog.commit

    async def in_doubt(*entries: Entry) -> None:
        await commit(*entries)
        if any(isinstance(entry, VdiEntry) for entry in entries):
            raise Unavailable("who knows")

    with monkeypatch.context() as patched:
        patched.setattr(store.catalog, "commit", in_doubt)
        ended = await flattened(world, "clone")
    assert (ended.state, ended.message) == ("failed", "who knows")
    await store.delete_snapshot("disk@s")
    await store.delete_vdi("disk")
    await segments_of(world, 1)
    assert await get(clone, 0, SIZE) == model
    await clone.flush()
    await world.kill()
    await world.open()
    assert await whole(world, "clone") == model


async def test_reads_that_are_under_way_are_waited_for_and_no_later_ones(world: World) -> None:
    """A read that has looked up a block in the other log may wait in a zone's thread when the clone stops needing
    that; others come all the time."""
    vdi = await make(world, size=SIZE)
    gates = [asyncio.Event(), asyncio.Event()]
    waiting = iter(gates)

    async def read(first: int, count: int, view: memoryview) -> int:
        await next(waiting).wait()
        return count

    vdi.view.read = read  # type: ignore[method-assign]
    into = memoryview(bytearray(BLOCK_BYTES))
    first = asyncio.create_task(vdi.read(0, BLOCK_BYTES, into))
    await turns(2)
    over = asyncio.create_task(vdi.reads_over())
    await turns(2)
    second = asyncio.create_task(vdi.read(0, BLOCK_BYTES, into))
    quiet = asyncio.create_task(vdi.quiet())
    await turns(5)
    assert not over.done()
    gates[0].set()
    await over
    assert first.done()
    assert not second.done()
    await turns(5)
    assert not quiet.done()
    gates[1].set()
    await quiet
    assert second.done()

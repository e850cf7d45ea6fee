"""Clones through the store: what they show and share, at any depth, and what may be deleted when."""

import asyncio
import itertools
import random

import pytest

from objstore.errors import Busy, Exists, InvalidRequest, NotFound
from objstore.units import BLOCK_BYTES, MIB
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
    refuse_checkpoints,
    segments_of,
    store_of,
    whole,
    world,
)
from tests.support.stepping import World, turns

__all__ = ["world"]

SIZE = 4 * MIB


async def clone_of(world: World, source: str, name: str, *, copies: int | None = None) -> Vdi:
    await store_of(world).clone(source, name, copies=copies)
    return await attach(world, name)


async def test_a_clone_begins_as_its_snapshot_and_goes_its_own_way(world: World) -> None:
    vdi = await make(world, size=SIZE)
    rng = random.Random(2)
    model = bytearray(SIZE)
    await churn(vdi, model, rng, 60)
    await store_of(world).create_snapshot("disk", "s")
    then = bytes(model)
    await churn(vdi, model, rng, 60)
    clone = await clone_of(world, "disk@s", "clone")
    assert (clone.size_bytes, clone.mode, clone.copies) == (SIZE, "writeback-always", 2)
    assert await whole(world, "clone") == then
    copy = bytearray(then)
    for _ in range(4):
        await churn(clone, copy, rng, 40)
        await churn(vdi, model, rng, 40)
        assert await whole(world, "clone") == copy
        assert await whole(world, "disk") == model
        assert await whole(world, "disk@s") == then
    assert clone.disk.live_total == sum(segment.live for segment in clone.disk.segments.values())
    assert store_of(world).snapshot("disk@s").clones == ["clone"]
    assert store_of(world).vdi("clone").parent == "disk@s"
    await clone.flush()
    await vdi.flush()
    for clean in (False, True, False):
        await (world.stop() if clean else world.kill())
        await world.open()
        assert await whole(world, "clone") == copy
        assert await whole(world, "disk") == model
        assert await whole(world, "disk@s") == then
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_holes_reserved_zeros_and_block_status_of_a_clone(world: World) -> None:
    vdi = await make(world, size=SIZE)
    await put(vdi, 0, b"a" * MIB)
    await vdi.zero(MIB, MIB, no_hole=True)
    await store_of(world).create_snapshot("disk", "s")
    clone = await clone_of(world, "disk@s", "clone")
    await clone.trim(0, BLOCK_BYTES)
    await put(clone, 3 * MIB, b"b" * BLOCK_BYTES)
    for _ in range(2):
        shown = [(e.length_bytes, e.hole, e.zero) for e in await clone.extents(0, SIZE)]
        assert shown == [
            (BLOCK_BYTES, True, True),
            (MIB - BLOCK_BYTES, False, False),
            (MIB, False, True),
            (MIB, True, True),
            (BLOCK_BYTES, False, False),
            (MIB - BLOCK_BYTES, True, True),
        ]
        await clone.flush()
        await clone.keeper.checkpoint()
    await clone.trim(0, SIZE)
    assert await whole(world, "clone") == bytes(SIZE)
    assert (await whole(world, "disk@s"))[:MIB] == b"a" * MIB


@pytest.mark.parametrize("clean", [True, False])
async def test_chains_of_clones(world: World, clean: bool) -> None:
    """Each clone is of a snapshot of the one before, with a part of its own; whatever is closed and opened, each reads
    its own story."""
    depth = 6
    vdi = await make(world, "c0", size=SIZE)
    part = SIZE // 8
    content = bytearray(pattern(100, SIZE))
    await put(vdi, 0, bytes(content))
    contents = {"c0": bytes(content)}
    for n in range(1, depth):
        await store_of(world).create_snapshot(f"c{n - 1}", "s")
        vdi = await clone_of(world, f"c{n - 1}@s", f"c{n}")
        await put(vdi, n * part, pattern(n, part))
        content[n * part : (n + 1) * part] = pattern(n, part)
        contents[f"c{n}"] = bytes(content)
        await vdi.flush()
        await vdi.keeper.checkpoint()
    for _ in range(2):
        for name, wanted in contents.items():
            assert await whole(world, name) == wanted
        await (world.stop() if clean else world.kill())
        await world.open()
    last = await attach(world, f"c{depth - 1}")
    assert len(store_of(world).open_vdis()) == depth
    assert await get(last, 0, SIZE) == contents[f"c{depth - 1}"]
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


@pytest.mark.parametrize("order", list(itertools.permutations(["base", "base@s", "a", "b"]))[::3])
async def test_scenario_5_base_snapshot_and_clones_go_in_any_order(world: World, order: tuple[str, ...]) -> None:
    """What clones need can't go before them, and is named; what goes leaves the others as they are; in the end nothing
    is left."""
    store = store_of(world)
    base = await make(world, "base", size=2 * MIB)
    await put(base, 0, pattern(1, 2 * MIB))
    await store.create_snapshot("base", "s")
    contents = {"base@s": pattern(1, 2 * MIB)}
    for name, number in (("a", 2), ("b", 3), ("base", 4)):
        vdi = base if name == "base" else await clone_of(world, "base@s", name)
        await put(vdi, number * 65536, pattern(number, MIB))
        contents[name] = await whole(world, name)
        await store.close(vdi)
    left = list(order)
    while left:
        for name in list(left):
            if name == "base@s" and not {"a", "b"}.isdisjoint(left):
                with pytest.raises(Busy, match=next(n for n in ("a", "b") if n in left)):
                    await store.delete_snapshot(name)
                continue
            await (store.delete_snapshot(name) if "@" in name else store.delete_vdi(name))
            left.remove(name)
            for other in left:
                assert await whole(world, other) == contents[other]
            if name == order[0]:
                await world.kill()
                store = await world.open()
    for log in (1, 2, 3):
        assert await segments_of(world, log) == 0
    assert not [name for zone in range(3) for name in world.names(zone, "checkpoint/")]
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_a_clone_of_a_live_disk(world: World) -> None:
    """In one step: the snapshot in between is not seen, and goes with the last that needs it, also after a restart."""
    store = store_of(world)
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    clone = await clone_of(world, "disk", "clone")
    await put(vdi, 0, pattern(2, 2 * MIB))
    assert await whole(world, "clone") == pattern(1, 2 * MIB)
    assert store.snapshots() == []
    assert store.vdi("clone").parent == "disk"
    assert (await store.create_snapshot("disk")).snapshot.index == 1
    await store.delete_snapshot("disk@1")
    with pytest.raises(NotFound):
        await store.open("disk@0")
    await store.close(clone)
    await store.close(vdi)
    await store.delete_vdi("disk")
    assert await whole(world, "clone") == pattern(1, 2 * MIB)
    await world.stop()
    store = await world.open()
    assert store.names() == ["clone"]
    assert await whole(world, "clone") == pattern(1, 2 * MIB)
    await store.delete_vdi("clone")
    for log in (1, 2):
        assert await segments_of(world, log) == 0
    assert not store.catalog.state.snapshots
    assert not store.catalog.state.vdis


async def test_a_clone_is_opened_while_its_parent_is_being_deleted(world: World) -> None:
    """Before it is known whether the parent stays, hidden; the clone's own deletion waits for the opening."""
    store = store_of(world)
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store.clone("disk", "clone")
    await store.close(vdi)
    async with store._change:
        deletion = asyncio.ensure_future(store.delete_vdi("disk"))
        await turns()
        opening = asyncio.ensure_future(store.open("clone"))
        await turns()
        other = asyncio.ensure_future(store.delete_vdi("clone"))
        await turns()
        assert not opening.done()
        assert not other.done()
    await deletion
    await store.close(await opening)
    await asyncio.gather(other, return_exceptions=True)
    assert "disk" not in store.names()
    assert await whole(world, "clone") == pattern(1, 2 * MIB)


async def test_a_clone_is_opened_while_the_opening_of_its_parent_is_waited_for_to_delete_it(world: World) -> None:
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store_of(world).clone("disk", "clone")
    await world.stop()
    store = await world.open()
    parent = store._begin_opening(store._entry("disk"))
    deletion = asyncio.ensure_future(store.delete_vdi("disk"))
    await asyncio.sleep(0)
    clone = asyncio.ensure_future(store.open("clone"))
    await asyncio.gather(parent, deletion)
    await store.close(await clone)
    assert store.names() == ["clone"]
    assert await whole(world, "clone") == pattern(1, 2 * MIB)


async def test_a_clone_that_is_deleted_with_its_parent_does_not_wait_for_that(world: World) -> None:
    """Whoever deletes both waits for the clone's opening."""
    store = store_of(world)
    vdi = await make(world, size=2 * MIB)
    await store.clone("disk", "clone")
    await store.close(vdi)
    ids = {store.vdi(name).vdi_id for name in ("disk", "clone")}
    store._deleting.begin({vdi.vdi_id})
    opening = asyncio.ensure_future(store.open("clone"))
    await turns()
    assert not opening.done()
    store._deleting.begin(ids)
    with pytest.raises(NotFound, match="'clone' is being deleted"):
        await opening
    store._deleting.end(ids)
    await store.close(await store.open("clone"))


async def test_a_snapshot_is_opened_while_its_vdi_begins_to_be_deleted(world: World) -> None:
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    store = store_of(world)
    await store.create_snapshot("disk", "s")
    await store.close(vdi)
    volume, _ = await asyncio.gather(store.open("disk@s"), store.delete_vdi("disk"))
    await store.close(volume)
    assert await whole(world, "disk@s") == pattern(1, 2 * MIB)


async def test_a_hidden_snapshot_that_a_crash_left_goes_at_the_next_start(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store._take(store._entry("disk"), hidden=True)
    await put(vdi, 0, pattern(2, 2 * MIB))
    await vdi.flush()
    await world.kill()
    store = await world.open()
    await segments_of(world, 1)
    assert not store.catalog.state.snapshots
    assert await whole(world, "disk") == pattern(2, 2 * MIB)


async def test_a_clone_waits_for_a_map_that_is_still_to_be_written(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("waits for space|given up")
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await vdi.keeper.checkpoint()
    await put(vdi, 0, pattern(2, MIB))
    refuse_checkpoints(world)
    await store_of(world).create_snapshot("disk", "s")
    await store_of(world).clone("disk@s", "clone")
    await put(vdi, 0, pattern(3, 2 * MIB))
    await vdi.flush()
    await world.kill()
    await world.open()
    assert await whole(world, "clone") == pattern(2, MIB) + pattern(1, MIB)
    assert await whole(world, "disk") == pattern(3, 2 * MIB)


async def test_names_and_numbers_that_are_refused(world: World) -> None:
    store = store_of(world)
    await make(world)
    await store.create_snapshot("disk", "s")
    for source in ("other", "disk@t", "other@s"):
        with pytest.raises(NotFound):
            await store.clone(source, "clone")
    with pytest.raises(Exists):
        await store.clone("disk@s", "disk")
    for name, copies in (("a@b", 1), ("clone", 4), ("clone", 0)):
        with pytest.raises(InvalidRequest):
            await store.clone("disk@s", name, copies=copies)
    assert store.names() == ["disk"]


async def test_a_clone_has_its_own_copies(world: World) -> None:
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store_of(world).create_snapshot("disk", "s")
    clone = await clone_of(world, "disk@s", "clone", copies=3)
    await put(clone, 0, pattern(2, MIB))
    await clone.flush()
    await clone.keeper.checkpoint()
    for name in world.names(0, "log/000002/"):
        assert all(name in world.storages[zone].objects for zone in range(3))
    await store_of(world).set_copies("clone", 1)
    await store_of(world).wait_for_recovery()
    assert await whole(world, "clone") == pattern(2, MIB) + pattern(1, MIB)


async def test_collection_in_a_clone_and_in_what_it_comes_from(world: World) -> None:
    """Both are overwritten many times; neither's collection touches what the other reads."""
    vdi = await make(world, size=2 * MIB)
    model = bytearray(2 * MIB)
    rng = random.Random(4)
    await churn(vdi, model, rng, 100)
    await store_of(world).create_snapshot("disk", "s")
    then = bytes(model)
    clone = await clone_of(world, "disk@s", "clone")
    copy = bytearray(model)
    for _ in range(6):
        for _ in range(4):
            await churn(vdi, model, rng, 50)
            await churn(clone, copy, rng, 50)
            await turns()
        assert await whole(world, "clone") == copy
        assert await whole(world, "disk") == model
        assert await whole(world, "disk@s") == then
    assert clone.disk.loose_blocks * BLOCK_BYTES < 5 * clone.size_bytes
    assert clone.keeper.freed
    assert vdi.keeper.freed


async def test_damage_of_what_a_clone_shares_is_found_where_it_shows(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("bad|checksum|no zone has all")
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store_of(world).create_snapshot("disk", "s")
    clone = await clone_of(world, "disk@s", "clone")
    await put(clone, 0, pattern(2, 64 * BLOCK_BYTES))
    await clone.flush()
    segments = sorted(vdi.disk.segments.values(), key=lambda segment: segment.number)
    await world.stop()
    checked = Checked(world)
    checked.flip(segments[3].name, 9000)
    lost = {finding.vdi for finding in faults(checked.check()) if finding.kind == "data-lost"}
    assert lost == {"disk", "disk@s", "clone"}
    checked.flip(segments[3].name, 9000)
    checked.flip(segments[0].name, 9000)  # the clone has written that part anew
    lost = {finding.vdi for finding in faults(checked.check()) if finding.kind == "data-lost"}
    assert lost == {"disk", "disk@s"}
    await world.open()
    assert await whole(world, "clone") == pattern(2, 64 * BLOCK_BYTES) + pattern(1, 2 * MIB - 64 * BLOCK_BYTES)

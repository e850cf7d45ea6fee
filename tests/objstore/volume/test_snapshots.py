"""Snapshots through the store: what they show, when they are taken, what they keep and what deleting them frees."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

import pytest

from objstore.errors import Busy, Corrupt, Exists, InvalidRequest, NoSpace, NotFound, OutOfRange, ReadOnly
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.base import Volume
from objstore.volume.frozen import FrozenVolume
from objstore.volume.store import Store
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import Checked, faults
from tests.support.stepping import World, turns

SIZE = 8 * MIB


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


def store_of(world: World) -> Store:
    assert world.store is not None
    return world.store


async def make(world: World, name: str = "disk", *, size: int = SIZE, mode: str = "writeback-always") -> Vdi:
    await store_of(world).create_vdi(name, size, copies=2, mode=mode)
    return await attach(world, name)


async def attach(world: World, name: str = "disk") -> Vdi:
    vdi = await store_of(world).open(name)
    assert isinstance(vdi, Vdi)
    return vdi


async def put(vdi: Vdi, offset: int, data: bytes) -> None:
    await vdi.write(offset, memoryview(data))


async def get(volume: Volume, offset: int, length: int) -> bytes:
    into = memoryview(bytearray(b"\xee" * length))
    zeros = volume.read_now(offset, length, into)
    if zeros < 0:
        zeros = await volume.read(offset, length, into)
    return bytes(length) if zeros == length else bytes(into)


async def whole(world: World, name: str) -> bytes:
    """All bytes of a VDI or snapshot."""
    volume = await store_of(world).open(name)
    try:
        return await get(volume, 0, volume.size_bytes)
    finally:
        await store_of(world).close(volume)


async def segments_of(world: World, log: int) -> int:
    """Segment files of a log, once the background has nothing left to do."""
    store = store_of(world)
    while store._work:
        await asyncio.wait(store._work)
    for vdi in store.open_vdis():
        await vdi.give_back()
    await turns()
    return sum(1 for zone in range(3) for _ in world.names(zone, f"log/{log:06x}/"))


def pattern(n: int, length: int = SIZE) -> bytes:
    return random.Random(n).randbytes(BLOCK_BYTES) * (length // BLOCK_BYTES)


def refuse_checkpoints(world: World) -> None:
    """No zone has space for a checkpoint from now on."""

    def fault(call: str, name: str) -> None:
        if call == "put" and name.startswith("checkpoint/"):
            raise NoSpace(f"no space left on device call={call} name={name}")

    for backend in world.backends:
        backend.fault = fault


async def churn(vdi: Vdi, model: bytearray, rng: random.Random, writes: int) -> None:
    for _ in range(writes):
        count = rng.choice((1, 1, 2, 7, 40))
        first = rng.randrange(len(model) // BLOCK_BYTES - count)
        data = rng.randbytes(8) * (count * BLOCK_BYTES // 8)
        offset = first * BLOCK_BYTES
        if rng.random() < 0.1:
            await vdi.trim(offset, len(data))
            data = bytes(len(data))
        else:
            await put(vdi, offset, data)
        model[offset : offset + len(data)] = data


@pytest.mark.parametrize("clean", [True, False])
async def test_scenario_1_nine_snapshots_show_their_own_pattern(world: World, clean: bool) -> None:
    vdi = await make(world, size=MIB)
    for n in range(9):
        await put(vdi, 0, pattern(n, MIB))
        taken = await store_of(world).create_snapshot("disk", f"s{n}")
        assert taken.taken
        assert (taken.snapshot.name, taken.snapshot.index) == (f"disk@s{n}", n + 1)
    await put(vdi, 0, pattern(9, MIB))
    for _ in range(2):
        for n in range(9):
            assert await whole(world, f"disk@s{n}") == pattern(n, MIB)
            assert await whole(world, f"disk@{n + 1}") == pattern(n, MIB)
        assert await whole(world, "disk") == pattern(9, MIB)
        await (await attach(world)).flush()
        await (world.stop() if clean else world.kill())
        await world.open()
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_a_snapshot_is_read_only_and_knows_its_holes(world: World) -> None:
    vdi = await make(world)
    await put(vdi, MIB, b"d" * 12345)
    await store_of(world).create_snapshot("disk", "s")
    await vdi.trim(0, SIZE)
    shown = await store_of(world).open("disk@s")
    assert isinstance(shown, FrozenVolume)
    assert shown.read_only
    assert shown.size_bytes == SIZE
    shown_as = store_of(world).peek("disk@s")
    assert shown_as is not None
    assert shown_as[:5] == ("disk@s", SIZE, True, "snapshot 1", "")
    extents = await shown.extents(0, SIZE)
    assert [(e.length_bytes, e.hole) for e in extents] == [
        (MIB, True),
        (16 * KIB, False),
        (SIZE - MIB - 16 * KIB, True),
    ]
    assert await get(shown, MIB + 1, 12344) == b"d" * 12344
    with pytest.raises(ReadOnly):
        shown.write_now(0, memoryview(bytes(BLOCK_BYTES)))
    for call in (shown.write(0, memoryview(b"x")), shown.trim(0, 4096), shown.zero(0, 4096)):
        with pytest.raises(ReadOnly):
            await call
    with pytest.raises(OutOfRange):
        await get(shown, SIZE, 1)
    await shown.flush()
    await store_of(world).close(shown)


async def test_names_that_are_taken_impossible_or_unknown(world: World) -> None:
    await make(world)
    store = store_of(world)
    await store.create_snapshot("disk", "s")
    with pytest.raises(Exists):
        await store.create_snapshot("disk", "s")
    for tag in ("12", "a@b", "a/b", "-x"):
        with pytest.raises(InvalidRequest):
            await store.create_snapshot("disk", tag)
    with pytest.raises(NotFound):
        await store.create_snapshot("other", "s")
    for name in ("disk@t", "disk@2", "disk@", "other@s"):
        with pytest.raises(NotFound):
            await store.open(name)
        assert store.peek(name) is None
        with pytest.raises(NotFound):
            await store.delete_snapshot(name)
    untagged = await store.create_snapshot("disk")
    assert untagged.snapshot.name == "disk@2"
    assert [s.name for s in store.snapshots("disk")] == ["disk@s", "disk@2"]
    with pytest.raises(NotFound):
        store.snapshots("other")


async def test_scenario_11_writes_go_on_while_snapshots_are_taken(world: World) -> None:
    """Before each snapshot some writes are acknowledged and some are not yet: the first are in, none that begins after
    the snapshot is there is, and a request of several records is in it as a whole or not at all."""
    vdi = await make(world, size=16 * MIB)
    big = 2 * MIB
    numbers = itertools.count(1)
    done: dict[int, int] = {}
    begun: dict[int, int] = {}
    stop = False

    async def client(slot: int) -> None:
        while not stop:
            n = next(numbers)
            begun[slot] = n
            await put(vdi, slot * big, n.to_bytes(8, "little") * (big // 8))
            done[slot] = n

    clients = [asyncio.create_task(client(slot)) for slot in range(6)]
    for i in range(5):
        await turns(30 + 7 * i)
        before = dict(done)
        await store_of(world).create_snapshot("disk", f"s{i}")
        after = dict(begun)
        content = await whole(world, f"disk@s{i}")
        for slot in range(6):
            part = content[slot * big : (slot + 1) * big]
            assert part == part[:8] * (big // 8), "a request is there in part"
            number = int.from_bytes(part[:8], "little")
            assert before.get(slot, 0) <= number <= after[slot]
    stop = True
    await asyncio.gather(*clients)


async def test_what_is_flushed_with_a_snapshot_is_durable(world: World) -> None:
    vdi = await make(world)
    await put(vdi, 0, b"a" * MIB)
    await store_of(world).create_snapshot("disk", "s")
    await put(vdi, 0, b"b" * MIB)
    await world.kill()
    await world.open()
    assert (await whole(world, "disk@s"))[:MIB] == b"a" * MIB
    assert (await whole(world, "disk"))[:MIB] in (b"a" * MIB, b"b" * MIB)


@pytest.mark.parametrize("clean", [True, False])
async def test_a_map_that_was_not_written_is_made_by_opening(
    world: World, clean: bool, expected_warnings: ExpectedWarnings
) -> None:
    """The process ends, one way or the other, before the checkpoint that is the map; what was written behind the
    snapshot is not in it, sealed or not."""
    expected_warnings.allow("waits for space|given up")
    vdi = await make(world)
    model = bytearray(SIZE)
    rng = random.Random(3)
    await churn(vdi, model, rng, 60)
    await vdi.keeper.checkpoint()
    await churn(vdi, model, rng, 30)
    refuse_checkpoints(world)
    await store_of(world).create_snapshot("disk", "s")
    then = bytes(model)
    await churn(vdi, model, rng, 90)
    await vdi.flush()
    now = bytes(model)
    if clean:
        await world.stop()
    else:
        await world.kill()
    for _ in range(2):
        await world.open()
        assert await whole(world, "disk@s") == then
        assert await whole(world, "disk") == now
        await world.kill()
    await world.open()
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_scenario_8_nothing_was_written_since(world: World) -> None:
    vdi = await make(world)
    await put(vdi, 0, b"a" * MIB)
    store = store_of(world)
    first = await store.create_snapshot("disk", "s", skip_unchanged=True)
    again = await store.create_snapshot("disk", "t", skip_unchanged=True)
    assert (first.taken, again.taken) == (True, False)
    assert again.snapshot.name == "disk@s"
    await vdi.flush()
    await vdi.keeper.checkpoint()
    assert not (await store.create_snapshot("disk", "t", skip_unchanged=True)).taken
    assert (await store.create_snapshot("disk", "u")).taken
    await vdi.trim(0, BLOCK_BYTES)
    assert (await store.create_snapshot("disk", "t", skip_unchanged=True)).taken
    await world.stop()
    await world.open()
    assert not (await store_of(world).create_snapshot("disk", skip_unchanged=True)).taken


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 3, 1, 2)])
async def test_scenario_6_space_falls_by_what_nobody_needs(world: World, order: tuple[int, ...]) -> None:
    """Four snapshots, a quarter of the disk written anew before each. A segment goes with the last snapshot whose map
    points into it."""
    vdi = await make(world, size=2 * MIB)
    part = 512 * 1024
    await put(vdi, 0, pattern(50, 2 * MIB))
    for n in range(4):
        await put(vdi, n * part, pattern(n, part))
        await store_of(world).create_snapshot("disk", f"s{n}")
    for n in range(4):
        await put(vdi, n * part, pattern(60 + n, part))
    contents = {n: await whole(world, f"disk@s{n}") for n in range(4)}
    used = await segments_of(world, 1)
    left = set(range(4))
    for n in order:
        await store_of(world).delete_snapshot(f"disk@s{n}")
        left.remove(n)
        less = await segments_of(world, 1)
        assert less < used, "every snapshot alone has a quarter that no other has"
        used = less
        for other in left:
            assert await whole(world, f"disk@s{other}") == contents[other]
    assert not vdi.disk.held_blocks
    assert all(segment.live for segment in vdi.disk.segments.values()), "nothing is left of the snapshots"
    assert await whole(world, "disk") == b"".join(pattern(60 + n, part) for n in range(4))
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


@pytest.mark.parametrize("clean", [True, False])
async def test_what_a_snapshot_kept_goes_after_a_restart_too(world: World, clean: bool) -> None:
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    await store_of(world).create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, 2 * MIB))
    await vdi.flush()
    await (world.stop() if clean else world.kill())
    await world.open()
    await attach(world)
    kept = await segments_of(world, 1)
    assert await whole(world, "disk@s") == pattern(1, 2 * MIB)
    await store_of(world).delete_snapshot("disk@s")
    assert await segments_of(world, 1) <= kept - 12
    assert await whole(world, "disk") == pattern(2, 2 * MIB)


async def test_a_snapshot_that_is_protected_or_attached_stays(world: World) -> None:
    await make(world)
    store = store_of(world)
    await store.create_snapshot("disk", "s", protected=True)
    with pytest.raises(Busy, match="protected"):
        await store.delete_snapshot("disk@s")
    assert not (await store.protect_snapshot("disk@s", protected=False)).protected
    shown = await store.open("disk@s")
    assert store.snapshot("disk@s").attached == 1
    with pytest.raises(Busy, match="attached"):
        await store.delete_snapshot("disk@s")
    await store.close(shown)
    await store.delete_snapshot("disk@s")
    with pytest.raises(NotFound):
        await store.delete_snapshot("disk@s")
    assert store.snapshots() == []


@pytest.mark.parametrize("disk_first", [True, False])
async def test_scenario_7_the_disk_and_its_snapshot_go_in_any_order(world: World, disk_first: bool) -> None:
    vdi = await make(world, size=2 * MIB)
    await put(vdi, 0, pattern(1, 2 * MIB))
    store = store_of(world)
    await store.create_snapshot("disk", "s")
    await put(vdi, 0, pattern(2, 2 * MIB))
    await store.close(vdi)
    if disk_first:
        await store.delete_vdi("disk")
        with pytest.raises(NotFound):
            await store.delete_vdi("disk")
        assert store.names() == []
        assert [(s.name, s.vdi_deleted) for s in store.snapshots()] == [("disk@s", True)]
        before = await segments_of(world, 1)
        assert await whole(world, "disk@s") == pattern(1, 2 * MIB)
        other = await make(world, size=MIB)  # the name is free; the tag is not
        await put(other, 0, pattern(3, MIB))
        with pytest.raises(Exists):
            await store.create_snapshot("disk", "s")
        assert (await store.create_snapshot("disk")).snapshot.name == "disk@2"
        await world.kill()
        await world.open()
        assert await whole(world, "disk@s") == pattern(1, 2 * MIB)
        assert await whole(world, "disk@2") == await whole(world, "disk") == pattern(3, MIB)
        store = store_of(world)
        await store.delete_snapshot("disk@s")
        with pytest.raises(NotFound):
            await store.delete_snapshot("disk@s")
        assert before > await segments_of(world, 1) == 0
        assert await whole(world, "disk@2") == pattern(3, MIB)
    else:
        await store.delete_snapshot("disk@s")
        assert await whole(world, "disk") == pattern(2, 2 * MIB)
        await store.delete_vdi("disk")
        assert await segments_of(world, 1) == 0
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_collection_leaves_what_snapshots_need(world: World) -> None:
    """Writes for many times the disk's size: its own segments are collected, those of the snapshots are not."""
    vdi = await make(world, size=4 * MIB)
    model = bytearray(4 * MIB)
    rng = random.Random(9)
    contents = {}
    for n in range(4):
        for _ in range(6):
            await churn(vdi, model, rng, 60)
            await turns()
        await store_of(world).create_snapshot("disk", f"s{n}")
        contents[n] = bytes(model)
    for _ in range(6):
        await churn(vdi, model, rng, 60)
        await vdi.flush()
        for n, content in contents.items():
            assert await whole(world, f"disk@s{n}") == content
    assert vdi.disk.loose_blocks * BLOCK_BYTES < 4 * vdi.size_bytes
    assert await whole(world, "disk") == model
    held = vdi.disk.held_blocks
    assert store_of(world).vdi("disk").kept_bytes == held * BLOCK_BYTES
    assert held == sum(segment.blocks for segment in vdi.disk.segments.values() if segment.held)
    assert vdi.disk.held_live == sum(segment.live for segment in vdi.disk.segments.values() if segment.held)
    assert vdi.disk.live_total == sum(segment.live for segment in vdi.disk.segments.values())
    await world.kill()
    await world.open()
    for n, content in contents.items():
        assert await whole(world, f"disk@s{n}") == content
    again = await attach(world)
    assert again.disk.held_blocks == held
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def with_history(world: World, copies: int = 2) -> dict[str, bytes]:
    """A disk and three snapshots with hardly a segment in common; the contents of all four."""
    await store_of(world).create_vdi("disk", 2 * MIB, copies=copies, mode="writeback-always")
    vdi = await attach(world)
    contents = {}
    for n in range(3):
        await put(vdi, 0, pattern(n, 2 * MIB))
        await store_of(world).create_snapshot("disk", f"s{n}")
        contents[f"disk@s{n}"] = pattern(n, 2 * MIB)
    await put(vdi, 0, pattern(3, 2 * MIB))
    await vdi.flush()
    for _ in range(2):
        await vdi.keeper.checkpoint()
    return {**contents, "disk": pattern(3, 2 * MIB)}


def holders(world: World) -> dict[str, set[int]]:
    """Sealed segments and checkpoints of the first disk: name -> zones."""
    found: dict[str, set[int]] = {}
    for zone, storage in enumerate(world.storages):
        for name, data in storage.objects.items():
            if name.startswith(("log/000001/", "checkpoint/000001/")) and data[-128:-120] in (b"SHEEPDIR", b"SHEEPEND"):
                found.setdefault(name, set()).add(zone)
    return found


async def test_copies_of_what_snapshots_need_follow_the_disks(world: World) -> None:
    contents = await with_history(world)
    store = store_of(world)
    for copies in (3, 1, 2):
        await store.set_copies("disk", copies)
        await store.wait_for_recovery()
        for _ in range(2):
            await (await attach(world)).keeper.checkpoint()
        store.recovery.request()
        await store.wait_for_recovery()
        assert {len(zones) for zones in holders(world).values()} == {copies}
        for name, content in contents.items():
            assert await whole(world, name) == content
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_a_zone_that_comes_back_empty_gets_what_snapshots_need(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("zone|copy|checkpoint|out of service|recovery|superblock")
    contents = await with_history(world, copies=3)
    before = holders(world)
    await world.stop()
    world.storages[1].objects.clear()
    await world.open()
    store = store_of(world)
    await store.change_zones("replace", "zone1", path="zone3")
    await store.wait_for_recovery()
    after = holders(world)
    assert set(map(frozenset, after.values())) == {frozenset({0, 2, 3})}
    assert len(set(before) & set(after)) > 20
    await world.stop()
    await world.open(here=[3, 2])
    for name, content in contents.items():
        assert await whole(world, name) == content


async def test_scrub_mends_what_only_a_snapshot_needs(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("a copy is bad, replaced")
    contents = await with_history(world)
    vdi = await attach(world)
    kept = sorted(segment.name for segment in vdi.disk.segments.values() if segment.emptied)
    assert len(kept) > 10
    for n, name in enumerate(kept):
        zones = [zone for zone in range(3) if name in world.storages[zone].objects]
        world.damage(name, 9000, zones=[zones[n % 2]])
    await store_of(world).start_scrub()
    status = await store_of(world).wait_for_scrub()
    assert (status.copies_bad, status.copies_repaired) == (len(kept), len(kept))
    for name, content in contents.items():
        assert await whole(world, name) == content
    await world.stop()
    assert not faults(Checked(world).check())
    await world.open()


async def test_the_check_names_what_a_snapshot_has_lost(world: World) -> None:
    await with_history(world)
    vdi = await attach(world)
    segment = next(segment for segment in vdi.disk.segments.values() if segment.emptied)
    page = min(vdi.keeper.holds.maps)
    await world.stop()
    checked = Checked(world)
    checked.flip(segment.name, 9000)
    found = faults(checked.check())
    assert {finding.vdi for finding in found if finding.kind == "data-lost"} == {"disk@s0"}
    checked.flip(segment.name, 9000)
    name = f"checkpoint/000001/{page:08x}"
    saved = {zone: checked.zones[zone].objects.pop(name) for zone in checked.holders(name)}
    kinds = {(finding.kind, finding.name) for finding in faults(checked.check())}
    assert ("snapshot", name) in kinds
    for zone, data in saved.items():
        checked.zones[zone].objects[name] = data
    for zone in checked.holders(segment.name):
        del checked.zones[zone].objects[segment.name]
    assert "disk@s0" in {finding.vdi for finding in faults(checked.check())}
    await world.open()


async def test_what_a_snapshot_has_lost_is_an_error_and_never_zeros(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("bad|checksum|snapshot|checkpoint|no zone has all")
    contents = await with_history(world)
    vdi = await attach(world)
    segment = next(segment for segment in vdi.disk.segments.values() if segment.emptied)
    page = min(vdi.keeper.holds.maps)
    world.damage(segment.name, 9000, zones=[z for z in range(3) if segment.name in world.storages[z].objects])
    segment.close_handles()
    with pytest.raises(Corrupt) as lost:
        await whole(world, "disk@s0")
    assert [length for _, length in lost.value.bad] == [BLOCK_BYTES]
    assert await whole(world, "disk") == contents["disk"]
    await world.stop()
    for zone in range(3):
        world.storages[zone].objects.pop(f"checkpoint/000001/{page:08x}", None)
    await world.open()
    with pytest.raises(Corrupt):
        await whole(world, "disk@s0")
    for name in ("disk", "disk@s1", "disk@s2"):
        assert await whole(world, name) == contents[name]
    await store_of(world).delete_snapshot("disk@s0")
    assert await whole(world, "disk@s1") == contents["disk@s1"]

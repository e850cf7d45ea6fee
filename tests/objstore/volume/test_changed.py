"""What changed between snapshots, clones and disks: never too little, and nothing that was merely moved."""

import asyncio
import random

import pytest

from objstore.errors import Busy, Corrupt, InvalidRequest, OutOfRange, Stopping
from objstore.log.changed import DATA, SAME, TO_HOLE, TO_RESERVED, WORK_COMPARED, WORK_MAX, compare
from objstore.log.regions import Region, compact, expand
from objstore.units import BLOCK_BYTES, GIB, MIB, REGION_BLOCKS
from objstore.volume.base import Change, Volume
from objstore.volume.memory import MemoryVolume
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.objstore.volume.test_snapshots import attach, get, make, put, refuse_checkpoints, store_of, world
from tests.support.stepping import World, executor_of, turns

__all__ = ["world"]

SIZE = 6 * MIB
BLOCKS = SIZE // BLOCK_BYTES
REGION = REGION_BLOCKS * BLOCK_BYTES


class Model:
    """A disk: its bytes, and for each block how often it was written or cleared."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)
        self.turns = [0] * (size // BLOCK_BYTES)

    def copy(self) -> "Model":
        made = Model(len(self.data))
        made.data[:] = self.data
        made.turns[:] = self.turns
        return made

    def note(self, first: int, count: int, data: bytes) -> None:
        self.data[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES] = data
        for block in range(first, first + count):
            self.turns[block] += 1


@pytest.fixture
async def disk(world: World) -> Vdi:
    return await make(world, size=SIZE)


async def changes(volume: Volume, since: Volume, extents_max: int = 1 << 14) -> list[Change]:
    """For each block whether it has changed; the state of each call's answer is checked."""
    found: list[Change] = []
    at = 0
    while at < volume.size_bytes:
        part = await volume.changed(since, at, volume.size_bytes - at, extents_max=extents_max)
        assert 1 <= len(part) <= extents_max
        for change in part:
            assert change.length_bytes > 0
            assert change.length_bytes % BLOCK_BYTES == 0
            assert change.changed or not (change.hole or change.zero)
            assert change.zero or not change.hole
            found += [change] * (change.length_bytes // BLOCK_BYTES)
            at += change.length_bytes
    assert at == volume.size_bytes
    return found


def check(found: list[Change], old: Model, new: Model) -> None:
    """Nothing too little; and nothing that nobody has written."""
    for block, change in enumerate(found):
        place = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        if not change.changed:
            assert old.data[place] == new.data[place], f"a change was missed block={block}"
        else:
            assert old.turns[block] != new.turns[block], f"nobody has written block={block}"
            assert not change.zero or not any(new.data[place])


async def scribble(vdi: Vdi, model: Model, rng: random.Random, requests: int, *, spread: int = BLOCKS) -> None:
    for _ in range(requests):
        count = rng.choice((1, 1, 2, 7, 40))
        first = rng.randrange(spread - count)
        what = rng.random()
        data = bytes(count * BLOCK_BYTES)
        if what < 0.1:
            await vdi.trim(first * BLOCK_BYTES, len(data))
        elif what < 0.2:
            await vdi.zero(first * BLOCK_BYTES, len(data), no_hole=what < 0.15)
        else:
            data = rng.randbytes(8) * (len(data) // 8)
            await put(vdi, first * BLOCK_BYTES, data)
        model.note(first, count, data)


@pytest.mark.parametrize("seed", range(6))
async def test_any_two_states_against_a_model(world: World, seed: int) -> None:
    """Writes, trims, snapshots, clones, collection, reopening and pages out of memory in random order."""
    store = store_of(world)
    rng = random.Random(seed)
    vdi = await make(world, size=SIZE)
    live = {"disk": Model()}
    taken: dict[str, Model] = {}
    for turn in range(9):
        for name in list(live):
            vdi = await attach(world, name)
            await scribble(vdi, live[name], rng, 40, spread=rng.choice((BLOCKS, 300)))
            if rng.random() < 0.7:
                await vdi.give_back()
            await store.close(vdi)
            tag = f"t{turn}"
            await store.create_snapshot(name, tag)
            taken[f"{name}@{tag}"] = live[name].copy()
        if turn in (2, 5):
            source = rng.choice(sorted(taken))
            await store.clone(source, f"clone{turn}")
            live[f"clone{turn}"] = taken[source].copy()
            # A block that a clone writes is another one than the same block that its origin writes later.
            live[f"clone{turn}"].turns = [n * 1000 if n else 0 for n in live[f"clone{turn}"].turns]
            for model in taken.values():
                assert model is not live[f"clone{turn}"]
        if rng.random() < 0.3:
            await (world.stop() if rng.random() < 0.5 else world.kill())
            await world.open()
            store = store_of(world)
    vdi = await attach(world)
    if seed % 2:
        vdi._maps.limit_bytes = 0
    await scribble(vdi, live["disk"], rng, 20)
    states = {name: model for name, model in taken.items() if name.startswith("disk")} | {"disk": live["disk"]}
    volumes = {name: await store.open(name) for name in states}
    for old in states:
        for new in states:
            found = await changes(volumes[new], volumes[old], rng.choice((1, 5, 1 << 14)))
            check(found, states[old], states[new])
            if old == new:
                assert not any(change.changed for change in found)
    for name, model in live.items():
        for old, former in taken.items():
            if name.startswith("clone") or old.startswith("clone"):
                a, b = await store.open(old), await store.open(name)
                for block, change in enumerate(await changes(b, a)):
                    place = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
                    assert change.changed or former.data[place] == model.data[place]


async def test_what_collection_moves_is_no_change(world: World, disk: Vdi) -> None:
    """Random overwrites of one half: the other half's blocks share segments with it and are moved about."""
    model = Model()
    rng = random.Random(3)
    for first in rng.sample(range(BLOCKS), BLOCKS):
        data = rng.randbytes(8) * (BLOCK_BYTES // 8)
        await put(disk, first * BLOCK_BYTES, data)
        model.note(first, 1, data)
    for _ in range(4):  # before the snapshot: what it shows has been moved already
        await scribble(disk, model, rng, 200)
        await disk.give_back()
    await store_of(world).create_snapshot("disk", "s")
    then = model.copy()
    old = await store_of(world).open("disk@s")
    for _ in range(6):
        await scribble(disk, model, rng, 200, spread=BLOCKS // 2)
        await disk.give_back()
        found = await changes(disk, old)
        check(found, then, model)
        assert not any(change.changed for change in found[BLOCKS // 2 :])
    assert disk.collector.disk.live_total


async def test_a_snapshot_taken_while_a_segment_is_collected_keeps_its_blocks_where_they_are(
    world: World, disk: Vdi
) -> None:
    """A victim is read, a snapshot is taken, and only then its blocks would be moved."""
    model = Model()
    rng = random.Random(4)
    for first in rng.sample(range(BLOCKS), BLOCKS):
        data = rng.randbytes(8) * (BLOCK_BYTES // 8)
        await put(disk, first * BLOCK_BYTES, data)
        model.note(first, 1, data)
    collector = disk.collector
    reached, go_on = asyncio.Event(), asyncio.Event()
    move, moves = collector._admit, 0

    async def admit() -> None:
        nonlocal moves
        moves += 1
        reached.set()
        await go_on.wait()
        await move()

    collector._admit = admit  # type: ignore[method-assign]
    while not reached.is_set():
        await scribble(disk, model, rng, 5)
        collector.poke()
        await turns()
    assert moves
    await store_of(world).create_snapshot("disk", "s")
    old = await store_of(world).open("disk@s")
    then = model.copy()
    before = disk._writer.position
    go_on.set()
    await collector.round()
    found = await changes(disk, old)
    check(found, then, model)
    assert not any(change.changed for change in found)
    assert disk._writer.position >= before
    collector._admit = move  # type: ignore[method-assign]
    await store_of(world).close(old)
    await store_of(world).delete_snapshot("disk@s")
    await scribble(disk, model, rng, 400)
    await disk.give_back()
    assert await get(disk, 0, SIZE) == model.data


async def test_states_of_what_has_changed(world: World, disk: Vdi) -> None:
    await put(disk, 0, b"a" * 4 * BLOCK_BYTES)
    await store_of(world).create_snapshot("disk", "s")
    old = await store_of(world).open("disk@s")
    await put(disk, 0, b"b" * BLOCK_BYTES)
    await disk.trim(BLOCK_BYTES, BLOCK_BYTES)
    await disk.zero(2 * BLOCK_BYTES, BLOCK_BYTES, no_hole=True)
    wanted = [
        Change(BLOCK_BYTES, True),
        Change(BLOCK_BYTES, True, hole=True, zero=True),
        Change(BLOCK_BYTES, True, hole=False, zero=True),
        Change(SIZE - 3 * BLOCK_BYTES, False),
    ]
    assert await disk.changed(old, 0, SIZE) == wanted
    assert await disk.changed(old, 100, 2 * BLOCK_BYTES) == [
        Change(BLOCK_BYTES - 100, True),
        Change(BLOCK_BYTES, True, hole=True, zero=True),
        Change(100, True, hole=False, zero=True),
    ]
    assert await disk.changed(old, 0, SIZE, extents_max=1) == wanted[:1]
    assert (await old.changed(disk, 0, SIZE))[0] == Change(4 * BLOCK_BYTES - BLOCK_BYTES, True)


async def test_a_disk_that_has_grown(world: World, disk: Vdi) -> None:
    await put(disk, 0, b"a" * BLOCK_BYTES)
    await store_of(world).create_snapshot("disk", "s")
    await store_of(world).resize("disk", 3 * SIZE)
    old = await store_of(world).open("disk@s")
    assert await disk.changed(old, 0, 3 * SIZE) == [Change(3 * SIZE, False)]
    await put(disk, 2 * SIZE, b"b" * BLOCK_BYTES)
    found = await changes(disk, old)
    assert [at for at, change in enumerate(found) if change.changed] == [2 * SIZE // BLOCK_BYTES]
    with pytest.raises(OutOfRange):
        await old.changed(disk, 0, 3 * SIZE)


async def test_after_a_rollback_what_both_have_is_the_same(world: World, disk: Vdi) -> None:
    store = store_of(world)
    model = Model()
    rng = random.Random(5)
    await scribble(disk, model, rng, 100)
    await store.create_snapshot("disk", "a")
    then = model.copy()
    await scribble(disk, model, rng, 5)
    await store.create_snapshot("disk", "b")
    later = model.copy()
    await store.close(disk)
    await store.rollback("disk@a")
    disk = await attach(world)
    a, b = await store.open("disk@a"), await store.open("disk@b")
    assert not any(change.changed for change in await changes(disk, a))
    back = await changes(disk, b)
    check(back, later, then)
    assert 0 < sum(change.changed for change in back) < 300
    assert await disk.depths(0, SIZE) == await a.depths(0, SIZE), "what it was rolled back to is its own"
    assert {depth for _, depth in await disk.depths(0, SIZE)} == {0, 1}


async def test_depths_of_clones(world: World, disk: Vdi) -> None:
    store = store_of(world)
    await put(disk, 0, b"a" * 4 * BLOCK_BYTES)
    await store.create_snapshot("disk", "s")
    await store.clone("disk@s", "one")
    one = await attach(world, "one")
    await put(one, BLOCK_BYTES, b"b" * BLOCK_BYTES)
    await store.create_snapshot("one", "s")
    await store.clone("one@s", "two")
    two = await attach(world, "two")
    await put(two, 0, b"c" * BLOCK_BYTES)
    await two.trim(3 * BLOCK_BYTES, BLOCK_BYTES)
    await two.zero(4 * BLOCK_BYTES, BLOCK_BYTES, no_hole=True)
    b = BLOCK_BYTES
    assert await two.depths(0, 6 * b) == [(b, 1), (b, 2), (b, 3), (b, 0), (b, 1), (b, 0)]
    assert await one.depths(0, 6 * b) == [(b, 2), (b, 1), (2 * b, 2), (2 * b, 0)]
    assert await disk.depths(10, 5 * b) == [(4 * b - 10, 1), (b + 10, 0)]
    for block in range(5, 1000, 2):  # a region in the form of an array
        await put(two, block * b, b"d" * b)
    assert (await two.depths(0, 8 * b))[:8] == [(b, 1), (b, 2), (b, 3), (b, 0), (2 * b, 1), (b, 0), (b, 1)]
    snapshot = await store.open("one@s")
    assert await snapshot.depths(0, 6 * b) == await one.depths(0, 6 * b)


async def test_regions_with_the_same_page_are_not_looked_at(world: World) -> None:
    """Each region of a large disk has data; one has changed. No page of another one is read."""
    size = 64 * MIB
    disk = await make(world, size=size)
    for at in range(0, size, REGION):
        for block in range(0, 200, 2):
            await put(disk, at + block * BLOCK_BYTES, b"x" * BLOCK_BYTES)
    store = store_of(world)
    await store.create_snapshot("disk", "a")
    await disk.keeper.checkpoint()
    await put(disk, 5 * REGION, b"y" * BLOCK_BYTES)
    await store.create_snapshot("disk", "b")
    a, b = await store.open("disk@a"), await store.open("disk@b")
    for backend in world.backends:
        backend.calls.clear()
    found = await changes(b, a)
    assert [at for at, change in enumerate(found) if change.changed] == [5 * REGION_BLOCKS]
    for volume in (a, b):
        assert volume.view.map.loaded_bytes == 0, "pages that are looked at once stay out of memory"  # type: ignore[attr-defined]
    # The live map is in memory and clean: it is known to be as its page is.
    found = await changes(disk, a)
    assert [at for at, change in enumerate(found) if change.changed] == [5 * REGION_BLOCKS]


async def test_one_call_does_a_bounded_amount_of_work(world: World) -> None:
    disk = await make(world, size=64 * GIB * 4)
    await store_of(world).create_snapshot("disk", "a")
    old = await store_of(world).open("disk@a")
    for region in range(100):
        await put(disk, region * REGION, b"x" * BLOCK_BYTES)
    found = await disk.changed(old, 0, disk.size_bytes)
    covered = sum(change.length_bytes for change in found)
    assert covered <= WORK_MAX // WORK_COMPARED * REGION
    found = await disk.changed(old, 100 * REGION, disk.size_bytes - 100 * REGION)
    assert found == [Change(WORK_MAX * REGION, False)]


async def test_pages_that_move_while_they_are_read_are_read_again(world: World, disk: Vdi) -> None:
    model = Model()
    rng = random.Random(6)
    await scribble(disk, model, rng, 100)
    await store_of(world).create_snapshot("disk", "a")
    then = model.copy()
    await scribble(disk, model, rng, 100)
    old = await store_of(world).open("disk@a")
    disk._maps.limit_bytes = 0
    await disk.keeper.checkpoint()
    disk.disk.evict()
    executor = executor_of(store_of(world).env)
    executor.hold(0, 1, 2)
    asking = asyncio.create_task(disk.changed(old, 0, SIZE))
    await turns()
    assert not asking.done()
    executor.release(0, 1, 2)
    data = b"n" * BLOCK_BYTES
    await put(disk, 7 * BLOCK_BYTES, data)
    model.note(7, 1, data)
    await asking
    check(await changes(disk, old), then, model)


async def test_a_map_page_that_is_lost_is_an_error_and_not_no_change(
    world: World, disk: Vdi, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("map pages unreadable")
    rng = random.Random(7)
    model = Model()
    await scribble(disk, model, rng, 100)
    store = store_of(world)
    await store.create_snapshot("disk", "a")
    await scribble(disk, model, rng, 100)
    await store.create_snapshot("disk", "b")
    a, b = await store.open("disk@a"), await store.open("disk@b")
    name = f"checkpoint/{disk.disk.log:06x}/{store.find_snapshot('disk@a').checkpoint:08x}"
    world.damage(name, 4096 + 20, zones=[zone for zone in range(3) if name in world.storages[zone].objects])
    with pytest.raises(Corrupt):
        await changes(b, a)


async def test_what_can_not_be_compared(world: World, disk: Vdi) -> None:
    with pytest.raises(InvalidRequest, match="no volume of the same store"):
        await disk.changed(MemoryVolume("other", SIZE), 0, SIZE)
    await store_of(world).create_snapshot("disk", "a")
    old = await store_of(world).open("disk@a")
    for length, extents_max in ((0, 1), (SIZE, 0)):
        with pytest.raises(InvalidRequest):
            await disk.changed(old, 0, length, extents_max=extents_max)
        with pytest.raises(InvalidRequest):
            await disk.depths(0, length, extents_max=extents_max)
    with pytest.raises(Busy, match="attached"):
        await store_of(world).delete_snapshot("disk@a")
    await store_of(world).close(old)
    with pytest.raises(Stopping):
        await disk.changed(old, 0, SIZE)


async def test_the_map_of_a_snapshot_that_has_to_wait_for_space(
    world: World, disk: Vdi, expected_warnings: ExpectedWarnings
) -> None:
    """The frozen regions of a checkpoint that finds no space are not what the newest checkpoint says."""
    expected_warnings.allow("no space")
    model = Model()
    rng = random.Random(8)
    await scribble(disk, model, rng, 100)
    store = store_of(world)
    await store.create_snapshot("disk", "a")
    then = model.copy()
    await scribble(disk, model, rng, 50)
    refuse_checkpoints(world)
    await store.create_snapshot("disk", "b")
    old = await store.open("disk@a")
    check(await changes(disk, old), then, model)
    await scribble(disk, model, rng, 50)
    check(await changes(disk, old), then, model)


def array_of(changes: dict[int, int]) -> Region:
    values = expand(1 << 40 | 1)
    for at, entry in changes.items():
        values[at] = entry
    return values


@pytest.mark.parametrize("form", ["entries", "smallest"])
def test_regions_compared(form: str) -> None:
    base = 1 << 40 | 1
    old: Region | None = array_of({5: 0, 6: 1})
    new: Region | None = array_of({4: 0, 5: 1, 6: 2 << 40 | 7, 1000: 0})
    if form == "smallest":
        old, new = compact(old), compact(new)  # type: ignore[arg-type]
    wanted = [(SAME, 4), (TO_HOLE, 1), (TO_RESERVED, 1), (DATA, 1), (SAME, 993), (TO_HOLE, 1), (SAME, 23)]
    assert compare(old, new, 0, REGION_BLOCKS) == wanted
    assert compare(old, new, 5, 8) == [(TO_RESERVED, 1), (DATA, 1), (SAME, 1)]
    assert compare(old, old, 3, 900) == [(SAME, 897)]
    assert compare(None, base, 0, 10) == [(DATA, 10)]
    assert compare(base, None, 0, 10) == [(TO_HOLE, 10)]
    assert compare(1, None, 0, 10) == [(TO_HOLE, 10)]
    assert compare(None, 1, 0, 10) == [(TO_RESERVED, 10)]

"""Collection: space comes back, a client's write always wins, nothing is lost however the process ends."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from objstore.backend.base import ZoneFailed
from objstore.format.record import KIND_SHIFT, Kind
from objstore.log.collect import SPACE_QUIET, SPACE_TIGHT, TIGHT_SEGMENTS
from objstore.log.reader import in_turn, read_run, reader_for
from objstore.log.segment import Segment, segment_number
from objstore.log.tail import look_at
from objstore.units import BLOCK_BYTES
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World, executor_of, turns


@pytest.fixture
async def disk() -> AsyncIterator[ModelDisk]:
    world = World(2)
    await world.open(create=True)
    yield await ModelDisk(world).create()
    await world.kill()


async def settle(disk: ModelDisk) -> None:
    """Let collection do all it finds to do, and free what may be freed."""
    for _ in range(3):
        await turns(300)
        await disk.vdi.keeper.checkpoint()
    await turns(300)


def stored_blocks(disk: ModelDisk) -> int:
    objects = disk.world.storages[0].objects
    return sum(len(objects[name]) for name in disk.segments) // BLOCK_BYTES


def kinds(disk: ModelDisk) -> set[int]:
    """Kinds of operations in the sealed segments of zone 0."""
    found: set[int] = set()
    env = disk.vdi.disk.env
    for name in disk.segments:
        directory = look_at(env.zones[0].backend, env.store_id, LOG, segment_number(name) or 0).directory
        if directory is not None:
            found.update(bits >> KIND_SHIFT & 0xFF for bits in directory.words)
    return found


async def test_overwritten_data_gives_its_space_back(disk: ModelDisk) -> None:
    for _ in range(12):
        for first in range(0, 600, 20):
            await disk.write(first, 20)
        await disk.check()
    await disk.vdi.flush()
    await settle(disk)
    segment_blocks = disk.vdi.disk.writer.segment_blocks
    assert stored_blocks(disk) <= 600 * SPACE_TIGHT + (TIGHT_SEGMENTS + 8) * segment_blocks
    assert disk.vdi.keeper.freed > 20
    await disk.check()


async def test_sparse_segments_are_moved_together(disk: ModelDisk) -> None:
    for _ in range(6):
        for first in range(0, 1000, 4):
            await disk.write(first, 1 + disk.dice.randrange(3))
    await disk.vdi.flush()
    await settle(disk)
    assert Kind.MOVE in kinds(disk)
    await disk.check()
    live = sum(segment.live for segment in disk.vdi.disk.segments.values())
    assert live == disk.vdi.disk.live_total == sum(any(disk.expected(block)) for block in range(disk.blocks))
    await disk.reopen(clean=False)
    await disk.check()
    assert disk.vdi.disk.live_total == live


@pytest.mark.parametrize("clean", [True, False])
async def test_collection_goes_on_after_a_restart(disk: ModelDisk, clean: bool) -> None:
    for _ in range(5):
        await disk.churn(150)
        await disk.vdi.flush()
        await disk.reopen(clean=clean)
        await disk.check()
    await settle(disk)
    assert stored_blocks(disk) <= disk.vdi.disk.live_total * SPACE_TIGHT + 16 * disk.vdi.disk.writer.segment_blocks


async def test_a_write_during_the_move_wins(disk: ModelDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients overwrite, trim and reserve blocks between their reading and their moving."""
    met = 0

    async def read_and_be_overtaken(*arguments):  # type: ignore[no-untyped-def]
        nonlocal met
        found = await read_run(*arguments)
        for _ in range(3):
            met += 1
            first = disk.dice.randrange(disk.blocks - 2)
            choice = disk.dice.randrange(6)
            if disk.vdi._turn.locked():
                break
            if choice == 0:
                await disk.trim(first, 2)
            elif choice == 1:
                await disk.reserve(first, 2)
            else:
                disk.model[first * BLOCK_BYTES : (first + 1) * BLOCK_BYTES] = data = disk.dice.randbytes(BLOCK_BYTES)
                if not disk.vdi.write_now(first * BLOCK_BYTES, memoryview(data)):
                    await disk.vdi.write(first * BLOCK_BYTES, memoryview(data))
        return found

    monkeypatch.setattr("objstore.log.collect.read_run", read_and_be_overtaken)
    for _ in range(10):
        for _ in range(200):
            await disk.write(disk.dice.randrange(1000), 3)
        await disk.check()
    await disk.vdi.flush()
    assert met > 50
    monkeypatch.undo()
    await disk.check()
    await disk.reopen(clean=False)
    await disk.check()


async def test_checksums_travel_with_moved_blocks(disk: ModelDisk, expected_warnings: ExpectedWarnings) -> None:
    """What rots in both zones is not made valid by moving it: its segment stays, and reads go on to fail."""
    expected_warnings.allow("checksum wrong")
    expected_warnings.allow("segment can't be collected, blocks damaged in every zone")
    for first in range(0, 1000, 4):
        await disk.write(first, 2)
    await disk.vdi.flush()
    disk.damage(100)
    bad, _ = disk.place(100)
    for _ in range(6):
        for first in range(104, 1000, 4):
            await disk.write(first, 2)
    await disk.vdi.flush()
    await settle(disk)
    assert bad in disk.segments
    for block in (101, 104, 200):
        assert await disk.read(block) == disk.expected(block)
    with pytest.raises(Exception, match="no zone has these blocks whole"):
        await disk.read(100)


async def test_a_bad_copy_is_not_moved(disk: ModelDisk, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("checksum wrong")
    for first in range(0, 1000, 4):
        await disk.write(first, 2)
    await disk.vdi.flush()
    for block in range(0, 1000, 4):
        disk.damage(block, zones=[block // 4 % 2])
    for _ in range(6):
        for first in range(500, 1000, 4):
            await disk.write(first, 2)
    await disk.vdi.flush()
    await settle(disk)
    await disk.check()
    await disk.reopen(clean=True)
    await disk.check()


async def unmovable(disk: ModelDisk) -> set[int]:
    """Numbers of segments that could not be collected, because no zone in service has all their blocks whole."""
    await disk.world.store.env.put_out(1, ZoneFailed("it is gone"))  # type: ignore[union-attr]
    for first in range(0, 1000, 4):
        await disk.write(first, 2)
    await disk.vdi.flush()
    for block in range(0, 1000, 4):
        disk.damage(block, zones=[0])
    for _ in range(3):
        for first in range(0, 1000, 4):
            if first % 16:
                await disk.write(first, 2)
    await disk.vdi.flush()
    await settle(disk)
    stuck = set(disk.vdi.collector._unmovable)
    assert stuck & disk.vdi.disk.segments.keys() == stuck != set()
    return stuck


async def test_damaged_segments_go_when_their_blocks_have_been_overwritten(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong|put out|out of service|can't be collected|a copy is bad|no zone has all")
    stuck = await unmovable(disk)
    for first in range(0, 1000, 4):
        await disk.write(first, 2)
    await disk.vdi.flush()
    await settle(disk)
    assert not set(stuck) & disk.vdi.disk.segments.keys()
    await disk.check()


async def test_memory_that_a_read_which_hangs_may_still_fill_is_not_used_again(
    disk: ModelDisk, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """The collector reads all its victims into the same memory; a zone is put out under one of these reads."""
    expected_warnings.allow("read failed|put out|out of service")
    for first in range(0, 300, 20):
        await disk.write(first, 20)
    await disk.vdi.keeper.checkpoint()
    await turns()
    env, collector = disk.vdi.disk.env, disk.vdi.collector
    victim = next(s for s in disk.vdi.disk.segments.values() if s.live and in_turn(env, s)[0] == 1)

    async def read_and_hang(*arguments):  # type: ignore[no-untyped-def]
        await reader_for(env, victim, 1)
        executor_of(env).hold(1)
        return await read_run(*arguments)

    monkeypatch.setattr("objstore.log.collect.read_run", read_and_hang)
    fetch = asyncio.create_task(collector._fetch(victim, 0))
    await turns()
    assert not fetch.done()
    lent = collector._buffers[0]
    assert lent is not None
    await env.put_out(1, ZoneFailed("no answer"))
    fetched = await fetch
    assert fetched is not None
    content = bytes(fetched.data)
    lent[:] = bytes(len(lent))  # the call ends at last, and fills what it was given
    assert bytes(fetched.data) == content
    monkeypatch.undo()
    again = await collector._fetch(victim, 2)
    assert again is not None
    lent[:] = bytes(len(lent))
    assert bytes(again.data) == content
    executor_of(env).release(1)


async def test_discarded_disks_are_given_back_whole(disk: ModelDisk) -> None:
    for first in range(0, 1000, 20):
        await disk.write(first, 20)
    await disk.vdi.flush()
    assert stored_blocks(disk) > 1000
    await disk.trim(0, disk.blocks)
    await disk.vdi.flush()
    await settle(disk)
    assert disk.vdi.disk.live_total == 0
    assert stored_blocks(disk) <= 4 * disk.vdi.disk.writer.segment_blocks
    await disk.check()


async def test_large_requests_and_collection_at_once(disk: ModelDisk) -> None:
    """Moves stand between the parts of requests that take several records; both survive a replay."""
    for turn in range(10):
        writes = [asyncio.create_task(disk.write(first, 200)) for first in (0, 250, 500, 750)]
        await asyncio.gather(*writes)
        for first in range(0, 1000, 10):
            await disk.write(first + turn % 10)
    await disk.vdi.flush()
    await disk.check()
    await disk.reopen(clean=False)
    await disk.check()


async def test_the_end_of_the_process_at_any_moment_of_collection(disk: ModelDisk) -> None:
    for turn in range(12):
        for first in range(0, 1000, 6):
            await disk.write(first, 3)
        await disk.vdi.flush()
        await turns(7 * turn)
        await disk.reopen(clean=False)
        await disk.check()


async def test_who_needs_space_is_told_of_what_is_freed_while_collection_goes_on(
    disk: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every move leaves something worth moving again, rounds follow each other for ever."""
    collector, keeper = disk.vdi.collector, disk.vdi.keeper
    rounds = 0

    async def another() -> bool:
        nonlocal rounds
        rounds += 1
        keeper.freed += rounds == 5
        await asyncio.sleep(0)
        return rounds < 1000

    monkeypatch.setattr(collector, "_worthwhile", lambda: True)
    monkeypatch.setattr(collector, "_round", another)
    assert await collector.reclaim()
    assert rounds < 1000


async def test_who_waits_for_space_has_it_looked_at_again(disk: ModelDisk) -> None:
    """Space was tight when collection last looked, and nothing since then has made it look (simulation, seed 882)."""
    await disk.write(0, 3)
    disk.vdi.collector.tight = True
    async with asyncio.timeout(10):
        await disk.vdi.write(0, memoryview(bytes(BLOCK_BYTES)))
    assert not disk.vdi.collector.tight


@pytest.mark.parametrize("paged_out", [False, True])
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
async def test_a_large_discard_that_was_not_counted_before_the_end(
    paged_out: bool, clean: bool, checkpoint: bool
) -> None:
    world = World(1)
    await world.open(create=True)
    try:
        disk = await ModelDisk(world, blocks=80 * 1024).create(copies=1)
        for first in range(0, disk.blocks, 1000):
            await disk.write(first, 3)
        await disk.vdi.flush()
        if paged_out:
            await disk.reopen(clean=True)
        await disk.write(7, 3)
        await disk.trim(0, disk.blocks)
        if checkpoint:
            await disk.vdi.keeper.checkpoint()
        await disk.vdi.flush()
        await disk.reopen(clean=clean)
        await disk.write(5)
        await disk.vdi.flush()
        await settle(disk)
        assert disk.vdi.disk.live_total == 1
        assert stored_blocks(disk) <= 4 * disk.vdi.disk.writer.segment_blocks
    finally:
        await world.kill()


def files_allowed(disk: ModelDisk, space: float) -> float:
    """Blocks that the files may have when collection has nothing to do above `space`: it ends within a victim."""
    return disk.vdi.disk.live_total * space + 2 * disk.vdi.disk.writer.segment_blocks


def files(disk: ModelDisk) -> int:
    return disk.vdi.disk.total_blocks + disk.vdi.disk.dead_blocks


@pytest.fixture
async def resting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelDisk]:
    """A disk with garbage that is not enough for collection while clients are busy. They are, until `_look`."""
    monkeypatch.setattr("objstore.log.collect.QUIET_SECONDS", 3600.0)
    monkeypatch.setattr("objstore.log.collect.SPACE_START", 2.5)
    monkeypatch.setattr("objstore.log.collect.SPACE_TIGHT", 3.0)
    monkeypatch.setattr("objstore.log.collect.SLACK_SEGMENTS", 0)
    world = World(2)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=4096).create()
    for first in range(0, 4096, 16):
        await disk.write(first, 16)
    for _ in range(2000):
        await disk.write(disk.dice.randrange(4094), 2)
    await disk.vdi.flush()
    assert files(disk) > 1.5 * disk.vdi.disk.live_total
    yield disk
    await world.kill()


@pytest.mark.parametrize("rest", [False, True])
async def test_clients_that_rest_find_room_afterwards(
    resting: ModelDisk, monkeypatch: pytest.MonkeyPatch, rest: bool
) -> None:
    if rest:
        monkeypatch.setattr("objstore.log.collect.QUIET_SECONDS", 0.0)
        resting.vdi.collector._look(resting.vdi.disk.env.requests)
    for _ in range(10):
        await settle(resting)
    assert (files(resting) <= files_allowed(resting, SPACE_QUIET)) == rest
    await resting.check()
    await resting.reopen(clean=False)
    await resting.check()


async def test_a_request_ends_the_collection_of_a_rest(resting: ModelDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not later than with the segment under way, however much more there would be to do."""
    collector = resting.vdi.collector
    moved = 0
    collect = collector._collect

    async def collect_beside_a_client(segment: Segment, *arguments: Any) -> None:
        nonlocal moved
        moved += segment.live > 0
        await collect(segment, *arguments)
        if moved == 2:
            await resting.read(0)

    monkeypatch.setattr(collector, "_collect", collect_beside_a_client)
    collector._look(resting.vdi.disk.env.requests)
    await turns(3000)
    assert moved == 2
    assert collector._quiet_timer is not None, "looks again whether clients rest"
    assert files(resting) > files_allowed(resting, SPACE_QUIET)


async def test_the_collection_of_a_rest_ends_where_nothing_is_gained(
    resting: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that checkpoints cut short are as sparse as what they replace: moved for ever (simulation, seed 368)."""
    collector, keeper = resting.vdi.collector, resting.vdi.keeper
    moved = 0
    append = collector._append

    def append_and_cut(segment: Segment, *arguments: Any) -> Any:
        nonlocal moved
        moved += len(arguments[0])
        asyncio.get_running_loop().call_soon(keeper._force)
        return append(segment, *arguments)

    monkeypatch.setattr("objstore.log.collect.MOVE_BLOCKS_MAX", 2)
    monkeypatch.setattr(collector, "_append", append_and_cut)
    collector._look(resting.vdi.disk.env.requests)
    live = resting.vdi.disk.live_total
    for _ in range(100):
        await turns(1000)
        before = moved
        await turns(1000)
        if moved == before:
            break
    assert live * 0.1 < moved <= live + resting.vdi.disk.writer.segment_blocks
    assert collector._quiet_timer is None, "and nobody looks again before a client asks for something"


async def test_the_first_flush_after_a_rest_waits_for_little(
    resting: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What collection appends while clients rest is made durable segment by segment."""
    collector, env = resting.vdi.collector, resting.vdi.disk.env
    monkeypatch.setattr(env, "request_syncs", [])  # nothing but a flush makes anything durable
    dirty: list[int] = []
    begin = collector._collect

    async def collect(segment: Segment, *arguments: Any) -> None:
        dirty.append(env.dirty_bytes)
        await begin(segment, *arguments)

    monkeypatch.setattr(collector, "_collect", collect)
    collector._look(env.requests)
    await turns(3000)
    assert len(dirty) > 5
    assert max(dirty) == 0


async def test_no_timer_runs_on_a_disk_without_garbage(disk: ModelDisk) -> None:
    await disk.write(0, 20)
    await disk.vdi.flush()
    await settle(disk)
    assert disk.vdi.collector._quiet_timer is None

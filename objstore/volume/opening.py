"""Opening a VDI: checkpoint, tail, replay, the copy of what was not sealed; until its head record commits, nothing."""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

from objstore.backend.base import Backend
from objstore.errors import StoreError
from objstore.format.catalog import HeadEntry, VdiEntry
from objstore.format.checkpoint import DEAD
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.checkpoint import Loaded, load_pages, newest_checkpoint
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.keeper import FREES_CHECKED, Keeper
from objstore.log.opening import Base, Head, Tail, copy_rest, read_tail
from objstore.log.regions import decode_region, tally
from objstore.log.replay import Replay
from objstore.log.segment import Segment, segment_name
from objstore.log.writer import LogWriter
from objstore.replica.placement import choose
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES, REGION_BLOCKS

SEGMENTS_PER_RUN = 16
"""Consecutive segments share their zones, so that a flush seldom waits for more than one set of them."""
NO_HEAD = Head(0, (), 0, 0, True)


class Opened(NamedTuple):
    """An open log and the head record that must be committed before it serves; `garbage` may go after that."""

    disk: Disk
    keeper: Keeper
    head: HeadEntry
    garbage: dict[int, tuple[int, ...]]
    newest_wall_us: int


def placement(env: Env, log: int, copies: int) -> Callable[[int], tuple[int, ...]]:
    """Segment number -> its zones, by rendezvous hashing over runs of segments."""
    weights = [(zone.zone_id.hex(), 1.0) for zone in env.zones]
    index = {zone.zone_id.hex(): zone.index for zone in env.zones}

    @functools.lru_cache(maxsize=64)
    def place_run(number: int) -> tuple[int, ...]:
        return tuple(sorted(index[zone_id] for zone_id in choose(weights, log << 32 | number, copies)))

    return lambda number: place_run(number // SEGMENTS_PER_RUN)


async def open_disk(env: Env, vdi: VdiEntry, entry: HeadEntry | None) -> Opened:
    """Corrupt, Unavailable: it can't be opened without losing what was flushed."""
    log = vdi.log
    blocks = -(-vdi.size_bytes // BLOCK_BYTES)
    head = NO_HEAD
    if entry is not None:
        head = Head(entry.generation, tuple(entry.tail), entry.first_number, entry.checkpoint, entry.clean)
    place = placement(env, log, vdi.copies)
    # Checkpoints lie where segment 0 would, so that their place needs no record of its own.
    checkpoint_zones = place(0)
    loaded, sizes = await newest_checkpoint(env, log, head.checkpoint, checkpoint_zones)
    base = Base(0, 0, 0)
    pages: dict[int, PageRef] = {}
    if loaded is not None:
        base = Base(loaded.header.position, loaded.header.previous_crc, loaded.header.next_segment)
        columns = [loaded.root[name].tolist() for name in ("region", "checkpoint", "offset", "length")]
        pages = {region: PageRef(*ref) for region, *ref in zip(*columns, strict=True)}
    tail = await read_tail(env, log, head, base)
    position, previous_crc = base.position, base.previous_crc
    if tail.sealed:
        position, previous_crc = tail.sealed[-1][0].last_position, tail.sealed[-1][0].last_crc
    writer = LogWriter(
        env,
        log,
        generation=head.generation + 1,
        copies=vdi.copies,
        next_number=tail.next_number,
        position=position,
        previous_crc=previous_crc,
        place=place,
        segment_bytes=env.settings.segment_bytes,
    )
    disk = Disk(env, log, blocks, BlockMap(pages), writer)
    disk.checkpoint_zones = lambda number: checkpoint_zones
    disk.pages = pages
    keeper = Keeper(disk)
    _restore_keeper(keeper, loaded, sizes)
    keeper.durable_number = min(head.checkpoint, keeper.number)
    kept = _restore_segments(disk, loaded, tail)
    try:
        # They may take the very space that the copies need.
        await drop_garbage(env, log, {number: tail.unkept[number] for number in tail.empty})
        await _replay(disk, tail)
    except StoreError:
        await close_disk(disk)
        made = {n: segment.zones for n, segment in disk.segments.items() if segment.generation == writer.generation}
        with contextlib.suppress(StoreError):  # what is left is garbage that the next try removes
            await drop_garbage(env, log, made)
        raise
    first_number = max([tail.next_number, *(number + 1 for number in disk.segments)])
    tail_start = loaded.header.previous_next_segment if loaded is not None else 0
    numbers = {n for n in (*disk.segments, *disk.dead) if n >= tail_start}
    committed = HeadEntry(
        log=log,
        generation=writer.generation,
        tail=sorted(numbers),
        first_number=first_number,
        checkpoint=keeper.durable_number,
        clean=False,
    )
    garbage = {n: zones for n, zones in tail.unkept.items() if n not in kept and n not in tail.empty}
    return Opened(disk, keeper, committed, garbage, tail.newest_wall_us)


def _restore_keeper(keeper: Keeper, loaded: Loaded | None, sizes: dict[int, int]) -> None:
    keeper.sizes = dict(sizes)
    keeper.previous_needs = frozenset(sizes)
    keeper.next_number = max(sizes, default=0) + 1
    if loaded is not None:
        keeper.number = loaded.header.number
        keeper.position = loaded.header.position
        keeper.next_segment = loaded.header.next_segment
        keeper.previous_next_segment = loaded.header.previous_next_segment
        keeper.pages = keeper.disk.pages


def _restore_segments(disk: Disk, loaded: Loaded | None, tail: Tail) -> set[int]:
    """Segment objects for the checkpoint's table and the sealed tail; the numbers of all that are kept."""
    kept: set[int] = set()
    if loaded is not None:
        names = ("number", "blocks", "seal_crc", "live", "zones", "generation", "state")
        for number, blocks, seal_crc, live, mask, generation, state in zip(
            *(loaded.table[name].tolist() for name in names), strict=True
        ):
            zones = tuple(z.index for z in disk.env.zones if mask >> z.index & 1)
            segment = Segment(disk.log, number, generation, zones, blocks)
            segment.sealed = True
            segment.seal_crc = seal_crc
            segment.live = live
            kept.add(number)
            if state == DEAD:
                disk.env.segments[segment.key] = segment
                disk.dead[number] = (segment, FREES_CHECKED - 1)
                disk.dead_blocks += blocks
            else:
                disk.add_segment(segment)
    for directory, zones, blocks in tail.sealed:
        segment = Segment(disk.log, directory.segment, directory.generation, zones, blocks)
        segment.sealed = True
        segment.seal_crc = directory.crc
        kept.add(directory.segment)
        disk.add_segment(segment)
    return kept


async def _replay(disk: Disk, tail: Tail) -> None:
    """Bring map and live counters to the end of the log; copy what was not sealed."""
    env = disk.env
    before: dict[int, int] = {}

    async def load(wanted: list[tuple[int, PageRef]]) -> None:
        if wanted:
            for region, ref, page in await load_pages(env, disk.log, wanted, disk.checkpoint_zones):
                value = decode_region(page)
                tally(value, 0, REGION_BLOCKS, before)
                disk.map.load(region, ref, value)

    replay = Replay(disk.map, load)
    for directory, _, _ in tail.sealed:
        await replay.add(directory)
    if tail.rest:
        await copy_rest(disk.writer, tail.rest)
        for directory in disk.finished:
            await replay.add(directory)
        disk.finished.clear()
    await replay.finish()
    # Dropped regions that were in memory: what was loaded is in `before`, what the replay made was never counted.
    disk.map.dropped.clear()
    for key, count in before.items():
        segment = env.segments.get(key)
        if segment is not None:
            segment.live -= count
    disk.map.dropped.clear()  # counted in `before`, or never counted at all
    for key, count in disk.map.count_live().items():
        env.segments[key].live += count
    disk.live_total = sum(segment.live for segment in disk.segments.values())


async def close_disk(disk: Disk) -> None:
    """Give back what an opening took that did not come to its end."""
    await disk.writer.close()
    for segment in [*disk.segments.values(), *(segment for segment, _ in disk.dead.values())]:
        disk.env.segments.pop(segment.key, None)
        segment.close_handles()


async def drop_garbage(env: Env, log: int, garbage: dict[int, tuple[int, ...]]) -> None:
    """Remove segments that no committed head or checkpoint needs."""
    for number, zones in garbage.items():
        for zone in zones:
            await run(env.executor, zone, env.zones[zone].backend.delete, segment_name(log, number))


def purge_log(backend: Backend, folders: list[str]) -> None:
    """In a zone's thread: remove every object of a deleted log, durably."""
    for folder in folders:
        backend.delete_all(folder)

"""Opening a VDI: checkpoint, tail, replay, the copy of what was not sealed; until its head record commits, nothing."""

from __future__ import annotations

import functools
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from objstore.backend.base import Backend
from objstore.errors import StoreError
from objstore.format.catalog import HeadEntry, TailRow, VdiEntry
from objstore.format.checkpoint import DEAD, KEPT, LIVE, CheckpointHeader
from objstore.log.address import BLOCK_BITS, LOG_BITS, SEGMENT_BITS
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.checkpoint import (
    CheckpointZones,
    Loaded,
    LostPages,
    checkpoint_folder,
    find_checkpoint,
    newest_checkpoint,
)
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.holds import live_numbers, pages_of
from objstore.log.keeper import FREES_CHECKED, Keeper
from objstore.log.mapbulk import tally_regions
from objstore.log.opening import Base, Head, Row, Tail, believe, copy_rest, list_folder, read_tail
from objstore.log.parts import Owed, Uncounted, state_of
from objstore.log.regions import Region, expand, view
from objstore.log.replay import Replay
from objstore.log.root import Root, rebased
from objstore.log.segment import Segment, segment_name
from objstore.log.tail import SurvivingRecord
from objstore.log.trust import Trust
from objstore.log.writer import LogWriter
from objstore.replica.membership import Membership
from objstore.replica.placement import choose
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES

logger = logging.getLogger(__name__)

SEGMENTS_PER_RUN = 16
"""Consecutive segments share their zones, so that a flush seldom waits for more than one set of them."""
RUNS_CACHED = 64
UNKNOWN_REGION = ((1 << LOG_BITS + SEGMENT_BITS) - 1) << BLOCK_BITS | 1
"""One run of entries in the last segment of the last log there can be."""
NO_HEAD = Head(0, (), 0, 0, True)
CHECKPOINT_STRIDE = 1 << 10
CHECKPOINT_STRIDE_FORCED = 1 << 20
"""How far above all checkpoint numbers that are known a run begins to count: zones that are not here may have a few
more, one for each checkpoint that was cut off; or, where a branch was given up by --force, whatever that made."""


class FrozenAt(NamedTuple):
    """A snapshot in the log that is opened: its map is the one behind `position`, checkpoint number `checkpoint`."""

    snapshot_id: int
    checkpoint: int
    position: int


class Opened(NamedTuple):
    """An open log and the head record that must be committed before it serves; `garbage` may go after that. owed: the
    snapshot, if any, whose map is written once the log serves, under a number of this run that is committed with the
    head."""

    disk: Disk
    keeper: Keeper
    head: HeadEntry
    garbage: dict[int, tuple[int, ...]]
    newest_wall_us: int
    owed: FrozenAt | None


class Placement:
    """Segment number -> its zones: weighted rendezvous hashing over runs of segments, among the members that take new
    data. Every object of an epoch gets `copies` of them, or all if they are fewer: opening relies on it."""

    def __init__(self, membership: Membership, log: int, copies: int) -> None:
        self._membership = membership
        self._log = log
        self.copies = copies
        self._version = -1
        self._runs: dict[int, tuple[int, ...]] = {}

    def set_copies(self, copies: int) -> None:
        """From now on."""
        self.copies = copies
        self._version = -1

    def __call__(self, number: int) -> tuple[int, ...]:
        membership = self._membership
        if membership.version != self._version or len(self._runs) > RUNS_CACHED:
            self._version = membership.version
            self._runs.clear()
        run_number = number // SEGMENTS_PER_RUN
        zones = self._runs.get(run_number)
        if zones is None:
            numbers = {member.id: member.number for member in membership.placeable()}
            weights = [(member.id, member.weight) for member in membership.placeable()]
            chosen = choose(weights, self._log << 32 | run_number, self.copies)
            zones = self._runs[run_number] = tuple(sorted(numbers[zone_id] for zone_id in chosen))
        return zones


def min_copies(env: Env, copies: int) -> int:
    """How many zones a VDI with so many copies must have in service to take writes."""
    return min(copies, env.settings.min_copies or max(1, copies - 1))


def head_of(entry: HeadEntry) -> Head:
    """The head as the log layer sees it."""
    rows = tuple(Row(row.number, row.seal_crc, zones_of_mask(row.zones)) for row in entry.tail)
    return Head(
        entry.generation,
        rows,
        entry.first_number,
        entry.checkpoint,
        entry.clean,
        entry.epoch,
        entry.copies,
        entry.base_checkpoint,
        entry.first_checkpoint,
    )


def tail_rows(disk: Disk, start: int) -> list[TailRow]:
    """The sealed segments from `start` on, as a head names them."""
    segments = [*disk.segments.values(), *(segment for segment, _ in disk.dead.values())]
    found = [s for s in segments if s.number >= start]
    return rows_of(sorted(found, key=lambda s: s.number))


def rows_of(segments: Iterable[Segment]) -> list[TailRow]:
    """As a head names them."""
    return [TailRow(s.number, s.seal_crc, sum(1 << z for z in s.zones)) for s in segments]


@functools.lru_cache(1024)
def zones_of_mask(mask: int) -> tuple[int, ...]:
    """The zone numbers of a mask. Remembered: a table names the same few sets thousands of times."""
    return tuple(z for z in range(mask.bit_length()) if mask >> z & 1)


async def open_disk(
    env: Env,
    membership: Membership,
    vdi: VdiEntry,
    entry: HeadEntry | None,
    *,
    snapshots: Sequence[FrozenAt] = (),
    base_root: Root | None = None,
    force: bool = False,
) -> Opened:
    """Corrupt: it can't be opened without losing what was flushed. Unavailable: not without zones that are missing,
    which are named. force: then open what there is of it. snapshots: whose maps are in this log. base_root: what
    a clone's map begins with; the logs that it is in are open."""
    log = vdi.log
    blocks = -(-max(vdi.size_bytes, vdi.former_bytes) // BLOCK_BYTES)
    head = NO_HEAD if entry is None else head_of(entry)
    place = Placement(membership, log, vdi.copies)
    trust = Trust(env, membership.history)
    zones = CheckpointZones(env, place)
    listings = await list_folder(env, trust, checkpoint_folder(log))
    if not force:
        believe(trust, head)  # which goes for the checkpoints too
    ended = range(head.base_checkpoint + 1, head.first_checkpoint)
    loaded, sizes = await newest_checkpoint(
        env, log, head.checkpoint, ended, zones, listings, copies=head.copies, force=force
    )
    base = Base(0, 0, 0)
    root = Root() if base_root is None else base_root
    if loaded is not None:
        base = Base(loaded.header.position, loaded.header.previous_crc, loaded.header.next_segment)
        root = Root(loaded.root) if base_root is None else rebased(Root(loaded.root), base_root)
    pages = await root.pages()
    tail = await read_tail(env, log, head, base, trust=trust, force=force)
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
    disk.checkpoint_zones = env.page_zones[log] = zones
    disk.base_root = base_root
    keeper = Keeper(disk)
    keeper.root = root
    _restore_keeper(keeper, loaded, sizes)
    if entry is not None:
        stride = CHECKPOINT_STRIDE_FORCED if membership.history.forced_since(entry.epoch) else CHECKPOINT_STRIDE
        keeper.next_number = max(keeper.next_number - 1, head.checkpoint, head.first_checkpoint) + stride
    keeper.durable_number = min(head.checkpoint, keeper.number)
    kept = _restore_segments(disk, loaded, tail)
    owed = await _restore_holds(keeper, zones, snapshots)
    if owed is not None:
        owed = owed._replace(checkpoint=keeper.next_number)
    epoch = membership.epoch
    try:
        # They may take the very space that the copies need.
        await drop_garbage(env, log, tail.empty)
        await _replay(keeper, tail, owed)
    except StoreError:
        await close_disk(disk)
        made = {n: segment.zones for n, segment in disk.segments.items() if segment.generation == writer.generation}
        await drop_garbage(env, log, made)  # what is left is garbage that the next try removes
        raise
    # Copying the end took what zones there are: what can be read may be read.
    writer.min_copies = min_copies(env, vdi.copies)
    first_number = max([tail.next_number, *(number + 1 for number in disk.segments)])
    tail_start = loaded.header.previous_next_segment if loaded is not None else 0
    committed = HeadEntry(
        log=log,
        generation=writer.generation,
        tail=tail_rows(disk, tail_start),
        first_number=first_number,
        checkpoint=keeper.durable_number,
        clean=False,
        epoch=epoch.id,
        copies=vdi.copies,
        base_checkpoint=keeper.number,
        first_checkpoint=keeper.next_number,
    )
    garbage: dict[int, tuple[int, ...]] = {}
    for number, shown in tail.shown.items():
        gone = set(shown).difference(kept.get(number, ()), tail.empty.get(number, ()))
        if gone:
            garbage[number] = tuple(sorted(gone))
    return Opened(disk, keeper, committed, garbage, tail.newest_wall_us, owed)


def _restore_keeper(keeper: Keeper, loaded: Loaded | None, sizes: dict[int, int]) -> None:
    keeper.sizes = dict(sizes)
    keeper.needs = None if sizes else frozenset()
    keeper.next_number = max(sizes, default=0) + 1
    if loaded is not None:
        keeper.number = loaded.header.number
        keeper.position = loaded.header.position
        keeper.previous_crc = loaded.header.previous_crc
        keeper.next_segment = loaded.header.next_segment
        keeper.previous_next_segment = loaded.header.previous_next_segment


def _restore_segments(disk: Disk, loaded: Loaded | None, tail: Tail) -> dict[int, tuple[int, ...]]:
    """Segment objects for the checkpoint's table and the sealed tail; the numbers of all that are kept, each with the
    zones whose copies count."""
    kept: dict[int, tuple[int, ...]] = {}
    if loaded is not None:
        names = ("number", "blocks", "seal_crc", "live", "zones", "generation", "state")
        for number, blocks, seal_crc, live, mask, generation, state in zip(
            *(loaded.table[name].tolist() for name in names), strict=True
        ):
            zones = tuple(z for z in zones_of_mask(mask) if z < len(disk.env.zones))
            segment = Segment(disk.log, number, generation, zones, blocks)
            segment.sealed = True
            segment.seal_crc = seal_crc
            segment.live = live
            kept[number] = zones
            if state == DEAD:
                disk.env.segments[segment.key] = segment
                disk.dead[number] = (segment, FREES_CHECKED - 1)
                disk.dead_blocks += blocks
            else:
                disk.add_segment(segment)
                segment.emptied = state == KEPT
    for directory, zones, blocks in tail.sealed:
        segment = Segment(disk.log, directory.segment, directory.generation, zones, blocks)
        segment.sealed = True
        segment.seal_crc = directory.crc
        kept[directory.segment] = zones
        disk.add_segment(segment)
    return kept


async def _restore_holds(keeper: Keeper, zones: CheckpointZones, snapshots: Sequence[FrozenAt]) -> FrozenAt | None:
    """Hold what the snapshots' maps need; the one, if any, whose map is not written yet: only the newest can be."""
    disk = keeper.disk
    owed = None
    for snapshot in snapshots:
        if snapshot.checkpoint > keeper.number:
            owed = snapshot
            continue
        loaded = await find_checkpoint(disk.env, disk.log, snapshot.checkpoint, zones)
        if loaded is None:
            keeper.holds.add_unreadable(snapshot.checkpoint)
        else:
            keeper.holds.add(snapshot.checkpoint, live_numbers(loaded.table), pages_of(Root(loaded.root)))
    for segment in [s for s in disk.segments.values() if s.emptied and not s.held]:
        disk.bury(segment)  # the last snapshot that needed it went just before the end
    return owed


async def _replay(keeper: Keeper, tail: Tail, owed: FrozenAt | None) -> None:
    """Bring map and live counters to the end of the log; copy what was not sealed. owed: freeze the map of that
    snapshot on the way."""
    disk = keeper.disk
    env = disk.env
    before: dict[int, int] = {}
    rest = tail.rest
    lost: dict[int, PageRef] = {}

    async def load(wanted: list[tuple[int, PageRef]]) -> None:
        if not wanted:
            return
        try:
            await disk.load(wanted, evict=False)
        except LostPages as error:
            # Only what is in these regions is lost. They get entries that no block has, to see whether the rest of the
            # log replaces all of them.
            for region, ref in error.lost:
                if disk.map.load(region, ref, UNKNOWN_REGION):
                    lost[region] = ref
        values = [_region(disk, region) for region, _ in wanted if region not in lost]
        for key, count in tally_regions(value for value in values if value is not None).items():
            before[key] = before.get(key, 0) + count

    async def copy(records: list[SurvivingRecord]) -> int:
        """The number of the first segment behind the copies."""
        await copy_rest(disk.writer, records)
        for directory in disk.finished:
            await replay.add(directory)
        disk.finished.clear()
        return disk.writer.tail_number

    replay = Replay(disk.map, load)
    next_segment = keeper.next_segment
    position, previous_crc = keeper.position, keeper.previous_crc
    for directory, _, _ in tail.sealed:
        if owed is not None and directory.last_position > owed.position:
            await replay.finish()
            _give_up(disk, lost)
            _freeze(keeper, owed, next_segment, position, previous_crc, before)
            owed = None
        await replay.add(directory)
        next_segment = directory.segment + 1
        position, previous_crc = directory.last_position, directory.last_crc
    if owed is not None:
        until = next((i for i, r in enumerate(rest) if r.header.last_position > owed.position), len(rest))
        if until:
            next_segment = await copy(rest[:until])
            position, previous_crc = disk.writer.position, disk.writer.previous_crc
        await replay.finish()
        _give_up(disk, lost)
        _freeze(keeper, owed, next_segment, position, previous_crc, before)
        rest = rest[until:]
    if rest:
        await copy(rest)
    await replay.finish()
    _give_up(disk, lost)
    # Dropped regions that were in memory: what was loaded is in `before`, what the replay made was never counted.
    disk.map.dropped.clear()
    for key, count in before.items():
        segment = env.segments.get(key)
        if segment is not None and segment.log == disk.log:
            segment.live -= count
    disk.map.dropped.clear()  # counted in `before`, or never counted at all
    for key, count in disk.map.count_live().items():
        if key >> SEGMENT_BITS == disk.log:
            env.segments[key].live += count
    disk.live_total = sum(segment.live for segment in disk.segments.values())
    disk.held_live = sum(segment.live for segment in disk.segments.values() if segment.held)


def _give_up(disk: Disk, lost: dict[int, PageRef]) -> None:
    """Regions whose pages are lost and that the log so far has not replaced as a whole: nobody knows what is in them,
    and nobody may be told what is in a part of them."""
    for region, ref in lost.items():
        if _has_unknown(_region(disk, region)):
            disk.map.unload(region, ref)
            logger.error("a map page is lost, its blocks can't be read or written log=%d region=%d", disk.log, region)
        else:
            disk.damage.pages.pop(region, None)
    lost.clear()


def _region(disk: Disk, region: int) -> Region | None:
    value = disk.map.regions.get(region)
    assert not isinstance(value, PageRef)
    return value


def _has_unknown(value: Region | None) -> bool:
    return value is not None and bool((view(expand(value)) >= UNKNOWN_REGION).any())


def _freeze(
    keeper: Keeper, owed: FrozenAt, next_segment: int, position: int, previous_crc: int, before: dict[int, int]
) -> None:
    """The map is at the snapshot's position: freeze it, for a checkpoint that is written once the log serves.

    before: blocks of map pages that were loaded so far, by segment key, which the segments' counters still have.
    """
    disk = keeper.disk
    env = disk.env
    if position != owed.position:
        logger.error("a snapshot is not where it was log=%d position=%d found=%d", disk.log, owed.position, position)
    header = CheckpointHeader(
        disk.log,
        owed.checkpoint,
        position,
        disk.writer.generation,
        next_segment,
        previous_crc,
        disk.blocks,
        int(env.clock.wall() * 1e6),
        keeper.next_segment,
    )
    segments = [segment for segment in disk.segments.values() if segment.number < next_segment]
    states = [state_of(segment) for segment in segments]
    dead = [(segment, DEAD) for segment, seen in disk.dead.values() if not seen]
    here = disk.map.count_live()
    live = array("I", [max(0, s.live - before.get(s.key, 0)) + here.get(s.key, 0) for s in segments])
    uncounted = Uncounted([], disk.map.dropped_refs.copy())
    rows = [*zip(segments, states, strict=True), *dead]
    died = [segment for segment, _ in disk.dead.values()]
    keeper.owed = Owed(header, disk.map.freeze(), rows, live, died, uncounted)
    keeper.holds.begin(owed.checkpoint, [s for s, state in zip(segments, states, strict=True) if state == LIVE])


async def close_disk(disk: Disk) -> None:
    """Give back what an opening took that did not come to its end."""
    await disk.writer.close()
    for segment in [*disk.segments.values(), *(segment for segment, _ in disk.dead.values())]:
        disk.env.segments.pop(segment.key, None)
        segment.close_handles()
    disk.env.page_zones.pop(disk.log, None)


async def drop_garbage(env: Env, log: int, garbage: dict[int, tuple[int, ...]]) -> None:
    """Remove segments that no committed head or checkpoint needs; what can't be removed goes at the next opening."""
    for number, zones in garbage.items():
        for zone in env.serving(zones):
            try:
                await run(env.executor, zone, env.zones[zone].backend.delete, segment_name(log, number))
            except StoreError as error:
                logger.warning("garbage stays until the next opening: %s", error)


def purge_log(backend: Backend, folders: list[str]) -> None:
    """In a zone's thread: remove every object of a deleted log, durably."""
    for folder in folders:
        backend.delete_all(folder)

"""Collection: live blocks of mostly dead segments are appended again, densely; the segments are then free.

A moved block names its source; it counts only if the map still says exactly that source, at run time and in replay, so
a client's newer write always wins. Sources lie below every unsealed segment, so that opening a log, which gives new
addresses to the unsealed end, never changes one.

Segments that the map of a snapshot needs are left alone: neither moved nor counted in what space is judged by. When
the log's own map does not point into one any more that is noted (`Segment.emptied`), so that later snapshots don't need
it.

Share = live data over file length, because a log of small flushed writes is half headers on the day it is written.
Live counters only choose victims: a segment is dead when its directory shows no block that the map still points at.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from array import array
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt, FormatError, NoSpace, StoreError, Unavailable
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, BLOCK_IN_SEGMENT_MASK
from objstore.log.blockmap import PageRef
from objstore.log.checkpoint import load_pages
from objstore.log.damage import blocks_of
from objstore.log.disk import Disk
from objstore.log.keeper import Keeper
from objstore.log.mapbulk import heads_of
from objstore.log.reader import load_directory, read_run
from objstore.log.regions import decode_region, tally
from objstore.log.segment import Segment
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, REGION_BLOCKS, REGION_MASK, REGION_SHIFT

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]

SPACE_START: Final = 1.38
SPACE_TIGHT: Final = 1.55
"""Blocks of all files over live blocks: collection begins above the first and clients wait above the second. The limit
promised is 1.65 plus a constant; what is between is what one round of collection and two checkpoints need."""
SLACK_SEGMENTS: Final = 5
TIGHT_SEGMENTS: Final = 8
SHARE_MAX: Final = 0.93
"""No victim above this share: a dense segment has 0.97."""
SHARE_BUSY_MAX: Final = 0.8
"""No victim above this share while dead segments wait to be freed: they are what takes the space, and moving dense ones
meanwhile only makes more of them, on a small disk for ever."""
SHARE_FULL_MAX: Final = 0.97
VICTIMS_AT_ONCE: Final = 8
QUIET_SECONDS: Final = 0.25
"""Without any client's request for so long, collection goes on to SPACE_QUIET: the next burst of writes finds room and
files to write again, and does not share the disks with collection."""
SPACE_QUIET: Final = 1.1
SHARE_QUIET_MAX: Final = 0.85
"""No victim above this share while clients are quiet: it costs up to six blocks moved for each one freed."""
IDLE_ROUNDS_MAX: Final = 3
MOVE_BLOCKS_MAX: Final = 160
"""Single blocks moved by one record: 24 bytes of header page each, so 99 % of a collected segment is data."""


class Fetched(NamedTuple):
    """What a victim has live: blocks in logical order with the entries that the map has for them; `data` begins with
    block `first` of the segment. bad: what no zone has whole, of the blocks in `data`."""

    directory: Directory
    lbas: U64
    entries: U64
    first: int
    data: memoryview
    bad: list[int]


class Collector:
    """Collection for one disk: one task, woken at every boundary between segments and after every freeing.

    tight: clients wait (`room`) because the files take too much space and collection can free some.
    `_noted`: the clients' requests (Env.requests) when a timer found them quiet last. `_rest_moves`: blocks moved
    since then.
    """

    def __init__(self, disk: Disk, keeper: Keeper) -> None:
        self.disk = disk
        self.keeper = keeper
        self.tight = False
        self._unmovable: dict[int, tuple[frozenset[int], bool, int]] = {}
        """Segments that could not be collected: with which zones, held or not, and with how many live blocks."""
        self._buffers: list[memoryview | None] = [None, None]
        """What is read of victims, in turn; fresh memory for each cost 2,000 page faults."""
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._round_waiters: list[asyncio.Future[None]] = []
        self._pressed = 0
        """Callers of `reclaim`: any victim will do."""
        self._closed = False
        self._noted = -1
        self._rest_moves = 0
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._task = disk.env.loop.create_task(self._run())
        disk.writer.watch(self._task)

    def poke(self) -> None:
        """Something changed: look whether there is work, and whether clients must wait."""
        self._judge()
        self._wake.set()
        if self._task.done():
            self._end_round()

    def _judge(self) -> None:
        disk = self.disk
        total = disk.loose_blocks + disk.dead_blocks
        allowed = disk.loose_live * SPACE_TIGHT + TIGHT_SEGMENTS * disk.writer.segment_blocks
        self.tight = total > allowed and self._worthwhile() and disk.writer.error is None and not self._closed
        if not self.tight:
            self._let_go()

    def _let_go(self) -> None:
        self.tight = False
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def _worthwhile(self) -> bool:
        """Whether collecting can free anything worth waiting for."""
        disk = self.disk
        return bool(disk.dead) or disk.loose_blocks * SHARE_MAX > disk.loose_live + disk.writer.segment_blocks * 2

    async def room(self) -> None:
        """Wait while space is tight. Who waits makes the collector look again: what was tight may be so no more, and
        a checkpoint that nobody was in a hurry for is wanted now."""
        if self.tight:
            self._judge()
        while self.tight:
            self._wake.set()
            waiter: asyncio.Future[None] = self.disk.env.loop.create_future()
            self._waiters.append(waiter)
            await waiter

    async def reclaim(self) -> bool:
        """The zones are full: wait until something of this disk was freed. False: nothing can be."""
        keeper, disk = self.keeper, self.disk
        before = keeper.freed
        last: tuple[int, ...] = ()
        idle = 0
        self._pressed += 1
        try:
            while keeper.freed == before:
                if self._closed or disk.writer.error is not None or not self._worthwhile():
                    return False
                now = (keeper.number, disk.total_blocks, disk.dead_blocks)
                idle = idle + 1 if now == last else 0
                if idle >= IDLE_ROUNDS_MAX:
                    return False
                last = now
                waiter: asyncio.Future[None] = disk.env.loop.create_future()
                self._round_waiters.append(waiter)
                self._wake.set()
                await waiter
                await keeper.settled()
        finally:
            self._pressed -= 1
        return True

    async def round(self) -> None:
        """Look for work and return when there is none left, or none that can be done now."""
        if self._closed or self._task.done():
            return
        waiter: asyncio.Future[None] = self.disk.env.loop.create_future()
        self._round_waiters.append(waiter)
        self._wake.set()
        await waiter

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            freed = self.keeper.freed
            try:
                while not self._closed and self.disk.writer.error is None and await self._round():
                    self._judge()
                    if self.keeper.freed != freed:  # by a checkpoint: whoever waits for space need not wait for more
                        self._end_round()
            except StoreError as error:
                log.warning("collection stopped until the next boundary log=%d: %s", self.disk.log, error)
            try:
                await self._urge()
            except StoreError as error:
                log.warning("segments could not be sealed log=%d: %s", self.disk.log, error)
            self._judge()
            keeper = self.keeper
            if not self._wake.is_set() and (keeper.gave_up or keeper.waits_for_zones or not self.disk.dead):
                self._let_go()  # nothing under way will free space: the zones' own limit stops clients now
            self._end_round()
            if not self._quiet():
                self._await_quiet()
        self._end_round()

    async def _urge(self) -> None:
        """Nothing to collect just now: see that what stands in the way of freeing space gets done."""
        writer = self.disk.writer
        urgent = self.tight or self._pressed > 0
        if self._closed or writer.error is not None:
            return
        if self.disk.dead:
            self.keeper.hurry(now=urgent or self._owed(), waited_for=bool(self._waiters) or self._pressed > 0)
        if urgent and any(number < writer.tail_number for number in writer.unsealed):
            await writer.sealed_below(writer.tail_number)
            self._wake.set()

    def _end_round(self) -> None:
        for waiter in self._round_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._round_waiters.clear()

    # -- while clients are quiet --------------------------------------------------------------------------------

    def _quiet(self) -> bool:
        """No client has asked for anything since a timer found them quiet, and there is something to gain: what has
        been moved once is not moved again before they have written more (segments that checkpoints cut short stay
        sparse however often they are moved)."""
        return self._noted == self.disk.env.requests and self._rest_moves <= self.disk.live_total

    def _await_quiet(self) -> None:
        """Look every QUIET_SECONDS whether the clients rest, while there is something to do then."""
        env = self.disk.env
        wanted = self._above(SPACE_QUIET) and self._noted != env.requests and self.disk.writer.error is None
        if wanted and self._quiet_timer is None:
            self._quiet_timer = env.loop.call_later(QUIET_SECONDS, self._look, env.requests)

    def _look(self, requests: int) -> None:
        self._quiet_timer = None
        if self._closed:
            return
        if requests == self.disk.env.requests:
            self._noted = requests
            self._rest_moves = 0
            self._wake.set()
        else:
            self._await_quiet()

    # -- choosing -----------------------------------------------------------------------------------------------

    def _crowded(self) -> bool:
        return self._pressed > 0 or self._above(SPACE_QUIET if self._quiet() else SPACE_START)

    def _above(self, space: float) -> bool:
        """Whether the files hold more than `space` blocks for each live one, and a few segments."""
        disk = self.disk
        wanted = disk.loose_live * space + SLACK_SEGMENTS * disk.writer.segment_blocks
        return disk.loose_blocks + disk.dead_blocks > wanted

    def _owed(self) -> bool:
        """So much waits for checkpoints before it is freed that moving more blocks would only take more space."""
        disk = self.disk
        return disk.dead_blocks > max(4 * disk.writer.segment_blocks, disk.loose_live // 8)

    def _victims(self) -> list[Segment]:
        """The best victims now, emptiest first; only dead ones unless space is wanted."""
        disk = self.disk
        below = min(disk.writer.unsealed, default=disk.writer.tail_number)
        below = min(below, disk.parts_from(below))
        share_max = 0.0
        if self._crowded() and not self._owed():
            share_max = SHARE_FULL_MAX if self._pressed else SHARE_BUSY_MAX if disk.dead else SHARE_MAX
            if not self._pressed and not self._above(SPACE_START):
                share_max = min(share_max, SHARE_QUIET_MAX)
        found = [
            (segment.live / segment.blocks, number, segment)
            for number, segment in disk.segments.items()
            if number < below
            and segment.live <= share_max * segment.blocks
            and not (segment.held and (segment.emptied or segment.live > 0))
            and not (number in self._unmovable and self._still_unmovable(segment))
        ]
        found.sort(key=lambda item: item[:2])
        readable = (segment for _, _, segment in found if disk.env.serving(segment.zones))
        return list(itertools.islice(readable, VICTIMS_AT_ONCE))

    def _give_up(self, segment: Segment) -> None:
        self._unmovable[segment.number] = (self.disk.env.in_service, bool(segment.held), segment.live)

    def _still_unmovable(self, segment: Segment) -> bool:
        """Whether another attempt would end like the last one: with other zones it may not, nor once the blocks that
        were in the way have been overwritten."""
        in_service, held, live = self._unmovable[segment.number]
        same = in_service == self.disk.env.in_service and held == bool(segment.held)
        return same and (segment.live >= live or segment.live * 2 > live)

    async def _round(self) -> bool:
        """Collect a few victims; False when there is nothing to do."""
        await self._count_dropped()
        victims = self._victims()
        if not victims:
            return False
        fetching: asyncio.Task[Fetched | None] | None = None
        try:
            for i, segment in enumerate(victims):
                if segment.live and (self._owed() or not self._crowded()):
                    return False
                if self._closed:
                    return False
                current = fetching or self._start_fetch(segment, i)
                await asyncio.wait([current])
                # The next victim is read while this one is moved.
                fetching = self._start_fetch(victims[i + 1], i + 1) if i + 1 < len(victims) else None
                try:
                    await self._collect(segment, current.result(), i)
                except Corrupt as error:
                    self._give_up(segment)
                    log.error("segment can't be collected segment=%s: %s", segment.name, error)
                self._judge()
                if self._quiet():  # the first flush after the rest must not wait for more than this
                    await self.disk.writer.flush()
        finally:
            if fetching is not None:
                await asyncio.wait([fetching])
                fetching.exception()  # whoever comes to that segment again meets it again
        return True

    async def _count_dropped(self) -> None:
        """Take regions that a large discard dropped off the live counters."""
        disk = self.disk
        while disk.map.dropped and not self._closed:
            disk.forget_live(disk.map.count_dropped(64))
            await asyncio.sleep(0)
        while disk.map.dropped_refs and not self._closed:
            # New ones come in behind. These stay listed until they are counted: a checkpoint that begins meanwhile
            # must know that the counters still have them.
            wanted = disk.map.dropped_refs[:64]
            counts: dict[int, int] = {}
            try:
                for _, _, page in await load_pages(disk.env, disk.log, wanted, disk.checkpoint_zones):
                    tally(decode_region(page), 0, REGION_BLOCKS, counts)
            except (Corrupt, FormatError, Unavailable) as error:
                log.warning("live counters stay too high: %s", error)
                counts.clear()
            del disk.map.dropped_refs[: len(wanted)]
            disk.forget_live(counts)

    # -- moving -------------------------------------------------------------------------------------------------

    def _start_fetch(self, segment: Segment, turn: int) -> asyncio.Task[Fetched | None]:
        return self.disk.env.loop.create_task(self._fetch(segment, turn))

    async def _fetch(self, segment: Segment, turn: int) -> Fetched | None:
        """Read what is live of a segment, in logical order; None: no zone has its directory. Corrupt: a page of the map
        is damaged."""
        disk = self.disk
        directory = await load_directory(self.disk.env, segment)
        if directory is None:
            return None
        lbas, entries = blocks_of(directory)
        while (live := still_mapped(disk, lbas, entries)) is None:
            await self._load(lbas)
        lbas, entries = lbas[live], entries[live]
        if not len(lbas):
            return Fetched(directory, lbas, entries, 0, memoryview(b""), [])
        order = np.argsort(lbas, kind="stable")
        lbas, entries = lbas[order], entries[order]
        blocks = (entries & np.uint64(BLOCK_IN_SEGMENT_MASK)).astype(np.int64)
        first, last = int(blocks.min()), int(blocks.max())
        buffer = self._buffers[turn % 2]
        if buffer is None or len(buffer) < (last - first + 1) << BLOCK_SHIFT:
            buffer = self._buffers[turn % 2] = memoryview(bytearray(segment.file_bytes))
        wanted = (blocks - first).tolist()
        data, bad = await read_run(disk.env, segment, first, last - first + 1, wanted, buffer)
        if data.obj is not buffer.obj:  # a call that hangs may still fill the other one
            self._buffers[turn % 2] = None
        return Fetched(directory, lbas, entries, first, data, bad)

    async def _collect(self, segment: Segment, fetched: Fetched | None, turn: int) -> None:
        """Move what is live and mark the segment dead, unless its directory or a live block can't be read."""
        disk = self.disk
        while fetched is not None and len(fetched.lbas):
            if segment.held:  # a snapshot was taken meanwhile: its map has what lives here
                if not segment.live:  # or its counter is too low, and it would be chosen again
                    self._give_up(segment)
                return
            if fetched.bad:
                self._give_up(segment)
                log.error("segment can't be collected, blocks damaged in every zone segment=%s", segment.name)
                return
            await self._move(segment, fetched)
            left = still_mapped(disk, fetched.lbas, fetched.entries)
            if left is not None and not left.any():
                break
            fetched = await self._fetch(segment, turn)
        if fetched is None:
            self._give_up(segment)
            log.error("segment can't be collected, no zone has its directory segment=%s", segment.name)
            return
        self._unmovable.pop(segment.number, None)
        disk.bury(segment)

    async def _load(self, lbas: U64) -> None:
        disk = self.disk
        evict = True
        while wanted := disk.map.missing_blocks(lbas):
            await disk.load(wanted, evict=evict)
            evict = False

    async def _move(self, segment: Segment, fetched: Fetched) -> None:
        """Append what is still live again, in logical order."""
        disk = self.disk
        directory, lbas, entries, first, data, _ = fetched
        blocks = (entries & np.uint64(BLOCK_IN_SEGMENT_MASK)).astype(np.int64)
        rows = np.frombuffer(data, np.uint8).reshape(-1, BLOCK_BYTES)
        crcs = np.frombuffer(directory.crcs, np.uint32)
        writer = disk.writer
        low = 0
        while low < len(lbas):
            await self._admit()
            await self._map_room(lbas[low : low + MOVE_BLOCKS_MAX])
            while not (room := writer.batch_room(min(MOVE_BLOCKS_MAX, len(lbas) - low))):
                await writer.make_room(0)
            part = slice(low, low + room)
            still = still_mapped(disk, lbas[part], entries[part])
            if still is None:
                await self._load(lbas[part])
                still = still_mapped(disk, lbas[part], entries[part])
                if still is None or writer.batch_room(room) < room:
                    continue
            if segment.held:  # since it was chosen: what a snapshot shows stays where it is
                return
            chosen = np.flatnonzero(still) + low
            low += room
            if len(chosen):
                at = blocks[chosen]
                into = self._append(segment, lbas[chosen], entries[chosen], crcs[at])
                np.take(rows, at - first, axis=0, out=into, mode="clip")
            await asyncio.sleep(0)

    async def _admit(self) -> None:
        env = self.disk.env
        while env.dirty_bytes >= env.dirty_bytes_max and self.disk.writer.error is None:
            await env.dirty_room()
        if self.disk.writer.error is not None:
            raise self.disk.writer.error

    async def _map_room(self, lbas: U64) -> None:
        """As a writer waits for memory of the maps; but while checkpoints find no space, only collection makes some."""
        if not self.keeper.gave_up:
            with contextlib.suppress(NoSpace):
                await self.keeper.map_room(functools.partial(self.disk.map.grows_at, lbas))

    def _append(self, victim: Segment, lbas: U64, entries: U64, crcs: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        """The operations into the log and their effect into the map, which has all the blocks still there. Returns
        where their data belongs, a row for each: to be filled in the same loop turn."""
        disk = self.disk
        places: U64 = np.arange(len(lbas), dtype=np.uint64)
        heads = heads_of(lbas - places)
        counts = np.diff(heads, append=len(lbas)).tolist()
        disk.moving = True
        still = disk.still_position == disk.writer.position
        try:
            target, into = disk.writer.append_moves(lbas[heads].tolist(), counts, crcs.tolist(), entries.tolist())
        finally:
            disk.moving = False
        if still:
            disk.still_position = disk.writer.position
        set_one = disk.map.set_one
        for entry, lba in enumerate(lbas.tolist(), target):
            set_one(lba, entry)
        disk.env.segments[target >> BLOCK_BITS].live += len(lbas)
        victim.live -= len(lbas)
        self._rest_moves += len(lbas)
        disk.env.moved_blocks += len(lbas)
        return np.frombuffer(into, np.uint8).reshape(-1, BLOCK_BYTES)

    async def close(self) -> None:
        """Stop after the step under way."""
        self._closed = True
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()
        self.poke()
        await asyncio.wait([self._task])


def still_mapped(disk: Disk, lbas: U64, entries: U64) -> npt.NDArray[np.bool_] | None:
    """Which of the blocks the map still has at exactly these entries; None: a region of theirs is not in memory.

    Block by block: 0.25 us each. Work on whole regions is slower where a segment's blocks lie scattered over the disk,
    three or four in a region (2 us a block), which is how random writes leave them.
    """
    get = disk.map.regions.get
    lookup = disk.map.lookup
    found = []
    for lba, entry in zip(lbas.tolist(), entries.tolist(), strict=True):
        value = get(lba >> REGION_SHIFT)
        if type(value) is array:
            found.append(value[lba & REGION_MASK] == entry)
        elif type(value) is PageRef:
            return None
        else:
            found.append(lookup(lba) == entry)
    return np.array(found, np.bool_)

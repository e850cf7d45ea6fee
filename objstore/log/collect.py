"""Collection: live blocks of mostly dead segments are appended again, densely; the segments are then free.

A moved block names its source; it counts only if the map still says exactly that source, at run time and in replay, so
a client's newer write always wins. Sources lie below every unsealed segment, so that opening a log, which gives new
addresses to the unsealed end, never changes one.

Share = live data over file length, because a log of small flushed writes is half headers on the day it is written.
Live counters only choose victims: a segment is dead when its directory shows no block that the map still points at.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from array import array
from typing import Final

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt, FormatError, StoreError
from objstore.format.record import KIND_SHIFT, LBA_MASK, Kind
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, BLOCK_IN_SEGMENT_MASK, key_of
from objstore.log.blockmap import PageRef
from objstore.log.checkpoint import load_pages
from objstore.log.disk import Disk
from objstore.log.keeper import Keeper
from objstore.log.reader import read_run
from objstore.log.regions import decode_region, expand, tally, view
from objstore.log.replay import expand_runs
from objstore.log.segment import Segment
from objstore.log.tail import look_at
from objstore.replica.zone import run
from objstore.units import BLOCK_SHIFT, REGION_BLOCKS, REGION_MASK, REGION_SHIFT

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
SHARE_FULL_MAX: Final = 0.97
VICTIMS_AT_ONCE: Final = 8
IDLE_ROUNDS_MAX: Final = 3
MOVE_BLOCKS_MAX: Final = 160
"""Single blocks moved by one record: 24 bytes of header page each, so 99 % of a collected segment is data."""


class Collector:
    """Collection for one disk: one task, woken at every boundary between segments and after every freeing.

    tight: clients wait (`room`) because the files take too much space and collection can free some.
    """

    def __init__(self, disk: Disk, keeper: Keeper) -> None:
        self.disk = disk
        self.keeper = keeper
        self.tight = False
        self._unmovable: set[int] = set()
        self._buffer: memoryview | None = None
        """What is read of victims, one after the other; fresh memory for each cost 2,000 page faults."""
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._round_waiters: list[asyncio.Future[None]] = []
        self._pressed = 0
        """Callers of `reclaim`: any victim will do."""
        self._closed = False
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
        total = disk.total_blocks + disk.dead_blocks
        allowed = disk.live_total * SPACE_TIGHT + TIGHT_SEGMENTS * disk.writer.segment_blocks
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
        return bool(disk.dead) or disk.total_blocks * SHARE_MAX > disk.live_total + disk.writer.segment_blocks * 2

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

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            try:
                while not self._closed and self.disk.writer.error is None and await self._round():
                    self._judge()
            except StoreError as error:
                log.warning("collection stopped until the next boundary log=%d: %s", self.disk.log, error)
            try:
                await self._urge()
            except StoreError as error:
                log.warning("segments could not be sealed log=%d: %s", self.disk.log, error)
            self._judge()
            if not self._wake.is_set() and (self.keeper.gave_up or not self.disk.dead):
                self._let_go()  # nothing under way will free space: the zones' own limit stops clients now
            self._end_round()
        self._end_round()

    async def _urge(self) -> None:
        """Nothing to collect just now: see that what stands in the way of freeing space gets done."""
        writer = self.disk.writer
        urgent = self.tight or self._pressed > 0
        if self._closed or writer.error is not None:
            return
        if self.disk.dead:
            self.keeper.hurry(now=urgent or self._owed())
        if urgent and any(number < writer.tail_number for number in writer.unsealed):
            await writer.sealed_below(writer.tail_number)
            self._wake.set()

    def _end_round(self) -> None:
        for waiter in self._round_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._round_waiters.clear()

    # -- choosing -----------------------------------------------------------------------------------------------

    def _crowded(self) -> bool:
        disk = self.disk
        blocks = disk.total_blocks + disk.dead_blocks
        wanted = disk.live_total * SPACE_START + SLACK_SEGMENTS * disk.writer.segment_blocks
        return blocks > wanted or self._pressed > 0

    def _owed(self) -> bool:
        """So much waits for checkpoints before it is freed that moving more blocks would only take more space."""
        disk = self.disk
        return disk.dead_blocks > max(4 * disk.writer.segment_blocks, disk.live_total // 8)

    def _victims(self) -> list[Segment]:
        """The best victims now, emptiest first; only dead ones unless space is wanted."""
        disk = self.disk
        below = min(disk.writer.unsealed, default=disk.writer.tail_number)
        below = min(below, disk.parts_from(below))
        share_max = 0.0
        if self._crowded() and not self._owed():
            share_max = SHARE_FULL_MAX if self._pressed else SHARE_MAX
        found = [
            (segment.live / segment.blocks, number, segment)
            for number, segment in disk.segments.items()
            if number < below and segment.live <= share_max * segment.blocks and number not in self._unmovable
        ]
        found.sort(key=lambda item: item[:2])
        return [segment for _, _, segment in found[:VICTIMS_AT_ONCE]]

    async def _round(self) -> bool:
        """Collect a few victims; False when there is nothing to do."""
        await self._count_dropped()
        victims = self._victims()
        if not victims:
            return False
        for segment in victims:
            if segment.live and (self._owed() or not self._crowded()):
                return False
            if self._closed:
                return False
            try:
                await self._collect(segment)
            except Corrupt as error:
                self._unmovable.add(segment.number)
                log.error("segment can't be collected segment=%s: %s", segment.name, error)
            self._judge()
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
            except (Corrupt, FormatError) as error:
                log.warning("live counters stay too high: %s", error)
                counts.clear()
            del disk.map.dropped_refs[: len(wanted)]
            disk.forget_live(counts)

    # -- moving -------------------------------------------------------------------------------------------------

    async def _collect(self, segment: Segment) -> None:
        """Move what is live and mark the segment dead, unless its directory or a live block can't be read."""
        disk = self.disk
        directory = await self._directory(segment)
        if directory is None:
            self._unmovable.add(segment.number)
            log.error("segment can't be collected, no zone has its directory segment=%s", segment.name)
            return
        lbas, entries = blocks_of(directory)
        while len(lbas):
            await self._load(lbas)
            live = still_mapped(disk, lbas, entries)
            lbas, entries = lbas[live], entries[live]
            if not len(lbas):
                break
            if not await self._move(segment, directory, lbas, entries):
                self._unmovable.add(segment.number)
                return
        disk.bury(segment)

    async def _directory(self, segment: Segment) -> Directory | None:
        env = self.disk.env
        for z in segment.zones:
            zone = env.zones[z]
            try:
                seen = await run(env.executor, z, look_at, zone.backend, env.store_id, segment.log, segment.number)
            except StoreError as error:
                log.warning("directory unreadable segment=%s zone=%r: %s", segment.name, zone, error)
                continue
            if seen.directory is not None:
                return seen.directory
        return None

    async def _load(self, lbas: U64) -> None:
        disk = self.disk
        evict = True
        while wanted := disk.map.missing_blocks(lbas):
            await disk.load(wanted, evict=evict)
            evict = False

    async def _move(self, segment: Segment, directory: Directory, lbas: U64, entries: U64) -> bool:
        """Append live blocks again in logical order. False: one of them is damaged in every zone."""
        disk = self.disk
        order = np.argsort(lbas, kind="stable")
        lbas, entries = lbas[order], entries[order]
        blocks = (entries & np.uint64(BLOCK_IN_SEGMENT_MASK)).astype(np.int64)
        first, last = int(blocks.min()), int(blocks.max())
        if self._buffer is None or len(self._buffer) < (last - first + 1) << BLOCK_SHIFT:
            self._buffer = memoryview(bytearray(segment.file_bytes))
        wanted = (blocks - first).tolist()
        data, bad = await read_run(disk.env, segment, first, last - first + 1, wanted, self._buffer)
        if bad:
            log.error("segment can't be collected, blocks damaged in every zone segment=%s", segment.name)
            return False
        crcs = directory.crcs
        step = min(MOVE_BLOCKS_MAX, disk.writer.fresh_room)
        for low in range(0, len(lbas), step):
            part = slice(low, low + step)
            await self._admit()
            while not disk.writer.room_for_batch(step):
                await disk.writer.make_room(0)
            if disk.map.missing_blocks(lbas[part]):
                await self._load(lbas[part])
                if not disk.writer.room_for_batch(step):
                    continue  # what this leaves behind is found live again and moved in the next turn
            chosen = np.flatnonzero(still_mapped(disk, lbas[part], entries[part])) + low
            if len(chosen):
                self._append(data, first, blocks[chosen], lbas[chosen], entries[chosen], crcs)
            await asyncio.sleep(0)
        return True

    async def _admit(self) -> None:
        env = self.disk.env
        while env.dirty_bytes >= env.dirty_bytes_max and self.disk.writer.error is None:
            await env.dirty_room()
        if self.disk.writer.error is not None:
            raise self.disk.writer.error

    def _append(
        self, data: memoryview, first: int, blocks: npt.NDArray[np.int64], lbas: U64, entries: U64, crcs: array[int]
    ) -> None:
        """One loop turn: the operations into the log and their effect into the map."""
        disk = self.disk
        heads = [0, *(np.flatnonzero(lbas[1:] != lbas[:-1] + np.uint64(1)) + 1).tolist(), len(lbas)]
        targets: list[int] = []
        disk.moving = True
        try:
            for low, high in itertools.pairwise(heads):
                run_blocks = blocks[low:high].tolist()
                pieces = [data[(b - first) << BLOCK_SHIFT : (b - first + 1) << BLOCK_SHIFT] for b in run_blocks]
                entry = disk.writer.append(
                    Kind.MOVE,
                    int(lbas[low]),
                    high - low,
                    pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)),
                    crcs=[crcs[b] for b in run_blocks],
                    sources=entries[low:high].tolist(),
                )
                targets += range(entry, entry + high - low)
        finally:
            disk.moving = False
        applied = disk.map.compare_and_assign(lbas, entries, np.array(targets, np.uint64))
        segments = disk.env.segments
        for ok, target, source in zip(applied.tolist(), targets, entries.tolist(), strict=True):
            if ok:
                segments[target >> BLOCK_BITS].live += 1
                segments[source >> BLOCK_BITS].live -= 1

    async def close(self) -> None:
        """Stop after the step under way."""
        self._closed = True
        self.poke()
        await asyncio.wait([self._task])


def blocks_of(directory: Directory) -> tuple[U64, U64]:
    """(logical blocks, entries) of every data block of a segment, in log order."""
    words = np.frombuffer(directory.words, np.uint64)
    kinds = (words >> np.uint64(KIND_SHIFT)) & np.uint64(0xFF)
    data = (kinds == Kind.WRITE) | (kinds == Kind.MOVE)
    counts = np.frombuffer(directory.counts, np.uint32).astype(np.uint64)[data]
    base = np.uint64(key_of(directory.log, directory.segment) << BLOCK_BITS)
    entries = np.frombuffer(directory.starts, np.uint32).astype(np.uint64)[data] + base
    return expand_runs(words[data] & np.uint64(LBA_MASK), counts, entries)


def still_mapped(disk: Disk, lbas: U64, entries: U64) -> npt.NDArray[np.bool_]:
    """Which of the blocks the map still has at exactly these entries. The regions are loaded."""
    found = np.zeros(len(lbas), np.bool_)
    order = np.argsort(lbas, kind="stable")
    region_of = (lbas[order] >> np.uint64(REGION_SHIFT)).astype(np.int64)
    heads = [0, *(np.flatnonzero(region_of[1:] != region_of[:-1]) + 1).tolist(), len(order)]
    for low, high in itertools.pairwise(heads):
        if low == high:
            continue
        value = disk.map.regions.get(int(region_of[low]))
        if value is None or isinstance(value, PageRef):
            continue
        where = order[low:high]
        index = (lbas[where] & np.uint64(REGION_MASK)).astype(np.int64)
        found[where] = view(expand(value))[index] == entries[where]
    return found

"""Keeps one disk's log short and its map small: checkpoints, freeing of dead segments, eviction of map regions.

A checkpoint begins at a boundary between segments, in one loop turn: the dirty regions are frozen, position and segment
table noted. Then, while clients go on: the segments below are sealed durably, the frozen regions written, and the
checkpoint commits by appearing under its name in every zone of the disk.

Every step in the event loop is bounded, whatever the size of the disk; what numpy does with a whole root or table is
done in a zone's thread, on arrays that nobody changes.

A snapshot is a checkpoint that stays (`begin_snapshot`): the one that begins at its position. It is kept with the pages
and the segments that it needs (holds.py) until the snapshot is deleted. Writing it must succeed in the end, because
nothing else knows the map at that position: where the zones are full it is begun again from the frozen regions until
there is space, or until the log is closed; opening it brings the map to that position and freezes it there again.

Dead segments are freed after two checkpoints that began after their death are complete: the newest checkpoint may turn
out unreadable, and the one before it needs its tail. The two newest checkpoints, and older ones whose map pages they
refer to, are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from objstore.backend.base import ZoneFailed
from objstore.errors import Corrupt, FormatError, NoSpace, Stopping, StoreError, Unavailable
from objstore.format.checkpoint import DEAD, LIVE, CheckpointHeader
from objstore.log.blockmap import Frozen, PageRef
from objstore.log.checkpoint import CheckpointWriter, checkpoint_name, load_pages
from objstore.log.disk import Disk
from objstore.log.holds import Holds, pages_of
from objstore.log.parts import Owed, Uncounted, Written, make_table, state_of
from objstore.log.rebuild import rebuild_pages
from objstore.log.regions import Region, decode_region, tally
from objstore.log.root import Root, in_checkpoints, live_bytes, merged, without
from objstore.log.segment import Segment
from objstore.replica.zone import run
from objstore.units import REGION_BLOCKS

log = logging.getLogger(__name__)

T = TypeVar("T")

OPERATIONS_BETWEEN_MIN: Final = 1 << 20
OPERATIONS_BETWEEN_MAX: Final = 1 << 23
OPERATIONS_PER_REGION: Final = 128
"""A checkpoint writes up to 8 KiB for each dirty region; 128 operations a region keep that below 2 % of their data."""
SEGMENTS_BETWEEN_MAX: Final = 512
"""Segments in the tail: their directories are read at opening, 0.3 ms each."""
FREES_CHECKED: Final = 2
"""Checkpoints that must follow a segment's death before it is freed."""
SPARE_SPACE: Final = 1.62
SPARE_SEGMENTS: Final = 8
"""A freed file is kept for the next segment as long as files and spares together stay below so much of the live data:
inside what the limit on space leaves (collect.py)."""
DEAD_SHARE: Final = 25
"""Dead segments of this part of the live data make a checkpoint due: two follow before they are free, so about a tenth
of the live data waits."""
IDLE_SECONDS: Final = 5.0
BOUNDARY_SECONDS: Final = 0.1
"""A checkpoint that is wanted soon waits so long for the open segment to become full: a segment cut short can't be used
again, and half of all segment files were new ones when each such checkpoint cut one."""
REWRITE_BYTES_MAX: Final = 16 << 20
REWRITE_PAGES_MAX: Final = 1 << 12
COUNTED_AT_ONCE: Final = 64
EVICT_AT_ONCE: Final = 64
PAGES_AT_ONCE: Final = 64
"""Map pages encoded between two turns of the event loop: 3 to 40 us each."""
MERGED_AT_ONCE: Final = 256
PAUSE_FACTOR: Final = 6
"""While clients write and nobody waits for it, a checkpoint pauses so many times as long as it has encoded pages."""
PAUSE_SECONDS_MAX: Final = 0.02
PAUSED_OPERATIONS_MAX: Final = OPERATIONS_BETWEEN_MIN // 2
"""So many operations behind its position it makes way no more: checkpoints must not come later than they are due."""
SPACE_RETRY_SECONDS: Final = 1.0
"""Between attempts to write the map of a snapshot that found no space."""
FORGET_AT_ONCE: Final = 1 << 12


class _MadeWay(Exception):
    """A checkpoint is given up because a snapshot is to begin one of its own."""


class Keeper:
    """Checkpoints and freeing for one disk. Touched by the event loop only; one checkpoint at a time (`_task`).

    number: of the newest complete checkpoint. durable_number: of the newest that is known to be durable in its zones;
    the one found at opening may not be, if no head has named it yet. root: where the page of each region is, as
    `number` says. sizes: bytes of each checkpoint object that is kept. next_segment, previous_next_segment: where the
    tails of the newest and of the one before begin.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.number = 0
        self.durable_number = 0
        self.next_number = 1
        self.position = 0
        self.previous_crc = 0
        self.next_segment = 0
        self.previous_next_segment = 0
        self.root = Root()
        disk.newest_page = lambda region: self.root.get(region)
        self.sizes: dict[int, int] = {}
        self.needs: frozenset[int] | None = frozenset()
        self.needs_before: frozenset[int] | None = frozenset()
        """The checkpoints that the pages of the newest one and of the one before lie in. None: it is one of an earlier
        run, where any may be needed."""
        self.number_before = 0
        self.holds = Holds(disk)
        self.owed: Owed | None = None
        """A snapshot's map that opening the log has frozen: `start` begins to write it."""
        self.freed = 0
        """Segments whose files are gone, since the disk was opened."""
        self.on_progress: Callable[[], None] | None = None
        """Called when a checkpoint has ended, well or not, and when a segment's files are gone."""
        self.wanted = False
        self._task: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        """Told when the checkpoint under way has ended, or finds no space."""
        self._failed: StoreError | None = None
        """Why the last checkpoint that was begun failed."""
        self._part_waiters: list[asyncio.Future[None]] = []
        """Who waits for a checkpoint to begin while a request is in the log only in part."""
        self._for_snapshot = 0
        """Number of the checkpoint under way if it is a snapshot's."""
        self._wants_snapshot = False
        self._makes_way = False
        """A snapshot waits for the checkpoint under way, which is given up for it if it is none of a snapshot."""
        self._made_way = False
        """The last checkpoint was."""
        self._stands_for: StoreError | None = None
        """Why the map of a snapshot can't be written at the moment."""
        self._stands_since = 0.0
        self._space_waiter: asyncio.Future[None] | None = None
        """While the map of a snapshot waits for space."""
        self.gave_up = False
        """The last checkpoint found no space: another one now would not either."""
        self._closed = False
        self.tight = False
        self._timer: asyncio.TimerHandle | None = None
        self._press_timer: asyncio.TimerHandle | None = None
        self._again_timer: asyncio.TimerHandle | None = None
        self._takeovers = 0
        """How often the end of the log had been moved when the checkpoint under way began."""
        disk.owner = self
        disk.on_whole = self._resume
        disk.rebuild = self.rebuild
        disk.writer.kept = self.places

    # -- memory -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The disk serves from now on: its map takes part in the account of memory."""
        memory = self.disk.env.maps
        self.disk.map.join(memory)
        memory.owners.append(self)
        owed, self.owed = self.owed, None
        if owed is not None:
            self.next_number = max(self.next_number, owed.header.number + 1)
            self._for_snapshot = owed.header.number
            self._go(owed)

    def leave(self) -> None:
        """The map's memory doesn't count any more: the log has failed or is closed. Idempotent."""
        memory = self.disk.env.maps
        self.disk.map.leave()
        if self in memory.owners:
            memory.owners.remove(self)
        memory.wake()
        self._wake_part_waiters()

    @property
    def pinned_bytes(self) -> int:
        """See MapOwner."""
        return self.disk.map.pinned_bytes

    @property
    def error(self) -> StoreError | None:
        """See MapOwner."""
        return self.disk.writer.error

    @property
    def stuck(self) -> StoreError | None:
        """See MapOwner."""
        env = self.disk.env
        if self._space_waiter is not None and env.loop.time() - self._stands_since >= env.settings.write_wait_seconds:
            return self._stands_for
        return self.disk.writer.short if self.waits_for_zones else None

    def relieve(self) -> None:
        """See MapOwner."""
        self._force()

    async def map_room(self, grows: Callable[[], bool]) -> None:
        """Wait until a change that `grows` tells about may be made to the map (MapMemory.room). NoSpace; Unavailable:
        the log failed."""

        def still_grows() -> bool:
            if self.disk.writer.error is not None:
                raise self.disk.writer.error
            return grows()

        await self.disk.env.maps.room(still_grows)

    def evict(self, excess_bytes: int) -> None:
        """See MapOwner."""
        blockmap = self.disk.map
        while excess_bytes > 0:
            before = blockmap.loaded_bytes
            for region in blockmap.eviction_candidates(EVICT_AT_ONCE):
                ref = self.root.get(region)
                if ref is not None:
                    blockmap.evict(region, ref)
            freed = before - blockmap.loaded_bytes
            if freed <= 0:
                return
            excess_bytes -= freed

    # -- when ---------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether the tail has become long enough, enough dead segments wait, or the map pins too much memory, for a
        checkpoint."""
        disk = self.disk
        if disk.env.maps.due(disk.map.pinned_bytes):
            return True
        operations = disk.writer.position - self.position
        limit = OPERATIONS_PER_REGION * len(disk.map.dirty)
        if operations >= max(OPERATIONS_BETWEEN_MIN, min(OPERATIONS_BETWEEN_MAX, limit)):
            return True
        if disk.writer.next_number - self.next_segment >= SEGMENTS_BETWEEN_MAX:
            return True
        unseen = sum(segment.blocks for segment, seen in disk.dead.values() if not seen)
        segment_blocks = disk.writer.segment_blocks
        return unseen >= (segment_blocks if self.tight else max(2 * segment_blocks, disk.loose_live // DEAD_SHARE))

    def boundary(self) -> None:
        """Called at every boundary between segments."""
        if self._task is None and not self._closed and not self.disk.between_parts and (self.wanted or self.due()):
            self._begin()

    def hurry(self, *, now: bool, waited_for: bool) -> None:
        """Dead segments wait: see that checkpoints come even if no client writes any more.

        now: space is short. waited_for: nothing goes on until some is freed.
        """
        self.tight = now
        if now and not self.gave_up:
            if waited_for or not self.disk.writer.has_records:
                self._force()
            elif self._task is None and not self._closed:
                self.wanted = True
                if self._press_timer is None:
                    self._press_timer = self.disk.env.loop.call_later(BOUNDARY_SECONDS, self._press)
        elif self._timer is None:
            self._timer = self.disk.env.loop.call_later(IDLE_SECONDS, self._idle)

    def _press(self) -> None:
        self._press_timer = None
        if self.wanted:
            self._force()

    def _idle(self) -> None:
        self._timer = None
        if self.disk.dead:
            self._force()

    @property
    def waits_for_zones(self) -> bool:
        """The last checkpoint failed because zones are missing: another one now would too. One is tried in a while."""
        return self._again_timer is not None

    def _force(self, *, try_anyway: bool = False) -> None:
        disk = self.disk
        if self._task is not None or self._closed or disk.writer.error is not None:
            return
        if self.waits_for_zones and not try_anyway:
            return
        self.wanted = True
        if disk.between_parts:
            return  # `_resume` follows
        if disk.writer.has_records:
            disk.writer.finish_segment()
        else:
            self.boundary()

    def _resume(self) -> None:
        """A request of several parts is complete, or given up."""
        if self.wanted:
            self._force()
        self._wake_part_waiters()

    def _wake_part_waiters(self) -> None:
        for waiter in self._part_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._part_waiters.clear()

    async def checkpoint(self) -> None:
        """Write a checkpoint of everything appended before this call; where a request is in the log only in part, as
        soon as the rest is. StoreError: it could not be written."""
        writer = self.disk.writer
        number = self.next_number
        while self.number < number:
            if writer.error is not None:
                raise writer.error
            if self._closed:
                raise Stopping(f"the log is being closed log={self.disk.log}")
            moved = writer.takeovers
            self._force(try_anyway=True)
            if self._task is None:
                await self._whole()
                continue
            begun = self.next_number - 1
            await self._settled()
            if begun >= number and self._failed is not None and moved == writer.takeovers:
                raise self._failed

    async def _whole(self) -> None:
        """Wait until the request that is in the log in part is complete, or was given up."""
        waiter: asyncio.Future[None] = self.disk.env.loop.create_future()
        self._part_waiters.append(waiter)
        await waiter

    async def _settled(self) -> None:
        """Wait for the checkpoint under way. NoSpace: it waits for space; Unavailable: for zones."""
        task = self._task
        while task is not None and self._task is task:
            if self._space_waiter is not None and not isinstance(self._stands_for, NoSpace):
                raise Unavailable(f"the map of a snapshot waits for zones log={self.disk.log}: {self._stands_for}")
            if self._space_waiter is not None:
                raise NoSpace(f"the map of a snapshot finds no space log={self.disk.log}")
            await self._progress()
        if task is not None:
            await asyncio.wait([task])

    async def _progress(self) -> None:
        waiter: asyncio.Future[None] = self.disk.env.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- snapshots ----------------------------------------------------------------------------------------------

    @property
    def ready_for_snapshot(self) -> bool:
        """Whether `begin_snapshot` may be called now."""
        return self._task is None and not self._closed and not self.disk.between_parts

    async def next_chance(self) -> None:
        """Wait until `ready_for_snapshot` may have become true. NoSpace: it will not."""
        # The snapshot's has all that this one would have. Not twice in a row: whoever waits for the one given up may
        # begin another before the snapshot can.
        self._makes_way = self._task is not None and not self._made_way
        await self._settled()
        await asyncio.sleep(0)

    def begin_snapshot(self) -> int:
        """Begin the checkpoint of everything appended so far, which stays until `end_snapshot`; its number. All that
        its map needs is kept from now on."""
        assert self.ready_for_snapshot
        if self.disk.writer.error is not None:
            raise self.disk.writer.error
        if self.disk.writer.waits_for_takeover:
            raise Unavailable(f"zones are missing, the log stands still log={self.disk.log}")
        self.wanted = self._wants_snapshot = True
        if self.disk.writer.has_records:
            self.disk.writer.finish_segment()
        else:
            self.boundary()
        assert self._for_snapshot, "the boundary between two segments begins the checkpoint"
        self.disk.still_since = self.disk.still_position = self.disk.writer.position
        return self._for_snapshot

    def end_snapshot(self, number: int) -> None:
        """The snapshot of that checkpoint is gone, or never came to be."""
        self.holds.release(number)
        self._drop_unneeded()
        if self.on_progress is not None:
            self.on_progress()

    async def snapshot_written(self, number: int) -> None:
        """Wait until that checkpoint is complete. StoreError: it could not be written, or there is no space for it."""
        while self._for_snapshot == number:
            await self._settled()
        if self.number < number:
            raise self._failed or Unavailable(f"the map of a snapshot could not be written log={self.disk.log}")

    # -- writing ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        disk = self.disk
        writer = disk.writer
        self.wanted = False
        self._failed = None
        next_segment = writer.tail_number
        header = CheckpointHeader(
            disk.log,
            self.next_number,
            writer.position,
            writer.generation,
            next_segment,
            writer.previous_crc,
            disk.blocks,
            int(disk.env.clock.wall() * 1e6),
            self.next_segment,
        )
        self.next_number += 1
        self._for_snapshot, self._wants_snapshot = (header.number if self._wants_snapshot else 0), False
        rows = [(segment, state_of(segment)) for segment in disk.segments.values() if segment.number < next_segment]
        live = array("I", [max(0, segment.live) for segment, _ in rows])
        dead = [segment for segment, _ in disk.dead.values()]
        # The counters of this moment: replay of the tail goes on from there. What large discards have dropped by now is
        # still in them, and nobody will remember after the next opening: it is counted while the pages are written.
        uncounted = Uncounted(disk.map.dropped.copy(), disk.map.dropped_refs.copy())
        if self._for_snapshot:
            self.holds.begin(header.number, (segment for segment, state in rows if state == LIVE))
        rows += [(segment, DEAD) for segment, seen in disk.dead.values() if not seen]
        self._go(Owed(header, disk.map.freeze(), rows, live, dead, uncounted))

    def _go(self, what: Owed) -> None:
        self._takeovers = self.disk.writer.takeovers
        self._task = self.disk.env.loop.create_task(self._write(what))
        self.disk.writer.watch(self._task)

    async def _write(self, what: Owed) -> None:
        disk = self.disk
        header = what.header
        try:
            while True:
                output = CheckpointWriter(disk.env, header, disk.checkpoint_zones(header.number))
                try:
                    written = await self._pages(output, what)
                    self._stands_for = None
                    break
                except (NoSpace, Unavailable) as error:
                    self.gave_up = isinstance(error, NoSpace)
                    await output.abort()
                    if disk.writer.error is not None or not self._owes(header.number) or self._closed:
                        raise
                    log.warning("the map of a snapshot waits for space or zones log=%d: %s", disk.log, error)
                    await self._wait_for_space(error)
            if self._for_snapshot:
                await self._forget(what.frozen)
            self._made_way = False
        except _MadeWay:
            self._made_way = True
            await output.abort()
            what.frozen.abort()
        except StoreError as error:
            what.frozen.abort()
            self._failed = error
            log.warning("checkpoint given up log=%d checkpoint=%d: %s", disk.log, header.number, error)
            if isinstance(error, Unavailable) and disk.writer.error is None and not self._owes(header.number):
                self._retry_later()
            elif not isinstance(error, NoSpace):
                disk.writer.fail(error)
        else:
            self.gave_up = False
            what.frozen.commit()
            self._complete(header, output, written, what.dead)
        finally:
            self._task = None
            self._for_snapshot = 0
            self._makes_way = False
            self._tell()
        disk.env.maps.evict(self)
        disk.env.maps.wake()
        if self.on_progress is not None:
            self.on_progress()

    async def _wait_for_space(self, error: StoreError) -> None:
        """Let everybody know that this checkpoint stands, and why, and wait a while."""
        loop = self.disk.env.loop
        if self._stands_for is None:
            self._stands_since = loop.time()
        self._stands_for = error
        waiter: asyncio.Future[None] = loop.create_future()
        self._space_waiter = waiter
        timer = loop.call_later(SPACE_RETRY_SECONDS, self._try_again)
        self._tell()
        self.disk.env.maps.wake()
        if self.on_progress is not None:
            self.on_progress()
        try:
            await waiter
        finally:
            timer.cancel()
            self._space_waiter = None

    def _try_again(self) -> None:
        if self._space_waiter is not None and not self._space_waiter.done():
            self._space_waiter.set_result(None)

    async def _pages(self, output: CheckpointWriter, what: Owed) -> Written:
        """Write one checkpoint; it is durable on return. NoSpace; StoreError."""
        frozen = what.frozen
        take = frozen.page if self._for_snapshot else frozen.take
        writer = self.disk.writer
        await writer.sealed_below(what.header.next_segment)
        if writer.takeovers != self._takeovers and what.header.next_segment > writer.moved_from:
            raise Unavailable("the segments that it was to name lie elsewhere now")
        await output.open()
        loop, position = self.disk.env.loop, writer.position
        changed = np.sort(np.fromiter(frozen.regions, np.uint64, len(frozen.regions)))
        for low in range(0, len(changed), PAGES_AT_ONCE):
            began = loop.time()
            for region in changed[low : low + PAGES_AT_ONCE].tolist():
                page = take(region)
                if page:
                    await output.add(region, page)
            self._make_way()
            pause = 0.0
            if writer.position != position and not self._hurries(what.header.position):
                pause = min((loop.time() - began) * PAUSE_FACTOR, PAUSE_SECONDS_MAX)
            position = writer.position
            await asyncio.sleep(pause)
        root = await self._aside(without, self.root, changed)
        self._make_way()
        moved = await self._rewrite(output, root)
        self._make_way()
        root = await self._aside(merged, root, output.rows)
        needs = await self._aside(pages_of, root)
        table = await make_table(what.rows, what.live, await self._count(what.uncounted))
        self._make_way()
        await output.finish(root.rows, table)
        return Written(root, needs, moved)

    def _make_way(self) -> None:
        if self._makes_way and not self._for_snapshot:
            raise _MadeWay

    def _hurries(self, position: int) -> bool:
        """Whether somebody waits for the checkpoint of that position, or will soon."""
        disk = self.disk
        late = disk.writer.position - position > PAUSED_OPERATIONS_MAX
        return bool(self._waiters) or self.tight or self._closed or late or disk.env.maps.due(disk.map.pinned_bytes)

    async def _forget(self, frozen: Frozen) -> None:
        regions = list(frozen.regions)
        for low in range(0, len(regions), FORGET_AT_ONCE):
            frozen.forget(regions[low : low + FORGET_AT_ONCE])
            await asyncio.sleep(0)

    def _owes(self, number: int) -> bool:
        """Whether that checkpoint is the map of a snapshot that exists, or is just being taken."""
        return self._for_snapshot == number and number in self.holds.maps

    def _retry_later(self) -> None:
        """Zones are missing for a checkpoint, or just went: others may be there soon."""
        self.wanted = True
        if self._again_timer is None and not self._closed:
            self._again_timer = self.disk.env.loop.call_later(IDLE_SECONDS, self._again)

    def _again(self) -> None:
        self._again_timer = None
        self._force()

    async def _aside(self, function: Callable[..., T], *args: Any) -> T:
        """Work on arrays in a thread of one zone after the other, until it is done. Unavailable: no zone is there."""
        env = self.disk.env
        for zone in sorted(env.in_service):
            if zone in env.in_service:
                with contextlib.suppress(ZoneFailed):  # put out meanwhile; the work has nothing to do with it
                    return await run(env.executor, zone, function, *args)
        raise Unavailable(f"no zone is in service log={self.disk.log}")

    async def _count(self, uncounted: Uncounted) -> dict[int, int]:
        """Data blocks of dropped regions, by segment key; without those whose pages can't be read."""
        disk = self.disk
        counts: dict[int, int] = {}
        for low in range(0, len(uncounted.regions), COUNTED_AT_ONCE):
            for value in uncounted.regions[low : low + COUNTED_AT_ONCE]:
                tally(value, 0, REGION_BLOCKS, counts)
            await asyncio.sleep(0)
        for low in range(0, len(uncounted.refs), COUNTED_AT_ONCE):
            wanted = uncounted.refs[low : low + COUNTED_AT_ONCE]
            try:
                for _, _, page in await load_pages(disk.env, disk.log, wanted, disk.checkpoint_zones):
                    tally(decode_region(page), 0, REGION_BLOCKS, counts)
            except (Corrupt, FormatError, Unavailable) as error:
                log.warning("live counters stay too high: %s", error)
        return counts

    async def _rewrite(self, output: CheckpointWriter, root: Root) -> dict[int, PageRef]:
        """Take over the pages of old checkpoints that are mostly dead, so that those can go: their former places."""
        disk = self.disk
        moved: dict[int, PageRef] = {}
        live = await self._aside(live_bytes, root)
        held = self.holds.needed(self.sizes)
        sparse = {n for n, size in self.sizes.items() if n not in held | {self.number} and live.get(n, 0) * 2 < size}
        wanted = await self._aside(in_checkpoints, root, sparse, REWRITE_BYTES_MAX) if sparse else []
        del wanted[REWRITE_PAGES_MAX:]
        for low in range(0, len(wanted), MERGED_AT_ONCE):
            try:
                found = await load_pages(disk.env, disk.log, wanted[low : low + MERGED_AT_ONCE], disk.checkpoint_zones)
            except (Corrupt, Unavailable) as error:
                log.error("old checkpoints can't be merged: %s", error)
                return moved
            for region, ref, page in found:
                moved[region] = ref
                await output.add(region, page)
        return moved

    def _complete(
        self, header: CheckpointHeader, output: CheckpointWriter, written: Written, dead: list[Segment]
    ) -> None:
        disk = self.disk
        root, needs, moved = written
        for region, ref in moved.items():
            now = root.get(region)
            assert now is not None
            disk.map.repoint(region, ref, now)
        self.holds.written(header.number, needs)
        self.needs_before, self.needs = self.needs, needs
        self.number_before = self.number
        self.previous_next_segment, self.next_segment = self.next_segment, header.next_segment
        self.number = self.durable_number = header.number
        self.position, self.previous_crc = header.position, header.previous_crc
        self.root = root
        self.sizes[header.number] = output.size_bytes
        self._drop_unneeded()
        for segment in dead:
            entry = disk.dead.get(segment.number)
            if entry is not None:
                disk.dead[segment.number] = (segment, entry[1] + 1)
        self.free()

    async def rebuild(self, lost: list[tuple[int, PageRef]]) -> dict[int, Region]:
        """See Disk.rebuild. What a checkpoint that ends meanwhile makes of it is judged by whoever asked: the map says
        then something else than the lost page."""
        return await rebuild_pages(
            self.disk,
            lost,
            number=self.number,
            position=self.position,
            next_segment=self.next_segment,
            previous_next_segment=self.previous_next_segment,
            sizes=self.sizes,
        )

    # -- freeing ------------------------------------------------------------------------------------------------

    def _drop_unneeded(self) -> None:
        """Remove the checkpoints that are not needed any more."""
        for number in self.sizes.keys() - self._needed(self.sizes):
            del self.sizes[number]
            self._delete(checkpoint_name(self.disk.log, number))

    def _needed(self, numbers: Iterable[int]) -> set[int]:
        """Of these checkpoints, those that the two newest or a snapshot need."""
        numbers = set(numbers)
        if self.needs is None or self.needs_before is None:
            return numbers
        keep = self.needs | self.needs_before | {self.number, self.number_before}
        return numbers & keep | self.holds.needed(numbers)

    def take_in(self, shown: Mapping[int, int]) -> None:
        """Zones show these checkpoints (number: bytes of the longest copy), some of which were away when the log was
        opened: keep those that may be needed."""
        for number in self._needed(n for n in shown if n <= self.number):
            self.sizes[number] = max(shown[number], self.sizes.get(number, 0))

    def free(self) -> None:
        """Free the dead segments that two checkpoints have passed and nobody reads."""
        disk = self.disk
        for number, (segment, seen) in list(disk.dead.items()):
            if seen < FREES_CHECKED or segment.pins:
                continue
            del disk.dead[number]
            disk.dead_blocks -= segment.blocks
            disk.env.segments.pop(segment.key, None)
            disk.env.freed_segments += 1
            segment.close_handles()
            self._retire(segment)

    def _retire(self, segment: Segment) -> None:
        env = self.disk.env
        # A copy on a zone out of service is not listed any more when that comes back, and is removed then.
        zones = env.serving(segment.zones)
        left = len(zones)

        def gone(result: object, error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            _ignored(result, error)
            if not left:
                self.freed += 1
                if self.on_progress is not None:
                    self.on_progress()

        disk = self.disk
        segment_blocks = disk.writer.segment_blocks
        files = disk.loose_blocks + disk.dead_blocks + env.spare_blocks + segment.blocks
        again = (
            segment.blocks == segment_blocks
            and files <= disk.loose_live * SPARE_SPACE + SPARE_SEGMENTS * segment_blocks
        )
        if again:
            env.spare_blocks += segment.blocks
        for zone in zones:
            backend = env.zones[zone].backend
            env.executor.submit(zone, backend.retire if again else backend.delete, (segment.name,), gone)
        if not zones:
            self.freed += 1

    def _delete(self, name: str) -> None:
        for zone in self.disk.env.in_service:
            self.disk.env.executor.submit(zone, self.disk.env.zones[zone].backend.delete, (name,), _ignored)

    def drop_checkpoint(self, number: int) -> None:
        """Remove copies of a checkpoint that is not kept any more."""
        if number not in self.sizes:
            self._delete(checkpoint_name(self.disk.log, number))

    def places(self) -> set[tuple[int, ...]]:
        """The sets of zones that the log's segments and checkpoints lie in: 50 ns for each of these, so ask seldom."""
        found = {segment.zones for segment in self.disk.segments.values()}
        return found.union(self.disk.checkpoint_zones(number) for number in self.sizes)

    async def do_without(self, number: int) -> bool:
        """No zone has that checkpoint whole: see that nobody needs it any more, which takes two later ones. False: map
        pages, or the map of a snapshot, are lost with it."""
        if number in await self._aside(pages_of, self.root) or self.holds.needed([number]):
            return False
        while number in self.sizes:
            await self.checkpoint()
        return True

    async def settled(self) -> None:
        """Wait for the checkpoint under way, if any."""
        with contextlib.suppress(NoSpace):
            await self._settled()

    async def close(self) -> None:
        """Wait for the checkpoint under way; begin no other."""
        self._closed = True
        self.leave()
        for timer in (self._timer, self._press_timer, self._again_timer):
            if timer is not None:
                timer.cancel()
        self._try_again()
        while self._task is not None:
            await asyncio.wait([self._task])


def _ignored(result: object, error: BaseException | None) -> None:
    """A file that could not be removed is garbage that the next opening removes."""
    if error is not None:
        log.warning("garbage stays until the next opening: %s", error)

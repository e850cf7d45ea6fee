"""Keeps one disk's log short: checkpoints, freeing of dead segments, eviction of map regions.

A checkpoint begins at a boundary between segments, in one loop turn: the dirty regions are frozen, position and segment
table noted. Then, while clients go on: the segments below are sealed durably, the frozen regions written, and the
checkpoint commits by appearing under its name in every zone of the disk.

Dead segments are freed after two checkpoints that began after their death are complete: the newest checkpoint may turn
out unreadable, and the one before it needs its tail. The two newest checkpoints, and older ones whose map pages they
refer to, are kept.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from objstore.errors import Corrupt, FormatError, NoSpace, StoreError
from objstore.format.checkpoint import DEAD, LIVE, ROOT, TABLE, CheckpointHeader
from objstore.log.blockmap import Frozen, PageRef
from objstore.log.checkpoint import CheckpointWriter, checkpoint_name, load_pages
from objstore.log.disk import Disk
from objstore.log.regions import Region, decode_region, tally
from objstore.log.segment import Segment
from objstore.units import REGION_BLOCKS

log = logging.getLogger(__name__)

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
REWRITE_BYTES_MAX: Final = 16 << 20
COUNTED_AT_ONCE: Final = 64


class Uncounted(NamedTuple):
    """Regions that large discards have dropped and that the live counters still have: in memory, and as pages."""

    regions: list[Region]
    refs: list[tuple[int, PageRef]]


class Keeper:
    """Checkpoints and freeing for one disk. Touched by the event loop only; one checkpoint at a time (`_task`).

    number: of the newest complete checkpoint. durable_number: of the newest that is known to be durable in its zones;
    the one found at opening may not be, if no head has named it yet. pages: where the page of each region is, as the
    root of `number` says. sizes: bytes of each checkpoint object that is kept. next_segment, previous_next_segment:
    where the tails of the newest and of the one before begin.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.number = 0
        self.durable_number = 0
        self.next_number = 1
        self.position = 0
        self.next_segment = 0
        self.previous_next_segment = 0
        self.pages: dict[int, PageRef] = {}
        self.sizes: dict[int, int] = {}
        self.previous_needs: frozenset[int] = frozenset()
        self.freed = 0
        """Segments whose files are gone, since the disk was opened."""
        self.on_progress: Callable[[], None] | None = None
        """Called when a checkpoint has ended, well or not, and when a segment's files are gone."""
        self.wanted = False
        self._task: asyncio.Task[None] | None = None
        self._failed: StoreError | None = None
        self.gave_up = False
        """The last checkpoint found no space: another one now would not either."""
        self._closed = False
        self.tight = False
        self._timer: asyncio.TimerHandle | None = None

    # -- when ---------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether the tail has become long enough, or enough dead segments wait, for a checkpoint."""
        disk = self.disk
        operations = disk.writer.position - self.position
        limit = OPERATIONS_PER_REGION * len(disk.map.dirty)
        if operations >= max(OPERATIONS_BETWEEN_MIN, min(OPERATIONS_BETWEEN_MAX, limit)):
            return True
        if disk.writer.next_number - self.next_segment >= SEGMENTS_BETWEEN_MAX:
            return True
        unseen = sum(segment.blocks for segment, seen in disk.dead.values() if not seen)
        segment_blocks = disk.writer.segment_blocks
        return unseen >= (segment_blocks if self.tight else max(2 * segment_blocks, disk.live_total // DEAD_SHARE))

    def boundary(self) -> None:
        """Called at every boundary between segments."""
        if self._task is None and not self._closed and not self.disk.between_parts and (self.wanted or self.due()):
            self._begin()

    def hurry(self, *, now: bool) -> None:
        """Dead segments wait: see that checkpoints come even if no client writes any more."""
        self.tight = now
        if now and not self.gave_up:
            self._force()
        elif self._timer is None:
            self._timer = self.disk.env.loop.call_later(IDLE_SECONDS, self._idle)

    def _idle(self) -> None:
        self._timer = None
        if self.disk.dead:
            self._force()

    def _force(self) -> None:
        disk = self.disk
        if self._task is not None or self._closed or disk.between_parts or disk.writer.error is not None:
            return
        self.wanted = True
        if disk.writer.has_records:
            disk.writer.finish_segment()
        else:
            self.boundary()

    async def checkpoint(self) -> None:
        """Write a checkpoint of everything appended before this call. StoreError: it could not be written."""
        while self._task is not None:
            await asyncio.wait([self._task])
        self._failed = None
        self._force()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._failed is not None:
            raise self._failed
        if self.disk.writer.error is not None:
            raise self.disk.writer.error

    # -- writing ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        disk = self.disk
        writer = disk.writer
        self.wanted = False
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
        live = [segment for segment in disk.segments.values() if segment.number < next_segment]
        dead = [segment for segment, _ in disk.dead.values()]
        # The counters of this moment: replay of the tail goes on from there. What large discards have dropped by now is
        # still in them, and nobody will remember after the next opening: it is counted while the pages are written.
        uncounted = Uncounted(disk.map.dropped.copy(), disk.map.dropped_refs.copy())
        rows = [(segment, segment.live, LIVE) for segment in live]
        rows += [(segment, 0, DEAD) for segment, seen in disk.dead.values() if not seen]
        frozen = disk.map.freeze()
        self._task = disk.env.loop.create_task(self._write(header, frozen, rows, dead, uncounted))
        disk.writer.watch(self._task)

    async def _write(
        self,
        header: CheckpointHeader,
        frozen: Frozen,
        rows: list[tuple[Segment, int, int]],
        dead: list[Segment],
        uncounted: Uncounted,
    ) -> None:
        disk = self.disk
        changed = frozen.regions
        output = CheckpointWriter(disk.env, header, disk.checkpoint_zones(header.number))
        try:
            await disk.writer.sealed_below(header.next_segment)
            await output.open()
            for region in sorted(changed):
                page = frozen.take(region)
                if page:
                    await output.add(region, page)
            pages = {region: ref for region, ref in self.pages.items() if region not in changed}
            moved = await self._rewrite(output, pages)
            pages.update(output.refs)
            gone = await self._count(uncounted)
            table = np.array(
                [
                    (
                        s.number,
                        s.blocks,
                        s.seal_crc,
                        max(0, live - gone.get(s.key, 0)),
                        sum(1 << z for z in s.zones),
                        s.generation,
                        state,
                    )
                    for s, live, state in rows
                ],
                TABLE,
            )
            root = np.array([(r, ref.checkpoint, ref.length, ref.offset) for r, ref in pages.items()], ROOT)
            await output.finish(root, table)
        except StoreError as error:
            frozen.abort()
            self._failed = error
            log.warning("checkpoint given up log=%d checkpoint=%d: %s", disk.log, header.number, error)
            if isinstance(error, NoSpace):
                self.gave_up = True
                await output.abort()
            else:
                disk.writer.fail(error)
        else:
            self.gave_up = False
            frozen.commit()
            self._complete(header, output, pages, moved, dead)
        finally:
            self._task = None
        disk.evict()
        if self.on_progress is not None:
            self.on_progress()

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
            except (Corrupt, FormatError) as error:
                log.warning("live counters stay too high: %s", error)
        return counts

    async def _rewrite(self, output: CheckpointWriter, pages: dict[int, PageRef]) -> dict[int, PageRef]:
        """Take over the pages of old checkpoints that are mostly dead, so that those can go: their former places."""
        live: dict[int, int] = {}
        for ref in pages.values():
            live[ref.checkpoint] = live.get(ref.checkpoint, 0) + ref.length
        sparse = {n for n, size in self.sizes.items() if n != self.number and live.get(n, 0) * 2 < size}
        budget = REWRITE_BYTES_MAX
        wanted: list[tuple[int, PageRef]] = []
        for region, ref in pages.items():
            if ref.checkpoint in sparse and budget > 0:
                wanted.append((region, ref))
                budget -= ref.length
        moved: dict[int, PageRef] = {}
        disk = self.disk
        if wanted:
            try:
                found = await load_pages(disk.env, disk.log, wanted, disk.checkpoint_zones)
            except Corrupt as error:
                log.error("old checkpoints can't be merged: %s", error)
                return moved
            for region, ref, page in found:
                moved[region] = ref
                await output.add(region, page)
        return moved

    def _complete(
        self,
        header: CheckpointHeader,
        output: CheckpointWriter,
        pages: dict[int, PageRef],
        moved: dict[int, PageRef],
        dead: list[Segment],
    ) -> None:
        disk = self.disk
        for region, ref in moved.items():
            disk.map.repoint(region, ref, pages[region])
        needs = frozenset(ref.checkpoint for ref in pages.values())
        keep = needs | self.previous_needs | {self.number, header.number}
        self.previous_needs = needs
        self.previous_next_segment, self.next_segment = self.next_segment, header.next_segment
        self.number = self.durable_number = header.number
        self.position = header.position
        self.pages = disk.pages = pages
        self.sizes[header.number] = output.size_bytes
        for number in [n for n in self.sizes if n not in keep]:
            del self.sizes[number]
            self._delete(checkpoint_name(disk.log, number), disk.checkpoint_zones(number))
        for segment in dead:
            entry = disk.dead.get(segment.number)
            if entry is not None:
                disk.dead[segment.number] = (segment, entry[1] + 1)
        self.free()

    # -- freeing ------------------------------------------------------------------------------------------------

    def free(self) -> None:
        """Free the dead segments that two checkpoints have passed and nobody reads."""
        disk = self.disk
        for number, (segment, seen) in list(disk.dead.items()):
            if seen < FREES_CHECKED or segment.pins:
                continue
            del disk.dead[number]
            disk.dead_blocks -= segment.blocks
            disk.env.segments.pop(segment.key, None)
            segment.close_handles()
            self._retire(segment)

    def _retire(self, segment: Segment) -> None:
        left = len(segment.zones)

        def gone(result: object, error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            _ignored(result, error)
            if not left:
                self.freed += 1
                if self.on_progress is not None:
                    self.on_progress()

        disk = self.disk
        env = disk.env
        segment_blocks = disk.writer.segment_blocks
        files = disk.total_blocks + disk.dead_blocks + env.spare_blocks + segment.blocks
        again = (
            segment.blocks == segment_blocks
            and files <= disk.live_total * SPARE_SPACE + SPARE_SEGMENTS * segment_blocks
        )
        if again:
            env.spare_blocks += segment.blocks
        for zone in segment.zones:
            backend = env.zones[zone].backend
            env.executor.submit(zone, backend.retire if again else backend.delete, (segment.name,), gone)

    def _delete(self, name: str, zones: tuple[int, ...]) -> None:
        for zone in zones:
            self.disk.env.executor.submit(zone, self.disk.env.zones[zone].backend.delete, (name,), _ignored)

    async def settled(self) -> None:
        """Wait for the checkpoint under way, if any."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Wait for the checkpoint under way; begin no other."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._task is not None:
            await asyncio.wait([self._task])


def _ignored(result: object, error: BaseException | None) -> None:
    """A file that could not be removed is garbage that the next opening removes."""
    if error is not None:
        log.warning("garbage stays until the next opening: %s", error)

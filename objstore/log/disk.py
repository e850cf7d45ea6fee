"""One writable log with its block map: what changes blocks, and the account of live segments. Reading: view.py.

Whole blocks only; bytes, admission and modes are the volume's business (volume/vdi.py). Decisions are plain functions;
a coroutine here awaits only reads. Every append and the change of the map that belongs to it happen in one loop turn.

Holds: the map says exactly what replaying the log up to writer.position would give (a request of several parts takes
effect with its last; of what discards a large range, `apply_more` brings the rest); a segment's `live` counts the
map's entries that point into it, except for regions that a large discard dropped and that `Keeper` still has to count:
then it is too high, never too low. Segments of other logs, which the map of a clone points into, are not counted here.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from objstore.format.record import RECORD_DATA_BLOCKS_MAX, Flag, Kind
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, HOLE, RESERVED, SEGMENT_BITS, SEGMENT_MAX
from objstore.log.blockmap import FILL_STEP, BlockMap, PageRef
from objstore.log.env import Env
from objstore.log.root import Root
from objstore.log.segment import Segment
from objstore.log.view import MappedView
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_SHIFT, REGION_MASK, REGION_SHIFT

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]

FILL_AT_ONCE_BLOCKS: Final = FILL_STEP << REGION_SHIFT
FILL_KIND: Final = {HOLE: Kind.TRIM, RESERVED: Kind.ZERO}


class Disk(MappedView):
    """A log, its map, its segments. Touched by the event loop only.

    segments: the live table of this log, number -> Segment (the open one included). dead: segments without live
    blocks that wait to be freed, with the number of checkpoints begun and completed since they died.
    live_total: blocks of the disk whose data lies in this log. total_blocks, dead_blocks: blocks of the files of
    `segments` and of `dead`, in one zone. held_live, held_blocks: what of live_total and total_blocks lies in segments
    that the map of a snapshot needs (`Segment.held`): nothing of it can be freed by moving it.
    """

    def __init__(self, env: Env, log_number: int, blocks: int, blockmap: BlockMap, writer: LogWriter) -> None:
        super().__init__(env, log_number, blocks, blockmap)
        self.writer = writer
        writer.observer = self
        self.segments: dict[int, Segment] = {}
        self.dead: dict[int, tuple[Segment, int]] = {}
        self.live_total = 0
        self.total_blocks = 0
        self.dead_blocks = 0
        self.held_live = 0
        self.held_blocks = 0
        self.base_root: Root | None = None
        """What the map of a clone began with."""
        self.still_since = -1
        self.still_position = -1
        """From the first of these positions, that of the newest snapshot of this run, to the second there are
        operations of collection alone."""
        self.moving = False
        self.finished: list[Directory] = []
        """While the log is being opened: directories of the segments made so far."""
        self.on_failed: Callable[[], None] | None = None
        self.on_boundary: Callable[[], None] | None = None
        self.on_whole: Callable[[], None] | None = None
        """Called when `between_parts` has become false."""
        self._parts: list[tuple[int, int, int, int]] = []
        self._partial: list[tuple[int, int]] = []
        """Ranges of those parts that replace regions only in part."""
        self._applying: Iterator[None] | None = None

    # -- segments -----------------------------------------------------------------------------------------------

    def segment_opened(self, segment: Segment) -> None:
        """A new segment takes records (SegmentObserver)."""
        self.add_segment(segment)

    def segment_finished(self, segment: Segment, blocks_before: int, directory: Directory) -> None:
        """The log stands between two segments (SegmentObserver)."""
        self.total_blocks -= blocks_before - segment.blocks
        if self.on_boundary is not None:
            self.on_boundary()
        else:
            self.finished.append(directory)

    def log_failed(self) -> None:
        """The log takes nothing more (SegmentObserver)."""
        if self.on_failed is not None:
            self.on_failed()

    def add_segment(self, segment: Segment) -> None:
        """Take a segment into the live table."""
        self.segments[segment.number] = segment
        self.env.segments[segment.key] = segment
        self.total_blocks += segment.blocks

    def bury(self, segment: Segment) -> None:
        """No block of the segment is in the map any more (its directory was checked): to be freed in time, or once no
        snapshot needs it."""
        if segment.held:
            segment.emptied = True
            return
        del self.segments[segment.number]
        segment.live = 0
        self.total_blocks -= segment.blocks
        self.dead_blocks += segment.blocks
        self.dead[segment.number] = (segment, 0)

    def hold(self, segment: Segment) -> None:
        """The map of a snapshot needs the segment, whatever becomes of this disk's. Idempotent."""
        if not segment.held:
            segment.held = True
            self.held_blocks += segment.blocks
            self.held_live += segment.live

    def release(self, segment: Segment) -> None:
        """No snapshot needs the segment any more. Idempotent."""
        if segment.held:
            segment.held = False
            self.held_blocks -= segment.blocks
            self.held_live -= segment.live
            if segment.emptied:
                self.bury(segment)

    @property
    def loose_live(self) -> int:
        """Blocks with data in segments that collection may move."""
        return self.live_total - self.held_live

    @property
    def loose_blocks(self) -> int:
        """Blocks of the files of those segments."""
        return self.total_blocks - self.held_blocks

    # -- changing -----------------------------------------------------------------------------------------------

    @property
    def between_parts(self) -> bool:
        """Operations are in the log that the map does not show yet: no checkpoint may begin here."""
        return self.moving or bool(self._parts) or self._applying is not None

    def parts_from(self, otherwise: int) -> int:
        """Number of the first segment with data of a request whose last part is still to come, else `otherwise`: the
        map doesn't point there yet, but will."""
        for kind, _, _, entry in self._parts:
            if kind == Kind.WRITE:
                return entry >> BLOCK_BITS & SEGMENT_MAX
        return otherwise

    def write_block(self, lba: int, data: memoryview) -> bool:
        """Write one whole block if that takes no waiting: the hot path. False: nothing done."""
        writer = self.writer
        blockmap = self.map
        value = blockmap.regions.get(lba >> REGION_SHIFT)
        if type(value) is PageRef or not writer.room(1):
            return False
        entry = writer.append_block(lba, data)
        segments = self.env.segments
        segments[entry >> BLOCK_BITS].live += 1
        old = blockmap.set_one(lba, entry)
        if old > RESERVED:
            segment = segments[old >> BLOCK_BITS]
            if segment.log == self.log:
                segment.live -= 1
                if segment.held:
                    self.held_live -= 1
                return True
        self.live_total += 1
        return True

    def write_now(self, lba: int, data: memoryview) -> bool:
        """Write whole blocks as one operation if that takes no waiting. False: nothing done."""
        blocks = len(data) >> BLOCK_SHIFT
        if blocks > RECORD_DATA_BLOCKS_MAX or self.map.missing_edges(lba, blocks):
            return False
        if self.writer.room(blocks, whole=True) < blocks:
            return False
        self.append_write(lba, blocks, data)
        return True

    def append_write(self, lba: int, count: int, data: memoryview, flags: int = 0) -> None:
        """One operation of at most `writer.room` blocks; the edges of its range are loaded."""
        entry = self.writer.append(Kind.WRITE, lba, count, data, flags=flags)
        self._apply(Kind.WRITE, lba, count, entry, flags)

    def append_fill(self, lba: int, count: int, value: int, flags: int = 0) -> None:
        """Make a range HOLE or RESERVED; `writer.room(0)` was asked, the edges of the range are loaded."""
        kind = FILL_KIND[value]
        self.writer.append(kind, lba, count, flags=flags)
        self._apply(kind, lba, count, value, flags)

    def _apply(self, kind: int, lba: int, count: int, entry: int, flags: int) -> None:
        if flags:
            if flags & Flag.FIRST:
                self._parts.clear()
                self._partial.clear()
            self._add_part(kind, lba, count, entry)
            if not flags & Flag.LAST:
                return
            parts = self._parts.copy()
        elif kind == Kind.WRITE:
            self._apply_write(lba, count, entry)
            return
        else:
            parts = [(kind, lba, count, entry)]
        self._applying = self._steps(parts)
        self._parts.clear()
        self._partial.clear()
        self.apply_more()

    def _add_part(self, kind: int, lba: int, count: int, entry: int) -> None:
        """A part of a request; neighbours that discard go into the map as one."""
        parts = self._parts
        if parts and kind != Kind.WRITE:
            last_kind, last_lba, last_count, last_entry = parts[-1]
            if (last_kind, last_lba + last_count, last_entry) == (kind, lba, entry):
                lba, count = last_lba, last_count + count
                parts.pop()
                self._partial = [part for part in self._partial if part[0] != lba]
        parts.append((kind, lba, count, entry))
        if (lba | (lba + count)) & REGION_MASK:
            self._partial.append((lba, count))

    def _apply_write(self, lba: int, count: int, entry: int) -> None:
        replaced = self.map.assign(lba, entry, count)
        self.env.segments[entry >> BLOCK_BITS].live += count
        self.live_total += count
        self.forget_live(replaced)

    def _steps(self, parts: list[tuple[int, int, int, int]]) -> Iterator[None]:
        """Bring complete parts into the map; stops where the loop may have a turn."""
        for kind, lba, count, entry in parts:
            if kind == Kind.WRITE:
                self._apply_write(lba, count, entry)
            else:
                for replaced in self.map.fill_steps(lba, count, entry):
                    self.forget_live(replaced)
                    if count > FILL_AT_ONCE_BLOCKS:
                        yield

    def apply_more(self) -> bool:
        """Go on with what was appended last and is not in the map as a whole yet; False: it is. No other change of the
        disk but a collection's may come in between."""
        if self._applying is None:
            return False
        for _ in self._applying:
            return True
        self._applying = None
        if self.on_whole is not None:
            self.on_whole()
        return False

    def forget_live(self, replaced: dict[int, int]) -> None:
        """Blocks by segment key that the map points at no more."""
        segments = self.env.segments
        for key, blocks in replaced.items():
            if key >> SEGMENT_BITS != self.log:
                continue
            segment = segments.get(key)
            if segment is not None:  # else: regions dropped uncounted, whose segment was found dead and freed before
                segment.live -= blocks
                if segment.held:
                    self.held_live -= blocks
            self.live_total -= blocks

    def forget_parts(self) -> None:
        """The request of several parts under way failed before its last one: it never happened."""
        if self._parts:
            self._parts.clear()
            self._partial.clear()
            if self.on_whole is not None:
                self.on_whole()

    def readdress(
        self, made: Sequence[Segment], former: Sequence[Segment], lbas: U64, sources: U64, targets: U64
    ) -> None:
        """What lay in the segments `former` lies in those `made` now, block by block from `sources` to `targets`."""
        blockmap = self.map
        for segment in made:
            self.add_segment(segment)
        # What a request of several parts has not brought into the map yet may lie in regions that are not loaded.
        regions = lbas >> np.uint64(REGION_SHIFT)
        away = [r for r in np.unique(regions).tolist() if type(blockmap.regions.get(r)) is PageRef]
        here = ~np.isin(regions, np.array(away, np.uint64))
        moved = targets[here][blockmap.compare_and_assign(lbas[here], sources[here], targets[here])]
        for key, count in zip(*np.unique(moved >> np.uint64(BLOCK_BITS), return_counts=True), strict=True):
            self.env.segments[int(key)].live += int(count)
        if self._parts:
            new = dict(zip(sources.tolist(), targets.tolist(), strict=True))
            self._parts = [(kind, lba, count, new.get(entry, entry)) for kind, lba, count, entry in self._parts]
        for segment in former:
            del self.segments[segment.number]
            self.env.segments.pop(segment.key, None)
            self.total_blocks -= segment.blocks
            for zone in list(segment.handles):
                segment.drop_handle(zone)

    # -- map pages ----------------------------------------------------------------------------------------------

    async def load_edges(self, lba: int, count: int) -> None:
        """Bring in what `append_write` and `append_fill` of the range need; it may be the last part of a request, with
        which the parts before take effect too."""
        ranges = [(lba, count), *self._partial]
        evict = True
        while wanted := list(dict.fromkeys(pair for part in ranges for pair in self.map.missing_edges(*part))):
            await self.load(wanted, evict=evict)
            evict = False

"""One writable log with its block map: what changes blocks, what reads them, and the account of live segments.

Whole blocks only; bytes, admission and modes are the volume's business (volume/vdi.py). Decisions are plain functions;
a coroutine here awaits only reads. Every append and the change of the map that belongs to it happen in one loop turn.

Holds: the map says exactly what replaying the log up to writer.position would give (a request of several parts takes
effect with its last; of what discards a large range, `apply_more` brings the rest); a segment's `live` counts the
map's entries that point into it, except for regions that a large discard dropped and that `Keeper` still has to count:
then it is too high, never too low.
"""

import logging
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from objstore.errors import Corrupt, Unavailable
from objstore.format.record import RECORD_DATA_BLOCKS_MAX, Flag, Kind
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, BLOCK_IN_SEGMENT_MASK, HOLE, RESERVED, SEGMENT_MAX
from objstore.log.blockmap import FILL_STEP, BlockMap, PageRef
from objstore.log.checkpoint import load_pages
from objstore.log.damage import Damage, merge_ranges
from objstore.log.env import Env
from objstore.log.mapmemory import MapOwner
from objstore.log.reader import read_run, read_run_now, zero_fill
from objstore.log.regions import decode_region
from objstore.log.segment import Segment
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, REGION_MASK, REGION_SHIFT

log = logging.getLogger(__name__)

FILL_AT_ONCE_BLOCKS: Final = FILL_STEP << REGION_SHIFT
FILL_KIND: Final = {HOLE: Kind.TRIM, RESERVED: Kind.ZERO}


class Disk:
    """A log, its map, its segments. Touched by the event loop only.

    segments: the live table of this log, number -> Segment (the open one included). dead: segments without live
    blocks that wait to be freed, with the number of checkpoints begun and completed since they died.
    live_total: blocks of the disk that hold data. total_blocks, dead_blocks: blocks of the files of `segments` and of
    `dead`, in one zone.
    """

    def __init__(self, env: Env, log_number: int, blocks: int, blockmap: BlockMap, writer: LogWriter) -> None:
        self.env = env
        self.log = log_number
        self.blocks = blocks
        self.map = blockmap
        self.writer = writer
        writer.observer = self
        self.segments: dict[int, Segment] = {}
        self.dead: dict[int, tuple[Segment, int]] = {}
        self.damage = Damage()
        self.checkpoint_zones: Callable[[int], tuple[int, ...]] = lambda number: tuple(range(len(env.zones)))
        self.owner: MapOwner | None = None
        """Whose map this is in the account of memory."""
        self.live_total = 0
        self.total_blocks = 0
        self.dead_blocks = 0
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
        """No block of the segment is in the map any more (its directory was checked): to be freed in time."""
        del self.segments[segment.number]
        segment.live = 0
        self.total_blocks -= segment.blocks
        self.dead_blocks += segment.blocks
        self.dead[segment.number] = (segment, 0)

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
            segments[old >> BLOCK_BITS].live -= 1
        else:
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
            segment = segments.get(key)
            if segment is not None:  # else: regions dropped uncounted, whose segment was found dead and freed before
                segment.live -= blocks
            self.live_total -= blocks

    def forget_parts(self) -> None:
        """The request of several parts under way failed before its last one: it never happened."""
        if self._parts:
            self._parts.clear()
            self._partial.clear()
            if self.on_whole is not None:
                self.on_whole()

    # -- map pages ----------------------------------------------------------------------------------------------

    async def load(self, wanted: list[tuple[int, PageRef]], *, evict: bool = True) -> None:
        """Bring these regions of the map into memory, or some of them. Corrupt: a page is bad in every zone;
        Unavailable: in every zone that is in service.

        evict: make room for them first. Whoever asks a second time for the same range doesn't: what was loaded for it
        the first time would be the first to go.
        """
        if not wanted:
            return
        if evict:
            self.evict()
        try:
            pages = await load_pages(self.env, self.log, wanted, self.checkpoint_zones)
        except (Corrupt, Unavailable):
            # A checkpoint may have taken these pages over meanwhile, and the one that held them is gone: the caller
            # looks again and finds them there.
            if all(self.map.regions.get(region) == ref for region, ref in wanted):
                raise
            return
        for region, ref, page in pages:
            self.map.load(region, ref, decode_region(page))

    def evict(self) -> None:
        """Bring the maps back below their memory limit, if clean regions can go."""
        if self.owner is not None:
            self.env.maps.evict(self.owner)

    async def load_edges(self, lba: int, count: int) -> None:
        """Bring in what `append_write` and `append_fill` of the range need; it may be the last part of a request, with
        which the parts before take effect too."""
        ranges = [(lba, count), *self._partial]
        evict = True
        while wanted := list(dict.fromkeys(pair for part in ranges for pair in self.map.missing_edges(*part))):
            await self.load(wanted, evict=evict)
            evict = False

    # -- reading ------------------------------------------------------------------------------------------------

    def read_block_now(self, lba: int, into: memoryview) -> int:
        """One block: 0 = `into` holds it, 1 = it is zeros and `into` untouched, -1 = can't without waiting."""
        value = self.map.regions.get(lba >> REGION_SHIFT)
        if type(value) is array:
            entry = value[lba & REGION_MASK]
        elif value is None:
            return 1
        elif type(value) is PageRef:
            return -1
        else:
            entry = self.map.lookup(lba)
        if entry <= RESERVED:
            return 1
        segment = self.env.segments[entry >> BLOCK_BITS]
        return 0 if read_run_now(segment, entry & BLOCK_IN_SEGMENT_MASK, 1, into) else -1

    def read_now(self, lba: int, count: int, into: memoryview) -> int:
        """Blocks of zeros in the range, `into` untouched if that is all of them; -1 = can't without waiting."""
        if count == 1:
            return self.read_block_now(lba, into)
        if self.map.missing(lba, count):
            return -1
        segments = self.env.segments
        zeros: list[tuple[int, int]] = []
        zero_blocks = done = 0
        for entry, n in self.map.runs(lba, count):
            if entry <= RESERVED:
                zeros.append((done, n))
                zero_blocks += n
            else:
                part = into[done << BLOCK_SHIFT : (done + n) << BLOCK_SHIFT]
                if not read_run_now(segments[entry >> BLOCK_BITS], entry & BLOCK_IN_SEGMENT_MASK, n, part):
                    return -1
            done += n
        if done < count:
            return -1
        if zero_blocks < count:
            zero_fill(into, zeros)
        return zero_blocks

    async def read(self, lba: int, count: int, into: memoryview) -> int:
        """As read_now, waiting for zones. Corrupt, with `bad` in bytes from the start of the disk: every other byte of
        `into` is filled."""
        env = self.env
        zeros: list[tuple[int, int]] = []
        bad: list[int] = []
        done = 0
        while done < count:
            end = min(count, done + RECORD_DATA_BLOCKS_MAX)
            evict = True
            while wanted := self.map.missing(lba + done, end - done):
                await self.load(wanted, evict=evict)
                evict = False
            for entry, n in self.map.runs(lba + done, end - done):
                if entry <= RESERVED:
                    zeros.append((done, n))
                    done += n
                    continue
                segment = env.segments[entry >> BLOCK_BITS]
                block = entry & BLOCK_IN_SEGMENT_MASK
                part = into[done << BLOCK_SHIFT : (done + n) << BLOCK_SHIFT]
                if read_run_now(segment, block, n, part):
                    done += n
                    continue
                n, in_memory = stretch(segment, block, n)
                part = part[: n << BLOCK_SHIFT]
                if in_memory:
                    read_run_now(segment, block, n, part)
                else:
                    bad += [done + i for i in await self._read_zones(lba + done, entry, segment, n, part)]
                done += n
                break  # the map may have changed while this waited
        zero_blocks = sum(n for _, n in zeros)
        if zero_blocks < count:
            zero_fill(into, zeros)
        if bad:
            raise Corrupt(
                f"no zone has these blocks whole log={self.log} blocks={len(bad)} first={lba + bad[0]}",
                merge_ranges([((lba + i) << BLOCK_SHIFT, BLOCK_BYTES) for i in bad]),
            )
        return zero_blocks

    async def _read_zones(self, lba: int, entry: int, segment: Segment, count: int, into: memoryview) -> list[int]:
        """Fill `into` from the zones; indices of damaged blocks. A block that the map has moved meanwhile is read
        where it is now before it counts as damaged."""
        holders = segment.zones  # one that is put out before it has the seal is taken off the segment
        try:
            data, bad = await read_run(self.env, segment, entry & BLOCK_IN_SEGMENT_MASK, count)
        except Corrupt:
            data, bad = None, list(range(count))
        if data is not None:
            into[:] = data
        damaged = []
        for i in bad:
            while wanted := self.map.missing(lba + i, 1):
                await self.load(wanted)
            part = into[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]
            if self.map.lookup(lba + i) == entry + i:
                out = [z for z in holders if z not in self.env.in_service]
                if out:  # nobody can say that it is damaged
                    names = ", ".join(repr(self.env.zones[z]) for z in out)
                    raise Unavailable(f"block {lba + i} of log {self.log} is on zones that are out: {names}")
                part[:] = bytes(BLOCK_BYTES)
                damaged.append(i)
                self.damage.note(lba + i, entry + i)
                continue
            try:
                if await self.read(lba + i, 1, part):
                    part[:] = bytes(BLOCK_BYTES)
            except Corrupt:
                damaged.append(i)
        return damaged

    async def extents(self, lba: int, count: int, extents_max: int) -> list[tuple[int, int]]:
        """(HOLE, RESERVED or ENTRY_MIN for data, blocks), from the start of the range; may cover less."""
        while True:
            await self.load(self.map.missing(lba, 1))
            if not self.map.missing(lba, 1):
                return self.map.extents(lba, count, extents_max)


def stretch(segment: Segment, block: int, count: int) -> tuple[int, bool]:
    """(blocks from `block` on that are alike, at most count; whether they are in memory)."""
    memory = segment.memory
    if memory is None:
        return count, False
    in_memory = memory[block] is not None
    n = 1
    while n < count and (memory[block + n] is not None) is in_memory:
        n += 1
    return n, in_memory

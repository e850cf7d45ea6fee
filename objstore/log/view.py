"""What reads the blocks of a log through a map: a disk that is written to, and a snapshot of one.

Whole blocks only. Decisions are plain functions; a coroutine here awaits only reads. Addresses may name segments of
other logs, which are open as long as this is (`Env.segments`); so may the pages of the map (`Env.page_zones`).
"""

import logging
from array import array
from collections.abc import Awaitable, Callable

from objstore.errors import Corrupt, Unavailable
from objstore.format.record import RECORD_DATA_BLOCKS_MAX
from objstore.log.address import BLOCK_BITS, BLOCK_IN_SEGMENT_MASK, RESERVED
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.checkpoint import NUMBER_MASK, LostPages, load_pages
from objstore.log.damage import Damage, merge_ranges
from objstore.log.env import Env
from objstore.log.mapmemory import MapOwner
from objstore.log.reader import read_run, read_run_now, zero_fill
from objstore.log.regions import Kinds, Region, decode_region, kinds_of
from objstore.log.root import LOG_SHIFT
from objstore.log.segment import Segment
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, REGION_MASK, REGION_SHIFT

log = logging.getLogger(__name__)


class MappedView:
    """A map and the log that it is of. Touched by the event loop only.

    checkpoint_zones: of each checkpoint of this log, the zones that have it.
    """

    def __init__(self, env: Env, log_number: int, blocks: int, blockmap: BlockMap) -> None:
        self.env = env
        self.log = log_number
        self.blocks = blocks
        self.map = blockmap
        self.damage = Damage()
        self.checkpoint_zones: Callable[[int], tuple[int, ...]] = lambda number: tuple(range(len(env.zones)))
        self.rebuild: Callable[[list[tuple[int, PageRef]]], Awaitable[dict[int, Region]]] = _no_pages
        """What regions whose pages are lost had in them, as far as that can be told (rebuild.py)."""
        self.owner: MapOwner | None = None
        """Whose map this is in the account of memory."""
        self.newest_page: Callable[[int], PageRef | None] = lambda region: None
        """Where the page of a region lies that no checkpoint is owed; None: it has none, or nobody knows."""

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
        except (Corrupt, Unavailable) as error:
            # A checkpoint may have taken these pages over meanwhile, and the one that held them is gone: the caller
            # looks again and finds them there.
            if not all(self.map.regions.get(region) == ref for region, ref in wanted):
                return
            if not isinstance(error, LostPages):
                raise
            await self._rebuild(error)
            return
        for region, ref, page in pages:
            self.map.load(region, ref, decode_region(page))
            self.env.loaded_pages += 1

    async def _rebuild(self, error: LostPages) -> None:
        """Pages are whole in no zone: see what the log makes of them, for the next checkpoint to have. LostPages."""
        for region, ref, page in error.found:
            self.map.load(region, ref, decode_region(page))
        rebuilt = await self.rebuild(error.lost)
        lost = False
        for region, ref in error.lost:
            value = rebuilt.get(region)
            if value is not None:
                if self.map.load(region, ref, value):
                    self.map.write_anew(region)
                    self.env.rebuilt_pages += 1
            elif self.map.regions.get(region) == ref:
                self.damage.note_lost_page(region, ref)
                lost = True
        if lost:
            raise error

    def page_of(self, region: int) -> tuple[int, PageRef] | None:
        """The page that has a region as it is, and the log whose checkpoint it lies in; None: there is none (yet)."""
        ref = self.map.regions.get(region)
        if ref is not None and not isinstance(ref, PageRef):
            ref = self.newest_page(region) if self.map.is_clean(region) else None
        if ref is None:
            return None
        return ref.checkpoint >> LOG_SHIFT or self.log, ref._replace(checkpoint=ref.checkpoint & NUMBER_MASK)

    def evict(self) -> None:
        """Bring the maps back below their memory limit, if clean regions can go."""
        if self.owner is not None:
            self.env.maps.evict(self.owner)

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
        if self.damage.blocks:
            for i in set(range(count)).difference(bad):
                self.damage.readable(lba + i, entry + i)
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

    async def extents(self, lba: int, count: int, extents_max: int, kinds: Kinds = kinds_of) -> list[tuple[int, int]]:
        """(HOLE, RESERVED or ENTRY_MIN for data, or what `kinds` makes of a region; blocks), from the start of the
        range; may cover less."""
        while True:
            await self.load(self.map.missing(lba, 1))
            if not self.map.missing(lba, 1):
                return self.map.extents(lba, count, extents_max, kinds)


async def _no_pages(lost: list[tuple[int, PageRef]]) -> dict[int, Region]:
    return {}


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

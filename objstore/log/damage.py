"""Which blocks of a disk no zone has whole: kept by block, so that what is written again drops out of the list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt
from objstore.format.record import KIND_SHIFT, LBA_MASK, Kind
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, BLOCK_IN_SEGMENT_MASK, key_of
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.regions import expand, view
from objstore.log.replay import expand_runs
from objstore.log.segment import Segment
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, REGION_BLOCKS, REGION_SHIFT

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]
BLOCKS_MAX: Final = 1 << 20
"""Damaged blocks of one disk that are remembered one by one: 4 GiB of data, 100 MiB of memory."""
REGIONS_AT_ONCE: Final = 64


class MappedDisk(Protocol):
    """What is needed of a disk: objstore.log.disk.Disk."""

    blocks: int
    map: BlockMap

    async def load(self, wanted: list[tuple[int, PageRef]], *, evict: bool = True) -> None: ...


class Damage:
    """Damaged blocks of one disk: block -> the map entry under which it can't be read. Event loop only.

    A block counts as long as the map still says the same. truncated: there were more than BLOCKS_MAX. pages: regions
    whose map page no zone has: nobody knows what is in them. on_change: called when the list has become another.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.pages: dict[int, PageRef] = {}
        self.truncated = False
        self.on_change: Callable[[], None] = lambda: None

    def note(self, lba: int, entry: int) -> None:
        """The block, found under this entry, is bad in every zone."""
        if self.blocks.get(lba) == entry:
            return
        if len(self.blocks) < BLOCKS_MAX or lba in self.blocks:
            self.blocks[lba] = entry
        else:
            self.truncated = True
        self.on_change()

    def note_lost_page(self, region: int, ref: PageRef) -> None:
        """No zone has the region's page, and the log does not give it."""
        if self.pages.get(region) != ref:
            self.pages[region] = ref
            self.on_change()

    def readable(self, lba: int, entry: int) -> None:
        """The block, found under this entry, was read after all: a copy was repaired, or has come back."""
        if self.blocks.get(lba) == entry:
            del self.blocks[lba]
            self.on_change()

    def whole(self, segment: Segment) -> None:
        """A zone has all of that segment."""
        found = [lba for lba, entry in self.blocks.items() if entry >> BLOCK_BITS == segment.key]
        for lba in found:
            del self.blocks[lba]
        if found:
            self.on_change()

    def take(self, other: Damage) -> None:
        """What the opening of the disk has found besides."""
        for region, ref in other.pages.items():
            self.note_lost_page(region, ref)
        for lba, entry in other.blocks.items():
            self.note(lba, entry)

    def count(self, disk: MappedDisk | None) -> int:
        """Damaged blocks as far as can be told without reading map pages (disk: None = it is closed); all of a region
        whose page is lost."""
        if disk is not None and (self.blocks or self.pages):
            self._forget(disk, self.blocks.keys())
        return len(self.blocks) + (len(self.pages) << REGION_SHIFT)

    def _forget(self, disk: MappedDisk, lbas: Collection[int]) -> None:
        regions = disk.map.regions
        before = len(self.pages) + len(self.blocks)
        for region in [r for r, ref in self.pages.items() if regions.get(r) != ref]:
            del self.pages[region]
        for lba in [b for b in lbas if not isinstance(regions.get(b >> REGION_SHIFT), PageRef)]:
            if disk.map.lookup(lba) != self.blocks[lba]:
                del self.blocks[lba]
        if len(self.pages) + len(self.blocks) < before:
            self.on_change()

    async def ranges(self, disk: MappedDisk) -> list[tuple[int, int]]:
        """(offset_bytes, length_bytes) of what is damaged now, ascending, not touching."""
        known = sorted(lba for lba in self.blocks if lba >> REGION_SHIFT not in self.pages)
        for low in range(0, len(known), REGIONS_AT_ONCE):
            part = known[low : low + REGIONS_AT_ONCE]
            await _load(disk, np.array(part, np.uint64))
            self._forget(disk, [lba for lba in part if lba in self.blocks])
        found = [(lba << BLOCK_SHIFT, BLOCK_BYTES) for lba in self.blocks]
        for region in self.pages:
            first = region << REGION_SHIFT
            found.append((first << BLOCK_SHIFT, min(REGION_BLOCKS, disk.blocks - first) << BLOCK_SHIFT))
        return merge_ranges(sorted(found))

    async def note_segment(
        self, disk: MappedDisk, segment: Segment, directory: Directory | None, lost: Sequence[int] | None
    ) -> int:
        """No zone has these blocks of a segment (None: none of them can be read, the directory is lost too). How many
        blocks of the disk that are in use it costs."""
        found = 0
        if directory is not None and lost is not None:
            lbas, entries = blocks_of(directory)
            wanted = np.isin(entries & np.uint64(BLOCK_IN_SEGMENT_MASK), np.array(lost, np.uint64))
            lbas, entries = lbas[wanted], entries[wanted]
            for low in range(0, len(lbas), REGIONS_AT_ONCE):
                part = slice(low, low + REGIONS_AT_ONCE)
                await _load(disk, lbas[part])
                for lba, entry in zip(lbas[part].tolist(), entries[part].tolist(), strict=True):
                    if disk.map.lookup(lba) == entry:
                        self.note(lba, entry)
                        found += 1
        else:
            found = await self._search(disk, segment)
        return found

    async def note_page(self, disk: MappedDisk, region: int) -> bool:
        """A map page may be lost: look, and note it if no zone has it. Whether the region is in memory now."""
        try:
            await _load(disk, np.array([region << REGION_SHIFT], np.uint64))
        except Corrupt:
            ref = disk.map.regions.get(region)
            if isinstance(ref, PageRef):
                self.note_lost_page(region, ref)
            return False
        return True

    async def _search(self, disk: MappedDisk, segment: Segment) -> int:
        """Every block that the map has in a segment of which nothing is left."""
        key = np.uint64(segment.key)
        found = 0
        regions = sorted(disk.map.regions)
        for low in range(0, len(regions), REGIONS_AT_ONCE):
            try:
                part = np.array(regions[low : low + REGIONS_AT_ONCE], np.uint64)
                await _load(disk, part << np.uint64(REGION_SHIFT))
            except Corrupt as error:
                log.error("the list of damaged blocks is not complete: %s", error)
                continue
            for region in regions[low : low + REGIONS_AT_ONCE]:
                value = disk.map.regions.get(region)
                if value is None or isinstance(value, PageRef):
                    continue
                entries = view(expand(value))
                for index in np.flatnonzero(entries >> np.uint64(BLOCK_BITS) == key).tolist():
                    self.note((region << REGION_SHIFT) + index, int(entries[index]))
                    found += 1
        return found


async def _load(disk: MappedDisk, lbas: U64) -> None:
    """Bring the regions of these blocks into memory; they stay there until the next await. Corrupt: no zone has one."""
    evict = True
    while missing := disk.map.missing_blocks(lbas):
        await disk.load(missing, evict=evict)
        evict = False


def blocks_of(directory: Directory) -> tuple[U64, U64]:
    """(logical blocks, entries) of every data block of a segment, in log order."""
    words = np.frombuffer(directory.words, np.uint64)
    kinds = (words >> np.uint64(KIND_SHIFT)) & np.uint64(0xFF)
    data = (kinds == Kind.WRITE) | (kinds == Kind.MOVE)
    counts = np.frombuffer(directory.counts, np.uint32).astype(np.uint64)[data]
    base = np.uint64(key_of(directory.log, directory.segment) << BLOCK_BITS)
    entries = np.frombuffer(directory.starts, np.uint32).astype(np.uint64)[data] + base
    return expand_runs(words[data] & np.uint64(LBA_MASK), counts, entries)


def merge_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join touching (offset, length) ranges; input ascending."""
    merged: list[tuple[int, int]] = []
    for offset, length in ranges:
        if merged and merged[-1][0] + merged[-1][1] == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged

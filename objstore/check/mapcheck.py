"""Maps against the segments that they point into: every address names a block that was written for that block.

The directories of some segments are in memory at a time, and the maps are read once for each such batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from objstore.check.checkpoints import MapReader, RootTable, dense
from objstore.check.layout import REGION_BLOCKS, RESERVED, U64, Array64, Directory, data_lengths
from objstore.check.replay import WINDOW_REGIONS

BATCH_SEGMENTS: Final = 2048
"""Segments whose directories are laid out at a time: 64 MiB with segments of the largest size."""
CANDIDATES_MAX: Final = 1 << 20
"""Blocks of lost data that are looked up in the log's end; those behind count as lost."""
NOBODY: Final = np.uint64((1 << 64) - 1)

_LOG_SHIFT: Final = np.uint64(40)
_SEGMENT_SHIFT: Final = np.uint64(12)
_SEGMENT_MASK: Final = np.uint64((1 << 28) - 1)
_BLOCK_MASK: Final = np.uint64(0xFFF)
_WITHIN: Final = np.arange(REGION_BLOCKS, dtype=U64)


def owners(table: Directory) -> Array64:
    """For each block of a segment's file the VDI's block whose data it has, or NOBODY."""
    found = np.full(table.blocks, NOBODY, U64)
    operations = table.operations
    lengths = data_lengths(operations)
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(operations.places.astype(np.int64), lengths) + within
    found[places] = np.repeat(operations.blocks, lengths) + within.astype(U64)
    return found


@dataclass
class Wrong:
    """Entries of a map that can't be right: how many, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, blocks: Array64, entries: Array64, text: str) -> None:
        if len(blocks) and not self.count:
            segment, block = int(entries[0] >> _SEGMENT_SHIFT & _SEGMENT_MASK), int(entries[0] & _BLOCK_MASK)
            self.first = (
                f"block {int(blocks[0])} of the VDI is said to be at block {block} of segment {segment}, {text}"
            )
        self.count += len(blocks)


@dataclass
class MapCheck:
    """One checkpoint's map against the segments of its table, and against the map of the snapshot that the VDI is a
    clone of, which all addresses of other logs must come from unchanged.

    log: the VDI's. base: reader of that snapshot's map; base_lost: addresses of what it has lost, rising.
    live: blocks that the map points at, by row of the table. lost: (block, entry) of those whose data no copy has.
    """

    reader: MapReader
    table: RootTable
    log: int
    base: MapReader | None = None
    base_lost: Array64 = field(default_factory=lambda: np.zeros(0, U64))
    wrong: Wrong = field(default_factory=Wrong)
    lost: list[tuple[Array64, Array64]] = field(default_factory=list)
    lost_count: int = 0

    def __post_init__(self) -> None:
        self.table = self.table[np.argsort(self.table["number"])]
        self.live = np.zeros(len(self.table), np.int64)

    def run(
        self, batch: Mapping[int, Array64 | None], lost_blocks: Mapping[int, Sequence[int]], *, first: bool
    ) -> None:
        """Read the whole map and judge entries that point into `batch`: owners by segment number, None if no copy
        has a directory. lost_blocks: of segments that have one. first: also look for segments that don't exist."""
        numbers = np.array(sorted(batch), U64)
        arrays = [batch[number] for number in numbers.tolist()]
        sizes = np.array([0 if array is None else len(array) for array in arrays], np.int64)
        known = np.array([array is not None for array in arrays], bool)
        starts = np.cumsum(sizes) - sizes
        flat = np.concatenate([np.zeros(0, U64), *(array for array in arrays if array is not None)])
        gone = np.array(sorted(number << 12 | block for number, blocks in lost_blocks.items() for block in blocks), U64)
        for regions, pages in self.reader.pages():
            ours = pages >> _LOG_SHIFT == np.uint64(self.log)
            if first and self.base is not None:
                self._compare(regions, pages, (pages > RESERVED) & ~ours)
            rows, columns = np.nonzero((pages > RESERVED) & ours)
            entries = pages[rows, columns]
            blocks = regions[rows] * np.uint64(REGION_BLOCKS) + _WITHIN[columns]
            segments = entries >> _SEGMENT_SHIFT & _SEGMENT_MASK
            if first:
                self._count(blocks, entries, segments)
            if not len(numbers):
                continue
            at = np.minimum(np.searchsorted(numbers, segments), len(numbers) - 1)
            inside = numbers[at] == segments
            at, blocks, entries = at[inside], blocks[inside], entries[inside]
            within = (entries & _BLOCK_MASK).astype(np.int64)
            readable = known[at]
            self._lose(blocks[~readable], entries[~readable])
            fits = readable & (within < sizes[at])
            right = np.zeros(len(at), bool)
            right[fits] = flat[starts[at[fits]] + within[fits]] == blocks[fits]
            bad = readable & ~right
            self.wrong.add(blocks[bad], entries[bad], "where other data or none was written")
            if len(gone):
                places = entries & np.uint64((1 << 40) - 1)
                hit = right & (gone[np.minimum(np.searchsorted(gone, places), len(gone) - 1)] == places)
                self._lose(blocks[hit], entries[hit])

    def _compare(self, regions: Array64, pages: Array64, foreign: NDArray[np.bool_]) -> None:
        """Entries that name other logs."""
        assert self.base is not None
        order = np.argsort(regions)
        theirs = np.zeros_like(pages)
        theirs[order] = dense(self.base, regions[order])
        known = ~np.isin(regions, np.array(sorted(self.base.lost), U64))
        rows, columns = np.nonzero(foreign & (pages != theirs) & known[:, np.newaxis])
        blocks = regions[rows] * np.uint64(REGION_BLOCKS) + _WITHIN[columns]
        self.wrong.add(blocks, pages[rows, columns], "which the snapshot that it is a clone of does not say")
        rows, columns = np.nonzero(foreign & np.isin(pages, self.base_lost))
        self._lose(regions[rows] * np.uint64(REGION_BLOCKS) + _WITHIN[columns], pages[rows, columns])

    def _count(self, blocks: Array64, entries: Array64, segments: Array64) -> None:
        if not len(self.table):
            self.wrong.add(blocks, entries, "a segment that does not exist")
            return
        rows = np.minimum(np.searchsorted(self.table["number"], segments), len(self.table) - 1)
        there = self.table["number"][rows] == segments
        self.wrong.add(blocks[~there], entries[~there], "a segment that does not exist")
        self.live += np.bincount(rows[there], minlength=len(self.table))

    def _lose(self, blocks: Array64, entries: Array64) -> None:
        self.lost_count += len(blocks)
        room = CANDIDATES_MAX - sum(len(found) for found, _ in self.lost)
        if len(blocks) and room > 0:
            self.lost.append((blocks[:room].copy(), entries[:room].copy()))


def first_behind(limit: int, regions: Array64, window_of: Callable[[Array64], Array64]) -> int | None:
    """The first block from `limit` on that a map has; None: there is none. regions: all that it has, rising; window_of:
    the entries of some of them."""
    regions = regions[regions >= np.uint64(limit // REGION_BLOCKS)]
    for start in range(0, len(regions), WINDOW_REGIONS):
        some = regions[start : start + WINDOW_REGIONS]
        rows, columns = np.nonzero(window_of(some))
        blocks = some[rows] * np.uint64(REGION_BLOCKS) + _WITHIN[columns]
        behind = blocks[blocks >= np.uint64(limit)]
        if len(behind):
            return int(behind[0])
    return None


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Rising blocks as (first, count)."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][0] + found[-1][1] == block:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found


def wrong_counters(check: MapCheck) -> NDArray[np.bool_]:
    """Rows of the table whose counter of live blocks is too low; it may be too high."""
    return np.asarray(check.table["live"].astype(np.int64) < check.live)

"""Work on the regions of many blocks at once, in numpy: replayed writes, and counting live blocks.

Replay meets two shapes. Many writes to one region go into its array. Few writes to each of many regions, as random
writes over a large disk leave them, must not turn every region into 8 KiB: their runs are merged with the old ones for
all regions together.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from objstore.log.address import HOLE, RESERVED
from objstore.log.regions import (
    ENTRY_BYTES,
    Entries,
    Integers,
    Region,
    RunTable,
    U64Array,
    smallest,
    tally_entries,
)
from objstore.units import BLOCK_SHIFT, REGION_BLOCKS, REGION_MASK, REGION_SHIFT, VDI_BYTES_MAX

BATCH_BITS: Final = 22
BATCH_MAX: Final = 1 << BATCH_BITS
"""Writes that are sorted at once; block number and place in the batch share the 64 bits of a sort key."""
TALLY_ENTRIES: Final = 1 << 20
"""Entries counted in one vectorised step: 8 MiB of scratch memory."""

assert (VDI_BYTES_MAX >> BLOCK_SHIFT).bit_length() - 1 + BATCH_BITS <= 64


def heads_of(values: Integers) -> npt.NDArray[np.intp]:
    """Indices at which a new value begins, the first being 0. At least one value."""
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def keep_last(lbas: U64Array, entries: U64Array) -> tuple[U64Array, U64Array]:
    """The last write to each block, by block; numpy promises nothing for a block assigned twice. At most BATCH_MAX.

    Sorting 64-bit numbers that hold block and place takes 10 ms a million, a stable argsort 90.
    """
    keys = lbas << BATCH_BITS | np.arange(len(lbas), dtype=np.uint64)
    keys.sort()
    ordered = keys >> BATCH_BITS
    last = np.append(ordered[1:] != ordered[:-1], True)
    return ordered[last], entries[(keys[last] & (BATCH_MAX - 1)).astype(np.intp)]


def merge_runs(
    values: Sequence[Region | None], regions: Integers, starts: U64Array, blocks: U64Array, entries: U64Array
) -> list[Region | None]:
    """Lay runs over regions, all at once: about 2 us a region and 0.3 us a run, where splice needs 3 us a run.

    values: the regions of `regions` (ascending), none in the array form. starts (blocks of the disk, ascending),
    blocks, entries: the runs, which don't overlap, each inside one of those regions. Returns the new values.
    """
    base_starts, base_entries, counts = concatenate(values)
    base_starts += np.repeat(regions << REGION_SHIFT, counts).astype(np.uint64, copy=False)
    ends = starts + blocks
    # Where a run ends in the middle of what was there, the rest of that goes on.
    under = np.searchsorted(base_starts, ends, "right") - 1
    rest = (ends & REGION_MASK != 0) & (base_starts[under] != ends)
    rest[:-1] &= ends[:-1] != starts[1:]
    under = under[rest]
    rest_starts = ends[rest]
    rest_entries = base_entries[under] + (rest_starts - base_starts[under]) * (base_entries[under] > RESERVED)
    # Old runs that begin under a new one are gone.
    over = np.searchsorted(starts, base_starts, "right") - 1
    kept = (over < 0) | (base_starts >= ends[over])

    all_starts = np.concatenate((starts, rest_starts, base_starts[kept]))
    all_entries = np.concatenate((entries, rest_entries, base_entries[kept]))
    order = np.argsort(all_starts)
    all_starts = all_starts[order]
    all_entries = all_entries[order]

    before = all_entries[:-1]
    head = np.ones(len(all_starts), np.bool_)
    head[1:] = all_entries[1:] != before + np.diff(all_starts) * (before > RESERVED)
    head[1:] |= all_starts[1:] & REGION_MASK == 0
    all_starts = all_starts[head]
    bounds = (np.flatnonzero(all_starts & REGION_MASK == 0) * ENTRY_BYTES).tolist()
    assert len(bounds) == len(values)
    bounds.append(len(all_starts) * ENTRY_BYTES)
    starts_bytes = (all_starts & REGION_MASK).tobytes()
    entries_bytes = all_entries[head].tobytes()
    merged = []
    low = 0
    for high in bounds[1:]:
        merged.append(smallest(RunTable("Q", starts_bytes[low:high] + entries_bytes[low:high])))
        low = high
    return merged


def concatenate(values: Iterable[Region | None]) -> tuple[U64Array, U64Array, list[int]]:
    """(starts within the region, entries, runs of each region) of regions that are not in the array form."""
    parts: list[bytes | Entries] = []
    counts = []
    start_zero = bytes(ENTRY_BYTES)
    for value in values:
        if type(value) is RunTable:
            parts.append(value)
            counts.append(len(value) >> 1)
        else:
            assert value is None or type(value) is int
            parts.append(start_zero + (value or HOLE).to_bytes(ENTRY_BYTES, sys.byteorder))
            counts.append(1)
    numbers = np.frombuffer(b"".join(parts), np.uint64)
    is_start = np.repeat(np.resize([True, False], 2 * len(counts)), np.repeat(counts, 2))
    return numbers[is_start], numbers[~is_start], counts


def tally_regions(values: Iterable[Region]) -> dict[int, int]:
    """Data blocks of whole regions by segment key, about 20 ns an entry in the array form."""
    counts: dict[int, int] = {}
    arrays: list[Entries] = []
    others: list[Region] = []
    for value in values:
        if type(value) is not array:
            others.append(value)
            continue
        arrays.append(value)
        if len(arrays) << REGION_SHIFT >= TALLY_ENTRIES:
            tally_entries(np.frombuffer(b"".join(arrays), np.uint64), None, counts)
            arrays.clear()
    if arrays:
        tally_entries(np.frombuffer(b"".join(arrays), np.uint64), None, counts)
    if others:
        starts, entries, _ = concatenate(others)
        ends = np.append(starts[1:], np.uint64(0))
        ends[ends == 0] = REGION_BLOCKS
        tally_entries(entries, (ends - starts).astype(np.intp), counts)
    return counts

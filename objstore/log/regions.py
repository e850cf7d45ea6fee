"""One region of the block map: 1,024 blocks in the smallest of three forms, and the page that a form is stored as.

    None           a hole everywhere; such a region is absent from the map and has no page
    int            one run: the address of block 0, the others at the addresses after it; or RESERVED throughout
    RunTable       2..TABLE_RUNS_MAX runs, immutable
    array('Q')     one entry for each block, the only form that is changed in place

A run is a stretch of blocks at consecutive addresses, or of equal zeros; an address at block 0 of a segment doesn't
occur, so a run lies in one segment (address.py). Sequential fills make 4 runs a region for 1 MiB writes and 32 for
128 KiB writes, since each record has a header page between its data.

Page, little-endian (checksum and identity are added by whoever stores it):

    offset  size   field
    0       u8     form: 1 one run, 2 run table, 3 entries
    1       u8     0
    2       u16    n: 1 for form 1, 2..64 for form 2, 1024 for form 3
    4       u32    0
    8       u64*n  entries: 0 hole, 1 reserved zero, else an address (log 24 bits, segment 28, block 12);
                   form 2: the entry of the first block of each run; form 1: not 0
    8+8n    u16*n  form 2 only: first block of each run, ascending, the first 0; a run ends where the next one starts
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from objstore.errors import FormatError
from objstore.log.address import (
    BLOCK_BITS,
    BLOCK_IN_SEGMENT_MASK,
    ENTRY_MIN,
    HOLE,
    RESERVED,
    SEGMENT_BLOCKS_MAX,
)
from objstore.units import REGION_BLOCKS, REGION_MASK, REGION_SHIFT

U64Array: TypeAlias = npt.NDArray[np.uint64]
Integers: TypeAlias = npt.NDArray[np.integer[Any]]
TABLE_RUNS_MAX: Final = 64
SCALAR_BLOCKS_MAX: Final = 24
"""Up to here a Python loop over entries (40 ns each) beats the fixed 1 us of a handful of numpy calls."""
TALLY_ENTRIES: Final = 1 << 20
"""Entries counted in one vectorised step: 8 MiB of scratch memory."""

PAGE_HEADER: Final = struct.Struct("<BBHI")
ENTRY_BYTES: Final = 8
START_BYTES: Final = 2
FORM_RUN: Final = 1
FORM_TABLE: Final = 2
FORM_ENTRIES: Final = 3
PAGE_BYTES_MAX: Final = PAGE_HEADER.size + REGION_BLOCKS * ENTRY_BYTES

assert PAGE_HEADER.size == 8
assert array("H").itemsize == START_BYTES
assert array("Q").itemsize == ENTRY_BYTES
assert RESERVED + 1 < ENTRY_MIN, "`entry > RESERVED` must mean an address"

_IOTA: Final = np.arange(REGION_BLOCKS, dtype=np.uint64)
_NO_ENTRIES: Final = array("Q", bytes(REGION_BLOCKS * ENTRY_BYTES))
_START_ZERO: Final = array("H", (0,))


Entries: TypeAlias = "array[int]"
Region: TypeAlias = "int | RunTable | Entries"


class RunTable:
    """Runs of one region. Never changed: a frozen view may share it.

    starts: 'H', first block of each run within the region, ascending from 0. entries: 'Q', entry of that block.
    """

    __slots__ = ("entries", "starts")

    def __init__(self, starts: Entries, entries: Entries) -> None:
        self.starts = starts
        self.entries = entries


def advance(entry: int, blocks: int) -> int:
    """The entry `blocks` later in the same run."""
    return entry + blocks if entry > RESERVED else entry


def view(values: Entries) -> U64Array:
    """The entries as a numpy array that shares their memory."""
    return np.frombuffer(values, np.uint64)


def run_arrays(value: Region | None) -> tuple[Entries, Entries]:
    """(starts, entries) of a region that is not in the array form."""
    if isinstance(value, RunTable):
        return value.starts, value.entries
    assert value is None or isinstance(value, int)
    return _START_ZERO, array("Q", (value or HOLE,))


def entry_at(value: Region | None, index: int) -> int:
    """Entry of block `index` of the region."""
    if value is None:
        return HOLE
    if isinstance(value, int):
        return value + index if value > RESERVED else value
    if isinstance(value, RunTable):
        run = bisect_right(value.starts, index) - 1
        entry = value.entries[run]
        return entry + index - value.starts[run] if entry > RESERVED else entry
    assert isinstance(value, array)
    return int(value[index])


def runs_of(value: Region | None, first: int, end: int) -> list[tuple[int, int]]:
    """Blocks first..end-1 of the region as merged runs (entry of the first block, blocks)."""
    if value is None:
        return [(HOLE, end - first)]
    if isinstance(value, int):
        return [(value + first if value > RESERVED else value, end - first)]
    if isinstance(value, array):
        return _runs_of_entries(value, first, end)
    assert isinstance(value, RunTable)
    starts, entries = value.starts, value.entries
    low = bisect_right(starts, first) - 1
    high = bisect_left(starts, end)
    found = []
    for run in range(low, high - 1):
        following = starts[run + 1]
        found.append((advance(entries[run], first - starts[run]), following - first))
        first = following
    found.append((advance(entries[high - 1], first - starts[high - 1]), end - first))
    return found


def _runs_of_entries(values: Entries, first: int, end: int) -> list[tuple[int, int]]:
    if end - first > SCALAR_BLOCKS_MAX:
        part = view(values)[first:end]
        heads = run_heads(part)
        if len(heads) == 1:
            return [(values[first], end - first)]
        return list(zip(part[heads].tolist(), np.diff(heads, append=end - first).tolist(), strict=True))
    found = []
    start = first
    head = expected = values[first]
    for index in range(first, end):
        entry = values[index]
        if entry != expected:
            found.append((head, index - start))
            start = index
            head = entry
        expected = entry + (entry > RESERVED)
    found.append((head, end - start))
    return found


def run_heads(entries: U64Array) -> npt.NDArray[np.intp]:
    """Indices at which a run begins; the first is 0. At least one entry."""
    cut = np.empty(len(entries), np.bool_)
    cut[0] = True
    following = entries[1:]
    np.not_equal(following - entries[:-1], following > RESERVED, out=cut[1:])
    return np.flatnonzero(cut)


def kinds_of(value: Region | None, first: int, end: int) -> list[tuple[int, int]]:
    """Blocks first..end-1 as merged stretches (HOLE, RESERVED or ENTRY_MIN for data, blocks)."""
    if isinstance(value, array):
        kinds = np.minimum(view(value)[first:end], ENTRY_MIN)
        cuts = (np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist()
        cuts.append(end - first)
        found = []
        start = 0
        for cut in cuts:
            found.append((int(kinds[start]), cut - start))
            start = cut
        return found
    merged: list[tuple[int, int]] = []
    for entry, blocks in runs_of(value, first, end):
        append_run(merged, min(entry, ENTRY_MIN), blocks, step=0)
    return merged


def append_run(runs: list[tuple[int, int]], entry: int, blocks: int, step: int = 1) -> None:
    """Add a run behind the others, joined with the last one if it continues it.

    step: how entries grow within a run of data: 1 for addresses, 0 for kinds.
    """
    if runs:
        last, last_blocks = runs[-1]
        if entry == (last + last_blocks * step if last > RESERVED else last):
            runs[-1] = (last, last_blocks + blocks)
            return
    runs.append((entry, blocks))


def splice(value: Region | None, first: int, end: int, entry: int, runs_max: int) -> Region | None:
    """The region with blocks first..end-1 replaced by a run that begins with `entry`; `value` stays as it is.

    value: not in the array form. The result is, if it has more than runs_max runs.
    """
    starts, entries = run_arrays(value)
    low = bisect_right(starts, first) - 1
    high = bisect_left(starts, end)
    kept = low + (starts[low] < first)
    new_starts = array("H")
    new_entries = array("Q")
    if not kept or entry != advance(entries[kept - 1], first - starts[kept - 1]):
        new_starts.append(first)
        new_entries.append(entry)
    if end < REGION_BLOCKS:
        if high < len(starts) and starts[high] == end:
            tail = entries[high]
            high += 1
        else:
            tail = advance(entries[high - 1], end - starts[high - 1])
        if tail != advance(entry, end - first):
            new_starts.append(end)
            new_entries.append(tail)
    new_starts = starts[:kept] + new_starts + starts[high:]
    new_entries = entries[:kept] + new_entries + entries[high:]
    return from_runs(new_starts, new_entries, runs_max)


def from_runs(starts: Entries, entries: Entries, runs_max: int = TABLE_RUNS_MAX) -> Region | None:
    """The smallest form for merged runs; the array form above runs_max runs. Takes both arrays over."""
    if len(starts) == 1:
        return entries[0] or None
    table = RunTable(starts, entries)
    return table if len(starts) <= runs_max else expand(table)


def expand(value: Region | None) -> Entries:
    """The region in the array form, always a new array."""
    if isinstance(value, array):
        return value[:]
    values = _NO_ENTRIES[:]
    if value is None:
        return values
    out = view(values)
    if isinstance(value, int):
        if value > RESERVED:
            np.add(_IOTA, value, out=out)
        else:
            out.fill(value)
        return values
    starts = np.frombuffer(value.starts, np.uint16)
    entries = view(value.entries)
    lengths = np.diff(starts, append=np.uint16(REGION_BLOCKS))
    data = entries > RESERVED
    np.multiply(_IOTA, np.repeat(data, lengths), out=out)
    out += np.repeat(entries - starts * data, lengths)
    return values


def put_run(values: Entries, first: int, end: int, entry: int) -> None:
    """Make blocks first..end-1 of an array a run that begins with `entry`."""
    if entry > RESERVED:
        np.add(_IOTA[: end - first], entry, out=view(values)[first:end])
    else:
        view(values)[first:end] = entry


def compact(value: Region) -> Region | None:
    """The same blocks in the smallest form."""
    if not isinstance(value, array):
        return value
    entries = view(value)
    heads = run_heads(entries)
    if len(heads) > TABLE_RUNS_MAX:
        return value
    if len(heads) == 1:
        return value[0] or None
    return RunTable(array("H", heads.astype(np.uint16).tobytes()), array("Q", entries[heads].tobytes()))


def tally(value: Region | None, first: int, end: int, counts: dict[int, int]) -> None:
    """Add the data blocks among first..end-1 to `counts`, by segment key."""
    if isinstance(value, array) and end - first > SCALAR_BLOCKS_MAX:
        _tally_entries(view(value)[first:end], None, counts)
    elif isinstance(value, array):
        for entry in value[first:end]:
            if entry > RESERVED:
                key = entry >> BLOCK_BITS
                counts[key] = counts.get(key, 0) + 1
    elif value is not None:
        for entry, blocks in runs_of(value, first, end):
            if entry > RESERVED:
                key = entry >> BLOCK_BITS
                counts[key] = counts.get(key, 0) + blocks


def tally_regions(values: Iterable[Region]) -> dict[int, int]:
    """Data blocks of whole regions by segment key, about 20 ns an entry in the array form."""
    counts: dict[int, int] = {}
    batch: list[Entries] = []
    starts: list[Entries] = []
    entries: list[Entries] = []
    for value in values:
        if isinstance(value, array):
            batch.append(value)
            if len(batch) << REGION_SHIFT >= TALLY_ENTRIES:
                _tally_entries(np.frombuffer(b"".join(batch), np.uint64), None, counts)
                batch.clear()
        else:
            run_starts, run_entries = run_arrays(value)
            starts.append(run_starts)
            entries.append(run_entries)
    if batch:
        _tally_entries(np.frombuffer(b"".join(batch), np.uint64), None, counts)
    if starts:
        # Starts of the next region are lower, so a difference that wraps or is 0 ends a region.
        heads = np.frombuffer(b"".join(starts), np.uint16).astype(np.int64)
        lengths = np.diff(heads, append=0)
        lengths[lengths <= 0] += REGION_BLOCKS
        _tally_entries(np.frombuffer(b"".join(entries), np.uint64), lengths, counts)
    return counts


def _tally_entries(entries: U64Array, weights: npt.NDArray[np.int64] | None, counts: dict[int, int]) -> None:
    keys = entries >> BLOCK_BITS
    if weights is None:
        found, blocks = np.unique(keys, return_counts=True)
    else:
        found, where = np.unique(keys, return_inverse=True)
        blocks = np.bincount(where, weights).astype(np.int64)
    for key, amount in zip(found.tolist(), blocks.tolist(), strict=True):
        if key:
            counts[key] = counts.get(key, 0) + amount


def encode_region(small: Region) -> bytes:
    """The page of a region in its smallest form (`compact`)."""
    if isinstance(small, int):
        return PAGE_HEADER.pack(FORM_RUN, 0, 1, 0) + small.to_bytes(ENTRY_BYTES, "little")
    if isinstance(small, RunTable):
        starts = np.frombuffer(small.starts, np.uint16).astype("<u2", copy=False)
        entries = view(small.entries).astype("<u8", copy=False)
        return PAGE_HEADER.pack(FORM_TABLE, 0, len(starts), 0) + entries.tobytes() + starts.tobytes()
    assert isinstance(small, array)
    return PAGE_HEADER.pack(FORM_ENTRIES, 0, REGION_BLOCKS, 0) + view(small).astype("<u8", copy=False).tobytes()


def decode_region(page: bytes | memoryview) -> Region:
    """The region of a page. FormatError if it isn't one."""
    if len(page) < PAGE_HEADER.size + ENTRY_BYTES:
        raise FormatError(f"a map page is cut short bytes={len(page)}")
    form, zero, count, zeros = PAGE_HEADER.unpack_from(page)
    allowed = {FORM_RUN: (1, 1), FORM_TABLE: (2, TABLE_RUNS_MAX), FORM_ENTRIES: (REGION_BLOCKS, REGION_BLOCKS)}
    low, high = allowed.get(form, (0, -1))
    if zero or zeros or not low <= count <= high:
        raise FormatError(f"a map page has an impossible header form={form} count={count} zeros={zero},{zeros}")
    starts_at = PAGE_HEADER.size + count * ENTRY_BYTES
    if len(page) != starts_at + (count * START_BYTES if form == FORM_TABLE else 0):
        raise FormatError(f"a map page has the wrong length form={form} count={count} bytes={len(page)}")
    entries = np.frombuffer(page, "<u8", count, PAGE_HEADER.size).astype(np.uint64)
    if form == FORM_ENTRIES:
        check_runs(entries, 1)
        return array("Q", entries.tobytes())
    if form == FORM_RUN:
        check_runs(entries, REGION_BLOCKS)
        if not entries[0]:
            raise FormatError("a map page holds a region of holes")
        return int(entries[0])
    starts = np.frombuffer(page, "<u2", count, starts_at).astype(np.uint16)
    if starts[0] or starts[-1] >= REGION_BLOCKS or not (starts[1:] > starts[:-1]).all():
        raise FormatError(f"the runs of a map page are out of order starts={starts.tolist()}")
    check_runs(entries, np.diff(starts, append=np.uint16(REGION_BLOCKS)))
    return RunTable(array("H", starts.tobytes()), array("Q", entries.tobytes()))


def check_runs(entries: U64Array, blocks: int | npt.NDArray[np.uint16]) -> None:
    """FormatError unless every entry is a zero or the address of a run of so many blocks within one segment."""
    first = entries & BLOCK_IN_SEGMENT_MASK
    bad = (entries > RESERVED) & ((entries < ENTRY_MIN) | (first == 0) | (first + blocks > SEGMENT_BLOCKS_MAX))
    if bad.any():
        raise FormatError(f"an entry is neither a zero nor an address entry={int(entries[bad][0]):#x}")


def merge_runs(
    values: Sequence[Region | None], regions: Integers, starts: U64Array, blocks: U64Array, entries: U64Array
) -> list[Region | None]:
    """Lay runs over regions, all at once: about 2 us a region and 0.3 us a run, where splice needs 3 us a run.

    values: the regions of `regions` (ascending), none in the array form. starts (blocks of the disk, ascending),
    blocks, entries: the runs, which don't overlap, each inside one of those regions. Returns the new values.
    """
    base_entries, base_starts = _concatenate(values, regions)
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
    region_heads = np.flatnonzero(all_starts & REGION_MASK == 0)
    bounds = [*region_heads.tolist(), len(all_starts)]
    starts_bytes = (all_starts & REGION_MASK).astype(np.uint16).tobytes()
    entries_bytes = all_entries[head].tobytes()
    merged = []
    low = 0
    for high in bounds[1:]:
        merged.append(
            from_runs(
                array("H", starts_bytes[low * START_BYTES : high * START_BYTES]),
                array("Q", entries_bytes[low * ENTRY_BYTES : high * ENTRY_BYTES]),
            )
        )
        low = high
    assert len(merged) == len(values)
    return merged


def _concatenate(values: Sequence[Region | None], regions: Integers) -> tuple[U64Array, U64Array]:
    """(entries, first blocks) of all runs of several regions."""
    parts_starts: list[bytes | Entries] = []
    parts_entries: list[bytes | Entries] = []
    counts = []
    start_zero = bytes(START_BYTES)
    for value in values:
        if isinstance(value, RunTable):
            counts.append(len(value.starts))
            parts_starts.append(value.starts)
            parts_entries.append(value.entries)
        else:
            assert value is None or isinstance(value, int)
            counts.append(1)
            parts_starts.append(start_zero)
            parts_entries.append((value or HOLE).to_bytes(ENTRY_BYTES, sys.byteorder))
    starts = np.repeat(regions << REGION_SHIFT, counts).astype(np.uint64, copy=False)
    starts += np.frombuffer(b"".join(parts_starts), np.uint16)
    return np.frombuffer(b"".join(parts_entries), np.uint64), starts

"""One region of the block map: 1,024 blocks in the smallest of three forms, and the page that a form is stored as.

    None           a hole everywhere; such a region is absent from the map and has no page
    int            one run: the address of block 0, the others at the addresses after it; or RESERVED throughout
    RunTable       2..TABLE_RUNS_MAX runs, never changed once made
    array('Q')     one entry for each block, the only form that is changed in place; told by `type(value) is array`

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

import itertools
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from objstore.errors import FormatError
from objstore.log.address import (
    BLOCK_BITS,
    BLOCK_IN_SEGMENT_MASK,
    ENTRY_MIN,
    HOLE,
    LOG_MAX,
    RESERVED,
    SEGMENT_BITS,
    SEGMENT_BLOCKS_MAX,
)
from objstore.units import REGION_BLOCKS

U64Array: TypeAlias = npt.NDArray[np.uint64]
Integers: TypeAlias = npt.NDArray[np.integer[Any]]
TABLE_RUNS_MAX: Final = 64
SCALAR_BLOCKS_MAX: Final = 64
SCALAR_TALLY_MAX: Final = 128
"""Up to here a Python loop over entries (60 ns each) beats numpy's fixed cost: 4 us to find runs, 9 to count."""
SCALAR_RUNS_MAX: Final = 16
"""Up to here a Python loop over runs makes the array form faster than numpy; by random writes most runs are one block
long or a hole."""
TALLY_SPAN_MAX: Final = 2
"""Entries are counted without sorting if their segment numbers span at most so many times as many numbers: a million of
them in 15 ms instead of 70."""

PAGE_HEADER: Final = struct.Struct("<BBHI")
ENTRY_BYTES: Final = 8
START_BYTES: Final = 2
FORM_RUN: Final = 1
FORM_TABLE: Final = 2
FORM_ENTRIES: Final = 3
PAGE_BYTES_MAX: Final = PAGE_HEADER.size + REGION_BLOCKS * ENTRY_BYTES

assert PAGE_HEADER.size == 8
assert array("Q").itemsize == ENTRY_BYTES
assert RESERVED + 1 < ENTRY_MIN, "`entry > RESERVED` must mean an address"

_IOTA: Final = np.arange(REGION_BLOCKS, dtype=np.uint64)
_NO_ENTRIES: Final = array("Q", bytes(REGION_BLOCKS * ENTRY_BYTES))

if TYPE_CHECKING:
    Entries: TypeAlias = array[int]
else:
    Entries = array  # has no subscript at run time before Python 3.12
Region: TypeAlias = "int | RunTable | Entries"
Kinds: TypeAlias = "Callable[[Region | None, int, int], list[tuple[int, int]]]"
"""Blocks first..end-1 of a region as merged stretches (some number, blocks)."""


class RunTable(Entries):
    """2n numbers for n runs: first the blocks where they start, ascending from 0, then the entries of those blocks.

    One object for the collector of cycles to visit; three (table, starts, entries) doubled the time of a replay that
    makes 250,000 of them.
    """

    __slots__ = ()


def advance(entry: int, blocks: int) -> int:
    """The entry `blocks` later in the same run."""
    return entry + blocks if entry > RESERVED else entry


def view(values: Entries) -> U64Array:
    """The entries as a numpy array that shares their memory."""
    return np.frombuffer(values, np.uint64)


def as_table(value: Region | None) -> Entries:
    """The 2n numbers of a RunTable for a region that is not in the array form."""
    if type(value) is RunTable:
        return value
    assert value is None or type(value) is int
    return array("Q", (0, value or HOLE))


def entry_at(value: Region | None, index: int) -> int:
    """Entry of block `index` of the region."""
    if value is None:
        return HOLE
    if type(value) is int:
        return value + index if value > RESERVED else value
    if type(value) is RunTable:
        half = len(value) >> 1
        run = bisect_right(value, index, 0, half) - 1
        entry = value[half + run]
        return entry + index - value[run] if entry > RESERVED else entry
    assert type(value) is array
    return value[index]


def runs_of(value: Region | None, first: int, end: int) -> list[tuple[int, int]]:
    """Blocks first..end-1 of the region as merged runs (entry of the first block, blocks)."""
    if value is None:
        return [(HOLE, end - first)]
    if type(value) is int:
        return [(value + first if value > RESERVED else value, end - first)]
    if type(value) is array:
        return _runs_of_entries(value, first, end)
    assert type(value) is RunTable
    half = len(value) >> 1
    low = bisect_right(value, first, 0, half) - 1
    high = bisect_left(value, end, low, half) - 1
    found = []
    for run in range(low, high):
        following = value[run + 1]
        found.append((advance(value[half + run], first - value[run]), following - first))
        first = following
    found.append((advance(value[half + high], first - value[high]), end - first))
    return found


def _runs_of_entries(values: Entries, first: int, end: int) -> list[tuple[int, int]]:
    found = []
    if end - first > SCALAR_BLOCKS_MAX:
        part = view(values)[first:end]
        heads = run_heads(part)
        if len(heads) == 1:
            return [(values[first], end - first)]
        bounds = heads.tolist()
        bounds.append(end - first)
        for low, high in itertools.pairwise(bounds):
            found.append((values[first + low], high - low))
        return found
    head = expected = values[first]
    blocks = 0
    for entry in values[first:end]:
        if entry == expected:
            blocks += 1
        else:
            found.append((head, blocks))
            head = entry
            blocks = 1
        expected = entry + 1 if entry > RESERVED else entry
    found.append((head, blocks))
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
    if type(value) is array:
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


def depths_of(value: Region | None, first: int, end: int, depths: Mapping[int, int]) -> list[tuple[int, int]]:
    """Blocks first..end-1 as merged stretches (depth, blocks): 0 for holes, `depths` of the log in which a block's data
    lies, 1 for reserved zeros, of which nobody knows where they come from."""
    merged: list[tuple[int, int]] = []
    if type(value) is array:
        logs = view(value)[first:end] >> (SEGMENT_BITS + BLOCK_BITS)
        logs[view(value)[first:end] == RESERVED] = LOG_MAX + 1
        cuts = (np.flatnonzero(logs[1:] != logs[:-1]) + 1).tolist()
        runs = [(int(logs[low]), high - low) for low, high in itertools.pairwise([0, *cuts, end - first])]
    else:
        runs = [
            (LOG_MAX + 1 if entry == RESERVED else entry >> (SEGMENT_BITS + BLOCK_BITS), blocks)
            for entry, blocks in runs_of(value, first, end)
        ]
    deepest = max(depths.values(), default=0)
    for log, blocks in runs:
        depth = 0 if not log else 1 if log > LOG_MAX else depths.get(log, deepest + 1)
        append_run(merged, depth, blocks, step=0)
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
    old = as_table(value)
    half = len(old) >> 1
    low = bisect_right(old, first, 0, half) - 1
    high = bisect_left(old, end, low, half)
    kept = low + (old[low] < first)
    starts = []
    entries = []
    if not kept or entry != advance(old[half + kept - 1], first - old[kept - 1]):
        starts.append(first)
        entries.append(entry)
    if end < REGION_BLOCKS:
        if high < half and old[high] == end:
            tail = old[half + high]
            high += 1
        else:
            tail = advance(old[half + high - 1], end - old[high - 1])
        if tail != advance(entry, end - first):
            starts.append(end)
            entries.append(tail)
    table = RunTable("Q", old)
    table[half + kept : half + high] = array("Q", entries)
    table[kept:high] = array("Q", starts)
    return smallest(table, runs_max)


def smallest(table: RunTable, runs_max: int = TABLE_RUNS_MAX) -> Region | None:
    """The smallest form for merged runs; the array form above runs_max runs."""
    if len(table) == 2:
        return table[1] or None
    return table if len(table) <= 2 * runs_max else expand(table)


def expand(value: Region | None) -> Entries:
    """The region in the array form, always a new array."""
    if type(value) is array:
        return value[:]
    values = _NO_ENTRIES[:]
    if value is None:
        return values
    out = view(values)
    if type(value) is int:
        if value > RESERVED:
            np.add(_IOTA, value, out=out)
        else:
            out.fill(value)
        return values
    assert type(value) is RunTable
    half = len(value) >> 1
    if half <= SCALAR_RUNS_MAX:
        for run in range(half):
            entry = value[half + run]
            if entry:
                first = value[run]
                end = value[run + 1] if run + 1 < half else REGION_BLOCKS
                if end - first == 1:
                    values[first] = entry
                else:
                    put_run(values, first, end, entry)
        return values
    starts, entries = view(value).reshape(2, -1)
    lengths = np.empty(len(starts), np.intp)  # np.diff(append=...) alone takes 5 us
    lengths[-1] = REGION_BLOCKS - int(starts[-1])
    lengths[:-1] = starts[1:] - starts[:-1]
    data = entries > RESERVED
    if data.all():
        np.add(_IOTA, np.repeat(entries - starts, lengths), out=out)
    else:
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
    if type(value) is not array:
        return value
    entries = view(value)
    heads = run_heads(entries)
    if len(heads) > TABLE_RUNS_MAX:
        return value
    return smallest(RunTable("Q", heads.astype(np.uint64).tobytes() + entries[heads].tobytes()))


def tally(value: Region | None, first: int, end: int, counts: dict[int, int]) -> None:
    """Add the data blocks among first..end-1 to `counts`, by segment key."""
    if value is None:
        return
    if type(value) is not array:
        for entry, blocks in runs_of(value, first, end):
            if entry > RESERVED:
                key = entry >> BLOCK_BITS
                counts[key] = counts.get(key, 0) + blocks
    elif end - first > SCALAR_TALLY_MAX:
        tally_entries(view(value)[first:end], None, counts)
    else:
        for entry in value[first:end]:
            if entry > RESERVED:
                key = entry >> BLOCK_BITS
                counts[key] = counts.get(key, 0) + 1


def tally_entries(entries: U64Array, weights: Integers | None, counts: dict[int, int]) -> None:
    """Add entries, each standing for `weights` blocks (1), to `counts` by segment key."""
    keys = entries >> BLOCK_BITS
    data = keys > 0
    keys = keys[data]
    if not len(keys):
        return
    if weights is not None:
        weights = weights[data]
    low = keys.min()
    if int(keys.max() - low) < TALLY_SPAN_MAX * len(keys):
        # All of them belong to one log, whose segment numbers lie close together: no sorting.
        blocks = np.bincount((keys - low).astype(np.intp), weights)
        at = np.flatnonzero(blocks)
        found, blocks = at.astype(np.uint64) + low, blocks[at]
    else:
        found, where = np.unique(keys, return_inverse=True)
        blocks = np.bincount(where, weights)
    for key, amount in zip(found.tolist(), blocks.astype(np.intp).tolist(), strict=True):
        counts[key] = counts.get(key, 0) + amount


def encode_region(small: Region) -> bytes:
    """The page of a region in its smallest form (`compact`)."""
    if type(small) is int:
        return PAGE_HEADER.pack(FORM_RUN, 0, 1, 0) + small.to_bytes(ENTRY_BYTES, "little")
    if type(small) is RunTable:
        starts, entries = view(small).reshape(2, -1)
        page = PAGE_HEADER.pack(FORM_TABLE, 0, len(starts), 0)
        return page + entries.astype("<u8", copy=False).tobytes() + starts.astype("<u2").tobytes()
    assert type(small) is array
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
    starts = np.frombuffer(page, "<u2", count, starts_at).astype(np.uint64)
    if starts[0] or starts[-1] >= REGION_BLOCKS or not (starts[1:] > starts[:-1]).all():
        raise FormatError(f"the runs of a map page are out of order starts={starts.tolist()}")
    check_runs(entries, np.diff(starts, append=np.uint64(REGION_BLOCKS)))
    return RunTable("Q", starts.tobytes() + entries.tobytes())


def check_runs(entries: U64Array, blocks: int | U64Array) -> None:
    """FormatError unless every entry is a zero or the address of a run of so many blocks within one segment."""
    first = entries & BLOCK_IN_SEGMENT_MASK
    bad = (entries > RESERVED) & ((entries < ENTRY_MIN) | (first == 0) | (first + blocks > SEGMENT_BLOCKS_MAX))
    if bad.any():
        raise FormatError(f"an entry is neither a zero nor an address entry={int(entries[bad][0]):#x}")

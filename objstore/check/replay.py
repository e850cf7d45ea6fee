"""Operations applied to a map: requests of several parts as a whole, moved blocks only where the map says their source.

Only a window of regions is dense in memory at a time; operations are read again for each window.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from objstore.check.layout import (
    FIRST,
    LAST,
    MOVE,
    RECORD_BLOCKS_MAX,
    REGION_BLOCKS,
    RESERVED,
    TRIM,
    U64,
    ZERO,
    Array64,
    Operations,
)

WINDOW_REGIONS: Final = 8192
"""64 MiB of entries."""
EXPAND_BLOCKS: Final = 1 << 20
"""Blocks of small operations that are laid out at a time."""
ZERO_REGIONS_MAX: Final = 1 << 24
"""Regions that only a ZERO touches and neither checkpoint names: so many are looked at."""

_REGION_SHIFT: Final = 10
_REGION_MASK: Final = np.uint64(REGION_BLOCKS - 1)


class Effects(NamedTuple):
    """Operations in the order in which they have effect.

    values: the first block's entry (address, or RESERVED, or 0). moves: whether it is a MOVE; its sources begin at
    `starts` in `sources`.
    """

    blocks: NDArray[np.int64]
    counts: NDArray[np.int64]
    values: Array64
    kinds: NDArray[np.int64]
    flags: NDArray[np.int64]
    starts: NDArray[np.int64]
    sources: Array64

    def take(self, order: NDArray[np.int64]) -> "Effects":
        return Effects(
            self.blocks[order],
            self.counts[order],
            self.values[order],
            self.kinds[order],
            self.flags[order],
            self.starts[order],
            self.sources,
        )


def effects(log: int, segments: Iterable[tuple[int, Operations]]) -> Iterator[Effects]:
    """What segments (number, operations), in log order, do. Parts without their LAST come to nothing."""
    held: Effects | None = None
    for number, operations in segments:
        ours = _columns(log, number, operations)
        if held is None and not ours.flags.any():
            yield ours
            continue
        if held is not None:
            ours = _behind(held, ours)
        order: list[int] = []
        parts: list[int] = []
        for index, (kind, flag) in enumerate(zip(ours.kinds.tolist(), ours.flags.tolist(), strict=True)):
            if kind == MOVE:
                order.append(index)
                continue
            if not flag:
                parts = []
                order.append(index)
                continue
            if flag & FIRST:
                parts = []
            parts.append(index)
            if flag & LAST:
                order += parts
                parts = []
        yield ours.take(np.array(order, np.int64))
        held = ours.take(np.array(parts, np.int64)) if parts else None


def _columns(log: int, number: int, operations: Operations) -> Effects:
    kinds = operations.kinds.astype(np.int64)
    counts = operations.counts.astype(np.int64)
    addresses = operations.places.astype(U64) | np.uint64(log << 40 | number << 12)
    fixed = np.where(kinds == ZERO, np.uint64(RESERVED), np.uint64(0))
    values = np.where((kinds == TRIM) | (kinds == ZERO), fixed, addresses)
    moved = np.where(kinds == MOVE, counts, 0)
    starts = np.cumsum(moved) - moved
    flags = operations.flags.astype(np.int64)
    return Effects(operations.blocks.astype(np.int64), counts, values, kinds, flags, starts, operations.sources)


def _behind(held: Effects, ours: Effects) -> Effects:
    """Parts that wait (never MOVEs) and what follows them."""
    return Effects(
        np.concatenate((held.blocks, ours.blocks)),
        np.concatenate((held.counts, ours.counts)),
        np.concatenate((held.values, ours.values)),
        np.concatenate((held.kinds, ours.kinds)),
        np.concatenate((held.flags, ours.flags)),
        np.concatenate((held.starts, ours.starts)),
        ours.sources,
    )


def touched(log: int, segments: Iterable[tuple[int, Operations]], base: Array64) -> tuple[Array64, NDArray[np.bool_]]:
    """`base` (sorted regions) with every region added where operations may leave something, and which are touched."""
    ranges: list[NDArray[np.int64]] = []
    fresh = [base]
    room = ZERO_REGIONS_MAX
    for batch in effects(log, segments):
        if not len(batch.blocks):
            continue
        first = batch.blocks >> _REGION_SHIFT
        last = (batch.blocks + batch.counts - 1) >> _REGION_SHIFT
        ranges.append(np.stack((first, last)))
        small = batch.kinds != TRIM
        small &= last - first <= 1
        fresh.append(np.unique(np.concatenate((first[small], last[small])).astype(U64)))
        for index in np.flatnonzero((batch.kinds == ZERO) & ~small).tolist():
            length = min(int(last[index] - first[index]) + 1, room)
            room -= length
            fresh.append(np.arange(first[index], first[index] + length, dtype=np.int64).astype(U64))
    regions = np.unique(np.concatenate(fresh))
    steps = np.zeros(len(regions) + 1, np.int64)
    for first, last in ranges:
        np.add.at(steps, np.searchsorted(regions, first.astype(U64), "left"), 1)
        np.add.at(steps, np.searchsorted(regions, last.astype(U64), "right"), -1)
    return regions, np.cumsum(steps[:-1]) > 0


def apply(regions: Array64, entries: Array64, batches: Iterable[Effects]) -> None:
    """Do to `entries` (shape (regions, 1024)) what the operations do to these regions (sorted)."""
    if not len(regions):
        return
    flat = entries.reshape(-1)
    low, high = int(regions[0]), int(regions[-1])
    for batch in batches:
        first = batch.blocks >> _REGION_SHIFT
        last = (batch.blocks + batch.counts - 1) >> _REGION_SHIFT
        inside = np.flatnonzero((first <= high) & (last >= low))
        if not len(inside):
            continue
        ours = batch.take(inside)
        # Stretches: 0 small, 1 moves, from 2 on each long TRIM or ZERO by itself.
        stretch = np.where(ours.kinds == MOVE, 1, 0)
        long = ours.counts > RECORD_BLOCKS_MAX
        stretch[long] = 2 + np.arange(int(long.sum()))
        cuts = np.flatnonzero(np.diff(stretch)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(stretch)], strict=True):
            if stretch[start] >= 2:
                _fill(regions, flat, int(ours.blocks[start]), int(ours.counts[start]), ours.values[start])
            else:
                _small(regions, flat, ours, start, end, moves=bool(stretch[start]))


def _fill(regions: Array64, flat: Array64, block: int, count: int, value: np.uint64) -> None:
    end = block + count
    lo = int(np.searchsorted(regions, block >> _REGION_SHIFT, "left"))
    hi = int(np.searchsorted(regions, (end - 1) >> _REGION_SHIFT, "right"))
    if lo == hi:
        return
    start, stop = lo * REGION_BLOCKS, hi * REGION_BLOCKS
    start += max(0, block - int(regions[lo]) * REGION_BLOCKS)
    stop -= max(0, (int(regions[hi - 1]) + 1) * REGION_BLOCKS - end)
    flat[start:stop] = value


def _small(regions: Array64, flat: Array64, ours: Effects, start: int, end: int, *, moves: bool) -> None:
    """Operations of at most RECORD_BLOCKS_MAX blocks, all of them moves or none."""
    step = EXPAND_BLOCKS // RECORD_BLOCKS_MAX
    for begin in range(start, end, step):
        counts = ours.counts[begin : min(begin + step, end)]
        part = slice(begin, begin + len(counts))
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        blocks = (np.repeat(ours.blocks[part], counts) + within).astype(U64)
        values = np.repeat(ours.values[part], counts)
        values = values + np.where(values > RESERVED, within, 0).astype(U64)
        wanted = blocks >> np.uint64(_REGION_SHIFT)
        slots = np.minimum(np.searchsorted(regions, wanted), len(regions) - 1)
        here = regions[slots] == wanted
        places = (slots.astype(U64) * np.uint64(REGION_BLOCKS) + (blocks & _REGION_MASK))[here]
        values = values[here]
        if not moves:
            # numpy promises nothing about places that occur twice: the last one is picked here.
            unique, at = np.unique(places[::-1], return_index=True)
            flat[unique] = values[::-1][at]
            continue
        sources = ours.sources[(np.repeat(ours.starts[part], counts) + within)[here]]
        if len(np.unique(places)) < len(places):
            for place, source, value in zip(places.tolist(), sources, values, strict=True):
                if flat[place] == source:
                    flat[place] = value
            continue
        same = flat[places] == sources
        flat[places[same]] = values[same]

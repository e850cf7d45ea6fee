"""The block map of one VDI: for each block of 4 KiB, where its newest content lies.

Regions of 1,024 blocks, kept by regionmap.py. No I/O and no awaiting; one thread, one owner.

Limits: EXTENTS_WORK_MAX bounds one `extents` call whatever the disk's size. `fill_steps` takes 1 us for each region
    that exists in its range (RESERVED: in its range), at most FILL_STEP of them a step; nothing else depends on the
    size of the disk.

Holds at every return: an address belongs to the map of exactly this disk; blocks and ranges are checked by the caller.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from objstore.log.address import BLOCK_IN_SEGMENT_MASK, HOLE, RESERVED, SEGMENT_BLOCKS_MAX
from objstore.log.mapbulk import BATCH_MAX, heads_of, keep_last, merge_runs, tally_regions
from objstore.log.regionmap import Frozen, NotLoaded, PageRef, RegionMap
from objstore.log.regions import (
    TABLE_RUNS_MAX,
    Integers,
    Kinds,
    Region,
    RunTable,
    U64Array,
    append_run,
    check_runs,
    compact,
    entry_at,
    expand,
    kinds_of,
    put_run,
    run_heads,
    runs_of,
    splice,
    tally,
    view,
)
from objstore.units import BLOCK_SHIFT, REGION_BLOCKS, REGION_MASK, REGION_SHIFT, VDI_BYTES_MAX

__all__ = ["BlockMap", "Frozen", "NotLoaded", "PageRef"]

BLOCKS_MAX: Final = VDI_BYTES_MAX >> BLOCK_SHIFT
RUNS_MAX: Final = 1 << 16
INSERT_RUNS_MAX: Final = 8
"""A run table that single-block writes let grow beyond this becomes an array. Inserting a block costs 4 us each time;
the conversion 8 us and 8 KiB once, and later writes to the region 0.2 us. A million random writes over 64 GiB (256 GiB)
filled in sequence took 0.7 s (1.9 s) with 1, 0.9 s (2.3 s) with 8, 1.0 s (3.3 s) with 16."""
DENSE_RUNS_MIN: Final = 32
"""A replayed region that gets more runs at once goes to the array form without counting them."""
FILL_TALLY_MAX: Final = 64
"""Whole regions that one fill counts itself (10 us each); beyond that they are queued in `dropped`."""
FILL_STEP: Final = 1 << 12
"""Regions that one step of a fill changes, or looks for: 4 ms."""
EXTENTS_WORK_MAX: Final = 1 << 14
EXTENTS_WORK_REGION: Final = 64
"""Work of one `extents` call: 1 for an absent region (30 ns), 64 for another (2-5 us): about 1 ms."""


class BlockMap(RegionMap):
    """Maps blocks to entries (address.py).

    dropped: whole regions that a large fill removed uncounted; see `count_dropped`.
    dropped_refs: (region, page) of regions that were replaced as a whole without being loaded; the owner counts them.
    """

    __slots__ = ("dropped", "dropped_refs")

    def __init__(self, pages: Mapping[int, PageRef] | None = None) -> None:
        """pages: the regions of a checkpoint; without, an empty disk."""
        super().__init__(pages)
        self.dropped: list[Region] = []
        self.dropped_refs: list[tuple[int, PageRef]] = []

    # Blocks

    def lookup(self, block: int) -> int:
        """Entry of a block. NotLoaded."""
        value = self.regions.get(block >> REGION_SHIFT)
        if type(value) is array:
            return value[block & REGION_MASK]
        if value is None:
            return HOLE
        if type(value) is RunTable:
            half = len(value) >> 1
            run = bisect_right(value, block & REGION_MASK, 0, half) - 1
            entry = value[half + run]
            return entry + (block & REGION_MASK) - value[run] if entry > RESERVED else entry
        if type(value) is int:
            return value + (block & REGION_MASK) if value > RESERVED else value
        raise NotLoaded(block >> REGION_SHIFT)

    def set_one(self, block: int, entry: int) -> int:
        """Change one block; returns its old entry. NotLoaded."""
        values = self._open.get(block >> REGION_SHIFT)
        index = block & REGION_MASK
        if values is None:
            return self._set_elsewhere(block >> REGION_SHIFT, index, entry)
        old = values[index]
        values[index] = entry
        return old

    def _set_elsewhere(self, region: int, index: int, entry: int) -> int:
        value = self._loaded(region)
        if type(value) is array:
            values = self._writable(region, value)
            old = values[index]
            values[index] = entry
            return old
        old = entry_at(value, index)
        self._put(region, splice(value, index, index + 1, entry, INSERT_RUNS_MAX))
        return old

    # Ranges

    def runs(self, first: int, count: int, runs_max: int = RUNS_MAX) -> list[tuple[int, int]]:
        """Merged runs (entry of the first block, blocks) of a range, for reading it. NotLoaded.

        Covers the range, or its first part if that has runs_max runs. Takes 30 ns for an absent region.
        """
        found: list[tuple[int, int]] = []
        regions = self.regions
        end = first + count
        while first < end:
            region = first >> REGION_SHIFT
            value = regions.get(region)
            index = first & REGION_MASK
            stop = min(index + end - first, REGION_BLOCKS)
            if value is None:
                stop = min(self.next_region(region + 1, (end - 1 >> REGION_SHIFT) + 1) << REGION_SHIFT, end)
                append_run(found, HOLE, stop - first)
                first = stop
                continue
            if isinstance(value, PageRef):
                raise NotLoaded(region)
            part = runs_of(value, index, stop)
            if found:
                append_run(found, *part[0])
                found += part[1:]
            else:
                found = part
            if len(found) > runs_max:
                break
            first += stop - index
        return found[:runs_max] if len(found) > runs_max else found

    def extents(self, first: int, count: int, extents_max: int, kinds: Kinds = kinds_of) -> list[tuple[int, int]]:
        """Merged stretches (HOLE, RESERVED or ENTRY_MIN for data, blocks) of a range, for describing it; or what
        `kinds` makes of the regions that are no holes.

        Covers the range or a first part of it, at least one region's: it ends early at extents_max, when
        EXTENTS_WORK_MAX is used up, and before a region that isn't loaded. NotLoaded if that is the first one.
        """
        found: list[tuple[int, int]] = []
        regions = self.regions
        end = first + count
        work = EXTENTS_WORK_MAX
        while first < end and work > 0 and len(found) <= extents_max:
            region = first >> REGION_SHIFT
            value = regions.get(region)
            index = first & REGION_MASK
            if value is None:
                following = self.next_region(region + 1, min((end - 1 >> REGION_SHIFT) + 1, region + work))
                work -= following - region
                stop = min(following << REGION_SHIFT, end)
                append_run(found, HOLE, stop - first)
                first = stop
                continue
            if isinstance(value, PageRef):
                if found:
                    break
                raise NotLoaded(region)
            work -= EXTENTS_WORK_REGION
            stop = min(index + end - first, REGION_BLOCKS)
            part = kinds(value, index, stop)
            append_run(found, *part[0], step=0)
            found += part[1:]
            first += stop - index
        return found[:extents_max]

    def next_region(self, region: int, end: int) -> int:
        """The first region from `region` on that is no hole, at most `end`."""
        return next(filter(self.regions.__contains__, range(region, end)), end)

    def assign(self, first: int, entry: int, count: int) -> dict[int, int]:
        """Map a range to a run of consecutive addresses. Returns the data blocks replaced, by segment key. NotLoaded.

        PageRefs of regions that are replaced as a whole go to `dropped_refs` uncounted.
        """
        block = entry & BLOCK_IN_SEGMENT_MASK
        if entry <= RESERVED or not block or block + count > SEGMENT_BLOCKS_MAX:
            raise ValueError(f"not a run within one segment entry={entry:#x} blocks={count}")
        replaced: dict[int, int] = {}
        self._check_edges(first, count)
        end = first + count
        while first < end:
            region = first >> REGION_SHIFT
            index = first & REGION_MASK
            stop = min(index + end - first, REGION_BLOCKS)
            self._lay(region, index, stop, entry, replaced)
            entry += stop - index
            first += stop - index
        return replaced

    def _lay(self, region: int, index: int, stop: int, entry: int, replaced: dict[int, int]) -> None:
        """Replace blocks index..stop-1 of a region by one run; a region replaced as a whole needn't be loaded."""
        if stop - index == REGION_BLOCKS:
            old = self.regions.get(region)
            if isinstance(old, PageRef):
                self.dropped_refs.append((region, old))
            else:
                tally(old, 0, REGION_BLOCKS, replaced)
            self._put(region, entry or None)
            return
        value = self._loaded(region)
        tally(value, index, stop, replaced)
        if type(value) is array:
            put_run(self._writable(region, value), index, stop, entry)
        elif value is not None or entry != HOLE:
            self._put(region, splice(value, index, stop, entry, TABLE_RUNS_MAX))

    def fill(self, first: int, count: int, kind: int) -> dict[int, int]:
        """All of `fill_steps` at once; data blocks replaced, by segment key."""
        replaced: dict[int, int] = {}
        for counts in self.fill_steps(first, count, kind):
            for key, blocks in counts.items():
                replaced[key] = replaced.get(key, 0) + blocks
        return replaced

    def fill_steps(self, first: int, count: int, kind: int) -> Iterator[dict[int, int]]:
        """Map a range to HOLE or RESERVED, a step each time; each gives the data blocks it replaced, by segment key.
        NotLoaded at the first. Nothing else may make regions in the range until the last step.

        Beyond FILL_TALLY_MAX whole regions, those with data are queued in `dropped` instead of being counted, and their
        PageRefs always go to `dropped_refs`.
        """
        if kind not in (HOLE, RESERVED):
            raise ValueError(f"not a kind of zeros kind={kind}")
        replaced: dict[int, int] = {}
        self._check_edges(first, count)
        end = first + count
        low = first + REGION_MASK >> REGION_SHIFT
        high = end >> REGION_SHIFT
        if low > high:
            if count > 0:
                self._lay(high, first & REGION_MASK, end & REGION_MASK, kind, replaced)
            yield replaced
            return
        if first & REGION_MASK:
            self._lay(low - 1, first & REGION_MASK, REGION_BLOCKS, kind, replaced)
        if end & REGION_MASK:
            self._lay(high, 0, end & REGION_MASK, kind, replaced)
        if high - low <= FILL_TALLY_MAX:
            for region in range(low, high):
                if kind or region in self.regions:
                    self._lay(region, 0, REGION_BLOCKS, kind, replaced)
            yield replaced
            return
        yield replaced
        regions = self.regions
        if kind or high - low < len(regions):
            for at in range(low, high, FILL_STEP):
                part = range(at, min(at + FILL_STEP, high))
                self._drop(part if kind else filter(regions.__contains__, part), kind)
                yield {}
        else:
            existing = list(regions)
            for at in range(0, len(existing), FILL_STEP):
                part_of = existing[at : at + FILL_STEP]
                self._drop([region for region in part_of if low <= region < high], kind)
                yield {}

    def _drop(self, found: Iterable[int], kind: int) -> None:
        """Replace whole regions without looking at their entries."""
        for region in list(found):
            value = self.regions.get(region)
            if isinstance(value, PageRef):
                self.dropped_refs.append((region, value))
            elif value is not None and value != RESERVED:
                self.dropped.append(value)
            self._put(region, kind or None)

    def truncate(self, blocks: int) -> dict[int, int]:
        """Make everything from block `blocks` on a hole, as `fill` does."""
        return self.fill(blocks, BLOCKS_MAX - blocks, HOLE)

    def count_dropped(self, regions_max: int) -> dict[int, int]:
        """Count up to regions_max regions of `dropped` and forget them: data blocks by segment key."""
        counted = self.dropped[-regions_max:]
        del self.dropped[-regions_max:]
        return tally_regions(counted)

    def count_live(self) -> dict[int, int]:
        """Data blocks of all regions in memory, by segment key; one pass, 20 ns an entry."""
        return tally_regions(value for value in self.regions.values() if not isinstance(value, PageRef))

    # Many blocks at once

    def compare_and_assign(self, lbas: U64Array, sources: U64Array, targets: U64Array) -> npt.NDArray[np.bool_]:
        """Move blocks from `sources` to `targets` where the map still says exactly that source. NotLoaded.

        A block that occurs more than once is handled in the order given. Returns which of them applied.
        """
        applied = np.zeros(len(lbas), np.bool_)
        if not len(lbas):
            return applied
        self._check_blocks(lbas)
        check_runs(targets, 1)
        order = np.argsort(lbas, kind="stable")
        ordered = lbas[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(repeated):
            # One round for all first occurrences, one for the second ones, and so on.
            heads = heads_of(ordered)
            rank = np.arange(len(ordered)) - np.repeat(heads, np.diff(heads, append=len(ordered)))
            for turn in range(int(rank.max()) + 1):
                chosen = order[rank == turn]
                applied[chosen] = self._move(lbas[chosen], sources[chosen], targets[chosen])
        else:
            applied[order] = self._move(ordered, sources[order], targets[order])
        return applied

    def _move(self, lbas: U64Array, sources: U64Array, targets: U64Array) -> npt.NDArray[np.bool_]:
        """compare_and_assign for ascending blocks."""
        applied = np.empty(len(lbas), np.bool_)
        region_of = lbas >> REGION_SHIFT
        heads = heads_of(region_of)
        for region, low, high in zip(
            region_of[heads].tolist(), heads.tolist(), [*heads[1:].tolist(), len(lbas)], strict=True
        ):
            value = self._loaded(region)
            values = value if type(value) is array else expand(value)
            where = lbas[low:high] & REGION_MASK
            still = view(values)[where] == sources[low:high]
            applied[low:high] = still
            if not still.any():
                continue
            if values is value:
                view(self._writable(region, values))[where[still]] = targets[low:high][still]
            else:
                view(values)[where[still]] = targets[low:high][still]
                self._put(region, compact(values))
        return applied

    def apply_writes(self, lbas: U64Array, entries: U64Array) -> None:
        """Replay single-block writes in log order: of several to one block the last one counts. NotLoaded.

        Live blocks are not counted here (count_live). May be repeated as a whole after NotLoaded.
        """
        check_runs(entries, 1)
        for begin in range(0, len(lbas), BATCH_MAX):
            self._apply_batch(lbas[begin : begin + BATCH_MAX], entries[begin : begin + BATCH_MAX])

    def _apply_batch(self, lbas: U64Array, entries: U64Array) -> None:
        if not (lbas[1:] > lbas[:-1]).all():
            lbas, entries = keep_last(lbas, entries)
        # A run ends with its region, too.
        cut = np.zeros(len(lbas), np.bool_)
        cut[run_heads(entries)] = True
        cut[1:] |= np.diff(lbas) != 1
        cut |= lbas & REGION_MASK == 0
        run_at = np.flatnonzero(cut)
        starts = lbas[run_at]
        region_of = starts >> REGION_SHIFT
        heads = heads_of(region_of)
        touched = region_of[heads].tolist()
        runs_in = np.diff(heads, append=len(starts))
        values = [self._loaded(region) for region in touched]
        dense = runs_in > DENSE_RUNS_MIN
        dense |= np.fromiter((type(value) is array for value in values), np.bool_, len(values))
        bounds = run_at[heads].tolist()
        bounds.append(len(lbas))
        for where in np.flatnonzero(dense).tolist():
            low, high = bounds[where], bounds[where + 1]
            self._apply_dense(touched[where], values[where], lbas[low:high] & REGION_MASK, entries[low:high])
        if dense.all():
            return
        few = np.repeat(~dense, runs_in)
        sparse = np.flatnonzero(~dense).tolist()
        merged = merge_runs(
            [values[where] for where in sparse],
            region_of[heads][~dense],
            starts[few],
            np.diff(run_at, append=len(lbas))[few].astype(np.uint64),
            entries[run_at[few]],
        )
        for where, value in zip(sparse, merged, strict=True):
            self._put(touched[where], value)

    def _apply_dense(self, region: int, value: Region | None, where: Integers, entries: U64Array) -> None:
        if type(value) is array:
            view(self._writable(region, value))[where] = entries
            return
        values = expand(value)
        view(values)[where] = entries
        self._put(region, values)

    # What to load, and what it takes

    def grows(self, first: int, count: int) -> bool:
        """Whether changing the range may pin more memory: some region of it is not a changed array yet."""
        last = first + count - 1 >> REGION_SHIFT
        return not all(map(self._open.__contains__, range(first >> REGION_SHIFT, last + 1)))

    def grows_at(self, lbas: U64Array) -> bool:
        """The same for these blocks."""
        return not all(map(self._open.__contains__, np.unique(lbas >> REGION_SHIFT).tolist()))

    def missing(self, first: int, count: int) -> list[tuple[int, PageRef]]:
        """Regions to load before every block of the range can be looked up."""
        if count <= 0:
            return []
        low, high = first >> REGION_SHIFT, (first + count - 1 >> REGION_SHIFT) + 1
        return self._refs(range(low, high))

    def missing_edges(self, first: int, count: int) -> list[tuple[int, PageRef]]:
        """Regions to load before `assign` or `fill` of the range: those that it replaces only in part."""
        if count <= 0:
            return []
        edges = {first >> REGION_SHIFT} if first & REGION_MASK else set()
        if (first + count) & REGION_MASK:
            edges.add(first + count >> REGION_SHIFT)
        return self._refs(sorted(edges))

    def missing_blocks(self, lbas: U64Array) -> list[tuple[int, PageRef]]:
        """Regions to load before apply_writes or compare_and_assign of these blocks."""
        return self._refs(np.unique(lbas >> REGION_SHIFT).tolist())

    def _refs(self, regions: Iterable[int]) -> list[tuple[int, PageRef]]:
        get = self.regions.get
        return [(region, value) for region in regions if isinstance(value := get(region), PageRef)]

    def _check_edges(self, first: int, count: int) -> None:
        for region, _ in self.missing_edges(first, count):
            raise NotLoaded(region)

    def _check_blocks(self, lbas: U64Array) -> None:
        for region, _ in self.missing_blocks(lbas):
            raise NotLoaded(region)

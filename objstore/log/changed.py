"""What differs between two maps: a disk now and a snapshot of it, or two snapshots.

Two blocks are the same exactly if their entries are: what lies at an address never changes and no address is used
again, and what the map of a snapshot points at is not moved while the snapshot is there (DESIGN.md, "45. The same place
is the same contents"). So nothing is read but map pages, and of those only the ones that may differ: a region whose
page is one and the same in both maps is passed over without looking at it.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt, Unavailable
from objstore.log.address import HOLE, RESERVED
from objstore.log.blockmap import PageRef
from objstore.log.checkpoint import load_pages
from objstore.log.regions import Region, U64Array, decode_region, expand, view
from objstore.log.view import MappedView
from objstore.units import REGION_BLOCKS, REGION_MASK, REGION_SHIFT

SAME: Final = 0
DATA: Final = 1
TO_HOLE: Final = 2
TO_RESERVED: Final = 3
"""States of a block in the newer map against the older one: as it was, or else what it is now."""

WORK_MAX: Final = 1 << 14
WORK_SAME: Final = 16
WORK_COMPARED: Final = 256
"""Work of one call: 1 for a region that neither map has (60 ns), 16 for one with the same page in both (1 us), 256 for
one whose entries are compared (up to 20 us). Together about 1 ms, and at most 64 pages of each map are read."""

_NOW: Final = np.array((TO_HOLE, TO_RESERVED, DATA), np.uint8)
"""The state of a block that has changed, by min(entry, 2)."""


class _Step(NamedTuple):
    """A region, or several that neither map has: up to block `stop`. compared: whether its entries are looked at."""

    region: int
    stop: int
    compared: bool


async def changed(old: MappedView, new: MappedView, first: int, count: int, runs_max: int) -> list[tuple[int, int]]:
    """What differs in a range, from its start: (state, blocks), neighbours of equal state joined, at most runs_max; a
    bounded amount of work, so it may cover less than the range, at least one block.

    Blocks behind the end of a map count as holes. What was changed in either map before the call is in the answer;
    what is changed meanwhile may be. Corrupt: a page of a map is bad in every zone; Unavailable.
    """
    while True:
        steps = _plan(old, new, first, first + count)
        compared = [step.region for step in steps if step.compared]
        before, after = await asyncio.gather(_regions(old, compared), _regions(new, compared))
        found: list[tuple[int, int]] = []
        at = first
        for step in steps:
            if not step.compared:
                parts = [(SAME, step.stop - at)]
            elif _stands(old, step.region, before) and _stands(new, step.region, after):
                low = at & REGION_MASK
                parts = compare(
                    _value(old, step.region, before), _value(new, step.region, after), low, low + step.stop - at
                )
            else:  # changed, or its page was moved, while others were read
                break
            for state, blocks in parts:
                if found and found[-1][0] == state:
                    found[-1] = (state, found[-1][1] + blocks)
                else:
                    found.append((state, blocks))
            at = step.stop
            if len(found) > runs_max:
                break
        if found:
            return found[:runs_max]


def _plan(old: MappedView, new: MappedView, first: int, end: int) -> list[_Step]:
    """What one call looks at."""
    steps = []
    work = WORK_MAX
    at = first
    while at < end and work > 0:
        region = at >> REGION_SHIFT
        if region not in old.map.regions and region not in new.map.regions:
            limit = min((end - 1 >> REGION_SHIFT) + 1, region + work)
            following = min(old.map.next_region(region + 1, limit), new.map.next_region(region + 1, limit))
            work -= following - region
            compared = False
        else:
            following = region + 1
            page = old.page_of(region)
            compared = page is None or page != new.page_of(region)
            work -= WORK_COMPARED if compared else WORK_SAME
        at = min(following << REGION_SHIFT, end)
        steps.append(_Step(region, at, compared))
    return steps


Loaded: TypeAlias = "dict[int, tuple[PageRef, Region]]"


async def _regions(mapped: MappedView, wanted: list[int]) -> Loaded:
    """Those of these regions that are not in memory, with the pages that they were read from. They are not put into
    the map: what clients use must not make room for what is looked at once."""
    refs = [(region, ref) for region in wanted if isinstance(ref := mapped.map.regions.get(region), PageRef)]
    if not refs:
        return {}
    try:
        pages = await load_pages(mapped.env, mapped.log, refs, mapped.checkpoint_zones)
    except (Corrupt, Unavailable):
        # They were moved to a newer checkpoint, or have to be made again: as for any reader.
        for region, _ in refs:
            await mapped.load(mapped.map.missing(region << REGION_SHIFT, 1), evict=False)
        return {}
    return {region: (ref, decode_region(page)) for region, ref, page in pages}


def _stands(mapped: MappedView, region: int, loaded: Loaded) -> bool:
    """Whether the region is in memory, or was read from the page that the map still names."""
    slot = mapped.map.regions.get(region)
    return not isinstance(slot, PageRef) or (region in loaded and loaded[region][0] == slot)


def _value(mapped: MappedView, region: int, loaded: Loaded) -> Region | None:
    slot = mapped.map.regions.get(region)
    return loaded[region][1] if isinstance(slot, PageRef) else slot


def compare(old: Region | None, new: Region | None, first: int, end: int) -> list[tuple[int, int]]:
    """Blocks first..end-1 of a region as merged stretches (state, blocks)."""
    if type(old) is not array and type(old) is type(new) and old == new:
        return [(SAME, end - first)]
    before, after = _entries(old)[first:end], _entries(new)[first:end]
    states: npt.NDArray[np.uint8] = _NOW[np.minimum(after, RESERVED + 1).astype(np.intp)]
    states[before == after] = SAME
    heads = [0, *(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), end - first]
    return [(int(states[low]), high - low) for low, high in itertools.pairwise(heads)]


def _entries(value: Region | None) -> U64Array:
    if value is None:
        return np.full(REGION_BLOCKS, HOLE, np.uint64)
    return view(value if type(value) is array else expand(value))

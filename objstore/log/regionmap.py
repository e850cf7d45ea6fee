"""The regions of one VDI's block map: which are in memory, which were changed, which a checkpoint is owed.

A dict from region number to one of the forms of regions.py; an absent region is a hole, and a clean one can be replaced
by the PageRef of its page in a checkpoint. What the entries mean is blockmap.py's business. No I/O and no awaiting; one
thread, one owner.

Memory: 8.2 KiB for a region of entries, 0.2-1.2 KiB for a run table, 0.1-0.3 KiB for one run or a PageRef.

Holds at every return:
- A region differs from its page in the newest checkpoint only if it is in `dirty` or owed to the frozen view.
- A value that the frozen view owes is not changed in place: the array form is copied before its first change.
- `_open` holds the arrays that may be changed in place at once: dirty, not owed. It is what makes set_one cheap.
- A PageRef is clean. Whatever needs the entries of a region that is one raises NotLoaded and has changed nothing.
- pinned_bytes counts the regions of at least EVICTION_BYTES_MIN that are dirty or belong to the frozen view;
  loaded_bytes those that are in memory, values that only the frozen view still holds included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias, final

from objstore.log.eviction import EvictionClock
from objstore.log.mapmemory import MapMemory
from objstore.log.regions import Entries, Region, RunTable, compact, encode_region
from objstore.units import REGION_BLOCKS

REGION_OVERHEAD_BYTES: Final = 100
"""Key and slot of the dict (measured on 2^18 regions)."""
ARRAY_BYTES: Final = 80 + 8 * REGION_BLOCKS
TABLE_BYTES: Final = 80
TABLE_RUN_BYTES: Final = 16
PAGE_REF_BYTES: Final = 170
INT_BYTES: Final = 36
EVICTION_BYTES_MIN: Final = 2 * (REGION_OVERHEAD_BYTES + PAGE_REF_BYTES)
"""Smaller regions stay: a PageRef in their place would save little (a table of 4 runs: nothing)."""


@final
class PageRef(NamedTuple):
    """Where the page of a clean region lies: numbers that only whoever stores pages interprets."""

    checkpoint: int
    offset: int
    length: int


Slot: TypeAlias = "Region | PageRef"


class NotLoaded(LookupError):
    """The region's page must be read and handed to `load` first. Internal to the log; never reaches a client."""

    def __init__(self, region: int) -> None:
        super().__init__(f"region={region}")
        self.region = region


def slot_bytes(value: Slot | None) -> int:
    """Approximate memory of a region, its place in the dict included."""
    if value is None:
        return 0
    if type(value) is array:
        return REGION_OVERHEAD_BYTES + ARRAY_BYTES
    if type(value) is RunTable:
        return REGION_OVERHEAD_BYTES + TABLE_BYTES + TABLE_RUN_BYTES // 2 * len(value)
    return REGION_OVERHEAD_BYTES + (PAGE_REF_BYTES if type(value) is PageRef else INT_BYTES)


def heavy_bytes(value: Slot | None) -> int:
    """The same for a region that is worth evicting, else 0."""
    size_bytes = slot_bytes(value)
    return size_bytes if size_bytes >= EVICTION_BYTES_MIN else 0


class RegionMap:
    """Regions by number.

    regions: read by callers' inner loops: `r = regions.get(block >> 10)`, then for `type(r) is array` the entry is
        `r[block & 1023]`. Written only here.
    dirty: regions changed since the last freeze.
    """

    __slots__ = ("_account", "_bytes", "_clock", "_frozen", "_open", "dirty", "loaded_bytes", "pinned_bytes", "regions")

    def __init__(self, pages: Mapping[int, PageRef] | None = None) -> None:
        """pages: the regions of a checkpoint; without, an empty disk."""
        self.regions: dict[int, Slot] = dict(pages or {})
        self.dirty: set[int] = set()
        self.loaded_bytes = 0
        self.pinned_bytes = 0
        self._open: dict[int, Entries] = {}
        self._frozen: Frozen | None = None
        self._bytes = len(self.regions) * (REGION_OVERHEAD_BYTES + PAGE_REF_BYTES)
        self._clock = EvictionClock()
        self._account: MapMemory | None = None

    # Memory

    @property
    def memory_bytes(self) -> int:
        """Approximate memory of the regions and of what only a frozen view still holds."""
        return self._bytes + (self._frozen.held_bytes if self._frozen is not None else 0)

    def join(self, account: MapMemory) -> None:
        """Count in `account` from now on."""
        assert self._account is None
        self._account = account
        account.loaded_bytes += self.loaded_bytes
        account.pinned_bytes += self.pinned_bytes

    def leave(self) -> None:
        """Count in no account any more. Idempotent."""
        account, self._account = self._account, None
        if account is not None:
            account.loaded_bytes -= self.loaded_bytes
            account.pinned_bytes -= self.pinned_bytes

    def _count(self, loaded_bytes: int, pinned_bytes: int) -> None:
        self.loaded_bytes += loaded_bytes
        self.pinned_bytes += pinned_bytes
        if self._account is not None:
            self._account.loaded_bytes += loaded_bytes
            self._account.pinned_bytes += pinned_bytes

    # Changing

    def _loaded(self, region: int) -> Region | None:
        value = self.regions.get(region)
        if isinstance(value, PageRef):
            raise NotLoaded(region)
        return value

    def _writable(self, region: int, values: Entries) -> Entries:
        """The array of a region, ready to be changed in place."""
        self._soil(region, values)
        if self._frozen is not None and self._frozen.keep(region, values):
            values = values[:]
            self.regions[region] = values
        self._open[region] = values
        return values

    def _put(self, region: int, value: Region | None) -> None:
        """Replace a region by a changed one."""
        old = self.regions.get(region)
        self._soil(region, old)
        if self._frozen is not None:
            self._frozen.keep(region, old)
        self._store(region, value)
        if type(value) is array:
            self._open[region] = value
        else:
            self._open.pop(region, None)

    def write_anew(self, region: int) -> None:
        """The next checkpoint, or the one under way, shall have a page of this region, changed or not.
        NotLoaded."""
        value = self._loaded(region)
        if self._frozen is None or region not in self._frozen.left:
            self._soil(region, value)

    def _soil(self, region: int, value: Slot | None) -> None:
        """The region, which has this value, is about to be changed."""
        if region in self.dirty:
            return
        self.dirty.add(region)
        heavy = heavy_bytes(value)
        if heavy:
            if self._frozen is not None and self._frozen.is_clean(region):
                self._frozen.pinned_bytes -= heavy
            else:
                self._count(0, heavy)

    def _store(self, region: int, value: Slot | None) -> None:
        regions = self.regions
        old = regions.get(region)
        self._bytes += slot_bytes(value) - slot_bytes(old)
        growth = heavy_bytes(value) - heavy_bytes(old)
        if growth:
            self._count(growth, growth if region in self.dirty else 0)
        if value is not None:
            regions[region] = value
        elif old is not None:
            del regions[region]

    # Loading and eviction

    def load(self, region: int, ref: PageRef, value: Region) -> bool:
        """Put in the decoded page that `ref` points to. False, nothing done, if the map no longer says `ref`."""
        if self.regions.get(region) != ref:
            return False
        self._store(region, value)
        self._clock.loaded(region)
        return True

    def unload(self, region: int, ref: PageRef) -> None:
        """Put a page back in the place of a region, and forget what was changed of it: nobody knows the rest of it."""
        self._store(region, ref)
        self.dirty.discard(region)
        self._open.pop(region, None)
        self._clock.evicted(region)

    def repoint(self, region: int, old: PageRef, new: PageRef) -> None:
        """The page of an evicted region has moved (a checkpoint took it over); nothing happens unless it is `old`."""
        if self.regions.get(region) == old:
            self.regions[region] = new

    def evict(self, region: int, ref: PageRef) -> bool:
        """Replace a clean region by its page. False, nothing done, if it is dirty, owed to a frozen view, or no region.

        ref: the page in the newest complete checkpoint.
        """
        value = self.regions.get(region)
        if value is None or isinstance(value, PageRef) or not self.is_clean(region):
            return False
        self._store(region, ref)
        self._clock.evicted(region)
        return True

    def is_clean(self, region: int) -> bool:
        """Whether the newest checkpoint has the region as it is."""
        return region not in self.dirty and not self._is_frozen(region)

    def eviction_candidates(self, regions_max: int) -> list[int]:
        """Clean regions whose eviction frees at least half of their memory, the least wanted first.

        Takes 3 ms at most, and then may return none although there are some further on:
        call again.
        """
        return self._clock.candidates(self.regions, self._can_go, regions_max)

    def _can_go(self, region: int) -> bool:
        return bool(heavy_bytes(self.regions.get(region))) and self.is_clean(region)

    def _is_frozen(self, region: int) -> bool:
        return self._frozen is not None and region in self._frozen.regions

    # Checkpoints

    def freeze(self) -> Frozen:
        """Take the dirty regions for a checkpoint, 20 ns each; what changes from now on belongs to the next one.

        One view at a time: RuntimeError until the last one was finished by `commit` or `abort`.
        """
        if self._frozen is not None:
            raise RuntimeError("a frozen view is not finished")
        self._frozen = Frozen(self, self.dirty)
        self.dirty = set()
        self._open = {}
        return self._frozen

    def _unfreeze(self, dirty: set[int], loaded_bytes: int, pinned_bytes: int) -> None:
        """The frozen view is finished; `dirty` are to be in the next one. loaded_bytes, pinned_bytes: what counts no
        more. Nothing is done for each region: a view may have hundreds of thousands."""
        assert self._frozen is not None
        self._frozen = None
        self._count(-loaded_bytes, -pinned_bytes)
        self.dirty |= dirty


class Frozen:
    """The dirty regions of a map at the moment of `freeze`, until their checkpoint is complete or given up.

    regions: all of them; none may be evicted before `commit`. left: those not taken yet.
    held_bytes: memory of values that the map itself has replaced since.
    pinned_bytes: heavy regions that nothing but this view keeps from being evicted.
    `_kept`: what those of `left` had in them that were changed since (None = a hole); the others are as they were.
    """

    __slots__ = ("_kept", "_map", "held_bytes", "left", "pinned_bytes", "regions")

    def __init__(self, regionmap: RegionMap, regions: set[int]) -> None:
        self._map = regionmap
        self.regions = regions
        self.left = regions.copy()
        self.held_bytes = 0
        self.pinned_bytes = regionmap.pinned_bytes
        self._kept: dict[int, Region | None] = {}

    def keep(self, region: int, value: Slot | None) -> bool:
        """The map is about to change a region. True: this view still needs `value` as it is."""
        if region not in self.left or region in self._kept:
            return False
        assert not isinstance(value, PageRef), "dirty regions are never evicted"
        self._kept[region] = value
        self.held_bytes += slot_bytes(value)
        self._map._count(heavy_bytes(value), 0)
        return True

    def is_clean(self, region: int) -> bool:
        """The region's page is written and it was not changed since, as far as `dirty` doesn't say otherwise."""
        return region in self.regions and region not in self.left

    def take(self, region: int) -> bytes:
        """The page of a region as it was frozen, and forget it; empty if the region is a hole, which needs no page.

        KeyError if the region is not, or no longer, in the view. A region that was not changed since is kept in its
        smallest form.
        """
        page = self.page(region)
        self._forget(region)
        return page

    def page(self, region: int) -> bytes:
        """As `take`, for who may have to ask again: the view keeps the region until `forget`."""
        if region not in self.left:
            raise KeyError(region)
        if region in self._kept:
            kept = self._kept[region]
            small = None if kept is None else compact(kept)
        else:
            blockmap = self._map
            value = blockmap._loaded(region)
            small = None if value is None else compact(value)
            if small is not value:
                shrunk = heavy_bytes(small) - heavy_bytes(value)
                blockmap._store(region, small)
                self.pinned_bytes += shrunk
                blockmap._count(0, shrunk)
        return b"" if small is None else encode_region(small)

    def forget(self, regions: Iterable[int]) -> None:
        """The pages of these regions are not needed any more, as after `take`."""
        for region in regions:
            self._forget(region)

    def _forget(self, region: int) -> None:
        self.left.remove(region)
        if region in self._kept:
            value = self._kept.pop(region)
            heavy = heavy_bytes(value)
            self.held_bytes -= slot_bytes(value)
            self.pinned_bytes -= heavy
            self._map._count(-heavy, -heavy)

    def commit(self) -> None:
        """The checkpoint is complete: regions not changed since are clean. RuntimeError if pages were not taken."""
        if self.left:
            raise RuntimeError(f"pages of the frozen view were not taken pages={len(self.left)}")
        self._map._unfreeze(set(), 0, self.pinned_bytes)

    def abort(self) -> None:
        """The checkpoint is given up: all its regions are dirty again."""
        held = sum(map(heavy_bytes, self._kept.values()))
        self.left.clear()
        self._kept.clear()
        self._map._unfreeze(self.regions, held, held)

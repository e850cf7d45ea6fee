"""The root of a checkpoint in memory: for each region that has a page, where that is.

One sorted array of 24 bytes a region, never changed once made. Work on all of it is done in numpy (20 ms a TiB) by pure
functions, so that a thread can do it; what takes Python a step for each region goes in slices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt
from objstore.format.checkpoint import ROOT, ROOT_LOG_SHIFT
from objstore.log.regionmap import PageRef

LOG_SHIFT: Final = 32
"""PageRef.checkpoint: a checkpoint's number, with the log above this bit where it isn't the map's own."""
REGION_WORD: Final = (1 << ROOT_LOG_SHIFT) - 1
REGION_BITS: Final = np.uint64(REGION_WORD)
SLICE: Final = 1 << 13
"""Rows that Python handles between two turns of the event loop: 4 ms."""


class Root:
    """Pages by region."""

    __slots__ = ("regions", "rows")

    def __init__(self, rows: npt.NDArray[np.void] | None = None) -> None:
        """rows: of dtype ROOT, each region once."""
        rows = np.empty(0, ROOT) if rows is None else rows
        regions = rows["region"] & REGION_BITS
        if len(rows) and not (regions[1:] > regions[:-1]).all():
            rows = rows[np.argsort(regions)]
        self.rows = rows
        self.regions: npt.NDArray[np.uint64] = rows["region"] & REGION_BITS
        """Region numbers, ascending."""

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, region: int) -> PageRef | None:
        """The page of a region; None: it has none. 2 us."""
        at = int(self.regions.searchsorted(np.uint64(region)))
        if at == len(self.regions) or self.regions[at] != region:
            return None
        word, checkpoint, length, offset = self.rows[at].item()
        return PageRef(word >> ROOT_LOG_SHIFT << LOG_SHIFT | checkpoint, offset, length)

    def in_checkpoint(self, number: int) -> list[int]:
        """Regions whose pages lie in that checkpoint."""
        found: list[int] = self.regions[(self.rows["checkpoint"] == number) & own(self.rows)].tolist()
        return found

    async def pages(self) -> dict[int, PageRef]:
        """All of it, as a block map begins with it."""
        found: dict[int, PageRef] = {}
        for low in range(0, len(self.rows), SLICE):
            for word, checkpoint, length, offset in self.rows[low : low + SLICE].tolist():
                key = word >> ROOT_LOG_SHIFT << LOG_SHIFT | checkpoint
                found[word & REGION_WORD] = PageRef(key, offset, length)
            await asyncio.sleep(0)
        return found


def own(rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which rows name pages of the checkpoint's own log."""
    return np.asarray(rows["region"] <= REGION_BITS)


def without(root: Root, regions: npt.NDArray[np.uint64]) -> Root:
    """The root less some regions (ascending)."""
    if not len(regions) or not len(root):
        return root
    at = np.minimum(regions.searchsorted(root.regions), len(regions) - 1)
    return Root(root.rows[regions[at] != root.regions])


def merged(root: Root, rows: npt.NDArray[np.void]) -> Root:
    """The root with these rows instead of what it says about their regions, or on top of it."""
    kept = without(root, np.sort(rows["region"] & REGION_BITS))
    return Root(np.concatenate((kept.rows, rows)))


def live_bytes(root: Root) -> dict[int, int]:
    """Bytes of the pages in each checkpoint of the root's own log that has some."""
    rows = root.rows[own(root.rows)]
    numbers, where = np.unique(rows["checkpoint"], return_inverse=True)
    sizes = np.bincount(where, rows["length"], len(numbers)).astype(np.int64)
    return dict(zip(numbers.tolist(), sizes.tolist(), strict=True))


def in_checkpoints(root: Root, numbers: Collection[int], bytes_max: int) -> list[tuple[int, PageRef]]:
    """The first pages, about bytes_max of them, that lie in these checkpoints of the root's own log."""
    rows = root.rows[np.isin(root.rows["checkpoint"], list(numbers)) & own(root.rows)]
    before = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
    rows = rows[before < bytes_max]
    return [(region, PageRef(checkpoint, offset, length)) for region, checkpoint, length, offset in rows.tolist()]


def rebased(root: Root, base: Root) -> Root:
    """The root of a clone's map, with the pages that it shares where the snapshot has them now: its map may have been
    written anew since. base: the snapshot's, as `of_clone` makes it."""
    shared = ~own(root.rows)
    at = base.regions.searchsorted(root.regions[shared])
    if (at == len(base)).any() or (base.regions[at] != root.regions[shared]).any():
        raise Corrupt("a clone's map shares pages that its snapshot does not have")
    rows = root.rows.copy()
    rows[shared] = base.rows[at]
    return Root(rows)


def of_clone(root: Root, log: int) -> Root:
    """The root that a clone begins with, of a snapshot in that log: all pages are another log's."""
    rows = root.rows.copy()
    rows["region"][own(rows)] |= np.uint64(log << ROOT_LOG_SHIFT)
    return Root(rows)

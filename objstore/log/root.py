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

from objstore.format.checkpoint import ROOT
from objstore.log.regionmap import PageRef

SLICE: Final = 1 << 13
"""Rows that Python handles between two turns of the event loop: 4 ms."""


class Root:
    """Pages by region."""

    __slots__ = ("regions", "rows")

    def __init__(self, rows: npt.NDArray[np.void] | None = None) -> None:
        """rows: of dtype ROOT, each region once."""
        rows = np.empty(0, ROOT) if rows is None else rows
        regions = rows["region"]
        if len(rows) and not (regions[1:] > regions[:-1]).all():
            rows = rows[np.argsort(regions)]
        self.rows = rows
        self.regions: npt.NDArray[np.uint64] = np.ascontiguousarray(rows["region"])
        """Region numbers, ascending."""

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, region: int) -> PageRef | None:
        """The page of a region; None: it has none. 2 us."""
        at = int(self.regions.searchsorted(np.uint64(region)))
        if at == len(self.regions) or self.regions[at] != region:
            return None
        _, checkpoint, length, offset = self.rows[at].item()
        return PageRef(checkpoint, offset, length)

    def in_checkpoint(self, number: int) -> list[int]:
        """Regions whose pages lie in that checkpoint."""
        found: list[int] = self.regions[self.rows["checkpoint"] == number].tolist()
        return found

    async def pages(self) -> dict[int, PageRef]:
        """All of it, as a block map begins with it."""
        found: dict[int, PageRef] = {}
        for low in range(0, len(self.rows), SLICE):
            for region, checkpoint, length, offset in self.rows[low : low + SLICE].tolist():
                found[region] = PageRef(checkpoint, offset, length)
            await asyncio.sleep(0)
        return found


def without(root: Root, regions: npt.NDArray[np.uint64]) -> Root:
    """The root less some regions (ascending)."""
    if not len(regions) or not len(root):
        return root
    at = np.minimum(regions.searchsorted(root.regions), len(regions) - 1)
    return Root(root.rows[regions[at] != root.regions])


def merged(root: Root, rows: npt.NDArray[np.void]) -> Root:
    """The root with these rows instead of what it says about their regions, or on top of it."""
    kept = without(root, np.sort(rows["region"]))
    return Root(np.concatenate((kept.rows, rows)))


def live_bytes(root: Root) -> dict[int, int]:
    """Bytes of the pages in each checkpoint that has some."""
    numbers, where = np.unique(root.rows["checkpoint"], return_inverse=True)
    sizes = np.bincount(where, root.rows["length"], len(numbers)).astype(np.int64)
    return dict(zip(numbers.tolist(), sizes.tolist(), strict=True))


def in_checkpoints(root: Root, numbers: Collection[int], bytes_max: int) -> list[tuple[int, PageRef]]:
    """The first pages, about bytes_max of them, that lie in these checkpoints."""
    rows = root.rows[np.isin(root.rows["checkpoint"], list(numbers))]
    before = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
    rows = rows[before < bytes_max]
    return [(region, PageRef(checkpoint, offset, length)) for region, checkpoint, length, offset in rows.tolist()]

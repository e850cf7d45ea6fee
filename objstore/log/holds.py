"""What the maps of a log's snapshots need: segments that must stay, checkpoints whose pages they are made of.

The map of a snapshot is a checkpoint. What it may point into are the segments that the checkpoint's table lists as
live; these are held as a whole until the last snapshot that lists them is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objstore.format.checkpoint import LIVE
from objstore.log.disk import Disk
from objstore.log.root import Root, live_bytes
from objstore.log.segment import Segment

log = logging.getLogger(__name__)

U32 = npt.NDArray[np.uint32]


@dataclass
class FrozenMap:
    """The map of one snapshot. segments: numbers of those that it holds. pages: the checkpoints of this log that its
    pages lie in, None while it is being written or where that can't be read: then any may be needed."""

    segments: U32
    pages: frozenset[int] | None


def live_numbers(table: npt.NDArray[np.void]) -> U32:
    """Numbers of the segments that a checkpoint's table lists as live: those that its map may point into."""
    numbers: U32 = np.sort(table["number"][table["state"] == LIVE]).astype(np.uint32)
    return numbers


def pages_of(root: Root) -> frozenset[int]:
    """The checkpoints of the root's own log that its pages lie in."""
    return frozenset(live_bytes(root))


class Holds:
    """The maps of the snapshots in one disk's log, by the numbers of their checkpoints. Event loop only.

    Holds: `Segment.held` is true for exactly the segments that some map here lists.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.maps: dict[int, FrozenMap] = {}

    def begin(self, number: int, segments: Iterable[Segment]) -> None:
        """The checkpoint of that number begins, and will be the map of a snapshot."""
        held = list(segments)
        numbers = np.sort(np.fromiter((segment.number for segment in held), np.uint32, len(held)))
        self.maps[number] = FrozenMap(numbers, None)
        for segment in held:
            self._disk.hold(segment)

    def add(self, number: int, segments: U32, pages: frozenset[int]) -> None:
        """A snapshot whose map is that checkpoint exists (opening a log)."""
        self.maps[number] = FrozenMap(segments, pages)
        missing = 0
        for each in segments.tolist():
            segment = self._disk.segments.get(each)
            if segment is None:
                missing += 1
            else:
                self._disk.hold(segment)
        if missing:
            log.error("segments of a snapshot are gone log=%d checkpoint=%d: %d", self._disk.log, number, missing)

    def add_unreadable(self, number: int) -> None:
        """The same where no zone shows that checkpoint whole: nothing that it might need may go."""
        log.error("the map of a snapshot can't be read log=%d checkpoint=%d", self._disk.log, number)
        self.begin(number, self._disk.segments.values())

    def written(self, number: int, pages: frozenset[int]) -> None:
        """The checkpoint is complete."""
        if number in self.maps:
            self.maps[number].pages = pages

    def release(self, number: int) -> None:
        """The snapshot of that checkpoint is gone: what only it needed may go."""
        gone = self.maps.pop(number, None)
        if gone is None:
            return
        others = [each.segments for each in self.maps.values()]
        free = np.setdiff1d(gone.segments, np.unique(np.concatenate(others))) if others else gone.segments
        for each in free.tolist():
            segment = self._disk.segments.get(each)
            if segment is not None:
                self._disk.release(segment)

    def needed(self, numbers: Iterable[int]) -> set[int]:
        """Of these checkpoints, those that a snapshot needs."""
        wanted: set[int] = set()
        for number, each in self.maps.items():
            wanted.add(number)
            wanted |= {n for n in numbers if n <= number} if each.pages is None else each.pages
        return wanted.intersection(numbers)

"""A segment of a log as the running store sees it: its place, its live blocks, its handles, what is still in memory."""

from __future__ import annotations

from array import array
from typing import Final

from objstore.backend.base import Handle
from objstore.units import BLOCK_BYTES

NAME_DIGITS: Final = 7


def log_folder(log: int) -> str:
    """Folder of a log's segments in a zone."""
    return f"log/{log:06x}/"


def segment_name(log: int, number: int) -> str:
    """Object name of a segment in a zone."""
    return f"log/{log:06x}/{number:0{NAME_DIGITS}x}"


def segment_number(name: str) -> int | None:
    """The number in an object name of a segment, None if it is none."""
    digits = name.rpartition("/")[2]
    try:
        return int(digits, 16) if len(digits) == NAME_DIGITS else None
    except ValueError:
        return None


class Record:
    """One record between its first request and the moment when all its zones have it durably.

    Holds: `view` keeps every byte until then (an error leaves it here); bytes once appended never change.
    held_bytes: memory that it takes, once it is cut.
    """

    __slots__ = ("blocks", "buffer", "held_bytes", "last_position", "segment", "start", "view", "waiting")

    def __init__(self, segment: Segment, start: int, buffer: memoryview) -> None:
        self.segment = segment
        self.start = start
        self.blocks = 1
        self.view = buffer
        self.buffer: memoryview | None = buffer
        self.held_bytes = 0
        self.last_position = 0
        self.waiting = 0


class Segment:
    """One segment. Touched by the event loop only.

    live: blocks that the map of its log points at (a hint: see collect.py).
    memory: for a segment with undurable records, per block the Record that has it in memory; else None.
    crcs: CRC of each block, None while its directory has not been read. beginnings: see crcs.py; made of crcs at the
    first long read.
    handles: zone index -> open handle. `reader`: the handle that reads go to, None until one is open.
    held: the map of a snapshot needs it. emptied: and the map of the log doesn't any more (its directory was checked).
    pins: reads and copies under way outside the loop; the file may not be freed meanwhile.
    replaced: (zone, handle) of files that a repair has replaced, still open because somebody may be reading them.
    """

    __slots__ = (
        "beginnings",
        "blocks",
        "crcs",
        "emptied",
        "generation",
        "handles",
        "held",
        "key",
        "live",
        "log",
        "memory",
        "number",
        "pins",
        "reader",
        "replaced",
        "seal_crc",
        "sealed",
        "zones",
    )

    def __init__(self, log: int, number: int, generation: int, zones: tuple[int, ...], blocks: int) -> None:
        self.log = log
        self.number = number
        self.key = log << 28 | number
        self.generation = generation
        self.zones = zones
        self.blocks = blocks
        self.live = 0
        self.pins = 0
        self.held = False
        self.emptied = False
        self.sealed = False
        self.seal_crc = 0
        self.crcs: array[int] | None = None
        self.beginnings: array[int] | None = None
        self.memory: list[Record | None] | None = None
        self.handles: dict[int, Handle] = {}
        self.replaced: list[tuple[int, Handle]] = []
        self.reader: Handle | None = None

    @property
    def name(self) -> str:
        """Object name in a zone."""
        return segment_name(self.log, self.number)

    @property
    def file_bytes(self) -> int:
        """Bytes of one copy."""
        return self.blocks * BLOCK_BYTES

    def lose_handles(self, zone: int) -> list[Handle]:
        """Take the handles of a zone that is out of service from the segment, open as they are."""
        lost = [handle for z, handle in self.replaced if z == zone]
        self.replaced = [(z, handle) for z, handle in self.replaced if z != zone]
        handle = self.handles.pop(zone, None)
        if handle is not None:
            lost.append(handle)
            if self.reader is handle:
                self.reader = next(iter(self.handles.values()), None)
        return lost

    def close_handles(self) -> None:
        """Close every handle of the segment."""
        self.reader = None
        for handle in self.handles.values():
            handle.close()
        self.handles.clear()
        self._close_replaced()

    def drop_handle(self, zone: int) -> None:
        """Another file has the name in that zone now: reads that begin later open it."""
        handle = self.handles.pop(zone, None)
        if handle is None:
            return
        if handle is self.reader:
            self.reader = None
        self.replaced.append((zone, handle))
        if not self.pins:
            self._close_replaced()

    def unpin(self) -> None:
        """A read or copy outside the loop has ended."""
        self.pins -= 1
        if not self.pins and self.replaced:
            self._close_replaced()

    def _close_replaced(self) -> None:
        for _, handle in self.replaced:
            handle.close()
        self.replaced.clear()

"""What all logs of one open store share: zones, clock, settings, segments, buffers, the account of dirty data."""

import asyncio
import mmap
import random
import resource
from collections import deque
from collections.abc import Callable
from typing import Final

from objstore.backend.base import Handle
from objstore.clock import Clock
from objstore.format.record import RECORD_DATA_BLOCKS_MAX
from objstore.log.segment import Segment
from objstore.replica.zone import Executor, Zone
from objstore.units import BLOCK_BYTES
from objstore.volume.settings import StoreSettings

BUFFER_BYTES: Final = (1 + RECORD_DATA_BLOCKS_MAX) * BLOCK_BYTES
BUFFERS_IDLE_MAX: Final = 64
READERS_MAX: Final = 4096
CRC_SEGMENTS_MAX: Final = 4096
"""Segments whose block CRCs stay in memory (8 KiB each): enough for 32 GiB of data in use."""
RESERVE_SEGMENTS: Final = 4
"""Segments' worth of space in every zone that client writes leave free, so that deletes, trims, checkpoints and
collection can always go on and free more. dirty_bytes_max comes on top: opening after a crash copies what was not yet
sealed before the old files go, and that is at most what was dirty."""
DESCRIPTORS_SHARE: Final = 4
"""Of the descriptors that this process may have, at most one in so many is a segment kept open for reading."""


class BufferPool:
    """Page-aligned buffers of BUFFER_BYTES for records; at most BUFFERS_IDLE_MAX wait for reuse."""

    def __init__(self) -> None:
        self._idle: list[memoryview] = []

    def get(self) -> memoryview:
        """A buffer with undefined contents."""
        return self._idle.pop() if self._idle else memoryview(mmap.mmap(-1, BUFFER_BYTES))

    def put(self, buffer: memoryview) -> None:
        """Give a buffer back that nothing refers to any more."""
        if len(self._idle) < BUFFERS_IDLE_MAX:
            self._idle.append(buffer)


class Env:
    """Shared state of an open store. Touched by the event loop only.

    Holds: dirty_bytes = bytes of records that are not yet durable on all their zones, over all logs.
    """

    def __init__(
        self,
        *,
        store_id: bytes,
        zones: list[Zone],
        executor: Executor,
        clock: Clock,
        settings: StoreSettings,
        rng: random.Random,
    ) -> None:
        self.store_id = store_id
        self.zones = zones
        self.executor = executor
        self.clock = clock
        self.settings = settings
        self.rng = rng
        self.loop = asyncio.get_running_loop()
        self.epoch = 0
        self.epoch_id = bytes(16)
        self.segments: dict[int, Segment] = {}
        self.pool = BufferPool()
        self.dirty_bytes = 0
        self.dirty_bytes_max = settings.dirty_bytes_max
        self.reserved_bytes: Callable[[int], int] = lambda log: 0
        """Space that the preallocated VDIs other than the one of that log still have a right to, in each zone."""
        self.reserve_bytes = RESERVE_SEGMENTS * settings.segment_bytes + settings.dirty_bytes_max
        self.spare_blocks = 0
        """Blocks of freed files that a zone keeps to write again, as far as is known here."""
        self.bugs: frozenset[str] = frozenset()
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.readers_max = max(16, min(READERS_MAX, soft_limit // (DESCRIPTORS_SHARE * len(zones))))
        self.map_bytes: Callable[[], int] = lambda: 0
        """Memory of the maps of all open disks."""
        self.bad_copies = 0
        """Blocks and directories that a zone returned with a wrong checksum since the store was opened."""
        self.crc_cache: deque[Segment] = deque()
        self.request_syncs: list[Callable[[], None]] = []
        """For each log that may have dirty data: start making it durable."""
        self._dirty_waiters: deque[asyncio.Future[None]] = deque()
        self._readers: deque[Segment] = deque()

    def release_dirty(self, count_bytes: int) -> None:
        """`count_bytes` became durable."""
        self.dirty_bytes -= count_bytes
        if self._dirty_waiters and self.dirty_bytes < self.dirty_bytes_max:
            self.wake_dirty()

    def wake_dirty(self) -> None:
        """Let everyone look at the dirty limit again."""
        while self._dirty_waiters:
            waiter = self._dirty_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def dirty_room(self) -> None:
        """See that all that is dirty goes to the zones, and wait until something became durable (or a log failed)."""
        for request_sync in self.request_syncs:
            request_sync()
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._dirty_waiters.append(waiter)
        await waiter

    def trim_crc_cache(self) -> None:
        """Forget the CRCs of the segments that have had theirs longest; a read of them loads the directory again."""
        for _ in range(len(self.crc_cache) - CRC_SEGMENTS_MAX):
            segment = self.crc_cache.popleft()
            if segment.memory is None:
                segment.crcs = segment.beginnings = None
            else:
                self.crc_cache.append(segment)

    def keep_reader(self, segment: Segment, handle: Handle) -> None:
        """Reads of `segment` go to `handle` from now on; the oldest readers are closed beyond readers_max."""
        segment.reader = handle
        readers = self._readers
        readers.append(segment)
        for _ in range(len(readers) - self.readers_max):
            oldest = readers.popleft()
            if oldest.memory is None and not oldest.pins and oldest.sealed:
                oldest.close_handles()
            elif oldest.reader is not None:
                readers.append(oldest)

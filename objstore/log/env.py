"""What all logs of one open store share: zones, clock, settings, segments, buffers, the account of dirty data."""

import asyncio
import contextlib
import logging
import mmap
import random
import resource
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from objstore.backend.base import Handle, ZoneFailed
from objstore.clock import Clock
from objstore.errors import StoreError, Unavailable
from objstore.format.record import RECORD_DATA_BLOCKS_MAX
from objstore.log.mapmemory import MapMemory
from objstore.log.segment import Segment
from objstore.replica.watch import ZoneWatch
from objstore.replica.zone import Executor, Zone, run
from objstore.units import BLOCK_BYTES
from objstore.volume.settings import StoreSettings

log = logging.getLogger(__name__)

BUFFER_BYTES: Final = (1 + RECORD_DATA_BLOCKS_MAX) * BLOCK_BYTES
BUFFERS_IDLE_MAX: Final = 64
READERS_MAX: Final = 4096
CRC_SEGMENTS_MAX: Final = 4096
"""Segments whose block CRCs stay in memory (8 KiB each): enough for 32 GiB of data in use."""
RESERVE_SEGMENTS: Final = 4
"""Segments' worth of space in every zone that client writes leave free, so that deletes, trims, checkpoints and
collection can always go on and free more. dirty_bytes_max comes on top: opening after a crash copies what was not yet
sealed before the old files go, and that is at most what was dirty."""
READ_ERRORS_MAX: Final = 64
"""Reads that a zone may fail, each of them answered by another zone, before it is put out: a bad sector is no reason to
do without a disk, a disk that reads nothing is."""
PUT_OUT_AGAIN_SECONDS: Final = 5.0
"""Between attempts to put out zones that failed, where too few others would be left."""
SUGGEST_SECONDS: Final = 5.0
"""Between attempts to put out a zone that lags and was refused."""
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


class Membership(Protocol):
    """Which zones are in service, and how one is put out (replica/membership.py)."""

    in_service: frozenset[int]

    async def exclude(self, zones: Iterable[int], reason: str) -> None: ...

    def on_change(self, listener: Callable[[], None]) -> None: ...


class Log(Protocol):
    """A log's writer, as far as zones that come and go concern it."""

    def zones_changed(self, gone: frozenset[int]) -> None:
        """A new epoch is in force; the zones in `gone` were in service before."""
        ...

    def zones_stay(self, failing: frozenset[int], error: StoreError) -> None:
        """These zones failed and could not be put out in time."""
        ...

    def owed_since(self, zone: int, now: float) -> float | None:
        """Since when the zone has owed this log something that is wanted durable."""
        ...

    def can_lose(self, zone: int, gone: frozenset[int]) -> bool:
        """Whether enough copies of everything, and zones for what comes, would stay without that zone, where those in
        `gone`, itself included, are or will be put out."""
        ...


class Env:
    """Shared state of an open store. Touched by the event loop only.

    Holds: dirty_bytes = bytes of records that are not yet durable on all their zones, over all logs.
    in_service: numbers of the zones that the epoch in force names. failing: zones that are to be put out, and why.
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
        self.page_zones: dict[int, Callable[[int], tuple[int, ...]]] = {}
        """Of each log that is open: which zones have its checkpoint of that number."""
        self.pool = BufferPool()
        self.dirty_bytes = 0
        self.dirty_bytes_max = settings.dirty_bytes_max
        self.reserved_bytes: Callable[[int], int] = lambda log: 0
        self.space_hint: Callable[[], str] = lambda: ""
        """What to say to people whose store is full, behind the error."""
        """Space that the preallocated VDIs other than the one of that log still have a right to, in each zone."""
        self.reserve_bytes = RESERVE_SEGMENTS * settings.segment_bytes + settings.dirty_bytes_max
        self.requests = 0
        """Clients' requests to read or change any VDI so far: background work sees from it whether they rest."""
        self.spare_blocks = 0
        """Blocks of freed files that a zone keeps to write again, as far as is known here."""
        self.bugs: frozenset[str] = frozenset()
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.readers_max = max(16, min(READERS_MAX, soft_limit // (DESCRIPTORS_SHARE * len(zones))))
        self.maps = MapMemory(settings.map_memory_bytes)
        self.bad_copies = 0
        """Blocks and directories that a zone returned with a wrong checksum since the store was opened."""
        self.loaded_pages = 0
        """Pages of block maps that were read from zones because map_memory_bytes did not hold them, and at opening."""
        self.moved_blocks = 0
        """Blocks that collection has appended again since the store was opened."""
        self.freed_segments = 0
        self.rebuilt_pages = 0
        """Map pages that no zone had whole and that the log gave again, since the store was opened."""
        self.on_bad_copy: Callable[[Segment, int], None] = lambda segment, zone: None
        """Told of every segment and zone whose copy turned out bad or missing while it was read."""
        self.crc_cache: deque[Segment] = deque()
        self.in_service = frozenset(zone.index for zone in zones)
        self.failing: dict[int, StoreError] = {}
        self.logs: list[Log] = []
        """Those that are open for writing."""
        self.watch: ZoneWatch | None = None
        self._membership: Membership | None = None
        self._refused: StoreError | None = None
        """Why zones that fail can't be put out, once that has lasted too long; until zones change."""
        self._putting_out: asyncio.Task[None] | None = None
        self._suggested: dict[int, StoreError] = {}
        """The zones that are being put out because they lag, and why."""
        self._suggesting: set[asyncio.Task[None]] = set()
        self._suggest_again: asyncio.TimerHandle | None = None
        """Runs after a refusal, until the next attempt."""
        self._news = asyncio.Event()
        self._change_waiters: list[asyncio.Future[None]] = []
        self._orphans: dict[int, list[Handle]] | None = None
        """While an epoch comes into force: what was open in the zones that it leaves out."""
        self.request_syncs: list[Callable[[], None]] = []
        """For each log that may have dirty data: start making it durable."""
        self._dirty_waiters: deque[asyncio.Future[None]] = deque()
        self._readers: deque[Segment] = deque()

    # -- zones --------------------------------------------------------------------------------------------------

    def join(self, membership: Membership) -> None:
        """Follow the store's membership from now on, and watch its zones until `leave`."""
        self._membership = membership
        self.in_service = membership.in_service
        membership.on_change(self._zones_changed)
        self.watch = ZoneWatch(
            self.executor,
            self.clock,
            self.settings.zone_deadline_seconds,
            zones=lambda: [self.zones[z] for z in sorted(self.in_service)],
            lag=self._lag,
            expendable=self._expendable,
            lagging=self.zone_lagging,
            failing=self.zone_failing,
        )
        self.watch.start()

    def leave(self) -> None:
        """The store is closed: put nobody out any more."""
        if self.watch is not None:
            self.watch.close()
        self._membership = None
        for task in (self._putting_out, *self._suggesting):
            if task is not None:
                task.cancel()
        if self._suggest_again is not None:
            self._suggest_again.cancel()

    def serving(self, zones: Iterable[int]) -> tuple[int, ...]:
        """Those of the zones that are in service, in their order."""
        in_service = self.in_service
        return tuple(z for z in zones if z in in_service)

    def lost(self, zone: int) -> ZoneFailed:
        """What calls of a zone that is out of service end with."""
        return ZoneFailed(f"{self.zones[zone]!r} is out of service: {self.zones[zone].error}")

    def zone_failing(self, zone: int, error: StoreError) -> bool:
        """A call of that zone failed, or it lags: see that it is put out. The one place for it; at once and any number
        of times. False: that can't be; whoever needs the zone has to give up."""
        if self._membership is None:
            self.zones[zone].error = self.zones[zone].error or error
            return False
        if zone in self.in_service and zone not in self.failing:
            self.failing[zone] = error
            self.zones[zone].error = error
            log.error("%r failed and is put out: %s", self.zones[zone], error)
            self._news.set()
            if self._putting_out is None:
                self._putting_out = self.loop.create_task(self._put_out())
        return True

    def read_failed(self, zone: int, error: StoreError) -> None:
        """A read failed on that zone, and goes to another one."""
        where = self.zones[zone]
        if not isinstance(error, ZoneFailed):
            return  # a copy is missing there: that is repaired
        where.read_errors += 1
        where.last_error = str(error)
        if where.read_errors % READ_ERRORS_MAX == 0 and self._expendable(zone):
            self.zone_lagging(zone, error)

    def zone_lagging(self, zone: int, error: StoreError) -> bool:
        """As zone_failing, for a zone that is only bad to have: where it can't be put out it stays, and nobody gives
        up because of it. False: that was asked for before, or not long ago."""
        if self._membership is None or self._suggest_again is not None or zone in self._going:
            return False
        self._suggested[zone] = error
        task = self.loop.create_task(self._suggest(zone, error))
        self._suggesting.add(task)
        task.add_done_callback(self._suggesting.discard)
        return True

    async def _suggest(self, zone: int, error: StoreError) -> None:
        assert self._membership is not None
        try:
            await self._membership.exclude([zone], str(error))
        except StoreError as refused:
            log.warning("%r is not put out although it should: %s: %s", self.zones[zone], error, refused)
            if self._suggest_again is None:
                self._suggest_again = self.loop.call_later(SUGGEST_SECONDS, self._may_suggest)
        finally:
            del self._suggested[zone]

    def _may_suggest(self) -> None:
        self._suggest_again = None

    async def put_out(self, zone: int, error: StoreError) -> None:
        """As zone_failing; return when the epoch without the zone is durable. Unavailable: it could not be put out."""
        while zone in self.in_service:
            if not self.zone_failing(zone, error) or self._refused is not None:
                raise Unavailable(f"{self.zones[zone]!r} failed: {error}")
            await self.zones_change()

    async def zones_change(self) -> None:
        """Wait for the next change of epoch, or until it is clear that zones which fail can't be put out."""
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._change_waiters.append(waiter)
        await waiter

    async def _put_out(self) -> None:
        """Put the failing zones out, those that fail meanwhile included. Where that is refused a zone that comes back
        may help: it is tried again and again. After write_wait_seconds whoever waits for the failing ones is told."""
        membership = self._membership
        assert membership is not None
        give_up: float | None = None
        told: frozenset[int] = frozenset()
        while self.failing:
            self._news.clear()
            failing = frozenset(self.failing)
            reasons = "; ".join(f"{self.zones[z]!r}: {error}" for z, error in self.failing.items())
            try:
                await membership.exclude(failing, reasons)
            except StoreError as error:
                now = self.loop.time()
                if give_up is None:
                    log.error("zones failed and can't be done without: %s", error)
                    give_up = now + self.settings.write_wait_seconds
                if now >= give_up and told != failing:
                    told = failing
                    self._refuse(error)
                again = PUT_OUT_AGAIN_SECONDS if now >= give_up else min(give_up - now, PUT_OUT_AGAIN_SECONDS)
                timer = self.loop.call_later(again, self._news.set)
                await self._news.wait()
                timer.cancel()
                await self._put_out_some(membership)
        self._putting_out = None

    async def _put_out_some(self, membership: Membership) -> None:
        """All that fail can't be put out at once. Some of them may work again by now: the others go first, and then
        they, one after the other, so that each can be opened anew."""
        well: list[int] = []
        for z in sorted(self.failing):
            if not self.executor.outstanding(z):
                with contextlib.suppress(StoreError, TimeoutError):
                    async with asyncio.timeout(self.settings.zone_deadline_seconds):
                        await run(self.executor, z, self.zones[z].backend.check)
                    well.append(z)
        gone = self.failing.keys() - (well if len(well) < len(self.failing) else well[:-1])
        if well and gone:
            with contextlib.suppress(StoreError, TimeoutError):  # the next attempt asks for all of them again
                async with asyncio.timeout(self.settings.zone_deadline_seconds):
                    await membership.exclude(frozenset(gone), "it failed, and others that failed work again")

    def _refuse(self, error: StoreError) -> None:
        self._refused = error
        for each in list(self.logs):
            each.zones_stay(frozenset(self.failing), error)
        self._wake_change()

    def _zones_changed(self) -> None:
        """A new epoch is in force: everybody goes on without the zones that it leaves out."""
        assert self._membership is not None
        before, self.in_service = self.in_service, self._membership.in_service
        self._refused = None
        gone = before - self.in_service
        known = {**self._suggested, **self.failing}
        errors = {z: known.get(z, ZoneFailed("put out by the administrator")) for z in gone}
        for z in gone:
            self.failing.pop(z, None)
        for z in self.in_service - before:
            self.zones[z].last_error = str(self.zones[z].error or self.zones[z].last_error)
            self.zones[z].error = None
            self.zones[z].read_errors = 0
        for z, error in errors.items():
            self.zones[z].error = error
            log.warning("%r is out of service: %s", self.zones[z], error)
        orphans: dict[int, list[Handle]] = {z: [] for z in gone}
        self._orphans = orphans
        for each in list(self.logs):
            each.zones_changed(gone)
        for segment in self.segments.values() if gone else ():
            if segment.handles or segment.replaced:
                for z in gone:
                    orphans[z] += segment.lose_handles(z)
        self._orphans = None
        for z in gone:
            # Behind the logs, which have taken back the memory that a call under way may still read. Nobody may wait
            # for its calls any more, and nobody close a descriptor that one of them still uses.
            self.executor.abandon(z, self.lost(z), orphans[z])
        self._news.set()
        self._wake_change()

    def close_handle(self, zone: int, handle: Handle) -> None:
        """Nobody needs this handle any more."""
        if zone in self.in_service:
            handle.close()
        else:
            self.orphan(zone, handle)

    def orphan(self, zone: int, handle: Handle) -> None:
        """Nobody needs this handle of a zone that is out of service: closing it here could hang, or let a call that
        hangs go to another file."""
        if self._orphans is not None and zone in self._orphans:
            self._orphans[zone].append(handle)
        else:
            self.executor.abandon(zone, self.lost(zone), [handle])

    def _wake_change(self) -> None:
        waiters, self._change_waiters = self._change_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _lag(self, zone: int, now: float) -> float | None:
        owing = [since for each in self.logs if (since := each.owed_since(zone, now)) is not None]
        return min(owing, default=None)

    @property
    def _going(self) -> frozenset[int]:
        """Zones that are being put out. The record of that waits for all others: for one of them that hangs too, until
        it is to go as well."""
        return frozenset((*self.failing, *self._suggested))

    def lag_seconds(self, zone: int) -> float:
        """Age of the oldest data that the zone owes somebody; 0 = none."""
        now = self.clock.monotonic()
        since = self._lag(zone, now)
        return 0.0 if since is None else max(0.0, now - since)

    def _expendable(self, zone: int) -> bool:
        gone = self._going | {zone}
        return all(each.can_lose(zone, gone) for each in self.logs)

    # -- dirty data ---------------------------------------------------------------------------------------------

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

    # -- segments -----------------------------------------------------------------------------------------------

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

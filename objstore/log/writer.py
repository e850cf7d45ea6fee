"""The writing end of one log: records gathered, handed to the zones, made durable, segments sealed and prepared.

Rules kept here (DESIGN.md tells the schedules that break them):
- a position is given to a complete request only, in the loop turn that puts it into the record;
- appended bytes never change and stay in memory until they are durable on every zone of their segment;
- a flush waits for the position captured when it was asked for; what a sync covers is captured before the sync is
  issued; syncs of one zone never count for another;
- a failed write or sync is final: nothing is tried again on the same pages, the zone is put out. Records count as
  durable without it once the epoch that leaves it out is durable; the open segment is then sealed on the others;
- below `min_copies` zones nothing is acknowledged: writes wait, and then fail;
- a seal is written on a zone only after the sync of the segment's body succeeded there;
- a request is acknowledged only into a segment whose space is set aside on all its zones.
"""

import asyncio
import contextlib
import ctypes
import functools
import itertools
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from crc32c import crc32c

from objstore.backend.base import Backend, Handle, ZoneFailed
from objstore.errors import InvalidRequest, NoSpace, StoreError, Unavailable
from objstore.format.record import (
    CRC_BYTES,
    OP_BYTES,
    RECORD_DATA_BLOCKS_MAX,
    SOURCE_BYTES,
    TABLE_BYTES_MAX,
    Kind,
    encode_header,
    word,
)
from objstore.format.segment import (
    BLOCKS_MAX,
    DIRECTORY_RESERVE_PAGES,
    Directory,
    DirectoryBuilder,
    SegmentHeader,
    encode_segment_header,
)
from objstore.log.env import BUFFER_BYTES, Env
from objstore.log.lane import Lane, Seal, start_jobs
from objstore.log.segment import Record, Segment
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT

log = logging.getLogger(__name__)

DIRECTORY_MARGIN_PAGES: Final = 3
"""What one record can add to the directory: at most 330 operations of 16 bytes, 256 CRCs, 165 sources."""
COPY_OUT_BLOCKS_MAX: Final = 17
"""Records up to 64 KiB of data are copied out of their 1 MiB buffer when they are cut: a write + flush at a time would
otherwise hold a whole buffer each."""
PREPARED_MAX: Final = 6
PREPARED_AT_ONCE: Final = 2
"""Segments set aside ahead of a busy log: one more each time a write had to wait for one, one less each time the log
was idle. Making one takes a journal commit for its name, about as long as filling it at full speed."""
FULL_SECONDS: Final = 5.0
"""A zone that had no space for a segment is passed over so long, if there are more zones than copies."""
IDLE_SECONDS: Final = 10.0
"""A log that nothing was appended to for so long seals its segment where it stands and gives prepared ones back."""
UNSEALED_MAX: Final = 8
"""Segments whose seals are not durable: what opening after a power cut has to copy. Writes wait at this number, and
opening takes older seals for durable."""
UNSEALED_WANTED: Final = 4
"""From here on seals are made durable although no flush asks for that: one round of syncs for so many segments."""
SYNCS_OF_DIRTY: Final = 4
"""Near the limit of dirty data a log syncs each time it has appended this part of it: a sync waits for all that the
device has not yet written, whoever wrote it, so many small ones cost far more than a few."""
SMALL_RECORD_BLOCKS: Final = 24
ZEROS: Final = memoryview(bytes(1 << 20))
FULL_GAP_SHARE: Final = 32
"""A segment whose unused end is at most this part of it keeps its size: its file can then be used again as it is."""
SPLIT_BLOCKS_MIN: Final = 64
"""A request that doesn't fit the rest of a segment is split only if at least this much of it goes there."""


def segment_blocks(segment_bytes: int) -> int:
    """Blocks of a segment file for that much data: its header page, record headers and directory included."""
    data = segment_bytes // BLOCK_BYTES
    return min(BLOCKS_MAX, data + max(16, min(DIRECTORY_RESERVE_PAGES, data // 16)))


def paged_memory(length_bytes: int) -> memoryview:
    """Writable memory that begins at a page, as writing around the page cache needs it."""
    memory = memoryview(bytearray(length_bytes + BLOCK_BYTES - 1))
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % BLOCK_BYTES
    return memory[start : start + length_bytes]


def prepare_segment(
    backend: Backend, name: str, size_bytes: int, reserve_bytes: int, header: bytes, *, ahead: bool
) -> Handle:
    """In a zone's thread: set aside one segment and make its name and header durable.

    ahead: also write the file once if it is a new one, so that later syncs have no allocation to commit.
    """
    handle = backend.create(name, size_bytes, reserve_bytes=reserve_bytes)
    try:
        handle.write(0, [memoryview(header)])
        if ahead and not handle.recycled:
            for offset in range(len(header), size_bytes, len(ZEROS)):
                handle.write(offset, [ZEROS[: size_bytes - offset]])
        if ahead:
            handle.open_around()
        handle.sync()
    except StoreError:
        handle.close()
        raise
    return handle


def _garbage(result: object, error: BaseException | None) -> None:
    """An empty segment that could not be removed is garbage that the next opening removes."""


class SegmentObserver(Protocol):
    """Told of a writer's segments, in the loop turn in which it happens."""

    def segment_opened(self, segment: Segment) -> None:
        """Records go to `segment` from now on."""
        ...

    def segment_finished(self, segment: Segment, blocks_before: int, directory: Directory) -> None:
        """`segment` takes no more records and may have become shorter: the log stands exactly between two segments."""
        ...

    def log_failed(self) -> None:
        """The writer takes nothing more (`error` says why)."""
        ...


class LogWriter:
    """Appends to one log. All methods but the coroutines finish at once and are called in the event loop only.

    position: of the last operation appended. durable_upto: everything up to it is durable on all zones that hold it.
    sync_position: somebody wants everything up to it durable. error: set once too few zones are left to go on; the log
    then takes nothing more and no flush succeeds. place: the zones for a segment, of those in service.
    """

    def __init__(
        self,
        env: Env,
        log_number: int,
        *,
        generation: int,
        copies: int,
        next_number: int,
        position: int,
        previous_crc: int,
        place: Callable[[int], tuple[int, ...]],
        segment_bytes: int,
        min_copies: int = 1,
    ) -> None:
        self.env = env
        self.log = log_number
        self.generation = generation
        self.copies = copies
        self.min_copies = min_copies
        self.next_number = next_number
        self.position = position
        self.durable_upto = position
        self.previous_crc = previous_crc
        self.place = place
        self.segment_blocks = segment_blocks(segment_bytes)
        self.sync_position = 0
        self._since_sync = 0
        self.seal_target = -1
        self.error: StoreError | None = None
        self.space_error: NoSpace | None = None
        self.scarce = False
        """The last segment set aside came out of the reserve: it is not for the data of clients."""
        self.segment: Segment | None = None
        self.observer: SegmentObserver | None = None
        self.durable_wall = env.clock.wall()
        self.prepared_target = 1
        self.unsealed: dict[int, Segment] = {}
        """Segments of this writer whose seal is not yet durable on all zones, the open one included."""
        self._body_end = 0
        self._directory: DirectoryBuilder | None = None
        self._prepared: deque[Segment] = deque()
        self._preparing: asyncio.Task[None] | None = None
        self._reserve_tried = 0
        self._making_from: int | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._room_waiters: deque[asyncio.Future[None]] = deque()
        self._lanes: dict[int, Lane] = {}
        self._undurable: deque[Record] = deque()
        self._flush_waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._seal_waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._record: Record | None = None
        self._first_position = 0
        self._limit = 0
        self._data = 0
        self._table_bytes = 0
        self._words: list[int] = []
        self._counts: list[int] = []
        self._starts: list[int] = []
        self._crcs: list[int] = []
        self._sources: list[int] = []
        self._write_ahead = False
        """The last segment was made of small records: flushes come often, and new files are written once beforehand."""
        self._age_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._short_timer: asyncio.TimerHandle | None = None
        """Runs while there are too few zones, until waiting ends."""
        self.short: StoreError | None = None
        """Why writes fail for want of zones."""
        self._asked: deque[tuple[int, float]] = deque()
        """(position, since when somebody wants everything up to it durable), as the watch has seen it."""
        self.kept: Callable[[], Iterable[tuple[int, ...]]] = lambda: ()
        """The sets of zones that what is sealed, and the map, lie in."""
        self.elsewhere: Callable[[int, frozenset[int]], tuple[int, ...]] | None = None
        """As `place`, without the zones given."""
        self.starts: dict[int, tuple[int, int]] = {}
        """Of the segments in `unsealed`, and those behind them: position and header CRC of the last record before."""
        self.on_standstill: Callable[[], None] | None = None
        """Told when the log stands still because its end can't become durable where it lies; see takeover.py. None:
        nobody can help, the log stops for good in the end."""
        self.waits_for_takeover = False
        """Nothing is appended until the end has been appended again elsewhere."""
        self.takeovers = 0
        self.moved_from = 0
        """The first segment of those whose contents were appended again last."""
        self.halted = False
        """Lanes begin nothing more."""
        self.gives_up = False
        """Fail rather than wait for zones."""
        self._let_down_by_failing = False
        """It stands still for zones that failed and can't be put out, and for no other reason."""
        self._lost: set[int] = set()
        """Segments without a durable seal whose zones have all been put out; some may be back since."""
        self._full: dict[int, float] = {}
        """Zones that had no space for a segment, and until when others are preferred."""
        self._closed = False
        self._disowned = False
        env.request_syncs.append(self.request_sync)
        env.logs.append(self)

    # -- space --------------------------------------------------------------------------------------------------

    def room(self, blocks: int, *, whole: bool = False) -> int:
        """How many of `blocks` data blocks one `append` may take now without waiting; 0 = none, wait for `make_room`.

        For an operation without data ask for 0 blocks: 1 = there is room. whole: all of them or none.
        """
        if self.error is not None:
            raise self.error
        table = OP_BYTES + CRC_BYTES * blocks
        if self._record is not None and self._table_bytes + table <= TABLE_BYTES_MAX:
            left = self._limit - self._data
            if left >= blocks:
                return blocks or 1
        left = self._segment_room()
        if left >= blocks and left > 0:
            return min(blocks, RECORD_DATA_BLOCKS_MAX) or 1
        if left >= SPLIT_BLOCKS_MIN and not whole:
            return min(left, RECORD_DATA_BLOCKS_MAX)
        next_room = self._next_room
        return (min(blocks, next_room) or 1) if next_room else 0

    def batch_room(self, blocks: int) -> int:
        """Of `blocks` data blocks, how many one `append_moves` may take now; 0: none, wait for `make_room`."""
        if self.error is not None:
            raise self.error
        left = self._segment_room()
        if left >= min(blocks, SPLIT_BLOCKS_MIN):
            return min(left, blocks)
        return min(blocks, self._next_room)

    def room_for_batch(self, blocks: int) -> bool:
        """Whether several `append`s of `blocks` data blocks in all, and of no more tables than one header page holds,
        can follow each other now without waiting."""
        if self.error is not None:
            raise self.error
        blocks = max(1, blocks)
        return max(self._segment_room(), self._next_room) >= blocks

    @property
    def fresh_room(self) -> int:
        """Data blocks that the first record of a new segment takes."""
        return min(RECORD_DATA_BLOCKS_MAX, self.segment_blocks - 2 - 1 - DIRECTORY_MARGIN_PAGES)

    @property
    def _next_room(self) -> int:
        """Data blocks that the first record of the next segment takes; 0: that can't be opened now."""
        ready = self._prepared and len(self.unsealed) < UNSEALED_MAX and not self.waits_for_takeover
        return self.fresh_room if ready else 0

    def _segment_room(self) -> int:
        """Data blocks that one more record could take in the open segment, the record being gathered cut first."""
        if self.segment is None or self._directory is None:
            return 0
        end = self._body_end
        margin = DIRECTORY_MARGIN_PAGES
        if self._record is not None:
            end += 1 + self._data
            margin *= 2
        pages = -(-self._directory.length_bytes // BLOCK_BYTES)
        return max(0, self.segment_blocks - end - 1 - pages - margin)

    async def make_room(self, reserve_bytes: int) -> None:
        """Wait until a prepared segment is there. NoSpace: the zones are full; Unavailable: the log failed, or too few
        zones have been there for `write_wait_seconds`.

        reserve_bytes: what must stay free in every zone behind it. 0 for what frees space in the end: the reserve is
        then used if there is nothing else.
        """
        attempt = max(reserve_bytes, self.env.reserve_bytes)
        while (
            not self._prepared
            or (self.scarce and reserve_bytes)
            or len(self.unsealed) >= UNSEALED_MAX
            or self.waits_for_takeover
        ):
            if self.error is not None:
                raise self.error
            if self.waits_for_takeover:
                await self._taken_over()
                continue
            if len(self.unsealed) >= UNSEALED_MAX:
                await self.sealed_below(min(self.unsealed) + 1)
                continue
            if self._prepared:
                await self._check_space(reserve_bytes)
                continue
            if self._too_few_zones():
                if self.short is not None:
                    raise self.short
            else:
                if self.segment is not None:
                    self.prepared_target = min(self.prepared_target + 1, PREPARED_MAX)
                self._prepare(attempt)
            waiter: asyncio.Future[None] = self.env.loop.create_future()
            self._room_waiters.append(waiter)
            await waiter
            if self.space_error is not None and not self._prepared:
                if self._reserve_tried <= reserve_bytes:
                    raise self.space_error
                attempt = reserve_bytes

    async def _taken_over(self) -> None:
        """Wait for that, or for anything else that changes. Unavailable: it has lasted too long."""
        if self.short is not None:
            raise self.short
        waiter: asyncio.Future[None] = self.env.loop.create_future()
        self._room_waiters.append(waiter)
        await waiter

    def _placed(self, number: int) -> tuple[int, ...]:
        """The zones in service for a segment: others than those that were full just now, if so many are there."""
        zones = self.env.serving(self.place(number))
        if self._full and self.elsewhere is not None:
            now = self.env.loop.time()
            full = frozenset(z for z, until in self._full.items() if until > now)
            if not full.isdisjoint(zones):
                others = self.env.serving(self.elsewhere(number, full))
                return others if len(others) == len(zones) else zones
            if not full:
                self._full.clear()
        return zones

    def _too_few_zones(self) -> bool:
        """Whether a new segment would have fewer than `min_copies` zones; the time that writes wait begins then."""
        if self.has_zones():
            if not self._stuck():
                self.short = None
                self._stop_short_timer()
            return False
        self._wait_for_zones()
        return True

    def _wait_for_zones(self) -> None:
        if self.gives_up:
            self.fail(Unavailable(f"too few zones are in service log={self.log} min_copies={self.min_copies}"))
        elif self.short is None and self._short_timer is None:
            if not self.has_zones():
                log.error("writing waits for zones log=%d min_copies=%d", self.log, self.min_copies)
            self._short_timer = self.env.loop.call_later(self.env.settings.write_wait_seconds, self._waited)

    def _waited(self) -> None:
        self._short_timer = None
        self.short = Unavailable(f"too few zones are in service to write log={self.log} min_copies={self.min_copies}")
        if self.waits_for_takeover:
            self._let_down(self.short)
        elif self._stuck():
            self.fail(self.short)
        self._wake_room()

    def _stuck(self) -> bool:
        """Whether something acknowledged can't become durable on `min_copies` zones where it lies, or a segment can't
        be sealed any more."""
        return not self._lost.isdisjoint(self.unsealed) or any(
            record.waiting and not self._enough(record) for record in self._undurable
        )

    def _stop_short_timer(self) -> None:
        if self._short_timer is not None:
            self._short_timer.cancel()
            self._short_timer = None

    async def _check_space(self, reserve_bytes: int) -> None:
        """See whether so much is free again that clients may write into what came out of the reserve. NoSpace."""
        env = self.env
        free: list[int] = []
        for z in self._placed(self.next_number):
            try:
                free.append(await run(env.executor, z, env.zones[z].backend.free_bytes))
            except StoreError as error:
                await env.put_out(z, error)
        if min(free, default=0) < reserve_bytes:
            raise NoSpace(
                f"the zones are full{env.space_hint()}: free_bytes={min(free, default=0)} reserve_bytes={reserve_bytes}"
            )
        self.scarce = False

    def _prepare(self, reserve_bytes: int) -> None:
        if self._preparing is None and not self._closed and self.error is None and not self.waits_for_takeover:
            self.space_error = None
            self._reserve_tried = reserve_bytes
            self._preparing = self.env.loop.create_task(self._prepare_ahead(reserve_bytes))
            self.watch(self._preparing)

    async def _prepare_ahead(self, reserve_bytes: int) -> None:
        scarce = reserve_bytes < self.env.reserve_bytes
        target = 1 if scarce else self.prepared_target
        try:
            while len(self._prepared) < target and self.error is None and not self._closed:
                if self._too_few_zones():
                    break
                # Segments are used in the order of their numbers, so those made together become ready together.
                missing = target - len(self._prepared)
                self._making_from = self.next_number
                made = await asyncio.gather(
                    *(self._prepare_one(reserve_bytes) for _ in range(min(missing, PREPARED_AT_ONCE))),
                    return_exceptions=True,
                )
                for segment in made:
                    if isinstance(segment, Segment):
                        if segment.zones == self._placed(segment.number):
                            self._prepared.append(segment)
                        else:  # zones, or the number of copies, have changed while the others of this round were made
                            self._discard(segment)
                self._making_from = None
                if self._prepared:
                    self.scarce = scarce
                self._wake_room()
                for failure in made:
                    if isinstance(failure, BaseException):
                        raise failure
        except NoSpace as error:
            self.space_error = error
        except StoreError as error:
            self._fail_for_now(error)
        finally:
            self._preparing = None
            self._wake_room()

    async def _prepare_one(self, reserve_bytes: int) -> Segment | None:
        """A segment set aside on its zones; None: some of them went out of service meanwhile. NoSpace, Unavailable."""
        number = self.next_number
        self.next_number += 1
        env = self.env
        zones = self._placed(number)
        segment = Segment(self.log, number, self.generation, zones, self.segment_blocks)
        header = encode_segment_header(
            SegmentHeader(
                self.log,
                number,
                self.generation,
                env.epoch,
                env.epoch_id,
                self.copies,
                self.segment_blocks,
                int(env.clock.wall() * 1e6),
                tuple(env.zones[z].zone_id for z in zones),
            ),
            env.store_id,
        )
        pending: asyncio.Future[None] = env.loop.create_future()
        errors: list[tuple[int, BaseException]] = []
        left = len(zones)

        def done(zone: int, handle: Handle | None, error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if handle is not None:
                segment.handles[zone] = handle
            elif error is not None:
                errors.append((zone, error))
            if not left and not pending.done():
                pending.set_result(None)

        for zone in zones:
            env.executor.submit(
                zone,
                functools.partial(prepare_segment, ahead=self._write_ahead),
                (env.zones[zone].backend, segment.name, segment.file_bytes, reserve_bytes, header),
                functools.partial(done, zone),
            )
        await pending
        if not errors and env.serving(zones) == zones:
            env.spare_blocks = max(0, env.spare_blocks - segment.blocks)
            return segment
        self._discard(segment)
        full: NoSpace | None = None
        for zone, error in errors:
            if isinstance(error, NoSpace):
                full = error
                self._full[zone] = env.loop.time() + FULL_SECONDS
            elif not isinstance(error, StoreError) or isinstance(error, InvalidRequest):
                self.zone_failed(zone, error)
                raise self.error or Unavailable(str(error))
            else:
                await env.put_out(zone, error)
        if full is not None and not self._full.keys().isdisjoint(self._placed(self.next_number)):
            raise NoSpace(f"{full}{self.env.space_hint()}")
        return None

    def _discard(self, segment: Segment) -> None:
        """A prepared segment is not needed: nothing was written into it."""
        for zone in segment.zones:
            handle = segment.handles.pop(zone, None)
            if handle is not None:
                self.env.close_handle(zone, handle)
            if zone in self.env.in_service:
                self.env.executor.submit(zone, self.env.zones[zone].backend.delete, (segment.name,), _garbage)
        segment.reader = None

    def _wake_room(self) -> None:
        while self._room_waiters:
            waiter = self._room_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    # -- appending ----------------------------------------------------------------------------------------------

    def append_block(self, lba: int, data: memoryview) -> int:
        """One whole block: the hot path of `append`. `room(1)` was asked in this loop turn. Returns its entry."""
        if self._data >= self._limit or self._table_bytes > TABLE_BYTES_MAX - OP_BYTES - CRC_BYTES:
            self._next_record(1)
        record = self._record
        assert record is not None
        at = record.blocks
        record.view[at << BLOCK_SHIFT : (at + 1) << BLOCK_SHIFT] = data
        record.blocks = at + 1
        block = record.start + at
        self._data += 1
        self._table_bytes += OP_BYTES + CRC_BYTES
        self._words.append(lba | 1 << 48)
        self._counts.append(1)
        self._starts.append(block)
        self._crcs.append(crc32c(data))
        segment = record.segment
        segment.memory[block] = record  # type: ignore[index]
        self.position += 1
        self.env.dirty_bytes += BLOCK_BYTES
        return segment.key << BLOCK_SHIFT | block

    def append(
        self,
        kind: int,
        lba: int,
        count: int,
        data: memoryview | None = None,
        *,
        flags: int = 0,
        crcs: Sequence[int] | None = None,
        sources: Sequence[int] = (),
    ) -> int:
        """One operation; `room` was asked in this loop turn and gave at least the blocks of `data`.

        lba, count: what it covers (kind ENTRY: byte length of the entry, blocks). data: count whole blocks or None.
        crcs: CRCs that travel with moved data instead of being computed. Returns the entry of the first block (0
        without data).
        """
        blocks = count if data is not None else 0
        table = OP_BYTES + CRC_BYTES * blocks + SOURCE_BYTES * len(sources)
        if self._record is None or self._data + blocks > self._limit or self._table_bytes + table > TABLE_BYTES_MAX:
            self._next_record(blocks)
        record = self._record
        assert record is not None
        assert self._data + blocks <= self._limit, "room() was asked"
        self._table_bytes += table
        self._words.append(word(kind, lba, flags))
        self._counts.append(count)
        self.position += 1
        if data is None:
            self._starts.append(0)
            return 0
        at = record.blocks
        record.view[at << BLOCK_SHIFT : (at + blocks) << BLOCK_SHIFT] = data
        record.blocks = at + blocks
        block = record.start + at
        self._data += blocks
        self._starts.append(block)
        if crcs is None:
            self._crcs.extend([crc32c(data[i : i + BLOCK_BYTES]) for i in range(0, blocks << BLOCK_SHIFT, BLOCK_BYTES)])
        else:
            self._crcs.extend(crcs)
        self._sources.extend(sources)
        segment = record.segment
        segment.memory[block : block + blocks] = [record] * blocks  # type: ignore[index]
        self.env.dirty_bytes += blocks << BLOCK_SHIFT
        return segment.key << BLOCK_SHIFT | block

    def append_moves(
        self, lbas: list[int], counts: list[int], crcs: list[int], sources: list[int]
    ) -> tuple[int, memoryview]:
        """Runs of moved blocks, one MOVE each, in one record; `batch_room` gave at least len(crcs) in this loop turn.

        lbas, counts: first block and blocks of each run. crcs, sources: block by block. Returns the entry of the first
        block (those of the others follow) and where the data belongs, which the caller puts there in this loop turn.
        """
        blocks = len(crcs)
        table = OP_BYTES * len(lbas) + (CRC_BYTES + SOURCE_BYTES) * blocks
        if self._record is None or self._data + blocks > self._limit or self._table_bytes + table > TABLE_BYTES_MAX:
            self._next_record(blocks)
        record = self._record
        assert record is not None
        assert self._data + blocks <= self._limit, "batch_room() was asked"
        assert self._table_bytes + table <= TABLE_BYTES_MAX
        at = record.blocks
        into = record.view[at << BLOCK_SHIFT : (at + blocks) << BLOCK_SHIFT]
        record.blocks = at + blocks
        block = record.start + at
        self._data += blocks
        self._table_bytes += table
        self._words += [word(Kind.MOVE, lba) for lba in lbas]
        self._counts += counts
        self._starts += itertools.accumulate(counts[:-1], initial=block)
        self._crcs += crcs
        self._sources += sources
        self.position += len(lbas)
        segment = record.segment
        segment.memory[block : block + blocks] = [record] * blocks  # type: ignore[index]
        self.env.dirty_bytes += blocks << BLOCK_SHIFT
        return segment.key << BLOCK_SHIFT | block, into

    def start_record(self, blocks: int) -> None:
        """Begin a record that takes `blocks` blocks; `room_for_batch(blocks)` was asked in this loop turn."""
        self._next_record(blocks)

    def _next_record(self, blocks: int) -> None:
        self.cut()
        if self.segment is None or self._segment_room() < max(1, blocks):
            self._roll()
        segment = self.segment
        assert segment is not None
        self._limit = min(RECORD_DATA_BLOCKS_MAX, self._segment_room())
        record = Record(segment, self._body_end, self.env.pool.get())
        assert segment.memory is not None
        segment.memory[record.start] = record
        self._record = record
        self._first_position = self.position + 1
        self._data = 0
        self._table_bytes = 0
        self.env.dirty_bytes += BLOCK_BYTES
        if self._age_timer is None:
            self._age_timer = self.env.loop.call_later(self.env.settings.dirty_age_seconds, self._aged)

    def cut(self) -> None:
        """Close the record that is being gathered and hand it over."""
        record = self._record
        if record is None:
            return
        self._record = None
        self._limit = self._data = 0
        segment, directory = self.segment, self._directory
        assert segment is not None
        assert directory is not None
        words, counts, crcs, sources = (
            array("Q", self._words),
            array("I", self._counts),
            array("I", self._crcs),
            array("Q", self._sources),
        )
        wall_us = int(self.env.clock.wall() * 1e6)
        crc = encode_header(
            record.view[:BLOCK_BYTES],
            store_id=self.env.store_id,
            log=self.log,
            segment=segment.number,
            generation=self.generation,
            block=record.start,
            position=self._first_position,
            position_count=len(words),
            durable_upto=self.durable_upto,
            previous_crc=self.previous_crc,
            wall_us=wall_us,
            words=words,
            counts=counts,
            crcs=crcs,
            sources=sources,
        )
        self.previous_crc = crc
        directory.add(
            block=record.start,
            crc=crc,
            position=self._first_position,
            position_count=len(words),
            durable_upto=self.durable_upto,
            wall_us=wall_us,
            words=words,
            counts=counts,
            starts=array("I", self._starts),
            crcs=crcs,
            sources=sources,
        )
        for gathered in (self._words, self._counts, self._starts, self._crcs, self._sources):
            gathered.clear()
        record.last_position = self.position
        used = record.blocks << BLOCK_SHIFT
        if record.blocks <= COPY_OUT_BLOCKS_MAX:
            buffer = record.view
            record.view = paged_memory(used)
            record.view[:] = buffer[:used]
            record.buffer = None
            self.env.pool.put(buffer)
        else:
            record.view = record.view[:used]
        held = BUFFER_BYTES if record.buffer is not None else used
        if not self._disowned:  # else it left the account while it was gathered
            self.env.dirty_bytes += held - used
        record.held_bytes = held
        record.waiting = len(segment.zones)
        self._undurable.append(record)
        self._body_end += record.blocks
        self._since_sync += held
        if self.env.dirty_bytes * 2 > self.env.dirty_bytes_max < self._since_sync * SYNCS_OF_DIRTY:
            self._since_sync = 0
            self.sync_position = self.position
        self._hand_over(record)

    def _hand_over(self, item: Record | Seal) -> None:
        """To the zones of its segment, less those that are out."""
        for zone in item.segment.zones:
            lane = self._lanes.get(zone)
            if lane is not None:
                lane.queue.append(item)
        start_jobs(self._lanes.values())

    def _roll(self) -> None:
        """The open segment is finished; the next prepared one takes its place."""
        self.finish_segment()
        assert len(self.unsealed) < UNSEALED_MAX, "opening relies on it"
        segment = self._prepared.popleft()
        segment.memory = [None] * segment.blocks
        self._directory = DirectoryBuilder(self.log, segment.number, self.generation, self.previous_crc)
        segment.crcs = self._directory.crcs
        self.segment = segment
        self._body_end = 1
        self.unsealed[segment.number] = segment
        self.starts[segment.number] = self.position, self.previous_crc
        self.env.segments[segment.key] = segment
        for zone in segment.zones:
            if zone not in self._lanes:
                self._lanes[zone] = Lane(self, zone)
        self.env.keep_reader(segment, segment.handles[segment.zones[segment.number % len(segment.zones)]])
        self._prepare(self.env.reserve_bytes + self.env.reserved_bytes(self.log))
        if len(self.unsealed) >= UNSEALED_WANTED:
            self.seal_target = max(self.seal_target, segment.number - 1)
        if self.observer is not None:
            self.observer.segment_opened(segment)

    def finish_segment(self) -> None:
        """Seal the open segment where it stands (nothing if none is open). The record in the making is cut first."""
        self.cut()
        segment, directory = self.segment, self._directory
        if segment is None or directory is None or not directory.record_crcs:
            return
        self._write_ahead = self._body_end < SMALL_RECORD_BLOCKS * len(directory.record_crcs)
        self.segment = self._directory = None
        data, crc = directory.encode(self.env.store_id)
        pages = len(data) // BLOCK_BYTES
        blocks_before = segment.blocks
        full = segment.blocks - self._body_end - pages
        assert full >= 0, "the directory was reserved for"
        if full <= segment.blocks // FULL_GAP_SHARE:
            seal = Seal(segment, data, (segment.blocks - pages) << BLOCK_SHIFT, 0)
        else:
            segment.blocks = self._body_end + pages
            seal = Seal(segment, data, self._body_end << BLOCK_SHIFT, segment.file_bytes)
        segment.sealed = True
        segment.seal_crc = crc
        self._hand_over(seal)
        if self.observer is not None:
            self.observer.segment_finished(segment, blocks_before, directory.finish(crc))

    # -- durability ---------------------------------------------------------------------------------------------

    def _aged(self) -> None:
        self._age_timer = None
        if self.sync_position < self._first_position:
            self.prepared_target = max(1, self.prepared_target - 1)
        self.request_sync()
        if self._idle_timer is None and self.log:  # the catalog is one log, and never collected
            self._idle_timer = self.env.loop.call_later(IDLE_SECONDS, self._idle, self.position)

    def _idle(self, position: int) -> None:
        """Nothing was appended for a while, or something was: position, where the log stood at the last look."""
        self._idle_timer = None
        if self._closed or self.error is not None:
            return
        if self.position != position or self._record is not None:
            self._idle_timer = self.env.loop.call_later(IDLE_SECONDS, self._idle, self.position)
            return
        if self.segment is not None:
            self.seal_target = self.segment.number
            self.finish_segment()
        self.prepared_target = 1
        self.forget_prepared()

    async def go_elsewhere(self) -> None:
        """What lies elsewhere than new segments would go, or on fewer zones, is sealed, so that it can be copied; what
        is set aside so is given back. Unavailable."""
        for segment in [s for s in self._prepared if self._misplaced(s)]:
            self._prepared.remove(segment)
            self._discard(segment)
        old = [s.number for s in self.unsealed.values() if self._misplaced(s)]
        if old and self.error is None:
            if self.segment is not None and self.segment.number in old and self.has_records:
                self.finish_segment()
            await self.flush()
            await self.sealed_below(min(max(old) + 1, self.tail_number))

    def _misplaced(self, segment: Segment) -> bool:
        return set(segment.zones) != set(self.env.serving(self.place(segment.number)))

    def forget_prepared(self) -> None:
        """What was set aside for later is not to be used."""
        while self._prepared:
            self._discard(self._prepared.popleft())

    def request_sync(self) -> None:
        """Start making everything appended so far durable."""
        if self.durable_upto < self.position:
            self.sync_position = self.position
            self.cut()
            start_jobs(self._lanes.values())

    async def flush(self, position: int | None = None) -> None:
        """Return when everything up to `position` (default: appended before this call) is durable on every zone that
        holds it. Unavailable: a zone failed; nothing is promised then."""
        if position is None:
            position = self.position
        if self.error is not None:
            raise self.error
        if self.durable_upto >= position:
            return
        if self.waits_for_takeover and self.short is not None:
            raise self.short
        # First what is wanted, then the record: so the job that writes it syncs it too. Records are synced whole.
        gathered = self._record is not None and self._first_position <= position
        target = self.position
        if not gathered and position < target:
            target = next(record.last_position for record in self._undurable if record.last_position >= position)
        if target > self.sync_position:
            self.sync_position = target
        if gathered:
            self.cut()
        waiter: asyncio.Future[None] = self.env.loop.create_future()
        if self._flush_waiters and self._flush_waiters[-1][0] > position:
            at = next(i for i, (p, _) in enumerate(self._flush_waiters) if p > position)
            self._flush_waiters.insert(at, (position, waiter))
        else:
            self._flush_waiters.append((position, waiter))
        start_jobs(self._lanes.values())
        await waiter

    def synced(self, items: Sequence[Record | Seal]) -> None:
        """One zone has these durably."""
        for item in items:
            item.waiting -= 1
            if item.waiting:
                continue
            if isinstance(item, Seal):
                if any(record.waiting and record.segment is item.segment for record in self._undurable):
                    item.waiting = 1  # its zones are too few for its records, which are to be appended again
                else:
                    self._seal_durable(item.segment)
            elif self._enough(item):
                self._record_durable(item)
            else:
                item.waiting = 1  # some that had it are out: it is not on as many zones as are asked for
        undurable = self._undurable
        if not undurable or undurable[0].waiting:
            return
        while undurable and not undurable[0].waiting:
            self.durable_upto = undurable.popleft().last_position
        self.durable_wall = self.env.clock.wall()
        waiters = self._flush_waiters
        while waiters and waiters[0][0] <= self.durable_upto:
            waiter = waiters.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)

    def lane_idle(self) -> None:
        """A lane has nothing under way, or none is waited for any more."""
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()

    def _record_durable(self, record: Record) -> None:
        segment = record.segment
        assert segment.memory is not None
        segment.memory[record.start : record.start + record.blocks] = [None] * record.blocks
        if record.buffer is not None:
            self.env.pool.put(record.buffer)
            record.buffer = None
        if not self._disowned:
            self.env.release_dirty(record.held_bytes)

    def _disown(self) -> None:
        """What this log will not make durable any more leaves the account of dirty data, which other logs wait for.
        Reads still find it."""
        if self in self.env.logs:
            self.env.request_syncs.remove(self.request_sync)
            self.env.logs.remove(self)
        self._leave_account()

    def _leave_account(self) -> None:
        if self._disowned:
            return
        self._disowned = True
        gathered = (1 + self._data if self._record is not None else 0) << BLOCK_SHIFT
        self.env.release_dirty(gathered + sum(record.held_bytes for record in self._undurable if record.waiting))

    def _join_account(self) -> None:
        if self._disowned:
            self._disowned = False
            self.env.dirty_bytes += sum(record.held_bytes for record in self._undurable if record.waiting)

    def _seal_durable(self, segment: Segment) -> None:
        segment.memory = None
        self.unsealed.pop(segment.number, None)
        oldest = min(self.unsealed, default=self.next_number)
        for number in [number for number in self.starts if number < oldest]:
            del self.starts[number]
        if not segment.pins:
            for zone in [z for z, handle in segment.handles.items() if handle is not segment.reader]:
                self.env.close_handle(zone, segment.handles.pop(zone))
        self.env.crc_cache.append(segment)
        self.env.trim_crc_cache()
        waiting = []
        for number, waiter in self._seal_waiters:
            if any(n < number for n in self.unsealed):
                waiting.append((number, waiter))
            elif not waiter.done():
                waiter.set_result(None)
        self._seal_waiters = waiting

    async def sealed_below(self, number: int) -> None:
        """Return when every segment of this writer below `number` is sealed, its seal durable on all its zones."""
        if self.error is not None:
            raise self.error
        if not any(n < number for n in self.unsealed):
            return
        if self.waits_for_takeover and self.short is not None:
            raise self.short
        self.seal_target = max(self.seal_target, number - 1)
        waiter: asyncio.Future[None] = self.env.loop.create_future()
        self._seal_waiters.append((number, waiter))
        start_jobs(self._lanes.values())
        await waiter

    @property
    def dirty_bytes(self) -> int:
        """Bytes of this log that are not yet durable."""
        gathered = (1 + self._data) if self._record is not None else 0
        return (gathered + sum(record.blocks for record in self._undurable)) << BLOCK_SHIFT

    @property
    def has_records(self) -> bool:
        """Whether the open segment holds any record, the one being gathered included."""
        return self._record is not None or (self._directory is not None and bool(self._directory.record_crcs))

    @property
    def tail_number(self) -> int:
        """Number of the first segment that what is appended from now on can be in."""
        if self.segment is not None:
            return self.segment.number
        if self._prepared:
            return self._prepared[0].number
        return self.next_number if self._making_from is None else self._making_from

    # -- the end ------------------------------------------------------------------------------------------------

    def zone_failed(self, zone: int, error: BaseException) -> None:
        """A call of that zone failed. An error of the zone puts it out; any other is ours and stops the log."""
        where = self.env.zones[zone]
        if not isinstance(error, StoreError) or isinstance(error, InvalidRequest):
            log.error("unexpected error from %r", where, exc_info=error)
        elif self.env.zone_failing(zone, error):
            return
        if where.error is None:
            where.error = error
        self.fail(Unavailable(f"{where!r} failed, writing stopped: {error}"))

    def zone_full(self, zone: int, error: NoSpace) -> None:
        """A write into space that was set aside found the zone full; it is made again, and everybody waits for it."""
        log.warning("a write waits for space in %r: %s", self.env.zones[zone], error)

    def zones_changed(self, gone: frozenset[int]) -> None:
        """A new epoch is in force (env.Log): go on without the zones in `gone`.

        What they do not have is not waited for any more, as long as enough others will have it, and the open segment is
        sealed where it stands: its header names a zone that has less of it. What a zone has sealed stays a copy.
        """
        lanes = [self._lanes.pop(z) for z in gone if z in self._lanes]
        lost: dict[Segment, None] = {}
        items: list[Record | Seal] = []
        for lane in lanes:
            for item in lane.leave():
                lost[item.segment] = None
                items.append(item)
        if self.segment is not None and not gone.isdisjoint(self.segment.zones):
            lost[self.segment] = None
        for segment in lost:
            left = tuple(z for z in segment.zones if z not in gone)
            if left:
                segment.zones = left
            else:  # those that were in service last have all that counted: one may come back
                self._lost.add(segment.number)
        for segment in [segment for segment in self._prepared if not gone.isdisjoint(segment.zones)]:
            self._prepared.remove(segment)
            self._discard(segment)
        if self.error is None:
            if self.segment in lost:
                self.finish_segment()
            self.synced([item for item in items if self._goes_without(item)])
            if self._stuck():
                self._stand_still()
            elif self._let_down_by_failing:  # they could be put out after all
                self._let_down_by_failing = self.waits_for_takeover = False
                self.short = None
                self._join_account()
            if self.error is None:
                self._too_few_zones()
        self.lane_idle()
        self._wake_room()

    def _goes_without(self, item: Record | Seal) -> bool:
        """Whether something may count as durable without the zones that have just gone."""
        if isinstance(item, Seal):
            return item.segment.number not in self._lost
        return self._enough(item)

    def _enough(self, record: Record) -> bool:
        """Whether a record may count as durable with the zones that its segment still has."""
        segment = record.segment
        return len(segment.zones) >= self.min_copies and segment.number not in self._lost

    def _stand_still(self) -> None:
        """Something can't become durable where it lies: see that it is appended again elsewhere."""
        if self.on_standstill is None:
            if not self._lost.isdisjoint(self.unsealed):
                self.fail(Unavailable(f"every zone that holds the end of the log has failed log={self.log}"))
            else:
                self._wait_for_zones()
            return
        self._let_down_by_failing = False
        self._hold()
        self._wait_for_zones()
        self.on_standstill()

    def _hold(self) -> None:
        """Append nothing more."""
        if not self.waits_for_takeover:
            self.waits_for_takeover = True
            self.finish_segment()
            self.forget_prepared()

    def _let_down(self, error: StoreError) -> None:
        """Whoever waits for the zones has waited long enough. What is not durable stays in memory, and is appended
        again when there are zones for it; it leaves the account of dirty data, which other logs wait for."""
        self._leave_account()
        waiters = [waiter for _, waiter in self._flush_waiters] + [waiter for _, waiter in self._seal_waiters]
        self._flush_waiters.clear()
        self._seal_waiters.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._wake_room()
        self.env.wake_dirty()

    # -- takeover (takeover.py) -----------------------------------------------------------------------------------

    def has_zones(self) -> bool:
        """Whether enough zones are in service for new segments."""
        return len(self._placed(self.next_number)) >= self.min_copies

    async def halt(self) -> None:
        """Return when nothing of this log is under way in any zone, and nothing more begins until `resume`."""
        self.halted = True
        if self._preparing is not None:
            await asyncio.wait([self._preparing])
        self.forget_prepared()
        while any(lane.busy for lane in self._lanes.values()):
            waiter: asyncio.Future[None] = self.env.loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def resume(self) -> None:
        """There was no takeover: lanes go on with what they have."""
        self.halted = False
        start_jobs(self._lanes.values())

    def go_on(self) -> None:
        """There need not be a takeover: everything is durable and sealed. New segments go to zones in service."""
        assert not self.unsealed
        assert self.durable_upto == self.position
        self._lost.clear()
        self._asked.clear()
        self._join_account()
        self._let_down_by_failing = self.waits_for_takeover = False
        self.short = None
        self._stop_short_timer()
        self.resume()
        self._wake_room()

    def image(self, segment: Segment) -> bytes:
        """A segment as far as it is in memory, because it is not durable."""
        kept = [record for record in self._undurable if record.waiting and record.segment is segment]
        data = bytearray(max((record.start + record.blocks for record in kept), default=0) << BLOCK_SHIFT)
        for record in kept:
            at = record.start << BLOCK_SHIFT
            data[at : at + len(record.view)] = record.view
        return bytes(data)

    def go_on_behind(self, successor: "LogWriter", former: Sequence[Segment]) -> None:
        """Everything from the first unsealed segment on is durable and sealed in what `successor` made, and that
        counts: go on behind it, in its generation. former: the segments that count no more."""
        assert successor.position == self.position
        for lane in self._lanes.values():
            assert not lane.busy
            lane.leave()
        self._lanes.clear()
        for segment in former:
            segment.memory = None
        for record in self._undurable:
            if record.waiting:
                if record.buffer is not None:
                    self.env.pool.put(record.buffer)
                    record.buffer = None
                if not self._disowned:
                    self.env.release_dirty(record.held_bytes)
        self._undurable.clear()
        self.unsealed.clear()
        self.starts.clear()
        self._lost.clear()
        self._asked.clear()
        self._disowned = False
        self.generation = successor.generation
        self.next_number = max(self.next_number, successor.next_number)
        self.previous_crc = successor.previous_crc
        self.takeovers += 1
        self.moved_from = min(segment.number for segment in former)
        self.durable_upto = self.position
        self.durable_wall = self.env.clock.wall()
        self.waits_for_takeover = self.halted = False
        self.short = None
        self._stop_short_timer()
        log.warning("the end of the log was appended again on other zones log=%d", self.log)
        waiters = [waiter for _, waiter in self._flush_waiters] + [waiter for _, waiter in self._seal_waiters]
        self._flush_waiters.clear()
        self._seal_waiters.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._wake_room()

    def zones_stay(self, failing: frozenset[int], error: StoreError) -> None:
        """These zones failed and could not be put out in time (env.Log): let down whoever waits for one of them."""
        if any(not failing.isdisjoint(segment.zones) for segment in self.unsealed.values()):
            self._fail_for_now(Unavailable(f"zones failed and can't be done without: {error}"))

    def _fail_for_now(self, error: StoreError) -> None:
        """Zones failed and can't be put out, until other ones come back: nothing becomes durable before that."""
        if self.on_standstill is None or not isinstance(error, Unavailable):
            self.fail(error)
        elif self.error is None:
            self._let_down_by_failing = not self.waits_for_takeover
            self._hold()
            self.short = error
            self._let_down(error)

    def owed_since(self, zone: int, now: float) -> float | None:
        """Since when the zone has owed something that is wanted durable, as its watch sees it (env.Log)."""
        asked = self._asked
        if self.durable_upto >= self.sync_position:
            asked.clear()
            return None
        if not asked or asked[-1][0] < self.sync_position:
            asked.append((self.sync_position, now))
        while asked[0][0] <= self.durable_upto:
            asked.popleft()
        lane = self._lanes.get(zone)
        if lane is None or lane.stopped or lane.full:
            return None
        oldest = lane.oldest_record()
        if oldest is None:
            return None
        return next((since for position, since in asked if position >= oldest.last_position), None)

    def can_lose(self, zone: int, gone: frozenset[int]) -> bool:
        """Whether `min_copies` of all that it has in that zone, and zones for what comes, would stay (env.Log)."""
        left = self.env.in_service - gone
        if min(self.copies, len(left)) < self.min_copies:
            return False
        held = {segment.zones for segment in self.unsealed.values()}.union(self.kept())
        return all(zone not in zones or len(left.intersection(zones)) >= self.min_copies for zones in held)

    def watch(self, task: asyncio.Task[None]) -> None:
        """A task that this log can't do without: if it ends with an error of ours, the log stops loudly."""
        task.add_done_callback(self._watched)

    def _watched(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.critical("internal error, log stopped log=%d", self.log, exc_info=error)
            self.fail(Unavailable(f"internal error, writing stopped: {error!r}"))

    def fail(self, error: StoreError) -> None:
        """Take nothing more; every flush and write under way or to come raises `error`."""
        if self.error is None:
            self.error = error if isinstance(error, ZoneFailed | Unavailable) else Unavailable(str(error))
            log.error("log stopped log=%d: %s", self.log, error)
            self._disown()
        waiters = [waiter for _, waiter in self._flush_waiters] + [waiter for _, waiter in self._seal_waiters]
        self._flush_waiters.clear()
        self._seal_waiters.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(self.error)
        self._wake_room()
        self.lane_idle()
        self.env.wake_dirty()
        if self.observer is not None:
            self.observer.log_failed()

    async def close(self) -> None:
        """Stop preparing; drop prepared segments that hold nothing. The caller flushed and sealed what it wants."""
        self._closed = True
        if self._age_timer is not None:
            self._age_timer.cancel()
            self._age_timer = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._stop_short_timer()
        if self._preparing is not None:
            await asyncio.wait([self._preparing])
        while self._prepared:
            segment = self._prepared.popleft()
            if self.error is not None:  # the zones may hang
                self._discard(segment)
                continue
            segment.close_handles()
            for zone in self.env.serving(segment.zones):
                with contextlib.suppress(StoreError):  # an empty segment more is garbage that the next opening removes
                    await run(self.env.executor, zone, self.env.zones[zone].backend.delete, segment.name)
        while self.error is None and any(lane.busy for lane in self._lanes.values()):
            waiter: asyncio.Future[None] = self.env.loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter
        stuck = any(lane.busy for lane in self._lanes.values())
        for segment in list(self.unsealed.values()):
            if stuck:
                # A call on one of these descriptors has not returned; closing it could let the call hit another file.
                segment.reader = None
                segment.handles.clear()
            else:
                segment.close_handles()
        self._disown()

"""One log's way to one zone: what is handed over, what a sync covers, in which thread it is done.

A sync covers what was written before it was issued, in the files that it was issued for, in that zone alone: the lists
are taken when the job is made. An error ends a job and with it the lane; what it left unknown is never tried again on
the same pages. Only a write that found no space has sent nothing to its pages, and is made again after a while.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from objstore.backend.base import Handle, ZoneFailed
from objstore.errors import NoSpace, StoreError
from objstore.log.env import Env
from objstore.log.segment import Record, Segment
from objstore.replica.zone import Call, Write
from objstore.units import BLOCK_SHIFT

JOB_BYTES_MAX: Final = 16 << 20
RETRIED: Final = frozenset({"write", "write_around", "write_soon", "write_durable", "truncate"})
"""Calls that may be made again after NoSpace: what they left unknown is written again from memory. A sync is none: it
has older writes behind it."""
FULL_RETRY_SECONDS: Final = 0.5
"""Until a write into allocated space that found the zone full is made again (file systems that copy on write)."""
SHARED_BYTES_MAX: Final = 256 << 10
"""Synced jobs up to this size of zones on one file system share a thread."""
Step = tuple[Any, ...]
"""A blocking call and its arguments."""


class Seal:
    """The directory of a finished segment on its way to the zones."""

    __slots__ = ("data", "offset_bytes", "segment", "truncate_bytes", "waiting")

    def __init__(self, segment: Segment, data: bytes, offset_bytes: int, truncate_bytes: int) -> None:
        self.segment = segment
        self.data = data
        self.offset_bytes = offset_bytes
        self.truncate_bytes = truncate_bytes
        self.waiting = len(segment.zones)


class Job(NamedTuple):
    """What a lane does next. synced: what is durable in the zone when it has succeeded. begin, rest: the same work for
    `run_abreast`, if the job is small and synced: writes that wait for nothing, and what comes behind them. write: the
    job is nothing but this `write_durable` (handle, offset, memory, whether around the cache)."""

    steps: list[Step]
    begin: list[Step]
    rest: list[Step]
    written: "list[Record | Seal]"
    synced: "list[Record | Seal]"
    write: tuple[Handle, int, memoryview, bool] | None = None


class LaneOwner(Protocol):
    """The writer, as its lanes see it."""

    env: Env
    sync_position: int
    seal_target: int
    error: StoreError | None
    halted: bool

    def synced(self, items: "Sequence[Record | Seal]") -> None: ...

    def zone_failed(self, zone: int, error: BaseException) -> None: ...

    def zone_full(self, zone: int, error: NoSpace) -> None: ...

    def lane_idle(self) -> None: ...


class Lane:
    """One log's way to one zone: at most one job under way; what has gathered meanwhile is the next job.

    queue: records and seals not yet handed over, in log order. seals: taken from it, and waiting for the sync of their
    segments' records, all of which were taken before. unsynced: handed over and written, not covered by a sync. job:
    what is under way. stopped: the zone failed and will be put out, or is full for the moment. full: the last
    job found no space; what the next one needs is no sign of slowness. gone: it is out of service.
    """

    def __init__(self, writer: LaneOwner, zone: int) -> None:
        self.writer = writer
        self.zone = zone
        self.queue: deque[Record | Seal] = deque()
        self.unsynced: list[Record | Seal] = []
        self.seals: list[Seal] = []
        self.busy = False
        self.job: Job | None = None
        self.stopped = False
        self.gone = False
        self.full = False
        self.device = writer.env.zones[zone].device

    def pending(self) -> "list[Record | Seal]":
        """What the zone does not have durably yet, in log order."""
        under_way = self.job.written if self.job is not None else []
        return [*self.unsynced, *under_way, *self.seals, *self.queue]

    def oldest_record(self) -> Record | None:
        """The first record that the zone does not have durably yet."""
        under_way = self.job.written if self.job is not None else ()
        for item in itertools.chain(self.unsynced, under_way, self.queue):
            if isinstance(item, Record):
                return item
        return None

    def leave(self) -> "list[Record | Seal]":
        """The zone is out of service: do nothing more; what it will never have. A call under way may hang, and keeps
        the memory that it writes from."""
        left = self.pending()
        self.gone = self.stopped = True
        self.queue.clear()
        self.seals.clear()
        self.unsynced.clear()
        if self.job is not None:
            for item in left:
                if isinstance(item, Record):
                    item.buffer = None  # not to be used again: it goes when the call returns
        return left

    def _owes_sync(self) -> bool:
        writer = self.writer
        sync_position = writer.sync_position
        for item in itertools.chain(self.unsynced, self.queue, self.seals):
            if isinstance(item, Record):
                if item.last_position <= sync_position:
                    return True
            elif item.segment.number <= writer.seal_target:
                return True
        return False

    def take_job(self) -> Job | None:
        """The next job, if there is something to do and none is under way; the lane is busy then."""
        if self.busy or self.stopped or self.writer.halted or self.writer.error is not None:
            return None
        sync = self._owes_sync()
        if not self.queue and not sync:
            return None
        begin: list[tuple[Handle, bool, int, list[memoryview]]] = []
        # Segments with something unsynced: whether records, or a seal alone.
        dirty: dict[Segment, bool] = {}
        for item in self.unsynced:
            dirty[item.segment] = dirty.get(item.segment, False) or isinstance(item, Record)
        was_clean = not any(dirty.values())
        written: list[Record | Seal] = []
        views: list[memoryview] = []
        last: Segment | None = None
        end = size = 0
        queue = self.queue
        while queue and size < JOB_BYTES_MAX:
            item = queue.popleft()
            if isinstance(item, Seal):
                self.seals.append(item)
                continue
            segment = item.segment
            if segment is last and item.start == end:
                views.append(item.view)
            else:
                views = [item.view]
                handle = segment.handles[self.zone]
                begin.append((handle, handle is segment.reader, item.start << BLOCK_SHIFT, views))
            last = segment
            end = item.start + item.blocks
            size += item.blocks << BLOCK_SHIFT
            dirty[segment] = True
            written.append(item)
        to_sync = self._to_sync(dirty) if sync else set()
        rest: list[Step] = [(segment.handles[self.zone].sync,) for segment in dirty if segment in to_sync]
        synced = [item for item in itertools.chain(self.unsynced, written) if item.segment in to_sync]
        rest += self._seal_steps(dirty, to_sync, written, synced)
        if not begin and not rest:
            return None
        write: tuple[Handle, int, memoryview, bool] | None = None
        if was_clean and len(begin) == 1 and len(rest) == 1 and sync and size <= SHARED_BYTES_MAX:
            # Nothing older is unsynced, in this file or another: making just these bytes durable is enough.
            handle, is_reader, offset_bytes, views = begin[0]
            steps: list[Step] = [(handle.write_durable, offset_bytes, views)]
            if len(views) == 1:
                write = handle, offset_bytes, views[0], not is_reader
        else:
            steps = [(h.write if is_read else h.write_around, *where) for h, is_read, *where in begin]
            steps += rest
        self.busy = True
        soon: list[Step] = [(h.write_soon, *where) for h, _, *where in begin]
        self.job = Job(steps, soon, rest if sync and size <= SHARED_BYTES_MAX else [], written, synced, write)
        return self.job

    def _to_sync(self, dirty: dict[Segment, bool]) -> set[Segment]:
        """Of the segments with something unsynced those that a sync is due for. Seals alone can wait until the writer
        wants them: syncs one right after the other cost little more than one."""
        target = self.writer.seal_target
        return {segment for segment, records in dirty.items() if records or segment.number <= target}

    def _seal_steps(
        self,
        dirty: dict[Segment, bool],
        to_sync: set[Segment],
        written: "list[Record | Seal]",
        synced: "list[Record | Seal]",
    ) -> list[Step]:
        """Write the seals whose segments have nothing unsynced by then; sync those that are wanted."""
        writes: list[Step] = []
        syncs: list[Step] = []
        waiting: list[Seal] = []
        target = self.writer.seal_target
        for seal in self.seals:
            segment = seal.segment
            if dirty.get(segment, False) and segment not in to_sync:
                waiting.append(seal)
                continue
            handle = segment.handles[self.zone]
            writes.append((handle.write, seal.offset_bytes, [memoryview(seal.data)]))
            if seal.truncate_bytes:
                writes.append((handle.truncate, seal.truncate_bytes))
            written.append(seal)
            if segment.number <= target:
                syncs.append((handle.sync,))
                synced.append(seal)
        self.seals = waiting
        return writes + syncs

    def finished(self, job: Job, error: BaseException | None) -> None:
        """The job has ended; what gathered meanwhile is started by the caller."""
        self.busy = False
        self.job = None
        self.full = isinstance(error, NoSpace)
        if self.gone:
            return
        if error is not None:
            self.stopped = True
            if isinstance(error, NoSpace):
                # The seals too: the next job may take only a part of the records, and a seal goes behind all of them.
                self.queue.extendleft(reversed([*job.written, *self.seals]))
                self.seals.clear()
                self.writer.env.loop.call_later(FULL_RETRY_SECONDS, self._again)
                self.writer.zone_full(self.zone, error)
            else:
                self.unsynced += job.written
                self.writer.zone_failed(self.zone, error)
            return
        if job.synced:
            done = set(map(id, job.synced))
            self.unsynced = [item for item in itertools.chain(self.unsynced, job.written) if id(item) not in done]
            self.writer.synced(job.synced)
        else:
            self.unsynced += job.written

    def _again(self) -> None:
        """The zone was full: see whether it still is."""
        if not self.gone:
            self.stopped = False
            start_jobs((self,))


def start_jobs(lanes: Iterable[Lane]) -> None:
    """Start whatever these lanes have to do: single durable writes without a thread where that can be, the rest in each
    zone's threads; small synced jobs of zones that share a file system in one thread."""
    taken = [(lane, job) for lane in lanes if (job := lane.take_job()) is not None]
    if not taken:
        return
    executor = taken[0][0].writer.env.executor
    writes = [(lane, job) for lane, job in taken if job.write is not None]
    if writes:
        begun = executor.start_writes(
            [Write(lane.zone, *job.write, functools.partial(_done, (lane, job))) for lane, job in writes if job.write]
        )
        started = {lane for (lane, _), has_begun in zip(writes, begun, strict=True) if has_begun}
        taken = [pair for pair in taken if pair[0] not in started]
    calls: list[Call] = []
    while taken:
        lane, job = first = taken.pop(0)
        abreast = [first]
        if job.rest and lane.device is not None and taken:
            abreast += [pair for pair in taken if pair[1].rest and pair[0].device == lane.device]
        if len(abreast) == 1:
            calls.append(Call(lane.zone, run_steps, (job.steps,), functools.partial(_done, first)))
        else:
            taken = [pair for pair in taken if pair not in abreast]
            jobs = [(job.begin, job.rest) for _, job in abreast]
            done = functools.partial(_done_abreast, abreast)
            calls.append(Call(lane.zone, run_abreast, (jobs,), done, tuple(other.zone for other, _ in abreast[1:])))
    if len(calls) == 1:
        executor.submit(*calls[0])
    elif calls:
        executor.submit_together(calls)


def _done(pair: tuple[Lane, Job], _: object, error: BaseException | None) -> None:
    lane, job = pair
    lane.finished(job, error)
    start_jobs((lane,))
    if not lane.busy:
        lane.writer.lane_idle()


def _done_abreast(
    pairs: list[tuple[Lane, Job]], errors: list[StoreError | None] | None, error: BaseException | None
) -> None:
    for i, (lane, job) in enumerate(pairs):
        lane.finished(job, errors[i] if errors is not None else error)
    start_jobs([lane for lane, _ in pairs])
    for lane, _ in pairs:
        if not lane.busy:
            lane.writer.lane_idle()


def run_steps(steps: Sequence[Step]) -> None:
    """In a zone's thread: the calls of one job, in order; the first error ends it.

    NoSpace leaves only writes: after a sync that failed nobody knows what it left, whatever its error.
    """
    for step in steps:
        try:
            step[0](*step[1:])
        except NoSpace as error:
            if step[0].__name__ not in RETRIED:
                raise ZoneFailed(f"a sync found no space: {error}") from error
            raise


def run_abreast(jobs: Sequence[tuple[list[Step], list[Step]]]) -> list[StoreError | None]:
    """In one thread: jobs of zones that share a file system. All transfers are under way before any is waited for.

    Returns each job's error; it ends that job only.
    """
    errors: list[StoreError | None] = [None] * len(jobs)
    for part in (0, 1):
        for i, job in enumerate(jobs):
            if errors[i] is None:
                try:
                    run_steps(job[part])
                except StoreError as error:
                    errors[i] = error
    return errors

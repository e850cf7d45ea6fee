"""One log's way to one zone: what is handed over, what a sync covers, in which thread it is done.

A sync covers what was written before it was issued, in the files that it was issued for, in that zone alone: the lists
are taken when the job is made. An error ends a job; what it left unknown is never tried again on the same pages.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from objstore.errors import StoreError
from objstore.log.env import Env
from objstore.log.segment import Record, Segment
from objstore.replica.zone import Call, Executor
from objstore.units import BLOCK_SHIFT

JOB_BYTES_MAX: Final = 16 << 20
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
    """What a lane does next. synced: what is durable in the zone when it has succeeded."""

    steps: list[Step]
    written: "list[Record | Seal]"
    synced: "list[Record | Seal]"


class LaneOwner(Protocol):
    """The writer, as its lanes see it."""

    env: Env
    sync_position: int
    seal_target: int
    error: StoreError | None

    def synced(self, items: "Sequence[Record | Seal]") -> None: ...

    def zone_failed(self, zone: int, error: BaseException) -> None: ...

    def lane_idle(self) -> None: ...


class Lane:
    """One log's way to one zone: at most one job under way; what has gathered meanwhile is the next job.

    queue: records and seals not yet handed over. unsynced: handed over and written, not covered by a sync.
    """

    def __init__(self, writer: LaneOwner, zone: int) -> None:
        self.writer = writer
        self.zone = zone
        self.queue: deque[Record | Seal] = deque()
        self.unsynced: list[Record | Seal] = []
        self.busy = False

    def _owes_sync(self) -> bool:
        writer = self.writer
        sync_position = writer.sync_position
        for item in itertools.chain(self.unsynced, self.queue):
            if isinstance(item, Record):
                if item.last_position <= sync_position:
                    return True
            elif item.segment.number <= writer.seal_target:
                return True
        return False

    def take_job(self) -> Job | None:
        """The next job, if there is something to do and none is under way; the lane is busy then."""
        if self.busy or self.writer.error is not None:
            return None
        sync = self._owes_sync()
        if not self.queue and not sync:
            return None
        steps: list[Step] = []
        dirty = {item.segment: None for item in self.unsynced}
        was_clean = not dirty
        written: list[Record | Seal] = []
        synced: list[Record | Seal] = []
        views: list[memoryview] = []
        last: Segment | None = None
        end = size = 0
        queue = self.queue
        while queue and size < JOB_BYTES_MAX:
            item = queue.popleft()
            segment = item.segment
            handle = segment.handles[self.zone]
            if isinstance(item, Record):
                if segment is last and item.start == end:
                    views.append(item.view)
                else:
                    views = [item.view]
                    steps.append((handle.write, item.start << BLOCK_SHIFT, views))
                last = segment
                end = item.start + item.blocks
                size += item.blocks << BLOCK_SHIFT
            else:
                if segment in dirty:
                    steps.append((handle.sync,))
                    synced += [i for i in itertools.chain(self.unsynced, written) if i.segment is segment]
                steps.append((handle.write, item.offset_bytes, [memoryview(item.data)]))
                if item.truncate_bytes:
                    steps.append((handle.truncate, item.truncate_bytes))
                last = None
                size += len(item.data)
            dirty[segment] = None
            written.append(item)
        if sync:
            if was_clean and len(steps) == 1 and last is not None:
                # Nothing older is unsynced, in this file or another: making just these bytes durable is enough.
                steps = [(last.handles[self.zone].write_durable, *steps[0][1:])]
            else:
                steps += [(segment.handles[self.zone].sync,) for segment in dirty]
            synced = self.unsynced + written
        self.busy = True
        return Job(steps, written, synced)

    def finished(self, job: Job, error: BaseException | None) -> None:
        """The job has ended; what gathered meanwhile is started by the caller."""
        self.busy = False
        if error is not None:
            self.unsynced += job.written
            self.writer.zone_failed(self.zone, error)
            return
        if job.synced:
            done = set(map(id, job.synced))
            self.unsynced = [item for item in itertools.chain(self.unsynced, job.written) if id(item) not in done]
            self.writer.synced(job.synced)
        else:
            self.unsynced += job.written


def start_jobs(lanes: Iterable[Lane]) -> None:
    """Start whatever these lanes have to do, each in its zone's threads.

    One thread for all zones on one file system was tried for small synced jobs: 750 us for a write + flush against 440,
    because syncs that wait together share a journal commit and syncs one after the other do not.
    """
    calls = [call for lane in lanes if (call := _call_of(lane)) is not None]
    if len(calls) == 1:
        calls[0][0].submit(*calls[0][1])
    elif calls:
        calls[0][0].submit_together([call for _, call in calls])


def _call_of(lane: Lane) -> tuple[Executor, Call] | None:
    """The lane's next job as a call for its zone."""
    job = lane.take_job()
    if job is None:
        return None

    def done(_: object, error: BaseException | None) -> None:
        lane.finished(job, error)
        start_jobs((lane,))
        if not lane.busy:
            lane.writer.lane_idle()

    return lane.writer.env.executor, Call(lane.zone, run_steps, (job.steps,), done)


def run_steps(steps: Sequence[Step]) -> None:
    """In a zone's thread: the calls of one job, in order; the first error ends it."""
    for step in steps:
        step[0](*step[1:])

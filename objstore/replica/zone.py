"""Zones of an open store and the executors that run their blocking calls outside the event loop."""

import asyncio
import contextlib
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from objstore.backend.base import Backend, Handle, Writer
from objstore.errors import Busy, StoreError
from objstore.replica.ring import ENTRIES, Request, Ring

T = TypeVar("T")
Done = Callable[[Any, BaseException | None], None]
_GONE: Final = object()

ZONE_THREADS: Final = 4
"""Threads per zone: enough that a few syncs, a create and a read overlap; 300 dirty files synced in 14 ms against 30
with one thread and 8 with 16 (DESIGN.md, "Zone threads")."""


class Zone:
    """One zone of an open store: identity, number, backend, what was met there.

    error: why it was put out, or is about to be. read_errors: reads that failed there since the store was opened.
    last_error: the last of all that it was reported for, also when it is back.
    """

    def __init__(self, index: int, zone_id: bytes, backend: Backend, path: str) -> None:
        self.index = index
        self.zone_id = zone_id
        self.backend = backend
        self.path = path
        self.device = backend.device
        self.error: BaseException | None = None
        self.read_errors = 0
        self.last_error = ""

    def __repr__(self) -> str:
        return f"zone {self.path or self.zone_id.hex()}"


class Call(NamedTuple):
    """A blocking call for a zone; `done(result, None)` or `done(None, error)` follows in the event loop.

    others: further zones that it works on, in the one thread: all of them are late if it is, and it is awaited as long
    as one of them is in service.
    """

    zone: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    done: Done
    others: tuple[int, ...] = ()


class Write(NamedTuple):
    """A `Handle.write_durable` of one piece of memory that stays as it is; `done` follows as that of a Call. around:
    see `Handle.begin_durable`."""

    zone: int
    handle: Handle
    offset_bytes: int
    view: memoryview
    around: bool
    done: Done


class Closable(Protocol):
    """What holds a descriptor."""

    def close(self) -> None: ...


class Executor(Protocol):
    """Runs blocking calls for zones; completions come back in the event loop."""

    def submit(
        self, zone: int, function: Callable[..., Any], args: tuple[Any, ...], done: Done, others: tuple[int, ...] = ()
    ) -> None:
        """Run function(*args) for that zone and then, in the loop, done(result, None) or done(None, error)."""
        ...

    def submit_long(self, zone: int, function: Callable[..., Any], args: tuple[Any, ...], done: Done) -> None:
        """As submit, for calls that may take long on a healthy zone (walking all its files): they are made one at a
        time, keep no other call waiting and are left out of `oldest`."""
        ...

    def submit_together(self, calls: Sequence[Call]) -> None:
        """Submit calls of which nobody needs the first result before the last: they may complete together, when the
        last of them has ended or any has failed."""
        ...

    def start_writes(self, writes: Sequence[Write]) -> list[bool]:
        """Begin those of these writes that need no thread; they count as calls of their zones in all respects. For each
        whether it has begun."""
        ...

    def poll(self, now: float) -> None:
        """Deliver what has completed; calls submitted from now on have begun at `now` for `oldest`."""
        ...

    def oldest(self, zone: int) -> float | None:
        """The time given to the `poll` before the oldest call that has not returned was submitted; None: there is
        none."""
        ...

    def outstanding(self, zone: int) -> int:
        """Calls of the zone that have not returned, abandoned ones included."""
        ...

    def abandon(self, zone: int, error: StoreError, orphans: Sequence[Closable] = ()) -> None:
        """Nobody waits for this zone any more: calls under way complete with `error` now, later ones at once. What
        hangs goes on hanging, in threads that can't block the exit; calls that have not begun never run. What late
        results and `orphans` hold open is closed when the last call has returned."""
        ...

    def readmit(self, zone: int) -> None:
        """Undo `abandon`. Busy: a call from before has not returned; it could still write."""
        ...

    def close(self) -> None:
        """Take no more work. Calls that hang are left behind: their threads can't block the exit."""
        ...


async def run(executor: Executor, zone: int, function: Callable[..., T], *args: Any) -> T:
    """Await one blocking call of a zone. Cancelling the caller does not stop the call. ZoneFailed also if the zone is
    put out meanwhile: the call may then still be under way, and its arguments are not to be used again."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    executor.submit(zone, function, args, functools.partial(_settle, future))
    return await future


async def run_long(executor: Executor, zone: int, function: Callable[..., T], *args: Any) -> T:
    """As run, by `Executor.submit_long`."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    executor.submit_long(zone, function, args, functools.partial(_settle, future))
    return await future


def _settle(future: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def give_back(result: "Closable | Writer") -> None:
    """In a zone's thread: close what nobody needs any more."""
    if isinstance(result, Writer):
        result.abort()
    else:
        result.close()


class _Job:
    """One call. since: see `Executor.oldest`. under_way: an item for each call that completes together with this one.
    abandoned: nobody waits for it, and it is not to begin any more."""

    __slots__ = ("abandoned", "args", "done", "function", "lane", "others", "since", "under_way", "zone")

    def __init__(
        self, zone: int, lane: int, function: Callable[..., Any], args: tuple[Any, ...], done: Done, since: float
    ) -> None:
        self.zone = zone
        self.lane = lane
        self.others: tuple[int, ...] = ()
        self.function = function
        self.args = args
        self.done = done
        self.since = since
        self.under_way: list[None] = [None]
        self.abandoned = False


class ThreadExecutor:
    """Daemon threads per zone, and a ring for writes that need none. Several completions share one wake-up of the loop.

    Owned by the loop that made it: all but `_work` is called there only. `_finished` is appended to by the threads;
    deque.append and popleft are atomic, and the loop clears `_woken` before it drains, so no completion is overlooked.

    `_queues`, `_jobs`: by lane, which is the zone for ordinary calls and ~zone for long ones. `_hanging`: by zone, the
    abandoned calls that have not returned. `_out`: the zones abandoned, with the error that later calls get.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, threads: int = ZONE_THREADS) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._threads_max = threads
        self._queues: dict[int, SimpleQueue[_Job | None]] = {}
        self._threads: dict[int, int] = {}
        self._jobs: dict[int, dict[_Job, object]] = {}
        self._hanging: dict[int, int] = {}
        self._orphans: dict[int, list[Closable]] = {}
        self._out: dict[int, StoreError] = {}
        self._finished: deque[tuple[_Job, Any, BaseException | None]] = deque()
        self._now = 0.0
        self._woken = False
        self._closed = False
        self._ring: Ring | None = None
        self._ring_asked = False
        self._writes: dict[int, tuple[_Job, Write]] = {}
        """What the ring has under way, by number."""
        self._numbers = itertools.count()

    def submit(
        self, zone: int, function: Callable[..., Any], args: tuple[Any, ...], done: Done, others: tuple[int, ...] = ()
    ) -> None:
        job = _Job(zone, zone, function, args, done, self._now)
        job.others = others
        self._put(job)

    def submit_long(self, zone: int, function: Callable[..., Any], args: tuple[Any, ...], done: Done) -> None:
        self._put(_Job(zone, ~zone, function, args, done, self._now))

    def submit_together(self, calls: Sequence[Call]) -> None:
        under_way: list[None] = [None] * len(calls)
        for zone, function, args, done, others in calls:
            job = _Job(zone, zone, function, args, done, self._now)
            job.others = others
            job.under_way = under_way
            self._put(job)

    def start_writes(self, writes: Sequence[Write]) -> list[bool]:
        begun = [False] * len(writes)
        requests: list[Request] = []
        places: list[int] = []
        if not self._ring_asked:
            self._ring_asked = True
            self._ring = Ring.open()
            if self._ring is not None:
                self._loop.add_reader(self._ring.eventfd, self._written)
        if self._ring is None or self._closed or len(self._writes) + len(writes) > ENTRIES:
            return begun
        for i, (zone, handle, offset_bytes, view, around, _) in enumerate(writes):
            usable = not view.readonly and zone not in self._out
            fd = handle.begin_durable(offset_bytes, len(view), around=around) if usable else -1
            if fd >= 0:
                requests.append(Request(next(self._numbers), fd, offset_bytes, view))
                places.append(i)
        taken = self._ring.submit(requests) if requests else 0
        for i, request in zip(places[:taken], requests, strict=False):
            write = writes[i]
            args = (write.offset_bytes, [write.view])
            job = _Job(write.zone, write.zone, write.handle.write_durable, args, write.done, self._now)
            self._jobs.setdefault(write.zone, {})[job] = job
            self._writes[request.number] = job, write
            begun[i] = True
        return begun

    def _written(self) -> None:
        """The ring has completed something."""
        assert self._ring is not None
        for number, result in self._ring.completed():
            job, write = self._writes.pop(number)
            error: BaseException | None = None
            try:
                if not write.handle.end_durable(len(write.view), result) and not job.abandoned:
                    self._hand_over(job, len(self._jobs[job.lane]))
                    continue
            except StoreError as caught:
                error = caught
            self._finished.append((job, None, error))
        self._drain()

    def _put(self, job: _Job) -> None:
        if self._closed:
            raise RuntimeError("the executor is closed")
        if self._out and job.zone in self._out:
            job.under_way.pop()
            self._loop.call_soon(job.done, None, self._out[job.zone])
            return
        lane = job.lane
        jobs = self._jobs.get(lane)
        if jobs is None:
            jobs = self._jobs[lane] = {}
        jobs[job] = job
        for other in job.others:
            self._jobs.setdefault(other, {})[job] = job
        self._hand_over(job, len(jobs))

    def _hand_over(self, job: _Job, calls: int) -> None:
        """To the lane's threads, one more of them if there are more calls than threads."""
        lane = job.lane
        queue = self._queues.get(lane)
        if queue is None:
            queue = self._queues[lane] = SimpleQueue()
            self._threads[lane] = 0
        if calls > self._threads[lane] < (self._threads_max if lane >= 0 else 1):
            self._threads[lane] += 1
            name = f"zone{lane}-{self._threads[lane]}" if lane >= 0 else f"zone{~lane}-long"
            threading.Thread(target=self._work, args=(queue,), name=name, daemon=True).start()
        queue.put(job)

    def _work(self, queue: "SimpleQueue[_Job | None]") -> None:
        while (job := queue.get()) is not None:
            result: Any = None
            error: BaseException | None = None
            if not job.abandoned:
                try:
                    result = job.function(*job.args)
                except BaseException as caught:  # noqa: BLE001 - handed to the caller in the loop, whatever it is
                    error = caught
            under_way = job.under_way
            self._finished.append((job, result, error))
            under_way.pop()
            last = not under_way or error is not None
            del job, result, error, under_way
            if last and not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                    self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._woken = False
        finished = self._finished
        while finished:
            job, result, error = finished.popleft()
            awaited = self._jobs[job.lane].pop(job, _GONE) is not _GONE
            if not awaited:
                self._returned(job.zone, result)
            for other in job.others:
                if self._jobs[other].pop(job, _GONE) is _GONE:
                    self._returned(other, None)
                else:
                    awaited = True
            if awaited:
                job.done(result, error)

    def _returned(self, zone: int, result: Any) -> None:
        """A call that nobody waits for has come back after all."""
        self._hanging[zone] -= 1
        if isinstance(result, Handle | Writer):
            self._clear_up(zone, result)
        elif not self._hanging[zone]:
            self._clear_up(zone, *self._orphans.pop(zone, ()))

    def _clear_up(self, zone: int, *left: Closable | Writer) -> None:
        """Close these in a thread of the zone, where it may hang; until then the zone can't come back."""
        for item in left:
            job = _Job(zone, zone, give_back, (item,), _nobody, self._now)
            self._jobs.setdefault(zone, {})
            self._hanging[zone] = self._hanging.get(zone, 0) + 1
            self._hand_over(job, self._hanging[zone])

    def abandon(self, zone: int, error: StoreError, orphans: Sequence[Closable] = ()) -> None:
        self._drain()
        self._out[zone] = error
        left = [*self._jobs.get(zone, ()), *self._jobs.get(~zone, ())]
        hanging = self._hanging[zone] = self._hanging.get(zone, 0) + len(left)
        for job in left:
            del self._jobs[job.lane if job.zone == zone else zone][job]
            job.abandoned = not any(job in self._jobs.get(other, ()) for other in (job.zone, *job.others))
        if hanging:
            self._orphans.setdefault(zone, []).extend(orphans)
        else:
            self._clear_up(zone, *orphans)
        for job in left:
            if job.abandoned:
                job.done(None, error)

    def readmit(self, zone: int) -> None:
        calls = self.outstanding(zone)
        if calls:
            raise Busy(f"calls from before the zone was put out have not returned zone={zone} calls={calls}")
        self._out.pop(zone, None)

    def poll(self, now: float) -> None:
        self._now = now
        self._drain()

    def oldest(self, zone: int) -> float | None:
        job = next(iter(self._jobs.get(zone, ())), None)
        return None if job is None else job.since

    def outstanding(self, zone: int) -> int:
        return len(self._jobs.get(zone, ())) + len(self._jobs.get(~zone, ())) + self._hanging.get(zone, 0)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._ring is not None:
                self._loop.remove_reader(self._ring.eventfd)
                self._ring.close()
            for lane, queue in self._queues.items():
                for _ in range(self._threads[lane]):
                    queue.put(None)


def _nobody(result: object, error: BaseException | None) -> None:
    """Completion of a call that nobody waits for."""

"""Stores in memory whose zones are stepped by hand: an executor that can be held, backends that fail on request.

Everything runs in the event loop, so a test decides what has happened when it looks. Time stands still until a test
moves it.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from objstore.backend.base import Handle, Writer, ZoneFailed
from objstore.backend.memory import MemoryBackend, MemoryHandle, MemoryStorage
from objstore.errors import Busy, StoreError
from objstore.log.env import Env
from objstore.replica.zone import Call, Closable, Write, Zone, give_back
from objstore.units import KIB
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_zones

STORE_ID = bytes(range(16))
SMALL_SEGMENTS = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=0.0)
"""64 data blocks a segment, 80 blocks a file; nothing is synced because of its age, nobody waits for zones."""


class SteppingCall:
    """A call that has not run. abandoned: nobody waits for it any more."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Callable[[Any, BaseException | None], None],
        since: float,
    ) -> None:
        self.function = function
        self.args = args
        self.done = done
        self.since = since
        self.abandoned = False


class HandClock:
    """Time that moves only by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class SteppingExecutor:
    """objstore's Executor, one call per zone and loop turn, in order. A held zone waits for `release` or `step`.

    A zone that hangs is one that is held: `abandon` leaves its calls behind, and they run when it is released.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queues: dict[int, deque[SteppingCall]] = {}
        self._held: set[int] = set()
        self._scheduled: set[int] = set()
        self._out: dict[int, StoreError] = {}
        self._orphans: dict[int, list[Closable]] = {}
        self._now = 0.0
        self._closed = False
        self.dead = False

    def submit(
        self,
        zone: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Callable[[Any, BaseException | None], None],
        others: tuple[int, ...] = (),
    ) -> None:
        if self._closed:
            raise RuntimeError("the executor is closed")
        if zone in self._out:
            self._loop.call_soon(done, None, self._out[zone])
            return
        self._queues.setdefault(zone, deque()).append(SteppingCall(function, args, done, self._now))
        self._schedule(zone)

    submit_long = submit

    def submit_together(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.submit(*call)

    def start_writes(self, writes: Sequence[Write]) -> list[bool]:
        return [False] * len(writes)

    def poll(self, now: float) -> None:
        self._now = now

    def oldest(self, zone: int) -> float | None:
        return next((call.since for call in self._queues.get(zone, ()) if not call.abandoned), None)

    def outstanding(self, zone: int) -> int:
        return len(self._queues.get(zone, ()))

    def abandon(self, zone: int, error: StoreError, orphans: Sequence[Closable] = ()) -> None:
        self._out[zone] = error
        self._orphans.setdefault(zone, []).extend(orphans)
        left = [call for call in self._queues.get(zone, ()) if not call.abandoned]
        for call in left:
            call.abandoned = True
        for call in left:
            call.done(None, error)
        self._close_orphans(zone)

    def _close_orphans(self, zone: int) -> None:
        if not self.outstanding(zone):
            for orphan in self._orphans.pop(zone, ()):
                orphan.close()

    def readmit(self, zone: int) -> None:
        if self.outstanding(zone):
            raise Busy(f"calls have not returned zone={zone}")
        self._out.pop(zone, None)

    def _schedule(self, zone: int) -> None:
        if zone not in self._held and zone not in self._scheduled and self._queues.get(zone):
            self._scheduled.add(zone)
            self._loop.call_soon(self._turn, zone)

    def _turn(self, zone: int) -> None:
        self._scheduled.discard(zone)
        if zone not in self._held and not self.dead and self._queues[zone]:
            self.step(zone)
            self._schedule(zone)

    def hold(self, *zones: int) -> None:
        """Calls of these zones wait from now on."""
        self._held.update(zones)

    def release(self, *zones: int) -> None:
        """Calls of these zones run again."""
        self._held.difference_update(zones)
        for zone in zones:
            self._schedule(zone)

    def waiting(self, zone: int) -> int:
        """Calls of a held zone that have not run."""
        return len(self._queues.get(zone, ()))

    def step(self, zone: int) -> None:
        """Run the oldest call of the zone; whoever waits for it is told at once."""
        call = self._queues[zone].popleft()
        result: Any = None
        error: BaseException | None = None
        try:
            result = call.function(*call.args)
        except Exception as caught:  # noqa: BLE001 - handed to the caller, as a thread does
            error = caught
        if not call.abandoned:
            call.done(result, error)
            return
        if isinstance(result, Handle | Writer):
            give_back(result)
        self._close_orphans(zone)

    def close(self) -> None:
        self._closed = True


class WatchedBackend(MemoryBackend):
    """A zone in memory that notes every call on its handles, and fails where a test says so.

    calls: (call, object name, offset or size) of every create, write, write_durable, sync and truncate, in order.
    fault: asked before each call of those and of get, open, put, delete; may raise.
    unreadable: (object name, offset) of places that its medium can't read.
    closed: the object of each handle that was closed, in order.
    """

    def __init__(self, storage: MemoryStorage | None = None) -> None:
        self.storage = storage or MemoryStorage()
        super().__init__(self.storage)
        self.calls: list[tuple[str, str, int]] = []
        self.fault: Callable[[str, str], None] = lambda call, name: None
        self.unreadable: set[tuple[str, int]] = set()
        self.closed: list[str] = []

    def note(self, call: str, name: str, number: int = 0) -> None:
        self.fault(call, name)
        self.calls.append((call, name, number))

    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        self.note("create", name, size_bytes)
        made = super().create(name, size_bytes, reserve_bytes=reserve_bytes)
        made.close()
        return WatchedHandle(self, name, self.storage.objects[name])

    def open(self, name: str) -> Handle:
        self.fault("open", name)
        return WatchedHandle(self, name, self._find(name))

    def get(self, name: str) -> bytes:
        self.fault("get", name)
        return super().get(name)

    def put(self, name: str, data: bytes) -> None:
        self.fault("put", name)
        super().put(name, data)

    def delete(self, name: str) -> None:
        self.fault("delete", name)
        super().delete(name)


class WatchedHandle(MemoryHandle):
    """A handle of a WatchedBackend. nowait: whether read_nowait finds everything in memory."""

    nowait = True

    def __init__(self, backend: WatchedBackend, name: str, data: bytearray) -> None:
        super().__init__(name, data)
        self._backend = backend

    def write(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self._backend.note("write", self.name, offset_bytes)
        super().write(offset_bytes, buffers)

    def write_durable(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self._backend.note("write_durable", self.name, offset_bytes)
        MemoryHandle.write(self, offset_bytes, buffers)

    def sync(self) -> None:
        self._backend.note("sync", self.name)

    def truncate(self, size_bytes: int) -> None:
        self._backend.note("truncate", self.name, size_bytes)
        super().truncate(size_bytes)

    def close(self) -> None:
        self._backend.closed.append(self.name)
        super().close()

    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        self._backend.fault("read", self.name)
        end = offset_bytes + sum(buffer.nbytes for buffer in buffers)
        if any(name == self.name and offset_bytes <= at < end for name, at in self._backend.unreadable):
            raise ZoneFailed(f"input/output error call=read name={self.name} offset={offset_bytes}")
        return super().read(offset_bytes, buffers)

    def read_nowait(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return MemoryHandle.read(self, offset_bytes, buffers) if self.nowait else -1


def failing(call: str, part: str = "", *, times: int = 1) -> Callable[[str, str], None]:
    """A `fault`: the next `times` calls of that kind on objects with `part` in their names fail as a disk does."""
    left = times

    def fault(called: str, name: str) -> None:
        nonlocal left
        if left and called == call and part in name:
            left -= 1
            raise ZoneFailed(f"input/output error call={call} name={name}")

    return fault


def make_env(zones: int = 2, *, settings: StoreSettings = SMALL_SEGMENTS, seed: int = 1) -> Env:
    """What the logs of a store share, over zones in memory that are stepped by hand."""
    return Env(
        store_id=STORE_ID,
        zones=[Zone(i, bytes([i + 1]) * 16, WatchedBackend(), f"zone{i}") for i in range(zones)],
        executor=SteppingExecutor(),
        clock=HandClock(),
        settings=settings,
        rng=random.Random(seed),
    )


def backend_of(env: Env, zone: int) -> WatchedBackend:
    """The backend of a zone made by `make_env`."""
    backend = env.zones[zone].backend
    assert isinstance(backend, WatchedBackend)
    return backend


def executor_of(env: Env) -> SteppingExecutor:
    """The executor of an Env made here."""
    assert isinstance(env.executor, SteppingExecutor)
    return env.executor


async def turns(count: int = 50) -> None:
    """Let everything that is ready run, and what that makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)


class World:
    """The zones of one store and the processes that open it, one after the other."""

    def __init__(self, zones: int = 2, *, settings: StoreSettings = SMALL_SEGMENTS, capacity_bytes: int = 1 << 30):
        self.storages = [MemoryStorage(capacity_bytes) for _ in range(zones)]
        self.settings = settings
        self.clock = HandClock()
        self.rng = random.Random(5)
        self.backends: list[WatchedBackend] = []
        self.store: Store | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(
        self,
        *,
        create: bool = False,
        fault: Callable[[str, str], None] | None = None,
        here: Sequence[int] | None = None,
        force: bool = False,
        read_only: bool = False,
        faults: Mapping[int, Callable[[str, str], None]] | None = None,
    ) -> Store:
        """A new process opens the store. fault, faults: of every zone, of single ones, from the first call on. here:
        the zones that are there, default all."""
        assert self.store is None
        self._tasks = asyncio.all_tasks()
        here = range(len(self.storages)) if here is None else here
        self.backends = [WatchedBackend(storage) for storage in self.storages]
        for i, backend in enumerate(self.backends):
            backend.fault = (faults or {}).get(i) or fault or backend.fault
        executor = SteppingExecutor()
        try:
            self.store = await open_zones(
                [(self.backends[i], f"zone{i}") for i in here],
                reopen=self.reopen,
                settings=self.settings,
                create=create,
                clock=self.clock,
                executor=executor,
                rng=self.rng,
                missing={f"zone{i}": "there is no such directory" for i in range(len(self.storages)) if i not in here},
                force=force,
                read_only=read_only,
            )
        except BaseException:
            for backend in self.backends:
                backend.close()
            raise
        return self.store

    def reopen(self, path: str) -> WatchedBackend:
        """The zone of that path, opened anew; one more if it is the next number."""
        number = int(path.removeprefix("zone"))
        if number == len(self.storages):
            self.storages.append(MemoryStorage(self.storages[0].capacity_bytes))
            self.backends.append(WatchedBackend(self.storages[number]))
        self.backends[number] = WatchedBackend(self.storages[number])
        return self.backends[number]

    async def stop(self) -> None:
        """The process ends in good order."""
        store, self.store = self.store, None
        assert store is not None
        await store.shutdown()

    async def kill(self) -> None:
        """The process dies at once; the zones keep what their calls have done so far."""
        store, self.store = self.store, None
        if store is None:
            return
        executor_of(store.env).dead = True
        for vdi in store._open.values():
            vdi.keeper._closed = True  # its timers would begin another checkpoint
        own = asyncio.current_task()
        while left := [task for task in asyncio.all_tasks() - self._tasks if task is not own]:
            for task in left:  # what a task does at its end may begin another
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        for backend in self.backends:
            backend.close()

    def names(self, zone: int, prefix: str = "") -> list[str]:
        """Objects of a zone."""
        return sorted(name for name in self.storages[zone].objects if name.startswith(prefix))

    def damage(self, name: str, offset_bytes: int, *, zones: Sequence[int] | None = None) -> None:
        """Turn one bit of an object over, in some zones or all; negative offsets count from the end."""
        for zone in range(len(self.storages)) if zones is None else zones:
            self.storages[zone].objects[name][offset_bytes] ^= 0x10

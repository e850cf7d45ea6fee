"""The library for programs without an event loop: the same names, each call returns when it is done.

A connection has an event loop of its own that runs inside each call, and nowhere else: no thread is started. So nothing
happens between calls either; what was acknowledged from memory becomes durable in a later call (`flush`, `close`), not
by its age. With `background=True` the loop runs in a thread of its own instead, and any thread may call.
"""

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from objstore.access import connect as _connect
from objstore.access.buffers import Buffer
from objstore.access.connection import Connection
from objstore.access.export import Pieces
from objstore.access.file import VdiFile
from objstore.access.handle import VdiHandle
from objstore.access.transfer import Hole, Stream
from objstore.volume.base import Change, Extent
from objstore.volume.settings import MODES, StoreSettings
from objstore.volume.status import (
    JobStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotSpace,
    SnapshotStatus,
    SnapshotTaken,
    StoreStatus,
    TrashStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)

T = TypeVar("T")


class _Runner:
    """Where coroutines run: inside the call, or in a thread's loop."""

    def __init__(self, *, background: bool) -> None:
        self._inside: asyncio.Runner | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        if background:
            self._loop = uvloop.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="objstore", daemon=True)
            self._thread.start()
        else:
            self._inside = asyncio.Runner(loop_factory=uvloop.new_event_loop)
            self._loop = self._inside.get_loop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it. Ctrl-C cancels it."""
        if self._inside is not None:
            # Not Runner.run: it changes signal handlers each time, which prints the result of the call into a message
            # that nobody sees (25 ms for 1 MiB).
            task = self._loop.create_task(work)
            try:
                return self._loop.run_until_complete(task)
            except KeyboardInterrupt:
                if not task.done():
                    task.cancel()
                    self._loop.run_until_complete(asyncio.wait([task]))
                raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def each(self, items: AsyncIterator[T]) -> Iterator[T]:
        """One after the other, each asked for when it is wanted."""
        nothing = object()

        async def following() -> T | object:
            return await anext(items, nothing)

        while (item := self.run(following())) is not nothing:
            yield item  # type: ignore[misc]  # what is not `nothing` is a T

    def close(self) -> None:
        if self._inside is not None:
            self._inside.close()
        elif self._thread is not None and self._thread.is_alive():
            self.run(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class BlockingVdi:
    """A VdiHandle whose methods block. See there."""

    def __init__(self, runner: _Runner, vdi: VdiHandle) -> None:
        self._runner = runner
        self._vdi = vdi
        self.name = vdi.name
        self.size_bytes = vdi.size_bytes
        self.description = vdi.description
        self.read_only = vdi.read_only
        self.piece_bytes_max = vdi.piece_bytes_max

    def __enter__(self) -> "BlockingVdi":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._vdi)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._vdi.closed

    def file(self) -> VdiFile:
        """The VDI as a raw file object (io.RawIOBase); io.BufferedRandom over it makes small accesses cheap."""
        return VdiFile(self)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """See VdiHandle."""
        return self._runner.run(self._vdi.read(offset_bytes, length_bytes))

    def readinto(self, offset_bytes: int, buffer: Buffer) -> int:
        """See VdiHandle."""
        return self._runner.run(self._vdi.readinto(offset_bytes, buffer))

    def readv(self, extents: Sequence[tuple[int, int]], buffers: Sequence[Buffer]) -> int:
        """See VdiHandle."""
        return self._runner.run(self._vdi.readv(extents, buffers))

    def map(self, offset_bytes: int = 0, length_bytes: int = 0) -> Iterator[Extent]:
        """See VdiHandle."""
        return self._runner.each(self._vdi.map(offset_bytes, length_bytes))

    def changes(self, since: "BlockingVdi", offset_bytes: int = 0, length_bytes: int = 0) -> Iterator[Change]:
        """See VdiHandle."""
        return self._runner.each(self._vdi.changes(since._vdi, offset_bytes, length_bytes))

    def write(self, offset_bytes: int, data: Buffer, *, writeback: bool | None = None) -> int:
        """See VdiHandle."""
        return self._runner.run(self._vdi.write(offset_bytes, data, writeback=writeback))

    def writev(
        self, extents: Sequence[tuple[int, int]], buffers: Sequence[Buffer], *, writeback: bool | None = None
    ) -> int:
        """See VdiHandle."""
        return self._runner.run(self._vdi.writev(extents, buffers, writeback=writeback))

    def zero(self, offset_bytes: int, length_bytes: int, *, no_hole: bool = False) -> None:
        """See VdiHandle."""
        self._runner.run(self._vdi.zero(offset_bytes, length_bytes, no_hole=no_hole))

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """See VdiHandle."""
        self._runner.run(self._vdi.discard(offset_bytes, length_bytes))

    def download(self, offset_bytes: int = 0, length_bytes: int = 0) -> Iterator[bytes | Hole]:
        """See VdiHandle."""
        return self._runner.each(self._vdi.download(offset_bytes, length_bytes))

    def upload(self, stream: Stream, offset_bytes: int = 0, length_bytes: int = 0, *, zero_rest: bool = False) -> int:
        """See VdiHandle. While an item of the stream is waited for nothing else happens."""
        return self._runner.run(self._vdi.upload(stream, offset_bytes, length_bytes, zero_rest=zero_rest))

    def flush(self) -> None:
        """See VdiHandle."""
        self._runner.run(self._vdi.flush())

    def close(self) -> None:
        """See VdiHandle."""
        if not self._vdi.closed:
            self._runner.run(self._vdi.close())


class BlockingConnection:
    """A Connection whose methods block. See there. Made by `connect`."""

    def __init__(self, runner: _Runner, connection: Connection) -> None:
        self._runner = runner
        self._connection = connection
        self._closed = False
        self.in_process = connection.in_process

    def __enter__(self) -> "BlockingConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, name: str, *, read_only: bool = False) -> BlockingVdi:
        """See Connection; close what it gives, or use it as a context manager."""

        async def opened() -> VdiHandle:
            return await self._connection.open(name, read_only=read_only)

        return BlockingVdi(self._runner, self._runner.run(opened()))

    def create(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.create(name, size_bytes, copies=copies, mode=mode, prealloc=prealloc))

    def vdis(self) -> Iterator[VdiStatus]:
        """See Connection."""
        return self._runner.each(self._connection.vdis())

    def info(self, name: str) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.info(name))

    def delete(self, name: str) -> None:
        """See Connection."""
        self._runner.run(self._connection.delete(name))

    def trash(self) -> Iterator[TrashStatus]:
        """See Connection."""
        return self._runner.each(self._connection.trash())

    def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.undelete(name, new, vdi_id=vdi_id))

    def purge(self, name: str, *, vdi_id: int | None = None) -> None:
        """See Connection."""
        self._runner.run(self._connection.purge(name, vdi_id=vdi_id))

    def set_copies(self, name: str, copies: int) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.set_copies(name, copies))

    def set_limits(self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.set_limits(name, limits, weight=weight))

    def damage(self, name: str) -> VdiDamage:
        """See Connection."""
        return self._runner.run(self._connection.damage(name))

    def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.clone(source, name, copies=copies, mode=mode))

    def rename(self, name: str, new: str) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.rename(name, new))

    def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.resize(name, size_bytes, force=force, reconnect=reconnect))

    def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        """See Connection."""
        return self._runner.run(self._connection.rollback(name, force=force))

    def resume(self, name: str) -> VdiStatus:
        """See Connection."""
        return self._runner.run(self._connection.resume(name))

    def snapshots(self, name: str | None = None) -> Iterator[SnapshotStatus]:
        """See Connection."""
        return self._runner.each(self._connection.snapshots(name))

    def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        """See Connection."""
        return self._runner.run(
            self._connection.create_snapshot(name, tag, skip_unchanged=skip_unchanged, protected=protected)
        )

    def create_group_snapshot(self, names: Sequence[str], tag: str, *, protected: bool = False) -> list[SnapshotStatus]:
        """See Connection."""
        return self._runner.run(self._connection.create_group_snapshot(names, tag, protected=protected))

    def snapshot_space(self, name: str) -> SnapshotSpace:
        """See Connection."""
        return self._runner.run(self._connection.snapshot_space(name))

    def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        """See Connection."""
        return self._runner.run(self._connection.protect_snapshot(name, protected=protected))

    def delete_snapshot(self, name: str) -> None:
        """See Connection."""
        self._runner.run(self._connection.delete_snapshot(name))

    def export_diff(self, since: str, snapshot: str) -> Iterator[bytes]:
        """See Connection."""
        return self._runner.each(self._connection.export_diff(since, snapshot))

    def import_diff(
        self, stream: Pieces, name: str | None = None, *, tag: str | None = None, protected: bool = False
    ) -> SnapshotStatus:
        """See Connection."""
        if isinstance(stream, AsyncIterable):
            return self._runner.run(self._connection.import_diff(stream, name, tag=tag, protected=protected))
        feed: asyncio.Queue[Buffer | None] = asyncio.Queue(1)
        work = self._connection.import_diff(_fed(feed), name, tag=tag, protected=protected)
        task = self._runner.run(_begun(work))
        try:
            # Between two calls, so that the stream may come from another connection's calls.
            for piece in stream:
                if not self._runner.run(_offered(feed, piece, task)):
                    break
            else:
                self._runner.run(_offered(feed, None, task))
            return self._runner.run(_ended(task))
        except BaseException:
            task.cancel()
            self._runner.run(_settled(task))
            raise

    def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        """See Connection. In this process, without `background`, the job goes on while calls are under way alone."""
        return self._runner.run(self._connection.allocate(name, offset_bytes, length_bytes))

    def flatten(self, name: str) -> JobStatus:
        """See Connection, and `allocate`."""
        return self._runner.run(self._connection.flatten(name))

    def jobs(self) -> Iterator[JobStatus]:
        """See Connection."""
        return self._runner.each(self._connection.jobs())

    def job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return self._runner.run(self._connection.job(job_id))

    def wait_for_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return self._runner.run(self._connection.wait_for_job(job_id))

    def abort_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return self._runner.run(self._connection.abort_job(job_id))

    def attributes(self, name: str) -> Iterator[str]:
        """See Connection."""
        return self._runner.each(self._connection.attributes(name))

    def get_attribute(self, name: str, key: str) -> bytes:
        """See Connection."""
        return self._runner.run(self._connection.get_attribute(name, key))

    def set_attribute(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        """See Connection."""
        self._runner.run(self._connection.set_attribute(name, key, value, exclusive=exclusive))

    def delete_attribute(self, name: str, key: str) -> None:
        """See Connection."""
        self._runner.run(self._connection.delete_attribute(name, key))

    def status(self) -> StoreStatus:
        """See Connection."""
        return self._runner.run(self._connection.status())

    def zones(self) -> list[ZoneStatus]:
        """See Connection."""
        return self._runner.run(self._connection.zones())

    def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        """See Connection."""
        return self._runner.run(self._connection.change_zones(action, zone, path=path, weight=weight, force=force))

    def start_scrub(self) -> ScrubStatus:
        """See Connection."""
        return self._runner.run(self._connection.start_scrub())

    def scrub(self) -> ScrubStatus:
        """See Connection."""
        return self._runner.run(self._connection.scrub())

    def recovery(self) -> RecoveryStatus:
        """See Connection."""
        return self._runner.run(self._connection.recovery())

    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """See Connection."""
        return self._runner.run(self._connection.set_recovery_rate(bytes_per_second))

    def wait(self, seconds: float) -> None:
        """Let the store's own work (scrub, recovery) go on for so long, which otherwise happens inside calls alone."""
        self._runner.run(asyncio.sleep(seconds))

    def close(self) -> None:
        """See Connection."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._connection.close())
        finally:
            self._runner.close()


async def _fed(feed: asyncio.Queue[Buffer | None]) -> AsyncIterator[Buffer]:
    while (piece := await feed.get()) is not None:
        yield piece


async def _begun(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.create_task(work)


async def _offered(feed: asyncio.Queue[Buffer | None], piece: Buffer | None, task: asyncio.Task[Any]) -> bool:
    """Whether the task still takes something."""
    putting = asyncio.create_task(feed.put(piece))
    await asyncio.wait([putting, task], return_when=asyncio.FIRST_COMPLETED)
    putting.cancel()
    return not task.done()


async def _ended(task: asyncio.Task[T]) -> T:
    return await task


async def _settled(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])


def connect(
    zones: Sequence[Path | str] = (),
    *,
    socket: Path | str | None = None,
    settings: StoreSettings | None = None,
    create: bool = False,
    force: bool = False,
    read_only: bool = False,
    background: bool = False,
) -> BlockingConnection:
    """As objstore.connect, blocking. background: run the connection's event loop in a thread of its own."""
    runner = _Runner(background=background)

    async def begin() -> Connection:
        return await _connect.connect(
            zones, socket=socket, settings=settings, create=create, force=force, read_only=read_only
        )

    try:
        return BlockingConnection(runner, runner.run(begin()))
    except BaseException:
        runner.close()
        raise

"""The data side of the control API: sessions, their handles, and the bytes that go through them.

A session is a WebSocket that its client keeps open and never writes to; its handles are closed when it ends, however
that comes about. Bodies are at most DATA_BYTES_MAX long, and BODIES_MAX of them are in memory at a time.
"""

import asyncio
import secrets
import select
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import msgspec
from aiohttp import WSCloseCode, web

from nbdserver.operations import BINARY, operation
from objstore.access.api import (
    BODY_BYTES_MAX,
    DATA_BYTES_MAX,
    AttributeReply,
    BeginImport,
    ChangeReply,
    ExtentReply,
    FinishImport,
    Handle,
    OpenHandle,
    Range,
    Session,
    ZeroRange,
)
from objstore.access.local_vdi import LocalVdi
from objstore.errors import Fenced, InvalidRequest
from objstore.volume.base import Volume, VolumeSource
from objstore.volume.imports import Import
from objstore.volume.status import JobStatus, SnapshotStatus

BODIES_MAX: Final = 32
"""Others wait before their bodies are read."""
STALL_SECONDS: Final = 30.0
"""A client that moves no byte of a body for so long loses its connection: others wait for its place."""
FAREWELL_SECONDS: Final = 5.0
"""A session that the server ends waits so long for its client's consent."""
EXTENTS_MAX: Final = 1 << 12


class AttributesOfVdis(Protocol):
    """objstore.volume.attributes.Attributes."""

    def names(self, name: str) -> dict[str, int]: ...
    def get(self, name: str, key: str) -> bytes: ...
    async def set(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None: ...
    async def delete(self, name: str, key: str) -> None: ...


class AttributeOperations:
    """The attributes of VDIs."""

    def __init__(self, attributes: AttributesOfVdis) -> None:
        self._attributes = attributes

    @operation("GET", "/v1/vdis/{name}/attributes")
    async def list_attributes(self, name: str) -> list[AttributeReply]:
        """The attributes of a VDI, by name, with the lengths of their values."""
        found = self._attributes.names(name)
        return [AttributeReply(name=key, length_bytes=length) for key, length in found.items()]

    @operation("GET", "/v1/vdis/{name}/attributes/{key}")
    async def get_attribute(self, name: str, key: str) -> bytes:
        """The value of an attribute."""
        return self._attributes.get(name, key)

    @operation("PUT", "/v1/vdis/{name}/attributes/{key}", binary_body=True)
    async def set_attribute(self, request: web.Request, name: str, key: str, exclusive: bool = False) -> None:
        """Set an attribute to the body, at most 64 KiB. exclusive: only if there is none of that name."""
        async with _bounded(request):
            value = await _received(request, BODY_BYTES_MAX)
        await self._attributes.set(name, key, bytes(value), exclusive=exclusive)

    @operation("DELETE", "/v1/vdis/{name}/attributes/{key}")
    async def delete_attribute(self, name: str, key: str) -> None:
        """Remove an attribute."""
        await self._attributes.delete(name, key)


class JobsOfStore(Protocol):
    """objstore.volume.jobs.Jobs."""

    def list(self) -> list[JobStatus]: ...
    def get(self, job_id: int) -> JobStatus: ...
    async def abort(self, job_id: int) -> JobStatus: ...


class JobOperations:
    """Jobs on VDIs."""

    def __init__(self, jobs: JobsOfStore) -> None:
        self._jobs = jobs

    @operation("GET", "/v1/jobs")
    async def list_jobs(self) -> list[JobStatus]:
        """Jobs that run, and those of the last day."""
        return self._jobs.list()

    @operation("GET", "/v1/jobs/{job_id}")
    async def get_job(self, job_id: int) -> JobStatus:
        """One job."""
        return self._jobs.get(job_id)

    @operation("POST", "/v1/jobs/{job_id}/abort")
    async def abort_job(self, job_id: int) -> JobStatus:
        """Make a job end, and wait for that."""
        return await self._jobs.abort(job_id)


class ImportSource(VolumeSource, Protocol):
    """A source that volumes can be imported into (objstore.volume.imports)."""

    async def begin_import(self, name: str, what: Import) -> Volume: ...
    async def finish_import(self, volume: Volume, tag: str = "", *, protected: bool = False) -> SnapshotStatus: ...


class Sessions:
    """Every session, its handles by name. Touched by the event loop only."""

    def __init__(self, source: ImportSource) -> None:
        self._source = source
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._handles: dict[str, dict[str, LocalVdi]] = {}
        """Session -> handle -> VDI."""
        self._bodies = asyncio.Semaphore(BODIES_MAX)

    async def close(self) -> None:
        """End every session."""
        closing = [socket.close(code=WSCloseCode.GOING_AWAY) for socket in self._sockets.values()]
        await asyncio.gather(*closing, return_exceptions=True)  # all at once: a client that is stopped never answers

    @operation("GET", "/v1/session", status=101, answer=Session)
    async def open_session(self, request: web.Request) -> web.StreamResponse:
        """Begin a session, by WebSocket; its first message names it, and its handles are closed when it ends."""
        socket = web.WebSocketResponse(timeout=FAREWELL_SECONDS)
        await socket.prepare(request)
        name = secrets.token_hex(16)
        self._sockets[name] = socket
        handles = self._handles[name] = {}
        try:
            await socket.send_str(msgspec.json.encode(Session(session=name)).decode())
            async for _ in socket:
                pass
        finally:
            del self._sockets[name], self._handles[name]
            for handle in list(handles.values()):
                await handle.close()
        return socket

    @operation("POST", "/v1/vdis/{name}/handles", status=201)
    async def open_handle(self, name: str, body: OpenHandle) -> Handle:
        """Open a VDI for a session."""
        return await self._opened(body.session, body.read_only, self._source.open(name))

    async def _opened(self, session: str, read_only: bool, opening: Coroutine[Any, Any, Volume]) -> Handle:
        if session not in self._handles:
            opening.close()
            raise Fenced("the session has ended")
        vdi = LocalVdi(await opening, self._give_back, read_only=read_only)
        handles = self._handles.get(session)
        if handles is None:  # it ended meanwhile
            await vdi.close()
            raise Fenced("the session has ended")
        handle = secrets.token_hex(16)
        handles[handle] = vdi
        return Handle(handle=handle, size_bytes=vdi.size_bytes, read_only=vdi.read_only, description=vdi.description)

    @operation("POST", "/v1/vdis/{name}/imports", status=201)
    async def begin_import(self, name: str, body: BeginImport) -> Handle:
        """Begin to import into a VDI, or begin again: a handle to write what the stream has from its beginning on."""
        what = Import(body.base, body.identity, body.size_bytes, body.copies, body.mode)
        return await self._opened(body.session, False, self._source.begin_import(name, what))

    @operation("POST", "/v1/handles/{handle}/snapshot", status=201)
    async def finish_import(self, handle: str, body: FinishImport) -> SnapshotStatus:
        """All that is imported was written through this handle: take the snapshot with which the VDI is whole."""
        return await self._source.finish_import(self._vdi(handle).volume, body.tag, protected=body.protected)

    async def give_up(self, volume: Volume, reason: str, *, orderly: bool) -> None:
        """See Holder. The handles stay known, so that whoever uses one hears why it is dead."""
        for vdi in [vdi for handles in self._handles.values() for vdi in handles.values() if vdi.volume is volume]:
            await vdi.fence(reason)

    async def _give_back(self, vdi: LocalVdi) -> None:
        if vdi.volume.limiter is not None:
            vdi.volume.limiter.dismiss(vdi, go=False)
        await self._source.close(vdi.volume)

    @operation("DELETE", "/v1/handles/{handle}")
    async def close_handle(self, handle: str) -> None:
        """Close a handle."""
        vdi = self._vdi(handle)
        for handles in self._handles.values():
            handles.pop(handle, None)
        await vdi.close()

    def _vdi(self, handle: str) -> LocalVdi:
        for handles in self._handles.values():
            if handle in handles:
                return handles[handle]
        raise Fenced("the server does not know this handle: it was closed, or its session has ended")

    @operation("GET", "/v1/handles/{handle}/data", answer=bytes)
    async def read_data(
        self, request: web.Request, handle: str, offset_bytes: int, length_bytes: int
    ) -> web.StreamResponse:
        """Read so many bytes, at most 1 MiB."""
        vdi = self._vdi(handle)
        if length_bytes > DATA_BYTES_MAX:
            raise InvalidRequest(f"length_bytes = {length_bytes}: at most {DATA_BYTES_MAX} are possible")
        await _may_go(vdi, write=False, length_bytes=length_bytes)
        async with self._bodies:
            data = await vdi.read(offset_bytes, length_bytes)
            response = web.StreamResponse(headers={"Content-Type": BINARY, "Content-Length": str(length_bytes)})
            async with _bounded(request):
                await response.prepare(request)
                await response.write(data)
                await response.write_eof()
        return response

    @operation("PUT", "/v1/handles/{handle}/data", binary_body=True)
    async def write_data(
        self, request: web.Request, handle: str, offset_bytes: int, writeback: bool | None = None
    ) -> None:
        """Write the body, at most 1 MiB. writeback: false = durable when this is answered, true = acknowledged from
        memory where the VDI's mode allows it, left out = as the mode says."""
        vdi = self._vdi(handle)
        await _may_go(vdi, write=True, length_bytes=request.content_length or 0)
        async with self._bodies:
            async with _bounded(request):
                data = await _received(request, DATA_BYTES_MAX)
            vdi.check_change(offset_bytes, len(data))
            await vdi.put(offset_bytes, memoryview(data), writeback, _alive(request, vdi))

    @operation("POST", "/v1/handles/{handle}/zero")
    async def zero_range(self, request: web.Request, handle: str, body: ZeroRange) -> None:
        """Make a range read as zeros."""
        vdi = self._vdi(handle)
        vdi.check_change(body.offset_bytes, body.length_bytes)
        await _may_go(vdi, write=True, length_bytes=0)
        await vdi.volume.zero(body.offset_bytes, body.length_bytes, no_hole=body.no_hole, alive=_alive(request, vdi))

    @operation("POST", "/v1/handles/{handle}/discard")
    async def discard_range(self, request: web.Request, handle: str, body: Range) -> None:
        """Give back the whole blocks of a range."""
        vdi = self._vdi(handle)
        vdi.check_change(body.offset_bytes, body.length_bytes)
        await _may_go(vdi, write=True, length_bytes=0)
        await vdi.volume.trim(body.offset_bytes, body.length_bytes, alive=_alive(request, vdi))

    @operation("POST", "/v1/handles/{handle}/flush")
    async def flush_handle(self, handle: str) -> None:
        """Answered when everything that was complete before is durable."""
        await self._vdi(handle).flush()

    @operation("GET", "/v1/handles/{handle}/extents")
    async def list_extents(self, handle: str, offset_bytes: int, length_bytes: int) -> list[ExtentReply]:
        """The state of a range from its start; may cover less than was asked for, at least one byte."""
        vdi = self._vdi(handle)
        vdi.check_range(offset_bytes, length_bytes)
        found = await vdi.volume.extents(offset_bytes, length_bytes, extents_max=EXTENTS_MAX)
        return [ExtentReply(length_bytes=one.length_bytes, hole=one.hole, zero=one.zero) for one in found]

    @operation("GET", "/v1/handles/{handle}/changes")
    async def list_changes(self, handle: str, since: str, offset_bytes: int, length_bytes: int) -> list[ChangeReply]:
        """What differs between another handle and this one, from the start of a range; may cover less than was asked
        for, at least one byte."""
        vdi, older = self._vdi(handle), self._vdi(since)
        vdi.check_range(offset_bytes, length_bytes)
        older.check_range(0, 0)
        found = await vdi.volume.changed(older.volume, offset_bytes, length_bytes, extents_max=EXTENTS_MAX)
        return [
            ChangeReply(length_bytes=one.length_bytes, changed=one.changed, hole=one.hole, zero=one.zero)
            for one in found
        ]


async def _may_go(vdi: LocalVdi, *, write: bool, length_bytes: int) -> None:
    """Wait until the limits of the VDI let this request go. Fenced: its handle was closed meanwhile."""
    limiter = vdi.volume.limiter
    if limiter is None or limiter.take(write=write, length_bytes=length_bytes):
        return
    if not await limiter.wait(vdi, write=write, length_bytes=length_bytes):
        raise Fenced("the handle was closed")


async def _received(request: web.Request, bytes_max: int) -> bytearray:
    """The body. InvalidRequest: it is too long, or doesn't say how long it is."""
    length = request.content_length
    if length is None or length > bytes_max:
        raise InvalidRequest(f"a body of {length} bytes: its length is needed, and at most {bytes_max} are possible")
    data = bytearray()
    async for part in request.content.iter_any():
        data += part
    return data


@asynccontextmanager
async def _bounded(request: web.Request) -> AsyncIterator[None]:
    """Cut the connection of a client that keeps a place and moves nothing."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            yield
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise InvalidRequest("the body did not get through in time") from None


def _alive(request: web.Request, vdi: LocalVdi) -> Callable[[], bool]:
    """Whether the client still waits for the answer: one that gave up may have asked for something else since, which
    this must not overtake (DESIGN.md, rule 22). The loop may not have seen yet that it hung up: the socket knows."""
    transport = request.transport
    poll = select.poll()
    if transport is not None:
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)

    def alive() -> bool:
        return transport is not None and not transport.is_closing() and not vdi.closed and not poll.poll(0)

    return alive

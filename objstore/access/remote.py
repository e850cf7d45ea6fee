"""The library over the control socket of a running server: the same connection and handles, data included."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from objstore.access.api import (
    DATA_BYTES_MAX,
    AttributeReply,
    BeginImport,
    ChangeReply,
    Clone,
    Copies,
    CreateVdi,
    ErrorReply,
    ExtentReply,
    FinishImport,
    Handle,
    NewName,
    NewSize,
    OpenHandle,
    Protection,
    Range,
    RecoveryRate,
    Session,
    SetLimits,
    Status,
    TakeGroupSnapshot,
    TakeSnapshot,
    Undelete,
    ZeroRange,
    ZoneChange,
    error_from_reply,
)
from objstore.access.connection import Connection
from objstore.access.handle import VdiHandle
from objstore.errors import InvalidRequest, Stopping, StoreError, Unavailable
from objstore.format.stream import Begin
from objstore.names import check_attribute
from objstore.volume.base import Change, Extent
from objstore.volume.settings import MODES
from objstore.volume.status import (
    JobStatus,
    LimitStatus,
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

CONNECTIONS_MAX: Final = 17
"""To one server: so many requests less one are under way at a time, others wait. One is the session's."""

JOB_LOOK_SECONDS: Final = 0.01
JOB_LOOK_SECONDS_MAX: Final = 0.5
"""How often a server is asked for a job that is waited for: rarer and rarer."""

T = TypeVar("T")


class ControlHttp:
    """HTTP to a control socket. Errors are the StoreError that the server raised, or Unavailable if it went away."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._http = aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector(path, limit=CONNECTIONS_MAX),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def begin_session(self) -> str:
        """Its name. It ends with `close`, or with this process."""
        try:
            self._socket = await self._http.ws_connect("/v1/session")
            return msgspec.json.decode(await self._socket.receive_str(), type=Session).session
        except (aiohttp.ClientError, OSError, TypeError, msgspec.DecodeError) as error:
            raise Unavailable(f"control socket {self.path}: {_reason(error)}") from error

    async def ask(
        self, method: str, path: str, answer: type[T], body: Any = None, query: Mapping[str, int | str] | None = None
    ) -> T:
        """Send a record (or none) and decode the answer."""
        data = None if body is None else msgspec.json.encode(body)
        reply = await self._request(method, path, data, query or {}, None)
        try:
            return msgspec.json.decode(reply, type=answer)
        except msgspec.DecodeError as error:
            raise StoreError(
                f"control socket {self.path}: answer to {method} {path} not understood: {error}"
            ) from error

    async def tell(
        self, method: str, path: str, body: Any = None, query: Mapping[str, int | str] | None = None
    ) -> None:
        """Send a record, or bytes as they are; nothing comes back."""
        data = body if body is None or isinstance(body, memoryview) else msgspec.json.encode(body)
        await self._request(method, path, data, query or {}, None)

    async def get(self, path: str) -> bytes:
        """The bytes of an answer."""
        return await self._request("GET", path, None, {}, None)

    async def fetch(self, path: str, query: Mapping[str, int | str], into: memoryview) -> None:
        """Fill a buffer with the bytes of an answer."""
        await self._request("GET", path, None, query, into)

    async def _request(
        self, method: str, path: str, data: Any, query: Mapping[str, int | str], into: memoryview | None
    ) -> bytes:
        try:
            url = URL(path, encoded=True)
            async with self._http.request(method, url, data=data, params=query) as response:
                if response.status >= 300 or into is None:
                    reply = await response.read()
                else:
                    at = 0
                    async for part in response.content.iter_any():
                        into[at : at + len(part)] = part
                        at += len(part)
                    if at != len(into):
                        raise StoreError(f"control socket {self.path}: {at} bytes came, {len(into)} were asked for")
                    return b""
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"control socket {self.path}: {_reason(error)}") from error
        except ValueError as error:  # more bytes than asked for
            raise StoreError(f"control socket {self.path}: answer of a wrong length") from error
        if response.status < 300:
            return reply
        try:
            raise error_from_reply(msgspec.json.decode(reply, type=ErrorReply))
        except msgspec.DecodeError:
            raise StoreError(f"control socket {self.path}: {method} {path} answered {response.status}") from None

    async def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            await self._socket.close()
        await self._http.close()


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"nobody answers there ({error.os_error.strerror})"
    return f"the server went away ({error!r})"


class RemoteVdi(VdiHandle):
    """A VDI behind a server."""

    piece_bytes_max = DATA_BYTES_MAX

    def __init__(self, connection: "RemoteConnection", name: str, opened: Handle) -> None:
        super().__init__(name, opened.size_bytes, opened.description, read_only=opened.read_only)
        self._connection = connection
        self._http = connection.http
        self.handle = opened.handle
        self._path = f"/v1/handles/{opened.handle}"

    async def _read(self, offset: int, view: memoryview) -> None:
        query = {"offset_bytes": offset, "length_bytes": len(view)}
        await self._http.fetch(f"{self._path}/data", query, view)

    async def _write(self, offset: int, view: memoryview, writeback: bool | None) -> None:
        self._check(0, 0)  # the handle may have been closed between two pieces
        query: dict[str, int | str] = {"offset_bytes": offset}
        if writeback is not None:
            query["writeback"] = "true" if writeback else "false"
        await self._http.tell("PUT", f"{self._path}/data", view, query)

    async def _zero(self, offset: int, length: int, no_hole: bool) -> None:
        body = ZeroRange(offset_bytes=offset, length_bytes=length, no_hole=no_hole)
        await self._http.tell("POST", f"{self._path}/zero", body)

    async def _discard(self, offset: int, length: int) -> None:
        await self._http.tell("POST", f"{self._path}/discard", Range(offset_bytes=offset, length_bytes=length))

    async def _flush(self) -> None:
        await self._http.tell("POST", f"{self._path}/flush")

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        query = {"offset_bytes": offset, "length_bytes": length}
        found = await self._http.ask("GET", f"{self._path}/extents", list[ExtentReply], query=query)
        return [Extent(one.length_bytes, one.hole, one.zero) for one in found]

    async def _changed(self, since: VdiHandle, offset: int, length: int) -> list[Change]:
        if not isinstance(since, RemoteVdi) or since._connection is not self._connection:
            raise InvalidRequest(f"{since.name!r} is open through another connection than {self.name!r}")
        query: dict[str, int | str] = {"since": since.handle, "offset_bytes": offset, "length_bytes": length}
        found = await self._http.ask("GET", f"{self._path}/changes", list[ChangeReply], query=query)
        return [Change(one.length_bytes, one.changed, one.hole, one.zero) for one in found]

    async def _close(self) -> None:
        self._connection.handles.discard(self)
        await self._http.tell("DELETE", self._path)


class RemoteConnection(Connection):
    """A store behind a server."""

    in_process = False

    def __init__(self, http: ControlHttp, session: str) -> None:
        self.http = http
        self.handles: set[RemoteVdi] = set()
        self._session = session
        self._closed = False

    async def _open(self, name: str, read_only: bool) -> VdiHandle:
        if self._closed:
            raise Stopping("the connection was closed")
        body = OpenHandle(session=self._session, read_only=read_only)
        vdi = RemoteVdi(self, name, await self.http.ask("POST", f"{_path(name)}/handles", Handle, body))
        self.handles.add(vdi)
        return vdi

    async def _begin_import(self, name: str, what: Begin) -> VdiHandle:
        if self._closed:
            raise Stopping("the connection was closed")
        body = BeginImport(
            session=self._session,
            base=what.base,
            identity=what.identity,
            size_bytes=what.size_bytes,
            copies=what.copies,
            mode=what.mode,
        )
        vdi = RemoteVdi(self, name, await self.http.ask("POST", f"{_path(name)}/imports", Handle, body))
        self.handles.add(vdi)
        return vdi

    async def _finish_import(self, vdi: VdiHandle, tag: str, protected: bool) -> SnapshotStatus:
        assert isinstance(vdi, RemoteVdi)
        body = FinishImport(tag=tag, protected=protected)
        return await self.http.ask("POST", f"/v1/handles/{vdi.handle}/snapshot", SnapshotStatus, body)

    async def create(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """See Connection."""
        body = CreateVdi(name=name, size_bytes=size_bytes, copies=copies, mode=mode, prealloc=prealloc)
        return await self.http.ask("POST", "/v1/vdis", VdiStatus, body)

    async def vdis(self) -> AsyncIterator[VdiStatus]:
        """See Connection."""
        for vdi in await self.http.ask("GET", "/v1/vdis", list[VdiStatus]):
            yield vdi

    async def info(self, name: str) -> VdiStatus:
        """See Connection."""
        return await self.http.ask("GET", _path(name), VdiStatus)

    async def delete(self, name: str) -> None:
        """See Connection."""
        await self.http.tell("DELETE", _path(name))

    async def trash(self) -> AsyncIterator[TrashStatus]:
        """See Connection."""
        for entry in await self.http.ask("GET", "/v1/trash", list[TrashStatus]):
            yield entry

    async def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus:
        """See Connection."""
        wanted = Undelete(name=new, vdi_id=vdi_id)
        return await self.http.ask("POST", f"/v1/trash/{quote(name, safe='')}/undelete", VdiStatus, wanted)

    async def purge(self, name: str, *, vdi_id: int | None = None) -> None:
        """See Connection."""
        query = {} if vdi_id is None else {"vdi_id": vdi_id}
        await self.http.tell("DELETE", f"/v1/trash/{quote(name, safe='')}", query=query)

    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        """See Connection."""
        return await self.http.ask("PUT", f"{_path(name)}/copies", VdiStatus, Copies(copies=copies))

    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus:
        """See Connection."""
        given = {kind: LimitStatus(rate=rate, burst=burst) for kind, (rate, burst) in limits.items()}
        return await self.http.ask("PUT", f"{_path(name)}/limits", VdiStatus, SetLimits(limits=given, weight=weight))

    async def damage(self, name: str) -> VdiDamage:
        """See Connection."""
        return await self.http.ask("GET", f"{_path(name)}/damage", VdiDamage)

    async def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        """See Connection."""
        body = Clone(source=source, name=name, copies=copies, mode=mode)
        return await self.http.ask("POST", "/v1/clones", VdiStatus, body)

    async def rename(self, name: str, new: str) -> VdiStatus:
        """See Connection."""
        return await self.http.ask("PUT", f"{_path(name)}/name", VdiStatus, NewName(name=new))

    async def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        """See Connection."""
        body = NewSize(size_bytes=size_bytes, force=force, reconnect=reconnect)
        return await self.http.ask("PUT", f"{_path(name)}/size", VdiStatus, body)

    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        """See Connection."""
        query = {"force": "true" if force else "false"}
        return await self.http.ask("POST", f"{_snapshot_path(name)}/rollback", SnapshotStatus, query=query)

    async def resume(self, name: str) -> VdiStatus:
        """See Connection."""
        return await self.http.ask("POST", f"{_path(name)}/resume", VdiStatus)

    async def snapshots(self, name: str | None = None) -> AsyncIterator[SnapshotStatus]:
        """See Connection."""
        path = "/v1/snapshots" if name is None else f"{_path(name)}/snapshots"
        for snapshot in await self.http.ask("GET", path, list[SnapshotStatus]):
            yield snapshot

    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        """See Connection."""
        body = TakeSnapshot(tag=tag, skip_unchanged=skip_unchanged, protected=protected)
        return await self.http.ask("POST", f"{_path(name)}/snapshots", SnapshotTaken, body)

    async def create_group_snapshot(
        self, names: Sequence[str], tag: str, *, protected: bool = False
    ) -> list[SnapshotStatus]:
        """See Connection."""
        wanted = TakeGroupSnapshot(names=list(names), tag=tag, protected=protected)
        return await self.http.ask("POST", "/v1/group-snapshots", list[SnapshotStatus], wanted)

    async def snapshot_space(self, name: str) -> SnapshotSpace:
        """See Connection."""
        return await self.http.ask("GET", _snapshot_path(name) + "/space", SnapshotSpace)

    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        """See Connection."""
        return await self.http.ask("PUT", _snapshot_path(name), SnapshotStatus, Protection(protected=protected))

    async def delete_snapshot(self, name: str) -> None:
        """See Connection."""
        await self.http.tell("DELETE", _snapshot_path(name))

    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        """See Connection."""
        body = Range(offset_bytes=offset_bytes, length_bytes=length_bytes)
        return await self.http.ask("POST", f"{_path(name)}/allocate", JobStatus, body)

    async def flatten(self, name: str) -> JobStatus:
        """See Connection."""
        return await self.http.ask("POST", f"{_path(name)}/flatten", JobStatus)

    async def jobs(self) -> AsyncIterator[JobStatus]:
        """See Connection."""
        for job in await self.http.ask("GET", "/v1/jobs", list[JobStatus]):
            yield job

    async def job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return await self.http.ask("GET", f"/v1/jobs/{job_id}", JobStatus)

    async def wait_for_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        pause = JOB_LOOK_SECONDS
        while (job := await self.job(job_id)).state == "running":
            await asyncio.sleep(pause)
            pause = min(JOB_LOOK_SECONDS_MAX, 2 * pause)
        return job

    async def abort_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return await self.http.ask("POST", f"/v1/jobs/{job_id}/abort", JobStatus)

    async def attributes(self, name: str) -> AsyncIterator[str]:
        """See Connection."""
        for found in await self.http.ask("GET", f"{_path(name)}/attributes", list[AttributeReply]):
            yield found.name

    async def get_attribute(self, name: str, key: str) -> bytes:
        """See Connection."""
        return await self.http.get(_attribute_path(name, key))

    async def set_attribute(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        """See Connection."""
        query = {"exclusive": "true" if exclusive else "false"}
        await self.http.tell("PUT", _attribute_path(name, key), memoryview(value), query)

    async def delete_attribute(self, name: str, key: str) -> None:
        """See Connection."""
        await self.http.tell("DELETE", _attribute_path(name, key))

    async def status(self) -> StoreStatus:
        """See Connection."""
        return (await self.http.ask("GET", "/v1/status", Status)).store

    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        """See Connection."""
        zone = _absolute(zone) if action == "add" else zone
        path = None if path is None else _absolute(path)
        change = ZoneChange(action=action, zone=zone, path=path, weight=weight, force=force)
        return await self.http.ask("POST", "/v1/zones", list[ZoneStatus], change)

    async def start_scrub(self) -> ScrubStatus:
        """See Connection."""
        return await self.http.ask("POST", "/v1/scrub", ScrubStatus)

    async def scrub(self) -> ScrubStatus:
        """See Connection."""
        return await self.http.ask("GET", "/v1/scrub", ScrubStatus)

    async def recovery(self) -> RecoveryStatus:
        """See Connection."""
        return await self.http.ask("GET", "/v1/recovery", RecoveryStatus)

    async def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """See Connection."""
        return await self.http.ask(
            "PUT", "/v1/recovery", RecoveryStatus, RecoveryRate(bytes_per_second_max=bytes_per_second)
        )

    async def close(self) -> None:
        """See Connection."""
        self._closed = True
        try:
            for vdi in list(self.handles):
                await vdi.close()
        finally:
            await self.http.close()


async def connect_server(socket: Path | str) -> RemoteConnection:
    """Connect to the server behind a control socket. Unavailable: nobody answers there."""
    http = ControlHttp(os.fspath(socket))
    try:
        return RemoteConnection(http, await http.begin_session())
    except BaseException:
        await http.close()
        raise


def _path(name: str) -> str:
    return "/v1/vdis/" + quote(name, safe="")


def _snapshot_path(name: str) -> str:
    return "/v1/snapshots/" + quote(name, safe="")


def _attribute_path(name: str, key: str) -> str:
    check_attribute(key)
    return f"{_path(name)}/attributes/{quote(key, safe='')}"


def _absolute(path: str) -> str:
    """A server has another working directory."""
    return os.path.abspath(path)

"""The control socket of a running server: HTTP and JSON on a Unix socket of mode 0600.

GET /v1/openapi.json describes it (operations.py). Runs in the server's own event loop; every handler either answers
from memory or awaits the store. Who may open the socket may do everything: the file's mode is the access control.
"""

import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from nbdserver.control_data import (
    AttributeOperations,
    AttributesOfVdis,
    ImportSource,
    JobOperations,
    JobsOfStore,
    Sessions,
)
from nbdserver.control_trash import StoreWithTrash, TrashHandlers
from nbdserver.http_log import http_log
from nbdserver.operations import describe, operation, operations, route
from objstore.access.api import (
    BODY_BYTES_MAX,
    Clone,
    Copies,
    CreateVdi,
    ErrorReply,
    NewName,
    NewSize,
    Protection,
    Range,
    RecoveryRate,
    ServerStatus,
    SetLimits,
    Status,
    TakeGroupSnapshot,
    TakeSnapshot,
    ZoneChange,
    error_name,
    http_status,
)
from objstore.errors import Busy, Corrupt, InvalidRequest, StoreError
from objstore.volume.base import Holder
from objstore.volume.status import (
    JobStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotSpace,
    SnapshotStatus,
    SnapshotTaken,
    StoreInfo,
    StoreStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)

SHUTDOWN_SECONDS: Final = 10.0
"""How long `stop` waits for requests that are being answered."""

HTTP_LOG: Final = http_log(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlledStore(ImportSource, StoreWithTrash, Protocol):
    """What the control API needs of a store."""

    @property
    def holders(self) -> list[Holder]: ...
    @property
    def jobs(self) -> JobsOfStore: ...
    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus: ...
    async def flatten(self, name: str) -> JobStatus: ...
    @property
    def attributes(self) -> AttributesOfVdis: ...
    async def status(self, *, thorough: bool = True) -> StoreStatus: ...
    async def info(self) -> StoreInfo: ...
    def vdis(self) -> list[VdiStatus]: ...
    def vdi(self, name: str) -> VdiStatus: ...
    async def create_vdi(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = ..., prealloc: bool = False
    ) -> VdiStatus: ...
    async def delete_vdi(self, name: str) -> None: ...
    def snapshots(self, name: str | None = None) -> list[SnapshotStatus]: ...
    def snapshot(self, name: str) -> SnapshotStatus: ...
    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken: ...
    async def create_group_snapshot(
        self, names: Sequence[str], tag: str, *, protected: bool = False
    ) -> list[SnapshotStatus]: ...
    async def snapshot_space(self, name: str) -> SnapshotSpace: ...
    async def delete_snapshot(self, name: str) -> None: ...
    async def clone(
        self, source: str, name: str, *, copies: int | None = None, mode: str | None = None
    ) -> VdiStatus: ...
    async def rename(self, name: str, new: str) -> VdiStatus: ...
    async def resize(
        self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False
    ) -> VdiStatus: ...
    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus: ...
    async def resume(self, name: str) -> VdiStatus: ...
    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus: ...
    async def damage(self, name: str) -> VdiDamage: ...
    async def start_scrub(self) -> ScrubStatus: ...
    async def set_copies(self, name: str, copies: int) -> VdiStatus: ...
    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus: ...
    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus: ...
    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> None: ...


class ControlServer:
    """Owns the control socket's file from `start` to `stop`."""

    def __init__(
        self, store: ControlledStore, server_status: Callable[[], ServerStatus], more: Sequence[object] = ()
    ) -> None:
        """more: further objects with operations."""
        self._store = store
        self._server_status = server_status
        self._path: Path | None = None
        self._sessions = Sessions(store)
        store.holders.append(self._sessions)
        parts = (AttributeOperations(store.attributes), JobOperations(store.jobs), TrashHandlers(store))
        owners = (self, *parts, self._sessions, *more)
        handlers = [pair for owner in owners for pair in operations(owner)]
        self.operations = [found for found, _ in handlers]
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors_as_json])
        app.add_routes([route(found, handler) for found, handler in handlers])
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, logger=HTTP_LOG, shutdown_timeout=SHUTDOWN_SECONDS
        )

    async def start(self, path: Path, handed: socket.socket | None = None) -> None:
        """Answer on `path`, replacing a socket that a killed server left there.

        handed: a socket that listens there already; its file is somebody else's, and its mode theirs to choose.
        InvalidRequest if there can't be a socket; Busy if somebody answers there.
        """
        if handed is None:
            listener = _bind(path)
            self._path = path
        else:
            listener = handed
            listener.setblocking(False)
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        """Finish what is being answered (bounded), then remove the socket. Idempotent."""
        await self._sessions.close()
        await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    @operation("GET", "/v1/openapi.json")
    async def get_openapi(self) -> dict[str, Any]:
        """This description, in the terms of OpenAPI 3.1."""
        return describe(self.operations)

    @operation("GET", "/v1/status")
    async def get_status(self, thorough: bool = True) -> Status:
        """The server, its store and its zones. thorough: false = without what takes long in a large store, which is
        the zones' space and the segments with too few copies."""
        return Status(server=self._server_status(), store=await self._store.status(thorough=thorough))

    @operation("GET", "/v1/store")
    async def get_store(self) -> StoreInfo:
        """What the store is: when it was made, its format, its epochs, what lies in its zones."""
        return await self._store.info()

    @operation("GET", "/v1/vdis")
    async def list_vdis(self) -> list[VdiStatus]:
        """Every VDI, by name."""
        return self._store.vdis()

    @operation("POST", "/v1/vdis", status=201)
    async def create_vdi(self, body: CreateVdi) -> VdiStatus:
        """Create a VDI; it is durable when this is answered."""
        return await self._store.create_vdi(
            body.name, body.size_bytes, copies=body.copies, mode=body.mode, prealloc=body.prealloc
        )

    @operation("GET", "/v1/vdis/{name}")
    async def get_vdi(self, name: str) -> VdiStatus:
        """One VDI."""
        return self._store.vdi(name)

    @operation("DELETE", "/v1/vdis/{name}")
    async def delete_vdi(self, name: str) -> None:
        """Delete a VDI; where deleted VDIs are kept for a while it goes into the trash."""
        await self._store.delete_vdi(name)

    @operation("PUT", "/v1/vdis/{name}/name")
    async def rename(self, name: str, body: NewName) -> VdiStatus:
        """Give a VDI another name; its snapshots go with it."""
        return await self._store.rename(name, body.name)

    @operation("PUT", "/v1/vdis/{name}/size")
    async def resize(self, name: str, body: NewSize) -> VdiStatus:
        """Make a VDI larger, or by force smaller."""
        return await self._store.resize(name, body.size_bytes, force=body.force, reconnect=body.reconnect)

    @operation("POST", "/v1/snapshots/{name}/rollback")
    async def rollback(self, name: str, force: bool = False) -> SnapshotStatus:
        """Make a VDI what it was at a snapshot; a snapshot of what it was just now is the answer. force: its clients
        are disconnected first, and nobody may open it until it is resumed."""
        return await self._store.rollback(name, force=force)

    @operation("POST", "/v1/vdis/{name}/resume")
    async def resume(self, name: str) -> VdiStatus:
        """Let clients open a VDI again that a forced change has suspended."""
        return await self._store.resume(name)

    @operation("POST", "/v1/clones", status=201)
    async def clone(self, body: Clone) -> VdiStatus:
        """Make a VDI that begins as a snapshot, or as another VDI is now; it is durable when this is answered."""
        return await self._store.clone(body.source, body.name, copies=body.copies, mode=body.mode)

    @operation("GET", "/v1/snapshots")
    async def list_snapshots(self) -> list[SnapshotStatus]:
        """Every snapshot, those of deleted VDIs too."""
        return self._store.snapshots()

    @operation("GET", "/v1/vdis/{name}/snapshots")
    async def list_snapshots_of(self, name: str) -> list[SnapshotStatus]:
        """The snapshots of a VDI, oldest first."""
        return self._store.snapshots(name)

    @operation("POST", "/v1/vdis/{name}/snapshots", status=201)
    async def create_snapshot(self, name: str, body: TakeSnapshot) -> SnapshotTaken:
        """Take a snapshot; it is durable when this is answered."""
        return await self._store.create_snapshot(
            name, body.tag, skip_unchanged=body.skip_unchanged, protected=body.protected
        )

    @operation("POST", "/v1/group-snapshots", status=201)
    async def create_group_snapshot(self, body: TakeGroupSnapshot) -> list[SnapshotStatus]:
        """Take a snapshot of several VDIs at one instant; all of it is durable when this is answered."""
        return await self._store.create_group_snapshot(body.names, body.tag, protected=body.protected)

    @operation("GET", "/v1/snapshots/{name}")
    async def get_snapshot(self, name: str) -> SnapshotStatus:
        """One snapshot, called VDI@TAG or VDI@INDEX."""
        return self._store.snapshot(name)

    @operation("GET", "/v1/snapshots/{name}/space")
    async def get_snapshot_space(self, name: str) -> SnapshotSpace:
        """How much of a snapshot's data nothing else needs at this moment."""
        return await self._store.snapshot_space(name)

    @operation("PUT", "/v1/snapshots/{name}")
    async def protect_snapshot(self, name: str, body: Protection) -> SnapshotStatus:
        """Protect a snapshot from deletion, or not any more."""
        return await self._store.protect_snapshot(name, protected=body.protected)

    @operation("DELETE", "/v1/snapshots/{name}")
    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot; the space that only it needs comes back in the background."""
        await self._store.delete_snapshot(name)

    @operation("GET", "/v1/vdis/{name}/damage")
    async def get_damage(self, name: str) -> VdiDamage:
        """The parts of a VDI that no zone has whole, as far as is known."""
        return await self._store.damage(name)

    @operation("POST", "/v1/vdis/{name}/allocate", status=202)
    async def allocate_range(self, name: str, body: Range) -> JobStatus:
        """Begin a job that reserves space for the holes of a range; length 0 = to the end."""
        return await self._store.allocate(name, body.offset_bytes, body.length_bytes)

    @operation("POST", "/v1/vdis/{name}/flatten", status=202)
    async def flatten(self, name: str) -> JobStatus:
        """Begin a job that gives a clone data of its own, so that it needs the snapshot that it is of no more."""
        return await self._store.flatten(name)

    @operation("PUT", "/v1/vdis/{name}/copies")
    async def set_copies(self, name: str, body: Copies) -> VdiStatus:
        """Change how many zones hold each object of a VDI."""
        return await self._store.set_copies(name, body.copies)

    @operation("PUT", "/v1/vdis/{name}/limits")
    async def set_limits(self, name: str, body: SetLimits) -> VdiStatus:
        """Limit what the clients of a VDI may do in a second, from now on."""
        limits = {kind: (one.rate, one.burst) for kind, one in body.limits.items()}
        return await self._store.set_limits(name, limits, weight=body.weight)

    @operation("GET", "/v1/scrub")
    async def get_scrub(self) -> ScrubStatus:
        """The scrub under way, or the last one."""
        return (await self._store.status()).scrub

    @operation("POST", "/v1/scrub", status=202)
    async def start_scrub(self) -> ScrubStatus:
        """Read and check every copy of everything now."""
        return await self._store.start_scrub()

    @operation("GET", "/v1/recovery")
    async def get_recovery(self) -> RecoveryStatus:
        """Which copies are missing, and how far their recovery is."""
        return (await self._store.status()).recovery

    @operation("PUT", "/v1/recovery")
    async def set_recovery_rate(self, body: RecoveryRate) -> RecoveryStatus:
        """Limit recovery from now on."""
        return self._store.set_recovery_rate(body.bytes_per_second_max)

    @operation("POST", "/v1/zones")
    async def change_zones(self, body: ZoneChange) -> list[ZoneStatus]:
        """Add, drain, remove, replace a zone, or change its weight; the zones as they are then."""
        await self._store.change_zones(body.action, body.zone, path=body.path, weight=body.weight, force=body.force)
        return (await self._store.status()).zones


def _bind(path: Path) -> socket.socket:
    """A listening socket at `path` that was never accessible to others."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        # Linux gives the file the mode of the unbound socket, less the umask: there is no moment with another mode.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InvalidRequest(f"control socket {path}: {error.strerror or error}") from error
    except StoreError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _clear(path: Path) -> None:
    """Remove a socket that nobody answers; anything else at `path` is not ours to remove."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidRequest(f"control socket {path}: there is a file of this name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # it has so many waiting that it seems to hang; it is there
    raise Busy(f"control socket {path}: another server answers there")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except StoreError as error:
        bad = list(error.bad) if isinstance(error, Corrupt) else []
        return _json(ErrorReply(error_name(error), str(error), bad), http_status(error))
    except web.HTTPException as error:
        return _json(ErrorReply(type(error).__name__, f"{request.method} {request.path}: {error.reason}"), error.status)

"""The control socket of a running server: HTTP and JSON on a Unix socket of mode 0600 (control_api.py has the table).

Runs in the server's own event loop; every handler either answers from memory or awaits the store. Who may open the
socket may do everything: the file's mode is the access control.
"""

import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from nbdserver.control_api import (
    BODY_BYTES_MAX,
    Copies,
    CreateVdi,
    ErrorReply,
    RecoveryRate,
    ServerStatus,
    Status,
    ZoneChange,
    http_status,
)
from objstore.errors import Busy, InvalidRequest, StoreError
from objstore.volume.status import RecoveryStatus, ScrubStatus, StoreStatus, VdiDamage, VdiStatus

SHUTDOWN_SECONDS: Final = 10.0
"""How long `stop` waits for requests that are being answered."""

T = TypeVar("T")
HTTP_LOG: Final = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlledStore(Protocol):
    """What the control API needs of a store."""

    async def status(self) -> StoreStatus: ...
    def vdis(self) -> list[VdiStatus]: ...
    def vdi(self, name: str) -> VdiStatus: ...
    async def create_vdi(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = ..., prealloc: bool = False
    ) -> VdiStatus: ...
    async def delete_vdi(self, name: str) -> None: ...
    async def damage(self, name: str) -> VdiDamage: ...
    async def start_scrub(self) -> ScrubStatus: ...
    async def set_copies(self, name: str, copies: int) -> VdiStatus: ...
    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus: ...
    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> None: ...


class ControlServer:
    """Owns the control socket's file from `start` to `stop`."""

    def __init__(self, store: ControlledStore, server_status: Callable[[], ServerStatus]) -> None:
        self._store = store
        self._server_status = server_status
        self._path: Path | None = None
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors_as_json])
        app.router.add_get("/v1/status", self._get_status)
        app.router.add_get("/v1/vdis", self._get_vdis)
        app.router.add_post("/v1/vdis", self._post_vdi)
        app.router.add_get("/v1/vdis/{name}", self._get_vdi)
        app.router.add_delete("/v1/vdis/{name}", self._delete_vdi)
        app.router.add_get("/v1/vdis/{name}/damage", self._get_damage)
        app.router.add_get("/v1/scrub", self._get_scrub)
        app.router.add_post("/v1/scrub", self._post_scrub)
        app.router.add_get("/v1/recovery", self._get_recovery)
        app.router.add_put("/v1/recovery", self._put_recovery)
        app.router.add_put("/v1/vdis/{name}/copies", self._put_copies)
        app.router.add_post("/v1/zones", self._post_zones)
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, logger=HTTP_LOG, shutdown_timeout=SHUTDOWN_SECONDS
        )

    async def start(self, path: Path) -> None:
        """Answer on `path`, replacing a socket that a killed server left there.

        InvalidRequest if there can't be a socket; Busy if somebody answers there.
        """
        listener = _bind(path)
        self._path = path
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        """Finish what is being answered (bounded), then remove the socket. Idempotent."""
        await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    async def _get_status(self, _request: web.Request) -> web.Response:
        return _json(Status(server=self._server_status(), store=await self._store.status()))

    async def _get_vdis(self, _request: web.Request) -> web.Response:
        return _json(self._store.vdis())

    async def _get_vdi(self, request: web.Request) -> web.Response:
        return _json(self._store.vdi(request.match_info["name"]))

    async def _post_vdi(self, request: web.Request) -> web.Response:
        wanted = await _body(request, CreateVdi)
        created = await self._store.create_vdi(
            wanted.name, wanted.size_bytes, copies=wanted.copies, mode=wanted.mode, prealloc=wanted.prealloc
        )
        return _json(created, status=201)

    async def _delete_vdi(self, request: web.Request) -> web.Response:
        await self._store.delete_vdi(request.match_info["name"])
        return web.Response(status=204)

    async def _get_damage(self, request: web.Request) -> web.Response:
        return _json(await self._store.damage(request.match_info["name"]))

    async def _get_scrub(self, _request: web.Request) -> web.Response:
        return _json((await self._store.status()).scrub)

    async def _post_scrub(self, _request: web.Request) -> web.Response:
        return _json(await self._store.start_scrub(), status=202)

    async def _get_recovery(self, _request: web.Request) -> web.Response:
        return _json((await self._store.status()).recovery)

    async def _put_recovery(self, request: web.Request) -> web.Response:
        wanted = await _body(request, RecoveryRate)
        return _json(self._store.set_recovery_rate(wanted.bytes_per_second_max))

    async def _put_copies(self, request: web.Request) -> web.Response:
        wanted = await _body(request, Copies)
        return _json(await self._store.set_copies(request.match_info["name"], wanted.copies))

    async def _post_zones(self, request: web.Request) -> web.Response:
        wanted = await _body(request, ZoneChange)
        await self._store.change_zones(
            wanted.action, wanted.zone, path=wanted.path, weight=wanted.weight, force=wanted.force
        )
        return _json((await self._store.status()).zones)


async def _body(request: web.Request, kind: type[T]) -> T:
    """The request's body. InvalidRequest."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"request body: {error}") from error


def _is_our_fault(record: logging.LogRecord) -> bool:
    """Bytes that are no request of HTTP are answered with 400; a traceback in the log would help nobody."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


HTTP_LOG.addFilter(_is_our_fault)


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
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise Busy(f"control socket {path}: another server answers there")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except StoreError as error:
        return _json(ErrorReply(type(error).__name__, str(error)), http_status(error))
    except web.HTTPException as error:
        return _json(ErrorReply(type(error).__name__, f"{request.method} {request.path}: {error.reason}"), error.status)

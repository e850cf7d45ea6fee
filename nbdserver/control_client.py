"""The other end of the control socket, for the command line: blocking, standard library only."""

import http.client
import os
import socket
import time
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from objstore.access.api import (
    Clients,
    Clone,
    Copies,
    CreateVdi,
    ErrorReply,
    KickClient,
    Kicked,
    NewName,
    NewSize,
    Protection,
    RecoveryRate,
    Reloaded,
    Status,
    TakeSnapshot,
    ZoneChange,
    error_from_reply,
)
from objstore.errors import StoreError, Unavailable
from objstore.volume.status import (
    RecoveryStatus,
    ScrubStatus,
    SnapshotStatus,
    SnapshotTaken,
    StoreInfo,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)

REPLY_SECONDS_MAX: Final = 600.0
"""Longest wait for an answer; only a preallocation of a large VDI takes more than a moment."""

REPLY_BYTES_MAX: Final = 64 << 20

T = TypeVar("T")


class NoServer(Exception):
    """Nobody answers at the control socket: the server is just starting or stopping, or was killed."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP to a path instead of a host."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=REPLY_SECONDS_MAX)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ControlClient:
    """Speaks to one running server. Each method: the StoreError that the server raised, or Unavailable if it went."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Connect. NoServer if nobody listens there; Unavailable if this user may not."""
        self._path = os.fspath(path)
        self._connection = _UnixConnection(self._path)
        try:
            self._connection.connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            self.close()
            raise NoServer(self._path) from error
        except OSError as error:
            self.close()
            raise Unavailable(f"control socket {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def status(self, *, thorough: bool = True) -> Status:
        return self._ask("GET", "/v1/status" if thorough else "/v1/status?thorough=false", Status)

    def info(self) -> StoreInfo:
        return self._ask("GET", "/v1/store", StoreInfo)

    def vdis(self) -> list[VdiStatus]:
        return self._ask("GET", "/v1/vdis", list[VdiStatus])

    def vdi(self, name: str) -> VdiStatus:
        return self._ask("GET", _vdi_path(name), VdiStatus)

    def create_vdi(self, name: str, size_bytes: int, *, copies: int | None, mode: str, prealloc: bool) -> VdiStatus:
        wanted = CreateVdi(name=name, size_bytes=size_bytes, copies=copies, mode=mode, prealloc=prealloc)
        return self._ask("POST", "/v1/vdis", VdiStatus, wanted)

    def delete_vdi(self, name: str) -> None:
        self._request("DELETE", _vdi_path(name), None)

    def snapshots(self, name: str | None) -> list[SnapshotStatus]:
        path = "/v1/snapshots" if name is None else _vdi_path(name) + "/snapshots"
        return self._ask("GET", path, list[SnapshotStatus])

    def create_snapshot(self, name: str, tag: str, *, skip_unchanged: bool, protected: bool) -> SnapshotTaken:
        wanted = TakeSnapshot(tag=tag, skip_unchanged=skip_unchanged, protected=protected)
        return self._ask("POST", _vdi_path(name) + "/snapshots", SnapshotTaken, wanted)

    def delete_snapshot(self, name: str) -> None:
        self._request("DELETE", _snapshot_path(name), None)

    def clone(self, source: str, name: str, *, copies: int | None, mode: str | None) -> VdiStatus:
        return self._ask("POST", "/v1/clones", VdiStatus, Clone(source=source, name=name, copies=copies, mode=mode))

    def rename(self, name: str, new: str) -> VdiStatus:
        return self._ask("PUT", _vdi_path(name) + "/name", VdiStatus, NewName(name=new))

    def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        wanted = NewSize(size_bytes=size_bytes, force=force, reconnect=reconnect)
        return self._ask("PUT", _vdi_path(name) + "/size", VdiStatus, wanted)

    def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        return self._ask(
            "POST", f"{_snapshot_path(name)}/rollback?force={'true' if force else 'false'}", SnapshotStatus
        )

    def resume(self, name: str) -> VdiStatus:
        return self._ask("POST", _vdi_path(name) + "/resume", VdiStatus)

    def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        return self._ask("PUT", _snapshot_path(name), SnapshotStatus, Protection(protected=protected))

    def damage(self, name: str) -> VdiDamage:
        return self._ask("GET", _vdi_path(name) + "/damage", VdiDamage)

    def start_scrub(self) -> ScrubStatus:
        return self._ask("POST", "/v1/scrub", ScrubStatus)

    def scrub_status(self) -> ScrubStatus:
        return self._ask("GET", "/v1/scrub", ScrubStatus)

    def recovery_status(self) -> RecoveryStatus:
        return self._ask("GET", "/v1/recovery", RecoveryStatus)

    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        return self._ask("PUT", "/v1/recovery", RecoveryStatus, RecoveryRate(bytes_per_second_max=bytes_per_second))

    def set_copies(self, name: str, copies: int) -> VdiStatus:
        return self._ask("PUT", _vdi_path(name) + "/copies", VdiStatus, Copies(copies=copies))

    def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        change = ZoneChange(action=action, zone=zone, path=path, weight=weight, force=force)
        return self._ask("POST", "/v1/zones", list[ZoneStatus], change)

    def clients(self) -> Clients:
        return self._ask("GET", "/v1/clients", Clients)

    def kick(self, client: str, *, fence: bool, seconds: float | None) -> Kicked:
        wanted = KickClient(client=client, fence=fence, seconds=seconds)
        return self._ask("POST", "/v1/clients/kick", Kicked, wanted)

    def unfence(self, client: str) -> None:
        self._request("DELETE", "/v1/fences/" + quote(client, safe=""), None)

    def reload(self) -> Reloaded:
        return self._ask("POST", "/v1/reload", Reloaded)

    def wait(self, seconds: float) -> None:
        """Let the server work."""
        time.sleep(seconds)

    def _ask(self, method: str, path: str, answer: type[T], body: Any = None) -> T:
        reply = self._request(method, path, body)
        try:
            return msgspec.json.decode(reply, type=answer)
        except msgspec.DecodeError as error:
            raise StoreError(
                f"control socket {self._path}: answer to {method} {path} not understood: {error}"
            ) from error

    def _request(self, method: str, path: str, body: Any) -> bytes:
        """The body of a good answer; an ErrorReply as the exception it stands for."""
        try:
            self._connection.request(method, path, None if body is None else msgspec.json.encode(body))
            response = self._connection.getresponse()
            if response.length is None or response.length > REPLY_BYTES_MAX:
                raise StoreError(f"control socket {self._path}: answer to {method} {path} of unacceptable length")
            reply = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"control socket {self._path}: the server went away ({error!r})") from error
        if response.status < 300:
            return reply
        try:
            raise error_from_reply(msgspec.json.decode(reply, type=ErrorReply))
        except msgspec.DecodeError:
            raise StoreError(f"control socket {self._path}: {method} {path} answered {response.status}") from None


def _snapshot_path(name: str) -> str:
    return "/v1/snapshots/" + quote(name, safe="")


def _vdi_path(name: str) -> str:
    return "/v1/vdis/" + quote(name, safe="")

"""How a command reaches its store: through the running server's control socket, else by opening the zones itself."""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec
import uvloop

from nbdserver.cli_progress import progress
from nbdserver.control_client import ControlClient, NoServer
from objstore.access.api import LockNote, Status
from objstore.errors import Busy, InvalidRequest, StoreError, Unavailable
from objstore.volume.directories import lock_note, zone_paths
from objstore.volume.settings import StoreSettings
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
from objstore.volume.store import Store, open_store

WAIT_SECONDS: Final = 10.0
"""How long a command waits for zones that somebody is just opening or giving back."""

POLL_SECONDS: Final = 0.1


class Admin(Protocol):
    """What a command does to a store; the same over the control socket and over zones opened here."""

    def status(self) -> Status: ...
    def info(self) -> StoreInfo: ...
    def vdis(self) -> list[VdiStatus]: ...
    def vdi(self, name: str) -> VdiStatus: ...
    def create_vdi(self, name: str, size_bytes: int, *, copies: int | None, mode: str, prealloc: bool) -> VdiStatus: ...
    def delete_vdi(self, name: str) -> None: ...
    def snapshots(self, name: str | None) -> list[SnapshotStatus]: ...
    def create_snapshot(self, name: str, tag: str, *, skip_unchanged: bool, protected: bool) -> SnapshotTaken: ...
    def delete_snapshot(self, name: str) -> None: ...
    def rename(self, name: str, new: str) -> VdiStatus: ...
    def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus: ...
    def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus: ...
    def resume(self, name: str) -> VdiStatus: ...
    def clone(self, source: str, name: str, *, copies: int | None, mode: str | None) -> VdiStatus: ...
    def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus: ...
    def damage(self, name: str) -> VdiDamage: ...
    def start_scrub(self) -> ScrubStatus: ...
    def scrub_status(self) -> ScrubStatus: ...
    def recovery_status(self) -> RecoveryStatus: ...
    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus: ...
    def set_copies(self, name: str, copies: int) -> VdiStatus: ...
    def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]: ...

    def wait(self, seconds: float) -> None:
        """Let the store work for so long."""
        ...


class OfflineAdmin:
    """Opens the zones in this process, in an event loop of its own."""

    def __init__(
        self, zones: Sequence[Path], settings: StoreSettings, *, read_only: bool = False, force: bool = False
    ) -> None:
        """Raises what open_store raises; Busy if a server got there first."""
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        note = msgspec.json.encode(LockNote(pid=os.getpid())).decode()
        try:
            self._store: Store = self._runner.run(
                open_store(zones, settings=settings, lock_note=note, read_only=read_only, force=force)
            )
        except StoreError:
            self._runner.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._runner.run(self._store.shutdown())
        finally:
            self._runner.close()

    def status(self) -> Status:
        return Status(server=None, store=self._runner.run(self._store.status()))

    def info(self) -> StoreInfo:
        return self._runner.run(self._store.info())

    def vdis(self) -> list[VdiStatus]:
        return self._store.vdis()

    def vdi(self, name: str) -> VdiStatus:
        return self._store.vdi(name)

    def create_vdi(self, name: str, size_bytes: int, *, copies: int | None, mode: str, prealloc: bool) -> VdiStatus:
        return self._runner.run(self._store.create_vdi(name, size_bytes, copies=copies, mode=mode, prealloc=prealloc))

    def delete_vdi(self, name: str) -> None:
        self._runner.run(self._store.delete_vdi(name))

    def snapshots(self, name: str | None) -> list[SnapshotStatus]:
        return self._store.snapshots(name)

    def create_snapshot(self, name: str, tag: str, *, skip_unchanged: bool, protected: bool) -> SnapshotTaken:
        taking = self._store.create_snapshot(name, tag, skip_unchanged=skip_unchanged, protected=protected)
        return self._runner.run(taking)

    def clone(self, source: str, name: str, *, copies: int | None, mode: str | None) -> VdiStatus:
        return self._runner.run(self._store.clone(source, name, copies=copies, mode=mode))

    def rename(self, name: str, new: str) -> VdiStatus:
        return self._runner.run(self._store.rename(name, new))

    def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        return self._runner.run(self._store.resize(name, size_bytes, force=force, reconnect=reconnect))

    def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        return self._runner.run(self._store.rollback(name, force=force))

    def resume(self, name: str) -> VdiStatus:
        return self._runner.run(self._store.resume(name))

    def delete_snapshot(self, name: str) -> None:
        self._runner.run(self._store.delete_snapshot(name))

    def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        return self._runner.run(self._store.protect_snapshot(name, protected=protected))

    def damage(self, name: str) -> VdiDamage:
        return self._runner.run(self._store.damage(name))

    def start_scrub(self) -> ScrubStatus:
        return self._runner.run(self._store.start_scrub())

    def scrub_status(self) -> ScrubStatus:
        return self._store.scrub.status()

    def recovery_status(self) -> RecoveryStatus:
        return self._store.recovery.status()

    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        return self._store.set_recovery_rate(bytes_per_second)

    def set_copies(self, name: str, copies: int) -> VdiStatus:
        return self._runner.run(self._store.set_copies(name, copies))

    def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        self._runner.run(self._store.change_zones(action, zone, path=path, weight=weight, force=force))
        return self._runner.run(self._store.status()).zones

    def wait(self, seconds: float) -> None:
        self._runner.run(asyncio.sleep(seconds))


@contextmanager
def open_admin(
    zones: Sequence[Path], settings: StoreSettings, *, read_only: bool = False, force: bool = False
) -> Iterator[Admin]:
    """The store that has one of `zones`. Busy if its owner does not answer for WAIT_SECONDS. read_only, force: see
    open_store; they matter only where no server has it."""
    deadline = time.monotonic() + WAIT_SECONDS
    with progress("waiting for the store"):
        admin = _connect_or_open(zones, settings, read_only, force)
        while admin is None:
            if time.monotonic() > deadline:
                raise Busy(f"zone {zones[0]} is in use by {holder(zones)} which does not answer")
            time.sleep(POLL_SECONDS)
            admin = _connect_or_open(zones, settings, read_only, force)
    if isinstance(admin, ControlClient):
        try:
            yield admin
        finally:
            admin.close()
    else:
        with admin:
            yield admin


@contextmanager
def open_server(zones: Sequence[Path]) -> Iterator[ControlClient]:
    """The server that has the store of one of `zones` open. Unavailable: there is none, or it does not answer."""
    note = note_of(zones)
    if note is None or not note.control:
        raise Unavailable(f"zone {zones[0]}: no server has this store open")
    try:
        client = ControlClient(note.control)
    except NoServer as error:
        raise Unavailable(f"zone {zones[0]}: process {note.pid} has it and does not answer now") from error
    try:
        yield client
    finally:
        client.close()


def resolve_zones(zones: Sequence[Path]) -> list[Path]:
    """All zones of the store: several are taken as they are, a single one stands for its whole store."""
    return zone_paths(zones[0]) if len(zones) == 1 else list(zones)


def _connect_or_open(
    zones: Sequence[Path], settings: StoreSettings, read_only: bool, force: bool
) -> ControlClient | OfflineAdmin | None:
    """None: the zones are locked, and their holder doesn't answer at the moment."""
    note = note_of(zones)
    if note is None:
        try:
            return OfflineAdmin(resolve_zones(zones), settings, read_only=read_only, force=force)
        except Busy:
            return None
    if not note.control:
        return None
    try:
        return ControlClient(note.control)
    except NoServer:
        return None


def note_of(zones: Sequence[Path]) -> LockNote | None:
    """The lock note of the first zone that can be read; the first zone's error if none can."""
    first_error: StoreError | None = None
    for zone in zones:
        try:
            text = lock_note(zone)
            return None if text is None else msgspec.json.decode(text, type=LockNote)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"zone {zone}: its lock is held by something that is not sheepfold") from error
        except StoreError as error:
            first_error = first_error or error
    assert first_error is not None  # there is at least one zone
    raise first_error


def holder(zones: Sequence[Path]) -> str:
    note = note_of(zones)
    return "another process" if note is None else f"process {note.pid}"

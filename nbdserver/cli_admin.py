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
from nbdserver.control_api import LockNote, Status
from nbdserver.control_client import ControlClient, NoServer
from objstore.errors import Busy, InvalidRequest, StoreError
from objstore.volume.settings import StoreSettings
from objstore.volume.status import VdiStatus
from objstore.volume.store import Store, lock_note, open_store, zone_paths

WAIT_SECONDS: Final = 10.0
"""How long a command waits for zones that somebody is just opening or giving back."""

POLL_SECONDS: Final = 0.1


class Admin(Protocol):
    """What a command does to a store; the same over the control socket and over zones opened here."""

    def status(self) -> Status: ...
    def vdis(self) -> list[VdiStatus]: ...
    def vdi(self, name: str) -> VdiStatus: ...
    def create_vdi(self, name: str, size_bytes: int, *, copies: int | None, mode: str, prealloc: bool) -> VdiStatus: ...
    def delete_vdi(self, name: str) -> None: ...


class OfflineAdmin:
    """Opens the zones in this process, in an event loop of its own."""

    def __init__(self, zones: Sequence[Path], settings: StoreSettings) -> None:
        """Raises what open_store raises; Busy if a server got there first."""
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        note = msgspec.json.encode(LockNote(pid=os.getpid())).decode()
        try:
            self._store: Store = self._runner.run(open_store(zones, settings=settings, lock_note=note))
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

    def vdis(self) -> list[VdiStatus]:
        return self._store.vdis()

    def vdi(self, name: str) -> VdiStatus:
        return self._store.vdi(name)

    def create_vdi(self, name: str, size_bytes: int, *, copies: int | None, mode: str, prealloc: bool) -> VdiStatus:
        return self._runner.run(self._store.create_vdi(name, size_bytes, copies=copies, mode=mode, prealloc=prealloc))

    def delete_vdi(self, name: str) -> None:
        self._runner.run(self._store.delete_vdi(name))


@contextmanager
def open_admin(zones: Sequence[Path], settings: StoreSettings) -> Iterator[Admin]:
    """The store that has one of `zones`. Busy if its owner does not answer for WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    with progress("waiting for the store"):
        admin = _connect_or_open(zones, settings)
        while admin is None:
            if time.monotonic() > deadline:
                raise Busy(f"zone {zones[0]} is in use by {_holder(zones)} which does not answer")
            time.sleep(POLL_SECONDS)
            admin = _connect_or_open(zones, settings)
    if isinstance(admin, ControlClient):
        try:
            yield admin
        finally:
            admin.close()
    else:
        with admin:
            yield admin


def resolve_zones(zones: Sequence[Path]) -> list[Path]:
    """All zones of the store: several are taken as they are, a single one stands for its whole store."""
    return zone_paths(zones[0]) if len(zones) == 1 else list(zones)


def _connect_or_open(zones: Sequence[Path], settings: StoreSettings) -> ControlClient | OfflineAdmin | None:
    """None: the zones are locked, and their holder doesn't answer at the moment."""
    note = _note(zones)
    if note is None:
        try:
            return OfflineAdmin(resolve_zones(zones), settings)
        except Busy:
            return None
    if not note.control:
        return None
    try:
        return ControlClient(note.control)
    except NoServer:
        return None


def _note(zones: Sequence[Path]) -> LockNote | None:
    """The lock note of the first zone that can be read; the first zone's error if none can."""
    first_error: StoreError | None = None
    for zone in zones:
        try:
            text = lock_note(zone)
            return None if text is None else msgspec.json.decode(text, type=LockNote)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"zone {zone}: its lock is held by something that is not sheepfold") from error
        except StoreError as error:
            first_error = first_error or error
    assert first_error is not None  # there is at least one zone
    raise first_error


def _holder(zones: Sequence[Path]) -> str:
    note = _note(zones)
    return "another process" if note is None else f"process {note.pid}"

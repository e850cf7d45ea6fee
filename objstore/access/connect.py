"""How a connection is made: to zones opened here, or to the server that has them open."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from objstore.access.api import LockNote
from objstore.access.connection import Connection
from objstore.access.pending import Pending
from objstore.errors import InvalidRequest
from objstore.volume.directories import lock_note, zone_paths
from objstore.volume.settings import StoreSettings


def connect(
    zones: Sequence[Path | str] = (),
    *,
    socket: Path | str | None = None,
    settings: StoreSettings | None = None,
    create: bool = False,
    force: bool = False,
    read_only: bool = False,
) -> Pending[Connection]:
    """Connect: `await connect(...)`, or `async with connect(...) as connection`.

    zones: directories that this process opens itself; one zone of a store stands for all of them. Busy: another process
    has them (`control_socket` tells how to reach it). create: empty or missing directories become a new store. force:
    open it although zones are missing that may hold something newer, which is given up. read_only: to look at status
    and lists; no VDI can be opened. settings: limits of the store.

    socket: the control socket of a running server, instead of zones. Unavailable: nobody answers there.
    """

    async def begin() -> Connection:
        if socket is not None:
            if zones or settings is not None or create or force or read_only:
                raise InvalidRequest("a server has its zones and their settings: give a socket alone")
            from objstore.access.remote import connect_server

            return await connect_server(socket)
        if not zones:
            raise InvalidRequest("connect to what? Give zones, or the socket of a server")
        from objstore.access.local import LocalConnection
        from objstore.volume.store import open_store

        note = msgspec.json.encode(LockNote(pid=os.getpid())).decode()
        paths = zones if create or len(zones) > 1 else zone_paths(zones[0])
        opened = await open_store(
            paths, settings=settings, create=create, lock_note=note, force=force, read_only=read_only
        )
        return LocalConnection(opened)

    return Pending(begin)


def control_socket(zone: Path | str) -> Path | None:
    """The control socket of the server that has this zone's store open; None: nobody has. NotFound: no such directory.
    InvalidRequest: whoever has it is reached in no such way."""
    text = lock_note(zone)
    if text is None:
        return None
    try:
        note = msgspec.json.decode(text, type=LockNote)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"zone {zone}: its lock is held by something that is not sheepfold") from error
    if not note.control:
        raise InvalidRequest(f"zone {zone} is held by process {note.pid}, which has no control socket")
    return Path(note.control)

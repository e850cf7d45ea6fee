"""How the check reaches the objects of a zone: a small reader protocol, and directories as the one that users have.

The store's lock is only looked at, or taken shared so that no server starts under a running check; nothing is written
unless a repair asks for it.
"""

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol

from objstore.errors import Busy, NotFound, Unavailable

TOP_NAMES: Final = frozenset({"superblock", "epoch", "catalog", "log", "checkpoint", "scrub", "recovery"})
APART: Final = frozenset({"lock", "tmp", "spare"})
"""What a zone's directory has beside its objects."""
LOCK_NOTE_BYTES_MAX: Final = 4096

_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2): type, whence, start, length, pid."""


class ZoneReader(Protocol):
    """The objects of one zone. OSError: the zone can't tell. label: what messages call it."""

    @property
    def label(self) -> str: ...

    def list(self, folder: str) -> Sequence[str]:
        """Names right below `folder` ("" = the zone itself), folders included; none if there is no such folder."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is no such object."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """These bytes, fewer at the end of the object. FileNotFoundError: no such object."""
        ...


class ZoneWriter(ZoneReader, Protocol):
    """A zone that can be repaired."""

    def put(self, name: str, data: bytes) -> None:
        """Make the object appear whole and durable, in place of one that is there."""
        ...

    def remove(self, name: str) -> None:
        """Remove the object durably."""
        ...


class DirectoryZone:
    """A directory."""

    def __init__(self, path: Path) -> None:
        """Unavailable: it is not there; a disk that is not mounted looks like that. NotFound: it is no directory."""
        if not os.path.lexists(path):
            raise Unavailable(f"the zone is missing: there is no directory {path}")
        if not path.is_dir():
            raise NotFound(f"{path} is no directory")
        self._path = path

    @property
    def label(self) -> str:
        return str(self._path)

    def list(self, folder: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(self._path / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        try:
            status = os.stat(self._path / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if os.path.isfile(self._path / name) else None

    def read(self, name: str, offset: int, length: int) -> bytes:
        descriptor = os.open(self._path / name, os.O_RDONLY)
        try:
            pieces = []
            while length:
                piece = os.pread(descriptor, length, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def put(self, name: str, data: bytes) -> None:
        target = self._path / name
        temporary = self._path / "tmp" / f"check-{os.getpid()}"
        for folder in (temporary.parent, target.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(folder.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, target)
        _sync_folder(target.parent)

    def remove(self, name: str) -> None:
        target = self._path / name
        target.unlink(missing_ok=True)
        _sync_folder(target.parent)

    @contextmanager
    def locked(self, *, exclusive: bool) -> Iterator[None]:
        """Keep servers away from the zone. Busy: one has it, or, for an exclusive lock, another check.

        Shared: nothing is written and the directory may be read-only. Without a lock file no server was ever here.
        """
        try:
            descriptor = os.open(self._path / "lock", os.O_RDWR if exclusive else os.O_RDONLY)
        except FileNotFoundError:
            yield
            return
        try:
            kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise Busy(f"zone {self._path} is in use by {_holder(descriptor)}; stop it first") from error
            yield
        finally:
            os.close(descriptor)


@contextmanager
def all_locked(zones: Sequence[DirectoryZone], *, exclusive: bool) -> Iterator[None]:
    """Every zone's lock (DirectoryZone.locked)."""
    with ExitStack() as locks:
        for zone in zones:
            locks.enter_context(zone.locked(exclusive=exclusive))
        yield


def _holder(descriptor: int) -> str:
    """Who has the lock, by the note in its file."""
    note = os.pread(descriptor, LOCK_NOTE_BYTES_MAX, 0)
    found = re.search(rb'"pid":\s*([0-9]+)', note)
    return f"process {int(found[1])}" if found else "another process"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

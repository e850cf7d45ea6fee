"""The contract of a backend: how one zone keeps its objects.

Conformance suite: tests/contract/backend_*contract.py. All methods block and are called from a zone's threads, at most
one call per handle at a time (several handles at once), except `Handle.read_nowait`, which the event loop calls too.

Names are relative paths of 1-8 parts of [a-z0-9._-], e.g. "log/000001/0000002a"; folders come into being by themselves.
Errors: NotFound, NoSpace (full; nothing done, or for a handle: unknown), Exists, Conflict (see replace_if), and
ZoneFailed for every other error of the operating system, with the zone's path, the call and errno in its message. After
ZoneFailed what was being written is unknown, and no call repeats it (DESIGN.md, "4. An error is final").
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from objstore.errors import StoreError, Unavailable


class ZoneFailed(Unavailable):
    """The zone's storage returned an error; final for this view of the zone."""


class Conflict(StoreError):
    """replace_if found other contents than expected; nothing done."""


class Entry(NamedTuple):
    """One object in a listing."""

    name: str
    size_bytes: int


class Handle(ABC):
    """An open object: a file that grows to a size that was set aside for it, or a finished one."""

    name: str
    size_bytes: int
    recycled: bool = False
    """The file was written before (`Backend.retire`): writing it again allocates nothing."""

    @abstractmethod
    def write(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Write all the buffers one behind the other from offset_bytes on (inside the size set aside). Not durable.
        NoSpace (file systems that copy on write): nothing was sent to the device, the same write may be tried again."""

    @abstractmethod
    def write_soon(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """As write, and the transfer to the medium begins at once as far as the backend can; not waited for."""

    @abstractmethod
    def write_around(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """As write, for what is not going to be read here: around the host's cache as far as the backend can."""

    @abstractmethod
    def write_durable(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """As write, and exactly these bytes are durable on return; promises nothing about earlier writes. NoSpace:
        these bytes are unknown, and no others; they may be written again."""

    def open_around(self) -> None:
        """Make ready for `begin_durable` around the host's cache, if the backend can do that; it need not."""
        return

    def begin_durable(self, offset_bytes: int, length_bytes: int, *, around: bool) -> int:
        """The caller will have the kernel write these bytes with RWF_DSYNC by itself, instead of `write_durable`: the
        descriptor for it; -1: only `write_durable` will do. around: as `write_around`, from memory that starts at a
        page. `end_durable` follows. Never waits."""
        return -1

    def end_durable(self, length_bytes: int, result: int) -> bool:
        """What came of that: bytes written or a negative errno. False: the kernel has not taken it, or not all of it,
        and named no error; `write_durable` will. Raises what that would. Never waits."""
        return False

    @abstractmethod
    def sync(self) -> None:
        """Every write of this handle that returned before this call is durable on return. After an error, NoSpace
        included, nothing is known, and every later sync or write_durable of the handle is ZoneFailed."""

    @abstractmethod
    def truncate(self, size_bytes: int) -> None:
        """Cut the object to size_bytes (<= its size) and give the rest of the space back; durable with next sync."""

    @abstractmethod
    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers one behind the other; returns the bytes read, fewer only at the end of the object."""

    @abstractmethod
    def read_nowait(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """As read, but only from memory: returns -1 where it would have to wait for the device (or can't tell)."""

    @abstractmethod
    def read_uncached(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """As read, around any cache of the host as far as the backend can: what is on the medium."""

    @abstractmethod
    def close(self) -> None:
        """Give the descriptor back. Idempotent. Makes nothing durable."""


class Writer(ABC):
    """A whole object under construction (`Backend.put_stream`): invisible until commit."""

    @abstractmethod
    def write(self, buffers: Sequence[memoryview | bytes]) -> None:
        """Append the buffers."""

    @abstractmethod
    def commit(self) -> None:
        """The object appears under its name, whole and durable, name included, replacing any former one."""

    @abstractmethod
    def abort(self) -> None:
        """Throw away what was written; idempotent, also after commit (then it does nothing)."""


class Backend(ABC):
    """Where one zone keeps its objects.

    device: equal for backends whose syncs wait for the same device anyway (None: nothing is known); see lane.py.
    """

    device: int | None = None

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Store a whole object: on return it is durable, name included; a crash leaves the old one or the new one."""

    @abstractmethod
    def put_stream(self, name: str) -> Writer:
        """As put for an object too large to hold in memory."""

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> None:
        """As put, but Exists if the name is taken; of several callers at once exactly one wins."""

    @abstractmethod
    def replace_if(self, name: str, expected: bytes, data: bytes) -> None:
        """As put, but Conflict unless the object's contents are `expected`; of several callers exactly one wins
        (among the users of one lock holder; see `lock`)."""

    @abstractmethod
    def get(self, name: str) -> bytes:
        """The whole object. NotFound."""

    @abstractmethod
    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        """A new object of size_bytes, all of it set aside (later writes inside can't meet NoSpace); Exists if taken.

        Contents are undefined until written (a recycled file shows its former life). The name is durable on return.
        reserve_bytes: NoSpace also if less than this would be free afterwards.
        """

    @abstractmethod
    def open(self, name: str) -> Handle:
        """Open an object for reading. NotFound."""

    @abstractmethod
    def list(self, prefix: str) -> list[Entry]:
        """Every object whose name starts with the folder `prefix` (e.g. "log/000001/"; "" = all), sorted by name.
        A folder that does not exist is empty. Unfinished puts do not show."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; open handles go on reading it. Absent is not an error. The removal need not be durable."""

    @abstractmethod
    def delete_all(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`; on return the removals are durable, those of earlier `delete`
        calls there included. Nobody creates objects there meanwhile."""

    @abstractmethod
    def retire(self, name: str) -> None:
        """As delete, but the backend may keep the file in a bounded pool for `create` to use again.
        The caller promises that nobody reads the object any more and no call on it is outstanding."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Space left for new objects."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Space that this backend's objects take now, its pool included (st_blocks on directories)."""

    @abstractmethod
    def check(self) -> None:
        """ZoneFailed or NotFound unless the zone is still where it was opened, is the same one and can be written."""

    @abstractmethod
    def lock(self, note: str) -> None:
        """Take the exclusive lock of this zone until close or the end of the process; Busy names the holder's note.
        `note` (one line, e.g. pid and control socket) can be read by others with `lock_note`."""

    @abstractmethod
    def lock_note(self) -> str | None:
        """The note of the present holder of the lock, None if nobody holds it."""

    @abstractmethod
    def close(self) -> None:
        """Close the lock and everything that the backend itself holds open. Idempotent."""

"""What the network side may ask of a volume: the contract that every kind of volume keeps.

Conformance suite: tests/contract/volume_contract.py (run over the memory volume and over VDIs of a store).

Two ways in, one meaning. The `*_now` methods are for the hot path: they finish at once or say that they can't and have
done nothing. The coroutines always finish. A caller tries the first and falls back to the second.

Order: a write that was acknowledged before another was submitted is before it in the log. Requests in flight together
that overlap have no order among them (proto.md, "Ordering of messages and writes").
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from objstore.units import MIB

REQUEST_BYTES_MAX = 64 * MIB
"""Largest read or write that a volume takes in one call. Trim, zero, cache and extents have no such limit."""


class Extent(NamedTuple):
    """A run of bytes with one state, in ascending order, never empty. `hole` = not allocated, `zero` = reads as zeros.

    Three states occur: data (False, False), hole (True, True), reserved zeros (False, True).
    """

    length_bytes: int
    hole: bool
    zero: bool


class Change(NamedTuple):
    """A run of bytes that differs, or does not, from what an older volume has there; in ascending order, never empty.

    hole, zero: of what has changed, what it is now, as in an Extent; both False where nothing has changed.
    """

    length_bytes: int
    changed: bool
    hole: bool = False
    zero: bool = False


def always() -> bool:
    """The default `alive`: a caller that never goes away."""
    return True


class Limiter(Protocol):
    """Bounds what the clients of a volume may do in a second (objstore.volume.throttle)."""

    def take(self, *, write: bool, length_bytes: int) -> bool:
        """Whether a request may go at once; then it is counted."""
        ...

    async def wait(self, owner: object, *, write: bool, length_bytes: int) -> bool:
        """Return when the request may go; it is counted then. False: it is not to be done (`dismiss`)."""
        ...

    def dismiss(self, owner: object, *, go: bool) -> None:
        """Let nothing of this owner wait any more: it goes at once, or is not done."""
        ...


class Volume(Protocol):
    """A disk. Offsets and lengths are bytes, any alignment; length 0 is valid and does nothing.

    Every method: InvalidRequest for negative numbers or an over-long request; OutOfRange past the end (nothing done);
    Unavailable when zones failed; Fenced, Stopping when the handle is finished. Writing methods: ReadOnly, NoSpace.
    Unless said otherwise an error means that nothing was changed.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str:
        """One line for people: mode, copies."""
        ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def limiter(self) -> Limiter | None:
        """Whom to ask before each request of a client; None: nothing is limited. It may change between requests."""
        ...

    @property
    def weight(self) -> int:
        """Its part of what the server can do when several volumes want more than that, relative to theirs."""
        ...

    def read_now(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        """Read without waiting, if everything is at hand; never raises for damage or misses, only for bad ranges.

        into: writable, contiguous, exactly length_bytes long.
        Returns how many of the bytes are known to be zeros without data behind them (holes, reserved zeros):
            0 = all data; between = `into` is filled, zeros included, and `extents` tells where they are;
            length_bytes = nothing but zeros, and `into` was NOT touched. -1 = can't now; `into` may be scribbled on.
        """
        ...

    async def read(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        """As read_now, waiting where necessary. Corrupt: every byte outside of its `bad` ranges has been filled
        (zeros included)."""
        ...

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        """Put a write into the log without waiting and without promising durability. data: borrowed until return.

        True: acknowledged as `writeback` acknowledges. False: nothing done, call `write` (the volume is in
        write-through mode, its dirty data stands at the limit, others wait already, a block must be read first, ...).
        Raises like write.
        """
        ...

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """Write `data`; borrowed and unchanged by the caller until return.

        fua: return only when the write is durable on every zone in service that holds it.
        alive: asked immediately before the write takes its place in the log; False drops the write (InvalidRequest):
            the connection that asked for it is gone (DESIGN.md, "22. A request whose client is gone doesn't
            overtake its successor").
        """
        ...

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """Make the whole blocks inside the range holes that read as zeros; partial blocks at its ends are unchanged."""
        ...

    async def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
        alive: Callable[[], bool] = always,
    ) -> None:
        """Make the range read as zeros. no_hole: whole blocks are no holes afterwards (`extents`); NoSpace if there is
        no room for them now. Only a preallocated volume promises that a later write finds its space. fast: raise
        NotSupported, nothing changed, where it takes more than a change of the map."""
        ...

    def flush_state(self) -> int:
        """What a flush would have to do now: 0 = nothing, all that was acknowledged is durable (and this call counts as
        that flush). Otherwise a number that changes with every acknowledged change: a flush that is under way and was
        begun at the same number will do for a new one."""
        ...

    def sync_soon(self) -> None:
        """A flush is expected next: what it will have to do may begin. Promises nothing, never waits or raises."""
        ...

    async def flush(self) -> None:
        """Return when everything acknowledged before this call, on any connection, is durable on every zone in service
        that holds it (mode `unsafe`: returns at once)."""
        ...

    async def cache(self, offset_bytes: int, length_bytes: int) -> None:
        """Advise that the range will be read soon. Never changes contents; failing silently is allowed."""
        ...

    async def extents(self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14) -> list[Extent]:
        """State of the range from its start: neighbours of equal state merged, at most extents_max extents, never past
        the end of the range; a bounded amount of work, so the list may cover less than asked for (at least one byte,
        length_bytes > 0 required)."""
        ...

    async def changed(
        self, since: "Volume", offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[Change]:
        """What differs in the range between `since`, another volume of the same store, and this one; covers a first
        part of it, as `extents` does. Whole blocks of 4 KiB count: never too little, and data that collection has moved
        is none of it. Bytes behind the end of `since` have changed where they are no hole. InvalidRequest: `since` is
        another store's; NotSupported: nobody knows."""
        ...

    async def depths(
        self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[tuple[int, int]]:
        """(length_bytes, depth), covering a first part of the range as `extents` does: 0 where nothing is allocated,
        1 where the data is the volume's own, 2 where it is shared with what it is a clone of, and so on."""
        ...


class Holder(Protocol):
    """Who opens volumes of a source for others and can be made to give one back."""

    async def give_up(self, volume: Volume, reason: str, *, orderly: bool) -> None:
        """Close every connection and handle that has this volume open; nothing that was asked for through one of them
        and has not happened yet happens any more. Returns when all of them are closed.

        orderly: what connections have received is done and answered first, as far as that doesn't take long.
        """
        ...


class VolumeSource(Protocol):
    """Where the network side gets its volumes by name (a store; in tests a dictionary of memory volumes)."""

    def names(self, *, snapshots: bool = False) -> list[str]:
        """Names that can be opened, sorted; snapshots: those of snapshots too."""
        ...

    def peek(self, name: str) -> "VolumeInfo | None":
        """What INFO needs, without opening the volume's log; None = no such volume."""
        ...

    def tags(self, name: str) -> list[str]:
        """The snapshots that a volume can be compared with (Volume.changed), each as TAG so that the volume they are
        opened as is NAME@TAG, where NAME is `name` up to its "@"; without opening anything."""
        ...

    async def open(self, name: str) -> Volume:
        """The volume, ready for I/O; every open is paired with one close. NotFound, Unavailable, Corrupt, Busy."""
        ...

    async def close(self, volume: Volume) -> None:
        """Give the volume back. The last close starts a flush."""
        ...


class VolumeInfo(NamedTuple):
    """What a client may know before it enters transmission. refused: why nobody may; empty: it may be opened."""

    name: str
    size_bytes: int
    read_only: bool
    description: str
    refused: str = ""
    identity: str = ""
    """What stays the same as long as a client may go on where it was; empty: nobody can say."""

"""An open VDI as the library's users see it; what is alike in this process and behind a server."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

from objstore.access import transfer
from objstore.access.buffers import Buffer, cut, readable, writable
from objstore.access.transfer import Hole, Stream
from objstore.errors import Fenced, InvalidRequest, OutOfRange, ReadOnly
from objstore.volume.base import Change, Extent

E = TypeVar("E", Extent, Change)

MAP_EXTENTS_MAX: Final = 1 << 12
"""Extents that one question to the volume may bring."""


class VdiHandle(ABC):
    """An open VDI. Offsets and lengths are bytes, any alignment; a length of 0 does nothing.

    Every method raises OutOfRange past the end and InvalidRequest for negative numbers or through a handle that was
    closed (nothing done); Fenced: the handle is dead for another reason, open the VDI again; Unavailable: zones or the
    server failed; Corrupt: every copy of some blocks is damaged (`bad` says which). Changes raise ReadOnly and NoSpace.

    Several calls may be under way at once. Changes that overlap have no order among them then; those that were awaited
    one after the other have. A change of at most `piece_bytes_max` bytes happens as a whole or not; a longer one is
    several of them, in ascending order.
    """

    piece_bytes_max: int

    def __init__(self, name: str, size_bytes: int, description: str, *, read_only: bool) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.description = description
        """Mode and copies, for people."""
        self.read_only = read_only
        self.closed = False
        self.fenced: Fenced | None = None
        """Why it was closed by somebody else; None: it was not."""

    async def __aenter__(self) -> "VdiHandle":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<VDI {self.name!r} of {self.size_bytes} bytes{', closed' if self.closed else ''}>"

    # -- reading ------------------------------------------------------------------------------------------------

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """So many bytes; what was never written is zeros."""
        self._check(offset_bytes, length_bytes)
        data = bytearray(length_bytes)
        await self._read_all(offset_bytes, memoryview(data))
        return bytes(data)

    async def readinto(self, offset_bytes: int, buffer: Buffer) -> int:
        """Fill a writable buffer, zeros included; returns its length."""
        view = writable(buffer)
        self._check(offset_bytes, len(view))
        await self._read_all(offset_bytes, view)
        return len(view)

    async def readv(self, extents: Sequence[tuple[int, int]], buffers: Sequence[Buffer]) -> int:
        """Read extents (offset, length), one behind the other, into buffers, one behind the other: both lists have the
        same number of bytes in all and may be cut anywhere. Returns that number."""
        for offset, length in extents:
            self._check(offset, length)
        total = 0
        for offset, length, pieces in cut(extents, [writable(buffer) for buffer in buffers]):
            if len(pieces) == 1:
                await self._read_all(offset, pieces[0])
            else:
                whole = memoryview(bytearray(length))
                await self._read_all(offset, whole)
                at = 0
                for piece in pieces:
                    piece[:] = whole[at : at + len(piece)]
                    at += len(piece)
            total += length
        return total

    async def _read_all(self, offset: int, view: memoryview) -> None:
        step = self.piece_bytes_max
        if len(view) <= step:
            if view:
                await self._read(offset, view)
            return
        for start in range(0, len(view), step):
            await self._read(offset + start, view[start : start + step])

    async def map(self, offset_bytes: int = 0, length_bytes: int = 0) -> AsyncIterator[Extent]:
        """What is data, hole and reserved zeros in a range (length 0 = to the end), ascending, neighbours of equal
        state joined."""
        async for extent in self._described(offset_bytes, length_bytes, self._extents):
            yield extent

    async def changes(self, since: "VdiHandle", offset_bytes: int = 0, length_bytes: int = 0) -> AsyncIterator[Change]:
        """What differs in a range (length 0 = to the end) between `since`, a handle of another VDI or snapshot of the
        same connection, and this one: whole blocks of 4 KiB, never too few; ascending, neighbours of equal state
        joined. It costs what the change costs. Bytes behind the end of `since` have changed where they are no hole. Of
        a VDI that others write it is no one moment: compare snapshots. InvalidRequest: another connection's handle."""
        since._check(0, 0)
        async for change in self._described(
            offset_bytes, length_bytes, lambda at, left: self._changed(since, at, left)
        ):
            yield change

    async def _described(
        self, offset_bytes: int, length_bytes: int, ask: Callable[[int, int], Awaitable[list[E]]]
    ) -> AsyncIterator[E]:
        """What `ask` says of a range, piece by piece, joined."""
        length_bytes = length_bytes or self.size_bytes - offset_bytes
        self._check(offset_bytes, length_bytes)
        at, end = offset_bytes, offset_bytes + length_bytes
        last: E | None = None
        while at < end:
            for extent in await ask(at, end - at):
                at += extent.length_bytes
                if last is None:
                    last = extent
                elif last[1:] == extent[1:]:
                    last = last._replace(length_bytes=last.length_bytes + extent.length_bytes)
                else:
                    yield last
                    last = extent
        if last is not None:
            yield last

    # -- changing -----------------------------------------------------------------------------------------------

    async def write(self, offset_bytes: int, data: Buffer, *, writeback: bool | None = None) -> int:
        """Write all of `data`; returns its length. The buffer is borrowed until then.

        writeback: False = durable on return, on every zone in service that holds it. True = acknowledged from memory
        where the VDI's mode allows it, durable with the next `flush` (or within `dirty_age_seconds`). None = as the
        VDI's mode says for NBD clients: it begins like False and becomes True with the first flush.
        """
        view = readable(data)
        self._check_change(offset_bytes, len(view))
        await self._write_all(offset_bytes, view, writeback)
        return len(view)

    async def writev(
        self, extents: Sequence[tuple[int, int]], buffers: Sequence[Buffer], *, writeback: bool | None = None
    ) -> int:
        """As readv, in the other direction: one write for each extent. Returns the number of bytes."""
        for offset, length in extents:
            self._check_change(offset, length)
        total = 0
        for offset, length, pieces in cut(extents, [readable(buffer) for buffer in buffers]):
            whole = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
            await self._write_all(offset, whole, writeback)
            total += length
        return total

    async def _write_all(self, offset: int, view: memoryview, writeback: bool | None) -> None:
        step = self.piece_bytes_max
        if len(view) <= step:
            if view:
                await self._write(offset, view, writeback)
            return
        for start in range(0, len(view), step):
            await self._write(offset + start, view[start : start + step], writeback)

    async def zero(self, offset_bytes: int, length_bytes: int, *, no_hole: bool = False) -> None:
        """Make the range read as zeros, to the byte. no_hole: its whole blocks stay allocated."""
        self._check_change(offset_bytes, length_bytes)
        if length_bytes:
            await self._zero(offset_bytes, length_bytes, no_hole)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give back the whole blocks inside the range; they read as zeros. Blocks in it by a part stay as they are."""
        self._check_change(offset_bytes, length_bytes)
        if length_bytes:
            await self._discard(offset_bytes, length_bytes)

    async def flush(self) -> None:
        """Return when every change of this VDI that was complete before this call, whoever made it, is durable on
        every zone in service that holds it (mode `unsafe`: at once)."""
        self._check(0, 0)
        await self._flush()

    async def close(self) -> None:
        """Give the handle back. What was not flushed becomes durable soon, but nobody is told. Idempotent."""
        if not self.closed:
            self.closed = True
            await self._close()

    # -- whole ranges ---------------------------------------------------------------------------------------------

    def download(self, offset_bytes: int = 0, length_bytes: int = 0) -> AsyncIterator[bytes | Hole]:
        """The contents of a range (length 0 = to the end) as a stream: pieces of at most 1 MiB, and what has no data as
        `Hole`s. While others write it is no one moment of the VDI: for that, download a snapshot."""
        return transfer.download(self, self.map(offset_bytes, length_bytes), offset_bytes)

    async def upload(
        self, stream: Stream, offset_bytes: int = 0, length_bytes: int = 0, *, zero_rest: bool = False
    ) -> int:
        """Write a stream to a range (length 0 = to the end); returns how many bytes it had, all durable then. Whole
        blocks of zeros in it become holes, like its `Hole`s.

        A stream that is shorter leaves the rest of the range as it was; zero_rest: zeros. One that is longer is an
        InvalidRequest, and the range holds its beginning.
        """
        length_bytes = length_bytes or max(0, self.size_bytes - offset_bytes)
        self._check_change(offset_bytes, length_bytes)
        return await transfer.upload(self, stream, offset_bytes, length_bytes, zero_rest=zero_rest)

    # -- what the two kinds do ----------------------------------------------------------------------------------

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        if self.closed:
            raise self.fenced or InvalidRequest(f"the handle of VDI {self.name!r} was closed")
        if offset_bytes < 0 or length_bytes < 0:
            raise InvalidRequest(f"impossible range offset={offset_bytes} length={length_bytes}")
        if offset_bytes + length_bytes > self.size_bytes:
            raise OutOfRange(f"past the end offset={offset_bytes} length={length_bytes} size={self.size_bytes}")

    def _check_change(self, offset_bytes: int, length_bytes: int) -> None:
        self._check(offset_bytes, length_bytes)
        if self.read_only:
            raise ReadOnly(f"VDI {self.name!r} was opened to be read only")

    @abstractmethod
    async def _read(self, offset: int, view: memoryview) -> None:
        """Fill the whole view; at most piece_bytes_max."""

    @abstractmethod
    async def _write(self, offset: int, view: memoryview, writeback: bool | None) -> None: ...

    @abstractmethod
    async def _zero(self, offset: int, length: int, no_hole: bool) -> None: ...

    @abstractmethod
    async def _discard(self, offset: int, length: int) -> None: ...

    @abstractmethod
    async def _flush(self) -> None: ...

    @abstractmethod
    async def _extents(self, offset: int, length: int) -> list[Extent]:
        """The state of the range from its start, at least one byte of it, at most MAP_EXTENTS_MAX extents."""

    @abstractmethod
    async def _changed(self, since: "VdiHandle", offset: int, length: int) -> list[Change]:
        """The same for what differs from `since`."""

    @abstractmethod
    async def _close(self) -> None: ...

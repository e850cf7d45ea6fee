"""Whole ranges in and out of an open VDI as streams, holes kept."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Final, NamedTuple, Protocol, TypeAlias

from objstore.access.buffers import Buffer, readable
from objstore.errors import InvalidRequest
from objstore.units import BLOCK_BYTES, BLOCK_MASK, MIB
from objstore.volume.base import Extent

PIECE_BYTES: Final = MIB
"""What one step of a transfer moves, and what it keeps in memory."""

_ZEROS: Final = memoryview(bytes(PIECE_BYTES))


class Hole(NamedTuple):
    """So many bytes of zeros without data behind them, as an item of a stream."""

    length_bytes: int


Stream: TypeAlias = "AsyncIterable[Buffer | Hole] | Iterable[Buffer | Hole]"
"""Items of any length, one behind the other."""


class Target(Protocol):
    """What a transfer needs of handle.VdiHandle."""

    name: str

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes: ...
    async def write(self, offset_bytes: int, data: Buffer, *, writeback: bool | None = None) -> int: ...
    async def zero(self, offset_bytes: int, length_bytes: int) -> None: ...
    async def flush(self) -> None: ...


async def download(vdi: Target, extents: AsyncIterator[Extent], offset_bytes: int) -> AsyncIterator[bytes | Hole]:
    """The contents of consecutive extents from offset_bytes on."""
    async for extent in extents:
        end = offset_bytes + extent.length_bytes
        if extent.zero:
            yield Hole(extent.length_bytes)
        else:
            for start in range(offset_bytes, end, PIECE_BYTES):
                yield await vdi.read(start, min(PIECE_BYTES, end - start))
        offset_bytes = end


class _Uploader:
    """Puts a stream's bytes into a range: whole blocks of zeros become holes, small items are put together."""

    def __init__(self, vdi: Target, offset_bytes: int, length_bytes: int) -> None:
        self._vdi = vdi
        self._at = offset_bytes
        self._end = offset_bytes + length_bytes
        self._data = bytearray()
        """Stands at `_at`."""
        self._zeros = 0
        """So many bytes in front of `_at` are still to be zeroed."""

    @property
    def room(self) -> int:
        """Bytes of the range that nothing was given for yet."""
        return self._end - self._at - len(self._data)

    async def add(self, view: memoryview) -> None:
        """More data; at most `room`."""
        while view:
            # Pieces end where blocks of the VDI end.
            space = PIECE_BYTES - (self._at & BLOCK_MASK) - len(self._data)
            self._data += view[:space]
            view = view[space:]
            if self.room and len(self._data) >= PIECE_BYTES - (self._at & BLOCK_MASK):
                await self._put()

    async def skip(self, length: int) -> None:
        """A hole; at most `room`."""
        await self._put()
        self._zeros += length
        self._at += length

    async def finish(self) -> None:
        """Everything is in the VDI."""
        await self._put()
        await self._zero()

    async def _zero(self) -> None:
        if self._zeros:
            await self._vdi.zero(self._at - self._zeros, self._zeros)
            self._zeros = 0

    async def _put(self) -> None:
        data, self._data = memoryview(self._data), bytearray()
        for length, zero in _runs(data, self._at):
            if zero:
                self._zeros += length
            else:
                await self._zero()
                await self._vdi.write(self._at, data[:length], writeback=True)
            data = data[length:]
            self._at += length


def _runs(data: memoryview, offset: int) -> list[tuple[int, bool]]:
    """The data as runs of (length, whether it is whole blocks of zeros)."""
    found: list[tuple[int, bool]] = []
    at = 0
    while at < len(data):
        length = min(BLOCK_BYTES - (offset + at & BLOCK_MASK), len(data) - at)
        zero = length == BLOCK_BYTES and data[at : at + length] == _ZEROS[:length]
        if found and found[-1][1] == zero:
            found[-1] = (found[-1][0] + length, zero)
        else:
            found.append((length, zero))
        at += length
    return found


async def upload(vdi: Target, stream: Stream, offset_bytes: int, length_bytes: int, *, zero_rest: bool) -> int:
    """See VdiHandle.upload; the range is checked."""
    uploader = _Uploader(vdi, offset_bytes, length_bytes)
    async for item in _items(stream):
        length = item.length_bytes if isinstance(item, Hole) else len(readable(item))
        if length < 0:
            raise InvalidRequest(f"a hole of {length} bytes")
        fits = min(length, uploader.room)
        if isinstance(item, Hole):
            await uploader.skip(fits)
        else:
            await uploader.add(readable(item)[:fits])
        if fits < length:
            await uploader.finish()
            await vdi.flush()
            raise InvalidRequest(f"the stream is longer than the {length_bytes} bytes of its range, which were written")
    done = length_bytes - uploader.room
    if zero_rest and uploader.room:
        await uploader.skip(uploader.room)
    await uploader.finish()
    await vdi.flush()
    return done


async def _items(stream: Stream) -> AsyncIterator[Buffer | Hole]:
    if isinstance(stream, AsyncIterable):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item

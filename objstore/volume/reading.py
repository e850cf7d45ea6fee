"""Byte ranges over a map of whole blocks: the reading half of a volume, for VDIs and for snapshots."""

import asyncio

from objstore.errors import Corrupt, InvalidRequest, OutOfRange, StoreError
from objstore.log.address import HOLE, RESERVED
from objstore.log.view import MappedView
from objstore.units import BLOCK_BYTES, BLOCK_MASK, BLOCK_SHIFT
from objstore.volume.base import REQUEST_BYTES_MAX, Extent

READ_AHEAD_BYTES_MAX = 8 << 20


class Reading:
    """What reads a volume. Touched by the event loop only.

    closed: what every call raises from now on; None while it serves.
    """

    size_bytes: int

    def __init__(self, view: MappedView) -> None:
        self.view = view
        self.closed: StoreError | None = None
        self._reads = 0
        """Reads under way that wait."""
        self._quiet = asyncio.Event()

    def _check(self, offset_bytes: int, length_bytes: int, *, bounded: bool = True) -> None:
        self.view.env.requests += 1
        if offset_bytes < 0 or length_bytes < 0 or (bounded and length_bytes > REQUEST_BYTES_MAX):
            raise InvalidRequest(f"impossible range offset={offset_bytes} length={length_bytes}")
        if offset_bytes + length_bytes > self.size_bytes:
            raise OutOfRange(f"past the end offset={offset_bytes} length={length_bytes} size={self.size_bytes}")
        if self.closed is not None:
            raise self.closed

    def read_now(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        """See Volume."""
        self._check(offset_bytes, length_bytes)
        if not (offset_bytes | length_bytes) & BLOCK_MASK:
            if length_bytes == BLOCK_BYTES:
                zeros = self.view.read_block_now(offset_bytes >> BLOCK_SHIFT, into)
            elif not length_bytes:
                return 0
            else:
                zeros = self.view.read_now(offset_bytes >> BLOCK_SHIFT, length_bytes >> BLOCK_SHIFT, into)
            return zeros << BLOCK_SHIFT if zeros > 0 else zeros
        if not length_bytes:
            return 0
        first, count, skip = cover(offset_bytes, length_bytes)
        whole = memoryview(bytearray(count << BLOCK_SHIFT))
        zeros = self.view.read_now(first, count, whole)
        if zeros < 0:
            return -1
        if zeros == count:
            return length_bytes
        into[:] = whole[skip : skip + length_bytes]
        return 0

    async def read(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        """See Volume."""
        self._check(offset_bytes, length_bytes)
        if not length_bytes:
            return 0
        first, count, skip = cover(offset_bytes, length_bytes)
        if not skip and count << BLOCK_SHIFT == length_bytes:
            return await self._read_blocks(first, count, into) << BLOCK_SHIFT
        whole = memoryview(bytearray(count << BLOCK_SHIFT))
        try:
            zeros = await self._read_blocks(first, count, whole)
        except Corrupt as error:
            into[:] = whole[skip : skip + length_bytes]
            raise Corrupt(str(error), _clip(error.bad, offset_bytes, length_bytes)) from error
        if zeros == count:
            return length_bytes
        into[:] = whole[skip : skip + length_bytes]
        return 0

    async def _read_blocks(self, first: int, count: int, into: memoryview) -> int:
        self._reads += 1
        try:
            return await self.view.read(first, count, into)
        finally:
            self._read_ended()

    def _read_ended(self) -> None:
        self._reads -= 1
        if not self._reads:
            self._quiet.set()

    async def cache(self, offset_bytes: int, length_bytes: int) -> None:
        """See Volume: reads up to READ_AHEAD_BYTES_MAX of the range, which leaves them in the host's page cache."""
        self._check(offset_bytes, length_bytes, bounded=False)
        end = offset_bytes + min(length_bytes, READ_AHEAD_BYTES_MAX)
        buffer = memoryview(bytearray(1 << 20))
        while offset_bytes < end:
            step = min(len(buffer), end - offset_bytes)
            try:
                await self.read(offset_bytes, step, buffer[:step])
            except Corrupt:
                return
            offset_bytes += step

    async def extents(self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14) -> list[Extent]:
        """See Volume."""
        self._check(offset_bytes, length_bytes, bounded=False)
        if not length_bytes or extents_max < 1:
            raise InvalidRequest("extents of nothing")
        first = offset_bytes >> BLOCK_SHIFT
        count = (offset_bytes + length_bytes + BLOCK_MASK >> BLOCK_SHIFT) - first
        end = offset_bytes + length_bytes
        found: list[Extent] = []
        at = first << BLOCK_SHIFT
        self._reads += 1
        try:
            stretches = await self.view.extents(first, count, extents_max)
        finally:
            self._read_ended()
        for kind, blocks in stretches:
            low, at = max(at, offset_bytes), at + (blocks << BLOCK_SHIFT)
            found.append(Extent(min(at, end) - low, kind == HOLE, kind <= RESERVED))
        return found

    async def quiet(self) -> None:
        """Return when no read is under way."""
        while self._reads:
            self._quiet.clear()
            await self._quiet.wait()


def cover(offset_bytes: int, length_bytes: int) -> tuple[int, int, int]:
    """(first block, blocks that cover the range, bytes of the first block in front of it)."""
    first = offset_bytes >> BLOCK_SHIFT
    count = (offset_bytes + length_bytes + BLOCK_MASK >> BLOCK_SHIFT) - first
    return first, count, offset_bytes & BLOCK_MASK


def _clip(ranges: tuple[tuple[int, int], ...], offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """The parts of ascending ranges that lie inside another one."""
    clipped = []
    for start, length in ranges:
        low, high = max(start, offset_bytes), min(start + length, offset_bytes + length_bytes)
        if low < high:
            clipped.append((low, high - low))
    return clipped

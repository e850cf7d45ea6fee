"""Byte ranges over a map of whole blocks: the reading half of a volume, for VDIs and for snapshots."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from objstore.errors import Corrupt, InvalidRequest, OutOfRange, StoreError
from objstore.log.address import HOLE, RESERVED
from objstore.log.changed import SAME, TO_HOLE, changed
from objstore.log.regions import depths_of
from objstore.log.view import MappedView
from objstore.stages import stage
from objstore.units import BLOCK_BYTES, BLOCK_MASK, BLOCK_SHIFT
from objstore.volume.base import REQUEST_BYTES_MAX, Change, Extent, Limiter, Volume
from objstore.volume.settings import WEIGHT_DEFAULT

READ_AHEAD_BYTES_MAX = 8 << 20


class Reading:
    """What reads a volume. Touched by the event loop only.

    closed: what every call raises from now on; None while it serves.
    """

    size_bytes: int

    def __init__(self, view: MappedView) -> None:
        self.view = view
        self.closed: StoreError | None = None
        self.limiter: Limiter | None = None
        self.weight = WEIGHT_DEFAULT
        self._reads: dict[int, int] = {}
        """How many reads are under way that wait, by the era in which they began."""
        self._era = 0
        self._quiet = asyncio.Event()
        self.logs: Callable[[], Mapping[int, int]] = dict
        """The logs in which data of this volume may lie, each with its depth (Volume.depths)."""

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
        with self._reading(), stage("zone read"):
            return await self.view.read(first, count, into)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        era, reads = self._era, self._reads
        reads[era] = reads.get(era, 0) + 1
        try:
            yield
        finally:
            reads[era] -= 1
            if not reads[era]:
                del reads[era]
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
        first, count, _ = cover(offset_bytes, length_bytes)
        with self._reading():
            stretches = await self.view.extents(first, count, extents_max)
        lengths = _lengths(stretches, offset_bytes, length_bytes)
        return [Extent(length, kind == HOLE, kind <= RESERVED) for length, kind in lengths]

    async def changed(
        self, since: Volume, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[Change]:
        """See Volume."""
        self._check(offset_bytes, length_bytes, bounded=False)
        if not length_bytes or extents_max < 1:
            raise InvalidRequest("changes of nothing")
        if not isinstance(since, Reading) or since.view.env is not self.view.env:
            raise InvalidRequest(f"{since.name} is no volume of the same store")
        if since.closed is not None:
            raise since.closed
        first, count, _ = cover(offset_bytes, length_bytes)
        with self._reading(), since._reading():
            stretches = await changed(since.view, self.view, first, count, extents_max)
        lengths = _lengths(stretches, offset_bytes, length_bytes)
        return [Change(length, state != SAME, state == TO_HOLE, state >= TO_HOLE) for length, state in lengths]

    async def depths(
        self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[tuple[int, int]]:
        """See Volume."""
        self._check(offset_bytes, length_bytes, bounded=False)
        if not length_bytes or extents_max < 1:
            raise InvalidRequest("depths of nothing")
        first, count, _ = cover(offset_bytes, length_bytes)
        kinds = partial(depths_of, depths=self.logs())
        with self._reading():
            stretches = await self.view.extents(first, count, extents_max, kinds)
        return _lengths(stretches, offset_bytes, length_bytes)

    async def quiet(self) -> None:
        """Return when no read is under way."""
        while self._reads:
            self._quiet.clear()
            await self._quiet.wait()

    async def reads_over(self) -> None:
        """Return when the reads that are under way at this call have ended."""
        now = self._era
        self._era += 1
        while any(era <= now for era in self._reads):
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


def _lengths(stretches: list[tuple[int, int]], offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """Stretches of whole blocks (kind, blocks) from the one on that holds offset_bytes, as (length_bytes, kind) inside
    the range."""
    found = []
    at = offset_bytes & ~BLOCK_MASK
    end = offset_bytes + length_bytes
    for kind, blocks in stretches:
        low, at = max(at, offset_bytes), at + (blocks << BLOCK_SHIFT)
        found.append((min(at, end) - low, kind))
    return found

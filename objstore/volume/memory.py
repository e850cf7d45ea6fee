"""A volume in memory, and a source of them: for tests and for measuring the network side alone.

Nothing survives the process; flush is a formality. Space for data is never short.
"""

import mmap
from collections.abc import Callable, Mapping
from typing import Final

from objstore.errors import InvalidRequest, NotFound, NotSupported, OutOfRange, ReadOnly
from objstore.units import BLOCK_BYTES, BLOCK_MASK, BLOCK_SHIFT, MIB
from objstore.volume.base import REQUEST_BYTES_MAX, Change, Extent, Limiter, Volume, VolumeInfo, always
from objstore.volume.settings import WEIGHT_DEFAULT

_HOLE: Final = 0
_DATA: Final = 1
_RESERVED: Final = 2
"""States of a block; what is not data reads as zeros."""

SCAN_BLOCKS_MAX: Final = 1 << 24
"""Most blocks that one call of extents looks at."""
_RUN_BLOCKS: Final = 1 << 16
_ZEROS: Final = memoryview(bytes(MIB))


class MemoryVolume:
    """A `Volume` in an anonymous mapping, with one byte of state per block."""

    def __init__(self, name: str, size_bytes: int, *, read_only: bool = False, description: str = "in memory") -> None:
        self.name = name
        self.description = description
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.limiter: Limiter | None = None
        self.weight = WEIGHT_DEFAULT
        blocks = -(-size_bytes // BLOCK_BYTES)
        self._states = bytearray(blocks)
        self._flushes = 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._data = memoryview(mmap.mmap(-1, max(1, blocks) * BLOCK_BYTES, flags=flags))

    def read_now(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        end = offset_bytes + length_bytes
        if offset_bytes < 0 or length_bytes < 0 or end > self.size_bytes or length_bytes > REQUEST_BYTES_MAX:
            self._refuse(offset_bytes, length_bytes)
        if not length_bytes:
            return 0
        first = offset_bytes >> BLOCK_SHIFT
        last = (end - 1) >> BLOCK_SHIFT
        data_blocks = self._states.count(_DATA, first, last + 1)
        if not data_blocks:
            return length_bytes
        into[:] = self._data[offset_bytes:end]
        zeros = (last + 1 - first - data_blocks) << BLOCK_SHIFT
        if zeros and self._states[first] != _DATA:
            zeros -= offset_bytes & BLOCK_MASK
        if zeros and self._states[last] != _DATA:
            zeros -= -end & BLOCK_MASK
        return zeros

    async def read(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        return self.read_now(offset_bytes, length_bytes, into)

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        length = len(data)
        self._check_change(offset_bytes, length)
        if length > REQUEST_BYTES_MAX:
            self._refuse(offset_bytes, length)
        if length:
            end = offset_bytes + length
            first = offset_bytes >> BLOCK_SHIFT
            count = ((end - 1) >> BLOCK_SHIFT) + 1 - first
            self._data[offset_bytes:end] = data
            if count == 1:
                self._states[first] = _DATA
            else:
                self._states[first : first + count] = bytes((_DATA,)) * count
        return True

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        _check_alive(alive)
        self.write_now(offset_bytes, data)

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        self._check_change(offset_bytes, length_bytes)
        _check_alive(alive)
        first, end = self._whole_blocks(offset_bytes, offset_bytes + length_bytes)
        self._clear(first, end, _HOLE)

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
        self._check_change(offset_bytes, length_bytes)
        _check_alive(alive)
        if not length_bytes:
            return
        end = offset_bytes + length_bytes
        first_whole, end_whole = self._whole_blocks(offset_bytes, end)
        ends = {offset_bytes >> BLOCK_SHIFT, (end - 1) >> BLOCK_SHIFT}
        edges = {block for block in ends if not first_whole <= block < end_whole}
        dirty = [block for block in edges if self._states[block] == _DATA]
        if fast and dirty:
            raise NotSupported(f"zeroing part of a block takes a write offset={offset_bytes} length={length_bytes}")
        for block in dirty:
            start = max(offset_bytes, block << BLOCK_SHIFT)
            stop = min(end, (block + 1) << BLOCK_SHIFT)
            self._data[start:stop] = _ZEROS[: stop - start]
        if no_hole:
            for block in edges.difference(dirty):
                self._states[block] = _RESERVED
        self._clear(first_whole, end_whole, _RESERVED if no_hole else _HOLE)

    def sync_soon(self) -> None:
        """See Volume."""

    def flush_state(self) -> int:
        """Every flush is one of its own here, so that tests see it arrive."""
        self._flushes += 1
        return self._flushes

    async def flush(self) -> None:
        pass

    async def cache(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_range(offset_bytes, length_bytes)

    async def extents(self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14) -> list[Extent]:
        self._check_range(offset_bytes, length_bytes)
        if length_bytes == 0:
            raise InvalidRequest(f"extents of nothing offset={offset_bytes}")
        end = offset_bytes + length_bytes
        block = offset_bytes >> BLOCK_SHIFT
        stop = min(((end - 1) >> BLOCK_SHIFT) + 1, block + SCAN_BLOCKS_MAX)
        found: list[Extent] = []
        while block < stop and len(found) < extents_max:
            state = self._states[block]
            run_end = self._run_end(block, stop)
            from_byte = max(offset_bytes, block << BLOCK_SHIFT)
            length = min(end, run_end << BLOCK_SHIFT) - from_byte
            found.append(Extent(length, hole=state == _HOLE, zero=state != _DATA))
            block = run_end
        return found

    async def changed(
        self, since: Volume, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[Change]:
        raise NotSupported(f"{self.name} is in memory and keeps no former contents")

    async def depths(
        self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14
    ) -> list[tuple[int, int]]:
        found = await self.extents(offset_bytes, length_bytes, extents_max=extents_max)
        return [(extent.length_bytes, int(not extent.hole)) for extent in found]

    def _run_end(self, block: int, stop: int) -> int:
        """The first block from `block` on whose state differs, at most stop."""
        states = self._states
        same = bytes((states[block],))
        while block < stop:
            part = states[block : min(block + _RUN_BLOCKS, stop)]
            different = len(part.lstrip(same))
            block += len(part) - different
            if different:
                break
        return block

    def _clear(self, first: int, end: int, state: int) -> None:
        """Blocks [first, end) read as zeros and have this state."""
        if end <= first:
            return
        for start in range(first << BLOCK_SHIFT, end << BLOCK_SHIFT, MIB):
            stop = min(start + MIB, end << BLOCK_SHIFT)
            if _DATA in self._states[start >> BLOCK_SHIFT : stop >> BLOCK_SHIFT]:
                self._data[start:stop] = _ZEROS[: stop - start]
        self._states[first:end] = bytes((state,)) * (end - first)

    def _whole_blocks(self, offset_bytes: int, end_bytes: int) -> tuple[int, int]:
        """The blocks that lie wholly in the range; the last block of the volume counts as whole without its padding."""
        first = -(-offset_bytes // BLOCK_BYTES)
        end = len(self._states) if end_bytes == self.size_bytes else end_bytes >> BLOCK_SHIFT
        return first, max(first, end)

    def _check_range(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            self._refuse(offset_bytes, length_bytes)

    def _check_change(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_range(offset_bytes, length_bytes)
        if self.read_only:
            raise ReadOnly(f"volume is read-only name={self.name}")

    def _refuse(self, offset_bytes: int, length_bytes: int) -> None:
        text = f"offset={offset_bytes} length={length_bytes} size={self.size_bytes}"
        if offset_bytes < 0 or length_bytes < 0:
            raise InvalidRequest(f"negative range {text}")
        if offset_bytes + length_bytes > self.size_bytes:
            raise OutOfRange(f"past the end of the volume {text}")
        raise InvalidRequest(f"request is longer than {REQUEST_BYTES_MAX} bytes {text}")


def _check_alive(alive: Callable[[], bool]) -> None:
    if not alive():
        raise InvalidRequest("the connection that asked for this is gone")


class MemorySource:
    """A `VolumeSource` over a dictionary. Counts what is open."""

    def __init__(self, volumes: Mapping[str, Volume]) -> None:
        self._volumes = dict(volumes)
        self.open_count = 0

    def names(self, *, snapshots: bool = False) -> list[str]:
        return sorted(self._volumes)

    def peek(self, name: str) -> VolumeInfo | None:
        volume = self._volumes.get(name)
        if volume is None:
            return None
        return VolumeInfo(name, volume.size_bytes, volume.read_only, volume.description)

    def tags(self, name: str) -> list[str]:
        return []

    async def open(self, name: str) -> Volume:
        volume = self._volumes.get(name)
        if volume is None:
            raise NotFound(f"no such volume name={name}")
        self.open_count += 1
        return volume

    async def close(self, volume: Volume) -> None:
        self.open_count -= 1

"""A memory volume whose requests can be held, refused or met by damage, for tests of the network side."""

import asyncio
from collections.abc import Callable

from objstore.errors import Corrupt, InvalidRequest
from objstore.units import MIB
from objstore.volume.base import Extent, always
from objstore.volume.memory import MemoryVolume

KINDS = ("read", "write", "trim", "zero", "flush", "cache", "extents")


class ScriptedVolume(MemoryVolume):
    """Does what a MemoryVolume does, but only when told to.

    hold() makes every request wait until release(), or release_only for requests of one kind ("read", "write", "trim",
    "zero", "flush", "cache", "extents"); arrived() waits for them. failure is raised by each request.
    fua_commands: the kinds of the requests that came with FUA, in order. zero_flags: (no_hole, fast) of each zero.
    damage: ranges whose bytes are lost; a read over one fills the rest, scribbles on it and raises Corrupt.
    """

    def __init__(self, size_bytes: int = 128 * MIB, name: str = "disk") -> None:
        super().__init__(name, size_bytes)
        self.failure: Exception | None = None
        self.damage: list[tuple[int, int]] = []
        self.flush_count = 0
        self.fua_commands: list[str] = []
        self.zero_flags: list[tuple[bool, bool]] = []
        self._held: set[str] = set()
        self._waiting = 0
        self._changed = asyncio.Condition()

    def hold(self) -> None:
        self._held = set(KINDS)

    async def release(self) -> None:
        self._held.clear()
        await self._tell()

    async def release_only(self, kind: str) -> None:
        self._held.discard(kind)
        await self._tell()

    async def arrived(self, count: int) -> None:
        """Return when `count` requests wait here."""
        async with self._changed, asyncio.timeout(20):
            await self._changed.wait_for(lambda: self._waiting >= count)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _pass(self, kind: str, *, fua: bool = False) -> None:
        """The gate in front of each request."""
        if fua:
            self.fua_commands.append(kind)
        self._waiting += 1
        await self._tell()
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: kind not in self._held)
        finally:
            self._waiting -= 1
        if self.failure is not None:
            raise self.failure

    def _waits(self, kind: str) -> bool:
        """The request can't be done at once."""
        return self.failure is not None or kind in self._held

    def _lost(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """The damage inside a range."""
        end = offset_bytes + length_bytes
        cut = [(max(start, offset_bytes), min(start + length, end)) for start, length in self.damage]
        return [(start, stop - start) for start, stop in cut if start < stop]

    def read_now(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        if self._waits("read") or self._lost(offset_bytes, length_bytes):
            return -1
        return super().read_now(offset_bytes, length_bytes, into)

    async def read(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        await self._pass("read")
        lost = self._lost(offset_bytes, length_bytes)
        if not lost:
            return super().read_now(offset_bytes, length_bytes, into)
        if super().read_now(offset_bytes, length_bytes, into) == length_bytes:
            into[:] = bytes(length_bytes)
        for start, length in lost:
            into[start - offset_bytes : start - offset_bytes + length] = b"\xdb" * length
        raise Corrupt("blocks are damaged in every copy", lost)

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        return not self._waits("write") and super().write_now(offset_bytes, data)

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        await self._pass("write", fua=fua)
        if not alive():
            raise InvalidRequest("the connection that asked for this is gone")
        super().write_now(offset_bytes, data)

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        await self._pass("trim", fua=fua)
        await super().trim(offset_bytes, length_bytes, alive=alive)

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
        self.zero_flags.append((no_hole, fast))
        await self._pass("zero", fua=fua)
        await super().zero(offset_bytes, length_bytes, no_hole=no_hole, fast=fast, alive=alive)

    async def flush(self) -> None:
        await self._pass("flush")
        self.flush_count += 1

    async def cache(self, offset_bytes: int, length_bytes: int) -> None:
        await self._pass("cache")
        await super().cache(offset_bytes, length_bytes)

    async def extents(self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14) -> list[Extent]:
        await self._pass("extents")
        return await super().extents(offset_bytes, length_bytes, extents_max=extents_max)

"""An open VDI of a store in this process."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from objstore.access.handle import MAP_EXTENTS_MAX, VdiHandle
from objstore.errors import Fenced, InvalidRequest
from objstore.volume.base import REQUEST_BYTES_MAX, Change, Extent, Volume

CALLS_AT_ONCE: Final = 32
"""Calls of one handle that may finish without waiting before the loop has a turn: a caller that never waits would keep
the store's own work, and everybody else, from theirs."""


class LocalVdi(VdiHandle):
    """A VDI of a store in this process."""

    piece_bytes_max = REQUEST_BYTES_MAX

    def __init__(self, volume: Volume, give_back: Callable[["LocalVdi"], Awaitable[None]], *, read_only: bool) -> None:
        """give_back: called once, when the handle is closed."""
        super().__init__(volume.name, volume.size_bytes, volume.description, read_only=read_only or volume.read_only)
        self._give_back = give_back
        self.volume = volume
        self._flushes = False
        """This handle has shown that its user knows how to flush."""
        self._calls = 0

    def _alive(self) -> bool:
        return not self.closed

    async def _give_way(self) -> None:
        self._calls = 0
        await asyncio.sleep(0)

    async def _read(self, offset: int, view: memoryview) -> None:
        self._calls += 1
        if self._calls >= CALLS_AT_ONCE:
            await self._give_way()
        if self.closed:
            self._check(0, 0)  # the handle may have been closed between two pieces
        zeros = self.volume.read_now(offset, len(view), view)
        if zeros < 0:
            zeros = await self.volume.read(offset, len(view), view)
        if zeros == len(view):
            view[:] = bytes(zeros)

    async def _write(self, offset: int, view: memoryview, writeback: bool | None) -> None:
        await self.put(offset, view, writeback, self._alive)

    def check_range(self, offset: int, length: int) -> None:
        """Raise what a question about that range would, as far as the handle itself knows."""
        self._check(offset, length)

    def check_change(self, offset: int, length: int) -> None:
        """Raise what a change of that range would, as far as the handle itself knows."""
        self._check_change(offset, length)

    async def put(self, offset: int, view: memoryview, writeback: bool | None, alive: Callable[[], bool]) -> None:
        """One write, unless nobody is there any more who asked for it (`Volume.write`)."""
        self._calls += 1
        if self._calls >= CALLS_AT_ONCE:
            await self._give_way()
        if writeback is not False:
            if self._write_now(offset, view):
                return
            if writeback and not self._flushes:
                await self._flush()  # the VDI may still be in write-through mode: it waits for a first flush
                if self._write_now(offset, view):
                    return
        await self.volume.write(offset, view, fua=writeback is False, alive=alive)

    def _write_now(self, offset: int, view: memoryview) -> bool:
        self._check(0, 0)  # the handle may have been closed while this call waited
        return self.volume.write_now(offset, view)

    async def _zero(self, offset: int, length: int, no_hole: bool) -> None:
        await self.volume.zero(offset, length, no_hole=no_hole, alive=self._alive)

    async def _discard(self, offset: int, length: int) -> None:
        await self.volume.trim(offset, length, alive=self._alive)

    async def _flush(self) -> None:
        await self.volume.flush()
        self._flushes = True

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        self._check(0, 0)
        return await self.volume.extents(offset, length, extents_max=MAP_EXTENTS_MAX)

    async def _changed(self, since: VdiHandle, offset: int, length: int) -> list[Change]:
        self._check(0, 0)
        since._check(0, 0)
        if not isinstance(since, LocalVdi):
            raise InvalidRequest(f"{since.name!r} is open through another connection than {self.name!r}")
        return await self.volume.changed(since.volume, offset, length, extents_max=MAP_EXTENTS_MAX)

    async def fence(self, reason: str) -> None:
        """Close the handle under its user; every later call is Fenced with that reason."""
        if not self.closed:
            self.fenced = Fenced(f"VDI {self.name!r}: {reason}")
        await self.close()

    async def _close(self) -> None:
        await self._give_back(self)

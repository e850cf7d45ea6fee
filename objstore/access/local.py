"""The library over zones that this process opens itself."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Final

from objstore.access.connection import Connection
from objstore.access.handle import MAP_EXTENTS_MAX, VdiHandle
from objstore.volume.base import REQUEST_BYTES_MAX, Extent, Volume
from objstore.volume.settings import MODES
from objstore.volume.status import RecoveryStatus, ScrubStatus, StoreStatus, VdiDamage, VdiStatus, ZoneStatus
from objstore.volume.store import Store

CALLS_AT_ONCE: Final = 32
"""Calls of one handle that may finish without waiting before the loop has a turn: a caller that never waits would keep
the store's own work, and everybody else, from theirs."""


class LocalVdi(VdiHandle):
    """A VDI of a store in this process."""

    piece_bytes_max = REQUEST_BYTES_MAX

    def __init__(self, connection: "LocalConnection", volume: Volume, *, read_only: bool) -> None:
        super().__init__(volume.name, volume.size_bytes, volume.description, read_only=read_only or volume.read_only)
        self._connection = connection
        self._volume = volume
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
        zeros = self._volume.read_now(offset, len(view), view)
        if zeros < 0:
            zeros = await self._volume.read(offset, len(view), view)
        if zeros == len(view):
            view[:] = bytes(zeros)

    async def _write(self, offset: int, view: memoryview, writeback: bool | None) -> None:
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
        await self._volume.write(offset, view, fua=writeback is False, alive=self._alive)

    def _write_now(self, offset: int, view: memoryview) -> bool:
        self._check(0, 0)  # the handle may have been closed while this call waited
        return self._volume.write_now(offset, view)

    async def _zero(self, offset: int, length: int, no_hole: bool) -> None:
        await self._volume.zero(offset, length, no_hole=no_hole, alive=self._alive)

    async def _discard(self, offset: int, length: int) -> None:
        await self._volume.trim(offset, length, alive=self._alive)

    async def _flush(self) -> None:
        await self._volume.flush()
        self._flushes = True

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        return await self._volume.extents(offset, length, extents_max=MAP_EXTENTS_MAX)

    async def _close(self) -> None:
        self._connection.handles.discard(self)
        await self._connection.store.close(self._volume)


class LocalConnection(Connection):
    """A store in this process. `store` is not for users of the library."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.handles: set[LocalVdi] = set()

    async def _open(self, name: str, read_only: bool) -> VdiHandle:
        handle = LocalVdi(self, await self.store.open(name), read_only=read_only)
        self.handles.add(handle)
        return handle

    async def create(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """See Connection."""
        return await self.store.create_vdi(name, size_bytes, copies=copies, mode=mode, prealloc=prealloc)

    async def vdis(self) -> AsyncIterator[VdiStatus]:
        """See Connection."""
        for vdi in self.store.vdis():
            yield vdi

    async def info(self, name: str) -> VdiStatus:
        """See Connection."""
        return self.store.vdi(name)

    async def delete(self, name: str) -> None:
        """See Connection."""
        await self.store.delete_vdi(name)

    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        """See Connection."""
        return await self.store.set_copies(name, copies)

    async def damage(self, name: str) -> VdiDamage:
        """See Connection."""
        return await self.store.damage(name)

    async def status(self) -> StoreStatus:
        """See Connection."""
        return await self.store.status()

    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        """See Connection."""
        zone = _absolute(zone) if action == "add" else zone
        path = None if path is None else _absolute(path)
        await self.store.change_zones(action, zone, path=path, weight=weight, force=force)
        return await self.zones()

    async def start_scrub(self) -> ScrubStatus:
        """See Connection."""
        return await self.store.start_scrub()

    async def scrub(self) -> ScrubStatus:
        """See Connection."""
        return self.store.scrub.status()

    async def recovery(self) -> RecoveryStatus:
        """See Connection."""
        return self.store.recovery.status()

    async def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """See Connection."""
        return self.store.set_recovery_rate(bytes_per_second)

    async def close(self) -> None:
        """See Connection."""
        for handle in list(self.handles):
            await handle.close()
        await self.store.shutdown()


def _absolute(path: str) -> str:
    return os.path.abspath(path)
